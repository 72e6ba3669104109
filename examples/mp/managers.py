"""Objects that live in a process of their own: shared by everybody, or many at work at once.

    python examples/mp/managers.py
"""

from __future__ import annotations

from typing import Any

from fiberexec import mp


class Simulator:
    """A random walk, as a stand-in for something that takes long."""

    def __init__(self, seed: int) -> None:
        import random

        self._random = random.Random(seed)
        self._position = 0

    def step(self, times: int) -> int:
        """Take so many steps; return where that leads."""
        for _ in range(times):
            self._position += self._random.choice((-1, 1))
        return self._position


def count(words: list[str], counts: Any, lock: Any) -> None:
    """Count words into a dictionary that others write to as well."""
    for word in words:
        with lock:
            counts[word] = counts.get(word, 0) + 1


def shared_dictionary() -> None:
    with mp.Manager() as manager:
        counts, lock = manager.dict(), manager.Lock()
        texts = ["to be or not to be".split(), "be that as it may".split()]
        processes = [mp.Process(target=count, args=(text, counts, lock)) for text in texts]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        print(f"'be' was counted {counts['be']} times")


class Simulators(mp.AsyncManager):
    """Makes simulators; what their methods return are futures."""


Simulators.register("Simulator", Simulator)


def simulators_at_once() -> None:
    managers = [Simulators() for _ in range(2)]
    for manager in managers:
        manager.start()
    simulators = [manager.Simulator(seed) for seed, manager in enumerate(managers)]
    steps = [simulator.step(100_000) for simulator in simulators]  # all of them are at work now
    print(f"the walks end at {[step.result() for step in steps]}")
    for manager in managers:
        manager.shutdown()


if __name__ == "__main__":
    shared_dictionary()
    simulators_at_once()
