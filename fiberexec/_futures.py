"""Where outcomes go: the future of submit(), and the results of one map() in order.

A sink has two methods, called by the manager with no lock held: deliver(task, outcome) and fail(task, error).
"""

from __future__ import annotations

import concurrent.futures
import sys
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar

from fiberexec import _messages as messages
from fiberexec._serialize import load_exception, loads
from fiberexec._states import JUDGING, SENT

if TYPE_CHECKING:
    from fiberexec._manager import Manager
    from fiberexec._scheduler import Task

T = TypeVar("T")
Outcome = tuple[int, bytes, "tuple[bytes | bytearray, ...]"]  # status of a record, data, buffers


def load_outcome(outcome: Outcome) -> tuple[Any, BaseException | None]:
    """An outcome as (value, None) or (None, exception). What unpickling raises is the exception."""
    status, data, buffers = outcome
    if status == messages.ERROR:
        return None, load_exception(data)
    try:
        return loads(data, buffers), None
    except BaseException as error:  # the class of a result runs its own code here
        return None, error


class _Condition(threading.Condition):
    """A Condition of two objects instead of ten: futures wait by the thousand, and the garbage collector visits them all."""

    _waiters: Any = ()
    _lock: Any

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        return bool(self._lock.acquire(blocking, timeout))

    def release(self) -> None:
        self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        if not self._waiters:
            self._waiters = deque()
        return super().wait(timeout)

    def _release_save(self) -> Any:
        return self._lock._release_save()

    def _acquire_restore(self, state: Any) -> None:
        self._lock._acquire_restore(state)

    def _is_owned(self) -> bool:
        return bool(self._lock._is_owned())


class FiberFuture(concurrent.futures.Future[T]):
    """A ``concurrent.futures.Future`` whose task can be stopped while it is running."""

    _task: Task | None = None
    _manager: Manager | None = None

    def __init__(self) -> None:  # the standard's own, with another Condition
        self._condition: threading.Condition = _Condition()
        self._state = "PENDING"
        self._result: Any = None
        self._exception: BaseException | None = None
        self._waiters: list[Any] = []
        self._done_callbacks: list[Any] = []

    def cancel(self) -> bool:
        """Cancel the task if it has not been sent to a worker. Returns whether it is cancelled."""
        task, manager = self._task, self._manager
        if task is None or manager is None:
            return super().cancel()
        manager.cancel_tasks([task])
        return self.cancelled()

    def running(self) -> bool:
        """Whether the task is with a worker."""
        task = self._task
        return task is not None and task.state in (SENT, JUDGING) and not self.done()

    def terminate(self) -> bool:
        """Stop the task, running or not: it ends in ``CancelledError`` and is never retried.

        A running task gets SIGTERM (its ``finally`` blocks run), and SIGKILL 2 seconds later. The future is done when the
        task has really ended. Returns False, and does nothing, when the outcome was there already.
        """
        task, manager = self._task, self._manager
        if task is None or manager is None:
            return super().cancel()
        return manager.terminate(task)

    def __reduce__(self) -> Any:
        raise TypeError("a future does not travel: send its result")

    # -- the sink

    def deliver(self, task: Task, outcome: Outcome) -> None:
        value, error = load_outcome(outcome)
        self.settle(task, value, error)

    def settle(self, task: Task | None, value: Any, error: BaseException | None) -> None:
        self._task = self._manager = None
        try:
            if error is None:
                self.set_result(value)
            else:
                self.set_exception(error)
        except concurrent.futures.InvalidStateError:
            pass  # somebody else has set it: the first one wins
        except BaseException:  # of a callback: the standard lets SystemExit pass, but this is the manager's thread
            sys.excepthook(*sys.exc_info())

    def fail(self, task: Task | None, error: BaseException | None) -> None:
        """End without a result; no error means: cancelled."""
        self._task = self._manager = None
        if error is not None:
            self.settle(task, None, error)
        elif super().cancel():
            self.set_running_or_notify_cancel()
        else:  # somebody has called set_running_or_notify_cancel()
            self.settle(task, None, concurrent.futures.CancelledError())

    def forked(self) -> None:
        """In a forked child the lock may be held by a thread that does not exist there; callbacks are the parent's."""
        self._condition = _Condition()
        self._waiters = []
        self._done_callbacks = []

    def abandon(self, error: BaseException) -> None:
        """End, since nobody is left who could do so in order."""
        self.fail(None, error)


