"""What the pool's asynchronous methods return: sinks of the executor's outcomes with multiprocessing's methods."""

from __future__ import annotations

import logging
import multiprocessing.pool
import pickle
import threading
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.context import TimeoutError
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from fiberexec._futures import ItemSink, values_of
from fiberexec._serialize import PicklingError, RemoteTraceback

if TYPE_CHECKING:
    from fiberexec._manager import Manager
    from fiberexec._scheduler import Task

T = TypeVar("T")
Callback = Callable[[Any], object]
_logger = logging.getLogger("fiberexec")
_REFUSALS = (pickle.PickleError, TypeError, AttributeError)


class MaybeEncodingError(multiprocessing.pool.MaybeEncodingError, PicklingError):  # type: ignore[misc, name-defined]
    """A result cannot be sent; the message says which and why. It is fiberexec's PicklingError, and multiprocessing's own."""

    def __init__(self, exc: object, value: object = "the result") -> None:
        super().__init__(exc, value)
        self._text = str(exc)

    def __str__(self) -> str:
        return self._text


def _load(what: Any) -> tuple[list[Any], BaseException | None]:
    """As values_of(), but what could not be pickled ends as multiprocessing ends it."""
    values, error = values_of(what)
    if isinstance(error, PicklingError):
        cause = error.__cause__
        if isinstance(cause, RemoteTraceback):  # it is of the worker
            error = MaybeEncodingError(error)
            error.__cause__ = cause
        elif cause is not None and not isinstance(cause, _REFUSALS):
            error = cause  # what an argument itself has raised
    return values, error


