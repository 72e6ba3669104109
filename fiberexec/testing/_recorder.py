"""A backend that notes what another one is asked and what it says, and knows what must be true of that."""

from __future__ import annotations

import select
import time
from collections.abc import Sequence
from typing import Any

from fiberexec.backends.base import Backend, Cell, Ended, JobEvent, Recalled, Refused, Started

PATIENCE = 60.0  # seconds that anything may take
AT_ONCE = 2.0  # seconds that a method may take that starts something; much, for a busy machine


class Recorder:
    """A backend that notes what another one is asked, and what it says."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.name, self.host, self.largest = backend.name, backend.host, backend.largest
        self.same_host, self.default_workers = backend.same_host, backend.default_workers
        self.idle_timeout = backend.idle_timeout
        self.asked: list[tuple[str, tuple[Any, ...]]] = []
        self.said: list[JobEvent] = []
        self.closed = 0

    def _call(self, name: str, *args: Any) -> Any:
        self.asked.append((name, args))
        start = time.monotonic()
        result = getattr(self.backend, name)(*args)
        took = time.monotonic() - start
        assert took < AT_ONCE, f"{name}() must return at once, and took {took:.1f} s"
        return result

    def launch(self, workers: Sequence[int]) -> None:
        self._call("launch", list(workers))

    def signal(self, worker: int, number: int, group: bool) -> None:
        self._call("signal", worker, number, group)

    def probe(self, worker: int) -> None:
        self._call("probe", worker)

    def recall(self, worker: int, number: int) -> None:
        self._call("recall", worker, number)

    def peek(self, worker: int) -> Cell | None:
        return self.backend.peek(worker)

    def wakeup(self) -> float | None:
        return self.backend.wakeup()

    def fds(self) -> Sequence[int]:
        return self.backend.fds()

    def poll(self) -> list[JobEvent]:
        events = self.backend.poll()
        self.said += events
        return events

    def close(self) -> None:
        self.closed += 1
        self.backend.close()

    def forked(self) -> None:
        self.backend.forked()

    # -- for the checks

    def wait(self, kind: type, count: int) -> list[Any]:
        """Poll as the manager does until ``count`` events of a kind have been said, and no more."""
        deadline = time.monotonic() + PATIENCE
        while len(found := [event for event in self.said if isinstance(event, kind)]) < count:
            now = time.monotonic()
            assert now < deadline, f"{count} {kind.__name__} expected in {PATIENCE:g} s, got {found}; all: {self.said}"
            due = self.wakeup()
            select.select(self.fds(), [], [], max(0.0, min(deadline if due is None else due, now + 1.0) - now))
            self.poll()
        assert len(found) == count, f"{count} {kind.__name__} expected, got {found}"
        return found

    def verify(self) -> None:
        """What must be true of everything that was said."""
        launched = [worker for name, args in self.asked if name == "launch" for worker in args[0]]
        state: dict[int, str] = dict.fromkeys(launched, "launched")
        for event in self.said:
            worker = event.worker
            assert worker in state, f"{event} is about a worker that was never launched"
            if isinstance(event, (Started, Refused)):
                assert state[worker] == "launched", f"{event} of a worker that had {state[worker]} before"
                state[worker] = "started" if isinstance(event, Started) else "been refused"
            else:
                assert state[worker] == "started", f"{event} of a worker that had {state[worker]}"
                if isinstance(event, Ended):
                    state[worker] = "ended"
            if isinstance(event, Started):
                pool = event.pool
                assert event.job and event.host, f"a job and a host have names: {event}"
                assert len(pool.devices) == pool.capacity.gpu, f"a device has a name, and a name a device: {pool}"
                assert len(set(pool.devices)) == len(pool.devices), f"a device is there once: {pool}"
                most = self.largest.capacity
                assert all(a <= b for a, b in zip(pool.capacity, most, strict=True)), f"{pool} is larger than {self.largest}"
            if isinstance(event, Recalled):
                assert ("recall", (worker, event.number)) in self.asked, f"{event} answers no recall()"
