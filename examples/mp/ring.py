"""All-reduce in numpy: every member of a ring ends up with the sum of everybody's array.

    pip install numpy
    python examples/mp/ring.py [members]

The array is cut into as many parts as there are members. In each of size - 1 steps a member passes one part on
and adds what it gets; in as many more, the finished parts go round. So each member sends about twice the
array, however many members there are (Patarasuk and Yuan, 2009, "Bandwidth optimal all-reduce algorithms").
"""

from __future__ import annotations

import sys

import numpy as np

from fiberexec import mp
from fiberexec.mp.ring import current_ring

LENGTH = 1_000_000


def all_reduce(array: np.ndarray) -> np.ndarray:
    """The sum of the arrays of all members."""
    ring = current_ring()
    parts = np.array_split(array.copy(), ring.size)
    for step in range(ring.size - 1):
        parts[(ring.rank - step - 1) % ring.size] += ring.shift(parts[(ring.rank - step) % ring.size])
    for step in range(ring.size - 1):
        parts[(ring.rank - step) % ring.size] = ring.shift(parts[(ring.rank + 1 - step) % ring.size])
    return np.concatenate(parts)


def member(rank: int, size: int) -> float:
    """Sum up arrays that are full of the members' ranks."""
    total = all_reduce(np.full(LENGTH, float(rank)))
    assert (total == total[0]).all()
    return float(total[0])


def main() -> None:
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    print(f"each member has the sum {mp.Ring(size, member).run()}")


if __name__ == "__main__":
    main()