class ApplyResult(ItemSink, Generic[T]):
    """What ``apply_async()`` returns."""

    _task: Task | None = None

    def __init__(self, manager: Manager, callback: Callback | None, error_callback: Callback | None) -> None:
        self._manager = manager
        self._callbacks = error_callback, callback
        self._event = threading.Event()
        self._success = False
        self._value: Any = None

    def ready(self) -> bool:
        """Whether the outcome is there."""
        return self._event.is_set()

    def successful(self) -> bool:
        """Whether there is a result, and no exception. Raises ValueError before the outcome is there."""
        if not self.ready():
            raise ValueError(f"{self!r} not ready")
        return self._success

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the outcome, for ``timeout`` seconds at most."""
        self._event.wait(timeout)

    def get(self, timeout: float | None = None) -> T:
        """Wait for the outcome: return the result, or raise the exception.

        Raises ``multiprocessing.TimeoutError`` when it is not there after ``timeout`` seconds.
        """
        self.wait(timeout)
        if not self.ready():
            raise TimeoutError
        if not self._success:
            raise self._value
        value: T = self._value
        return value

    def _finish(self, value: Any, error: BaseException | None) -> None:
        """The callback comes first: whoever waits finds it done."""
        if self._event.is_set():
            return
        self._success, self._value = error is None, value if error is None else error
        callback = self._callbacks[self._success]
        self._callbacks = None, None
        if callback is not None:
            try:
                callback(self._value)
            except BaseException:  # SystemExit too: this is the manager's thread
                _logger.exception("the callback of a pool's result raised")
        self._task = self._manager = None
        self._event.set()

    # -- the sink

    def put(self, first: int, count: int, what: Any) -> None:
        values, error = _load(what)
        self._finish(None if error is not None else values[0], error)

    def forked(self) -> None:
        self._event = threading.Event()
        self._callbacks = None, None  # they are the parent's

    def abandon(self, error: BaseException) -> None:
        self._finish(None, error)


AsyncResult = ApplyResult


class MapResult(ApplyResult[list[T]]):
    """What ``map_async()`` and ``starmap_async()`` return: ready when every item has its outcome.

    If items raise, the first exception that arrives is the outcome.
    """

    def __init__(
        self, manager: Manager, first: int, length: int, callback: Callback | None, error_callback: Callback | None
    ) -> None:
        super().__init__(manager, callback, error_callback)
        self._first = first  # id of the first item
        self._values: list[Any] = [None] * length
        self._error: BaseException | None = None
        self._left = length
        self._lock = threading.Lock()  # guards these three
        if not length:
            self._callbacks = None, None  # multiprocessing, too, calls nothing for no items
            self._finish([], None)

    def put(self, first: int, count: int, what: Any) -> None:
        values, error = _load(what)
        with self._lock:
            if error is None:
                place = first - self._first
                self._values[place : place + count] = values
            elif self._error is None:
                self._error = error
            self._left -= count
            if self._left:
                return
            done, self._values = self._values, []
        self._finish(done, self._error)

    def forked(self) -> None:
        super().forked()
        self._lock = threading.Lock()


class IMapIterator(ItemSink, Generic[T]):
    """What ``imap()`` returns: the results in the order of the items. Any thread may take them."""

    _ordered = True

    def __init__(self, manager: Manager) -> None:
        self._manager = manager
        self._ready: deque[tuple[Any, BaseException | None]] = deque()  # to be taken next
        self._order: deque[tuple[int, int]] = deque()  # the ids that are to become ready, in order: first, one past the last
        self._early: dict[int, list[tuple[Any, BaseException | None]]] = {}  # outcomes that wait for others, by the first's id
        self._open = 0  # items that were sent and have no outcome
        self._most = 0  # of them; see wait_for_room()
        self._ended = False  # no more are coming
        self._error: BaseException | None = None  # to be raised after the last result
        self.forked()

    def __iter__(self) -> Iterator[T]:
        return self

    def next(self, timeout: float | None = None) -> T:
        """The next result, or what its item raised.

        Raises StopIteration after the last, and ``multiprocessing.TimeoutError`` if none comes for ``timeout`` seconds.
        """
        try:
            value, error = self._ready.popleft()
        except IndexError:
            value, error = self._wait(timeout)
        if error is not None:
            try:
                raise error
            finally:
                del error  # no cycle between the exception's traceback and this frame
        result: T = value
        return result

    __next__ = next

    def _wait(self, timeout: float | None) -> tuple[Any, BaseException | None]:
        with self._arrived:
            if not self._arrived.wait_for(lambda: self._ready or (self._ended and self._open <= 0), timeout):
                raise TimeoutError
            if self._ready:
                return self._ready.popleft()
            error, self._error = self._error, None
        if error is None:
            raise StopIteration
        return None, error

    # -- for the thread that sends the items

    def wait_for_room(self, most: int) -> None:
        """When ``most`` items have no outcome yet, wait until it is half as many."""
        with self._room:
            self._most = most
            if self._open >= most:
                self._room.wait_for(lambda: 2 * self._open <= most)

    def end(self, error: BaseException | None) -> None:
        """No more items will come. ``error``: why, if it is not that there are none."""
        with self._arrived:
            self._ended = True
            self._error = self._error or error
            self._settle()

    # -- the sink

    def expect(self, first: int, count: int) -> None:
        with self._arrived:
            self._open += count
            if self._ordered:
                self._order.append((first, first + count))

    def put(self, first: int, count: int, what: Any) -> None:
        values, error = _load(what)
        outcomes: list[tuple[Any, BaseException | None]]
        outcomes = [(value, None) for value in values] if error is None else [(None, error)] * count
        with self._arrived:
            self._open -= count
            if self._ordered:
                self._early[first] = outcomes
                self._sort()
            else:
                self._ready += outcomes
            self._settle()
            if 2 * self._open <= self._most:
                self._room.notify()

    def _settle(self) -> None:
        if self._ended and self._open <= 0:
            self._manager = None
        self._arrived.notify_all()

    def _sort(self) -> None:
        """Make ready what comes next."""
        while self._order:
            first, end = self._order[0]
            outcomes = self._early.pop(first, None)
            if outcomes is None:
                return
            self._ready += outcomes
            self._order.popleft()
            if first + len(outcomes) < end:
                self._order.appendleft((first + len(outcomes), end))

    def forked(self) -> None:
        lock = threading.Lock()  # guards everything
        self._arrived = threading.Condition(lock)
        self._room = threading.Condition(lock)

    def abandon(self, error: BaseException) -> None:
        with self._arrived:
            self._open = 0
            self._room.notify()
        self.end(error)


class IMapUnorderedIterator(IMapIterator[T]):
    """What ``imap_unordered()`` returns: the results as they come."""

    _ordered = False
