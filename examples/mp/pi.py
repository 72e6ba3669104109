"""Estimate pi by throwing darts at a square: a pool, as in a program written for multiprocessing.

    python examples/mp/pi.py [darts]
"""

from __future__ import annotations

import random
import sys

import fiberexec
from fiberexec import mp


@fiberexec.meta(cpu=1)
def inside(dart: int) -> bool:
    """Throw one dart."""
    x, y = random.random(), random.random()
    return x * x + y * y < 1


def main() -> None:
    darts = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with mp.Pool(processes=2) as pool:
        hits = sum(pool.map(inside, range(darts)))
    print(f"Pi is roughly {4 * hits / darts:.4f}")


if __name__ == "__main__":
    main()