class ItemSink:
    """A sink for many items: each outcome, and what cannot even be sent, comes to put()."""

    _manager: Manager | None  # as of a FiberFuture that is not done

    def expect(self, first: int, count: int) -> None:
        """The next ``count`` items have the ids from ``first`` on."""

    def put(self, first: int, count: int, what: Any) -> None:
        """Take what became of ``count`` items, see values_of(). Any thread may call."""
        raise NotImplementedError

    def deliver(self, task: Task, outcome: Outcome) -> None:
        self.put(task.id + task.start, task.stop - task.start, outcome)

    def settle(self, task: Task, value: Any, error: BaseException | None) -> None:
        self.put(task.id + task.start, 1, error if error is not None else _Value(value))

    def fail(self, task: Task | None, error: BaseException | None) -> None:
        what = error if error is not None else concurrent.futures.CancelledError()
        if task is None:  # a call that could not be sent
            self.put(0, 1, what)
        else:
            self.put(task.id + task.start, task.stop - task.start, what)

    def forked(self) -> None:
        """As FiberFuture.forked()."""
        raise NotImplementedError

    def abandon(self, error: BaseException) -> None:
        """As FiberFuture.abandon()."""
        raise NotImplementedError


class MapResults(ItemSink):
    """The results of one map(), stored in segments until the consumer reaches them."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager
        self._groups: deque[tuple[int, int]] = deque()  # the ids that are to come, in order: first, one past the last
        self._segments: dict[int, tuple[int, Any]] = {}  # by the first item's id: number of items, Outcome or exception
        self._arrived = threading.Condition()  # guards _segments and _wanted
        self._wanted = 0
        self._lost: BaseException | None = None  # no more will come

    def expect(self, first: int, count: int) -> None:
        self._groups.append((first, first + count))

    def forked(self) -> None:
        self._arrived = threading.Condition()

    def abandon(self, error: BaseException) -> None:
        with self._arrived:
            self._lost = error
            self._arrived.notify_all()

    def put(self, first: int, count: int, what: Any) -> None:
        with self._arrived:
            self._segments[first] = count, what
            if first == self._wanted:
                self._arrived.notify()

    def take(self, deadline: float | None) -> list[Any]:
        """Wait for the next item: the values that are there from it on. Raises the item's exception."""
        first, end = self._groups.popleft()
        with self._arrived:
            self._wanted = first
            while first not in self._segments:
                if self._lost is not None:
                    raise self._lost
                rest = None if deadline is None else deadline - time.monotonic()
                if rest is not None and rest <= 0:
                    raise concurrent.futures.TimeoutError
                self._arrived.wait(rest)
            count, what = self._segments.pop(first)
        if first + count < end:
            self._groups.appendleft((first + count, end))
        values, error = values_of(what)
        if error is not None:
            try:
                raise error
            finally:
                del error, what  # no cycle between the exception's traceback and this frame
        return values


class _Value:
    """A result that has been unpickled already."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


def values_of(what: Outcome | BaseException | _Value) -> tuple[list[Any], BaseException | None]:
    """What ItemSink.put() is given, as (values, None) or ([], exception)."""
    if isinstance(what, BaseException):
        return [], what
    if isinstance(what, _Value):
        return [what.value], None
    value, error = load_outcome(what)
    if error is not None:
        return [], error
    return value if what[0] == messages.VALUES else [value], None
