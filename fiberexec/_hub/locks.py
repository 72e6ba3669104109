"""Semaphores (locks are semaphores of one), conditions, events, barriers: the hub's side.

Rules:
- What a process acquired and nobody released comes back when it has gone, as far as the initial value: a semaphore that
  starts at 0 counts signals, and those who took one keep it. A process that ends in order keeps what it took of a count, as
  in multiprocessing; a lock passes on in any case.
- Who waits is served in the order of arrival.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from threading import BrokenBarrierError
from time import monotonic
from typing import TYPE_CHECKING, Any

from fiberexec._hub.shared import PARKED, Shared, Wait, first

if TYPE_CHECKING:
    from fiberexec._hub.peers import Peer, Process
    from fiberexec._hub.server import Hub


class Semaphore(Shared):
    looks = ("value",)

    def __init__(self, hub: Hub, value: int, maximum: int) -> None:
        super().__init__(hub)
        self.value = value
        self._initial = value
        self._maximum = maximum
        self._held: dict[Process, int] = {}
        self._waiting: OrderedDict[Acquire, None] = OrderedDict()

    def do_acquire(self, peer: Peer, timeout: float | None) -> Any:
        return self.acquire(peer, timeout, True)

    def do_release(self, peer: Peer) -> None:
        if self.value >= self._maximum:
            raise ValueError("semaphore or lock released too many times")
        self.release(peer.process)

    def do_value(self, peer: Peer) -> int:
        return self.value

    def acquire(self, peer: Peer, timeout: float | None, answer: bool) -> Any:
        """Acquire, now or later, and answer."""
        if self.value > 0:
            self._take(peer)
            return answer
        Acquire(peer, self._waiting, timeout, answer)
        return PARKED

    def release(self, process: Process) -> None:
        if process not in self._held and self._held:
            process = next(iter(self._held))  # it releases what another one acquired
        held = self._held.get(process, 0)
        if held > 1:
            self._held[process] = held - 1
        elif held:
            del self._held[process]
        self._add()

    def gone(self, process: Process) -> None:
        held = self._held.pop(process, 0)
        if process.leaving and self._maximum > 1:
            return
        for _ in range(held):
            if self.value < self._initial:
                self._add()

    def _take(self, peer: Peer) -> None:
        self.value -= 1
        process = peer.process
        self._held[process] = self._held.get(process, 0) + 1
        process.uses[self] = None
        peer.undo = partial(self.release, process)

    def _add(self) -> None:
        self.value += 1
        if self._waiting:
            wait = first(self._waiting)
            self._take(wait.peer)
            wait.finish(wait.answer)


class Acquire(Wait):
    __slots__ = ("answer",)

    def __init__(self, peer: Peer, queue: OrderedDict[Any, None], timeout: float | None, answer: bool) -> None:
        super().__init__(peer, queue, timeout)
        self.answer = answer


class Condition(Shared):
    """Who waits has released the lock, and is answered when it has it again: True if it was notified."""

    looks = ("sleepers",)

    def __init__(self, hub: Hub, lock: int) -> None:
        super().__init__(hub)
        found = hub.objects.get(lock)
        if not isinstance(found, Semaphore):
            raise KeyError(f"the hub has no lock {lock}")
        self._lock = found
        self._waiting: OrderedDict[Sleep, None] = OrderedDict()

    def do_wait(self, peer: Peer, timeout: float | None) -> Any:
        Sleep(self._lock, peer, self._waiting, timeout)
        self._lock.release(peer.process)
        return PARKED

    def do_notify(self, peer: Peer, n: int) -> None:
        for _ in range(min(n, len(self._waiting))):
            first(self._waiting).wake(True)

    def do_sleepers(self, peer: Peer) -> int:
        return len(self._waiting)


class Sleep(Wait):
    __slots__ = ("lock",)

    def __init__(self, lock: Semaphore, peer: Peer, queue: OrderedDict[Any, None], timeout: float | None) -> None:
        super().__init__(peer, queue, timeout)
        self.lock = lock

    def wake(self, notified: bool) -> None:
        self.leave()
        if self.lock.acquire(self.peer, None, notified) is not PARKED:
            self.peer.reply(notified)

    def due(self) -> None:
        self.wake(False)


class Event(Shared):
    looks = ("is_set",)

    def __init__(self, hub: Hub) -> None:
        super().__init__(hub)
        self._set = False
        self._waiting: OrderedDict[Wait, None] = OrderedDict()

    def do_set(self, peer: Peer) -> None:
        self._set = True
        while self._waiting:
            first(self._waiting).finish(True)

    def do_clear(self, peer: Peer) -> None:
        self._set = False

    def do_is_set(self, peer: Peer) -> bool:
        return self._set

    def do_wait(self, peer: Peer, timeout: float | None) -> Any:
        if self._set:
            return True
        Wait(peer, self._waiting, timeout)
        return PARKED


class Barrier(Shared):
    """The last to arrive lets all pass, after its action if there is one. Answers are (index, whether to run it)."""

    looks = ("state",)

    def __init__(self, hub: Hub, parties: int, has_action: bool) -> None:
        super().__init__(hub)
        self._parties = parties
        self._has_action = has_action
        self._broken = False
        self._waiting: OrderedDict[Party, None] = OrderedDict()
        self._passing: OrderedDict[Party, None] = OrderedDict()  # who wait for the action
        self._acting: Process | None = None

    def do_wait(self, peer: Peer, timeout: float | None) -> Any:
        if self._broken:
            raise BrokenBarrierError
        Party(self, peer, timeout)
        self._let_pass()
        return PARKED

    def do_acted(self, peer: Peer) -> None:
        """The action is done."""
        self._acting = None
        for index, party in enumerate(list(self._passing)):
            party.finish((index, False))
        for party in self._waiting:
            party.start()
        self._let_pass()

    def do_abort(self, peer: Peer) -> None:
        self.break_()

    def do_reset(self, peer: Peer) -> None:
        self.break_()
        self._broken = False

    def do_state(self, peer: Peer) -> tuple[int, bool]:
        return len(self._waiting) + len(self._passing), self._broken

    def gone(self, process: Process) -> None:
        if self._acting is process:
            self.break_()

    def break_(self) -> None:
        self._broken = True
        self._acting = None
        for queue in (self._passing, self._waiting):
            while queue:
                first(queue).fail(BrokenBarrierError())

    def _let_pass(self) -> None:
        while len(self._waiting) >= self._parties and self._acting is None:
            *others, last = list(self._waiting)[: self._parties]
            for index, party in enumerate(others):
                if self._has_action:
                    party.move(self._passing)
                else:
                    party.finish((index, False))
            if self._has_action:
                last.peer.undo = self.break_  # who has not read that he is to act does not act
            last.finish((len(others), self._has_action))
            if self._has_action:
                self._acting = last.peer.process
                self._acting.uses[self] = None


class Party(Wait):
    """Its time runs while it waits for others, not while an action takes its own."""

    __slots__ = ("barrier", "timeout")

    def __init__(self, barrier: Barrier, peer: Peer, timeout: float | None) -> None:
        super().__init__(peer, barrier._waiting, None)
        self.barrier = barrier
        self.timeout = timeout
        if barrier._acting is None:
            self.start()

    def start(self) -> None:
        if self.timeout is not None:
            self.peer.hub.at(monotonic() + self.timeout if self.timeout > 0 else 0.0, self)

    def due(self) -> None:
        if self.queue is self.barrier._waiting:
            self.barrier.break_()

    def cancel(self) -> None:
        self.leave()
        self.barrier.break_()
