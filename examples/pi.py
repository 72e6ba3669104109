"""Estimate pi by throwing darts at a square: a million tiny tasks.

    python examples/pi.py [darts]

Each dart is an item of `map` of its own.  Tasks this small are sent many at a time, so this costs little
more than the darts themselves.
"""

from __future__ import annotations

import random
import sys

import fiberexec


@fiberexec.meta(cpu=1)
def inside(dart: int) -> bool:
    """Throw one dart; its number seeds it, so the estimate is the same in every run."""
    throw = random.Random(dart)
    x, y = throw.random(), throw.random()
    return x * x + y * y < 1


def main() -> None:
    darts = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with fiberexec.FiberExecutor() as ex:
        hits = sum(ex.map(inside, range(darts)))
    print(f"Pi is roughly {4 * hits / darts:.4f}")


if __name__ == "__main__":
    main()
