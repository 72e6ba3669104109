"""Lock, RLock, Semaphore, BoundedSemaphore, Condition, Event, Barrier: multiprocessing's, across processes and hosts.

They live in the hub. What a process held comes back when it has gone: a lock passes on, a barrier breaks.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import weakref
from collections.abc import Callable
from multiprocessing import process
from operator import index
from time import monotonic
from typing import Any

from fiberexec._hub import client
from fiberexec._hub.handle import Handle, seconds

__all__ = ["Barrier", "BoundedSemaphore", "Condition", "Event", "Lock", "RLock", "Semaphore"]

SEM_VALUE_MAX = 0x7FFFFFFF
RECURSIVE_MUTEX, SEMAPHORE = range(2)

_live: weakref.WeakSet[SemLock] = weakref.WeakSet()


class SemLock(Handle):
    """What locks and semaphores have in common. ``ctx`` is accepted for compatibility and has no effect."""

    def __init__(self, kind: int, value: int, maxvalue: int, *, ctx: object = None) -> None:
        value, maxvalue = index(value), index(maxvalue)
        if not 0 <= value <= maxvalue or maxvalue > SEM_VALUE_MAX:
            raise OSError(errno.EINVAL, f"{os.strerror(errno.EINVAL)}: value={value}")
        self._make("semaphore", value, maxvalue)
        self._reset(kind, maxvalue)

    def _reset(self, kind: int, maxvalue: int) -> None:
        self.kind = kind
        self.maxvalue = maxvalue
        self._depth = 0  # how often this process has acquired it, and not released
        self._thread: int | None = None  # that did it last
        _live.add(self)

    @property
    def _semlock(self) -> SemLock:
        return self

    @property
    def handle(self) -> int:
        return self._id

    @property
    def name(self) -> str:
        return f"/fiberexec-{self._id}"

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """Take it; False if that could not be within ``timeout`` seconds (None: wait as long as it takes)."""
        if self.kind == RECURSIVE_MUTEX and self._is_mine():
            self._depth += 1
            return True
        if not self._call("acquire", seconds(timeout) if block else 0.0):
            return False
        self._thread = threading.get_ident()
        self._depth += 1
        return True

    def release(self) -> None:
        """Give it back.

        Raises ValueError if it was released too often, and AssertionError if it is an RLock of another thread.
        """
        if self.kind == RECURSIVE_MUTEX:
            if not self._is_mine():
                raise AssertionError("attempt to release recursive lock not owned by thread")
            if self._depth > 1:
                self._depth -= 1
                return
        if self._depth > 0 and self.maxvalue == 1:
            self._depth -= 1
            client.post(self._hub, ("release", self._id, ()))  # it was ours: there is nothing to answer
        else:
            self._call("release")
            self._depth -= 1

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *args: object) -> None:
        self.release()

    def _count(self) -> int:
        return max(0, self._depth)

    def _is_mine(self) -> bool:
        return self._depth > 0 and self._thread == threading.get_ident()

    def _get_value(self) -> int:
        return int(self._call("value"))

    def _is_zero(self) -> bool:
        return self._get_value() == 0

    def _after_fork(self) -> None:
        self._depth = 0

    def __getstate__(self) -> tuple[Any, ...]:
        return *self._share(), self.kind, self.maxvalue

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._adopt((state[0], state[1]))
        self._reset(*state[2:])

    def _owner_name(self) -> str:
        if self._is_mine():
            name: str = process.current_process().name
            thread = threading.current_thread().name
            return name if thread == "MainThread" else f"{name}|{thread}"
        if self._get_value() == 1:
            return "None"
        return "SomeOtherThread" if self._count() > 0 else "SomeOtherProcess"


class Semaphore(SemLock):
    """A counter: acquire() waits until it is above 0 and takes 1 off, release() adds 1."""

    def __init__(self, value: int = 1, *, ctx: object = None) -> None:
        super().__init__(SEMAPHORE, value, SEM_VALUE_MAX, ctx=ctx)

    def get_value(self) -> int:
        """The counter."""
        return self._get_value()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}(value={_or_unknown(self._get_value)})>"


class BoundedSemaphore(Semaphore):
    """A Semaphore whose counter never passes its initial value: release() raises ValueError instead."""

    def __init__(self, value: int = 1, *, ctx: object = None) -> None:
        SemLock.__init__(self, SEMAPHORE, value, value, ctx=ctx)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}(value={_or_unknown(self._get_value)}, maxvalue={self.maxvalue})>"


class Lock(SemLock):
    """Held by one at a time. Any process or thread may release it."""

    def __init__(self, *, ctx: object = None) -> None:
        super().__init__(SEMAPHORE, 1, 1, ctx=ctx)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}(owner={_or_unknown(self._owner_name)})>"


class RLock(SemLock):
    """Held by one thread at a time, which may acquire it again, and releases it as often."""

    def __init__(self, *, ctx: object = None) -> None:
        super().__init__(RECURSIVE_MUTEX, 1, 1, ctx=ctx)

    def __repr__(self) -> str:
        owner = _or_unknown(self._owner_name)
        count: object = {"None": 0, "unknown": "unknown"}.get(owner, "nonzero")
        return f"<{type(self).__name__}({owner}, {self._count() if self._is_mine() else count})>"


class Condition(Handle):
    """Threads of any process wait for notify(). ``lock`` is a Lock or RLock; default: an RLock of its own."""

    def __init__(self, lock: SemLock | None = None, *, ctx: object = None) -> None:
        self._lock = RLock(ctx=ctx) if lock is None else lock
        self._make("condition", self._lock._id)
        self._make_methods()

    def _make_methods(self) -> None:
        self.acquire = self._lock.acquire
        self.release = self._lock.release

    def __enter__(self) -> bool:
        return self._lock.__enter__()

    def __exit__(self, *args: object) -> None:
        self._lock.__exit__(*args)

    def wait(self, timeout: float | None = None) -> bool:
        """Release the lock, wait for a notification, acquire it again; False if ``timeout`` seconds passed before."""
        lock = self._lock
        assert lock._is_mine(), "must acquire() condition before using wait()"
        depth, thread = lock._depth, lock._thread
        lock._depth = 0
        try:
            notified = bool(self._call("wait", seconds(timeout)))
        except (OSError, KeyError):
            raise  # the hub, or the condition, has gone
        except BaseException:
            lock.acquire()  # it was interrupted: the hub has taken the lock back
            raise
        finally:
            lock._depth, lock._thread = depth, thread
        return notified

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        """Wait until ``predicate()`` is true, for at most ``timeout`` seconds; returns its last value."""
        deadline = None if timeout is None else monotonic() + timeout
        while not (result := predicate()):
            rest = None if deadline is None else deadline - monotonic()
            if rest is not None and rest <= 0:
                break
            self.wait(rest)
        return result

    def notify(self, n: int = 1) -> None:
        """Wake ``n`` of those who wait."""
        assert self._lock._is_mine(), "lock is not owned"
        self._call("notify", index(n))

    def notify_all(self) -> None:
        """Wake all who wait."""
        self.notify(sys.maxsize)

    def __getstate__(self) -> tuple[Any, ...]:
        return *self._share(), self._lock

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._adopt((state[0], state[1]))
        self._lock = state[2]
        self._make_methods()

    def __repr__(self) -> str:
        sleepers = _or_unknown(lambda: self._call("sleepers"))
        return f"<{type(self).__name__}({self._lock!r}, {sleepers})>"


class Event(Handle):
    """A flag that all can wait for."""

    def __init__(self, *, ctx: object = None) -> None:
        self._make("event")

    def is_set(self) -> bool:
        """Whether the flag is set."""
        return bool(self._call("is_set"))

    def set(self) -> None:
        """Set the flag; whoever waits goes on."""
        self._call("set")

    def clear(self) -> None:
        """Reset the flag."""
        self._call("clear")

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the flag is set, for at most ``timeout`` seconds; returns whether it is."""
        return bool(self._call("wait", seconds(timeout)))

    def __getstate__(self) -> tuple[Any, ...]:
        return self._share()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._adopt((state[0], state[1]))

    def __repr__(self) -> str:
        state = {True: "set", False: "unset"}.get(_or_unknown(self.is_set), "unknown")
        return f"<{type(self).__qualname__} at {id(self):#x} {state}>"


class Barrier(Handle):
    """Lets ``parties`` threads of any process pass together. A party that dies while it waits breaks it.

    ``action`` is called by the last to arrive before all are released; ``timeout`` is the default of wait(), in seconds.
    """

    def __init__(
        self,
        parties: int,
        action: Callable[[], object] | None = None,
        timeout: float | None = None,
        *,
        ctx: object = None,
    ) -> None:
        if parties < 1:
            raise ValueError("parties must be > 0")
        self._parties = parties = index(parties)
        self._action = action
        self._timeout = timeout
        self._make("barrier", parties, action is not None)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the others; returns a number from 0 to parties - 1, another one in each thread.

        Raises threading.BrokenBarrierError if the barrier is or becomes broken, or is reset.
        """
        if timeout is None:
            timeout = self._timeout
        position, acts = self._call("wait", seconds(timeout))
        if acts:
            assert self._action is not None
            try:
                self._action()
            except BaseException:
                self.abort()
                raise
            self._call("acted")
        return int(position)

    def reset(self) -> None:
        """Make it as new. Whoever waits gets BrokenBarrierError."""
        self._call("reset")

    def abort(self) -> None:
        """Break it. Whoever waits, or will wait, gets BrokenBarrierError."""
        self._call("abort")

    @property
    def parties(self) -> int:
        """How many it takes."""
        return self._parties

    @property
    def n_waiting(self) -> int:
        """How many wait now."""
        return int(self._call("state")[0])

    @property
    def broken(self) -> bool:
        """Whether it is broken."""
        return bool(self._call("state")[1])

    def __getstate__(self) -> tuple[Any, ...]:
        return *self._share(), self._parties, self._action, self._timeout

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._adopt((state[0], state[1]))
        self._parties, self._action, self._timeout = state[2:]

    def __repr__(self) -> str:
        return f"<{type(self).__module__}.{type(self).__qualname__} at {id(self):#x}: {self._parties} parties>"


def _or_unknown(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except Exception:
        return "unknown"


def _in_child() -> None:
    for lock in list(_live):
        lock._after_fork()


os.register_at_fork(after_in_child=_in_child)
