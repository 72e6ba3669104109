"""Queue, JoinableQueue, SimpleQueue: multiprocessing's, across processes and hosts.

    put() ─► pickled ─► this process' feeder ─► the hub ─► get(): a few at once when they are consumed fast

Rules:
- An object is pickled in put(), so that what is changed later is not seen; what cannot be pickled goes to
  ``_on_queue_feeder_error``, as in multiprocessing.
- A queue with a maxsize is asked for each object, one without gets them in batches from a thread.
- get() claims an item in shared memory before it returns it. What was sent here and not claimed goes to others when they
  wait for it, or when this process dies; see _hub/queues.py.
"""

from __future__ import annotations

import os
import sys
import threading
import types
import weakref
from _collections import deque  # type: ignore[import-not-found]
from multiprocessing import util
from queue import Empty, Full
from time import monotonic
from typing import Any

from fiberexec import _platform
from fiberexec._errors import HubFull, HubLost
from fiberexec._hub import client, launch
from fiberexec._hub.handle import Handle
from fiberexec._hub.launch import Address
from fiberexec._hub.wire import CELL, CELLS, CLAIMED, DONE, HUB, OTHERS, RECALLED
from fiberexec._messages import BULK
from fiberexec._serialize import dumps_result, loads

__all__ = ["JoinableQueue", "Queue", "SimpleQueue"]

_WORK = 0.001  # seconds of a consumer's work that are taken ahead
_MOST = 256  # items that are taken ahead
_BATCH = 1 << 20  # bytes, about, and
_BATCH_ITEMS = 4096  # items at most, in one frame of the feeder
_IDLE = 0.05  # seconds after which the feeder's thread ends


class _Consumer:
    """One thread's end of one queue."""

    def __init__(self, hub: Address, id: int) -> None:
        self.cells, self.slot = _cell(hub, id)
        self.cell = self.cells.memory[CELL * self.slot : CELL * (self.slot + 1)]
        self.id = id
        self.items: deque[Any] = deque()  # claimed from the left
        self.number = 0  # of the last one claimed
        self.marked = 0  # how many of them are done
        self.taken = 0  # in the last batch
        self.came = 0.0  # when it came
        self.want = 1
        self.is_new = True

    def claim(self) -> Any:
        """The next item that is here; None if there is none, or it was taken back."""
        if not self.items:
            return None
        cell = self.cell
        number = self.number + 1
        cell[CLAIMED] = number
        if cell[RECALLED] >= number:
            cell[CLAIMED] = number - 1
            self.items.clear()
            return None
        self.number = number
        return self.items.popleft()

    def pace(self) -> None:
        """Want as many items as take _WORK seconds, going by the last batch."""
        used = self.taken - len(self.items)
        if used:
            seconds = (monotonic() - self.came) / used
            self.want = max(1, min(_MOST, 2 * self.want, int(_WORK / max(seconds, 1e-7))))

    def receive(self, number: int, items: list[Any], buffers: list[Any]) -> Any:
        """What the hub has answered; returns the first item, which is claimed and cannot be taken back."""
        self.cell[CLAIMED] = self.number = number
        self.taken = len(items)
        self.came = monotonic()
        if buffers:
            position = 0
            for index, item in enumerate(items):
                if type(item) is tuple:
                    data, kinds = item
                    own = [bytes(b) if kind else b for b, kind in zip(buffers[position : position + len(kinds)], kinds)]
                    position += len(kinds)
                    items[index] = (own.pop(0) if data is None else data), own
        self.items = deque(items)
        return self.items.popleft()

    def __del__(self) -> None:
        self.cells.free.append((self.id, self.slot))


class _Cells:
    """The memory in which this process' consumers tell one hub how far they are."""

    def __init__(self, hub: Address) -> None:
        fd = _platform.make_cells(CELLS)
        try:
            self.memory = _platform.map_cells(fd)
            client.send_fd(hub, ("cells", HUB, ()), fd)
        finally:
            os.close(fd)
        self.unused = iter(range(CELLS))
        self.free: deque[tuple[int, int]] = deque()  # queue, slot: of threads that have ended


_all_cells: dict[bytes, _Cells] = {}  # by the hub's token
_cells_lock = threading.Lock()


def _cell(hub: Address, id: int) -> tuple[_Cells, int]:
    """A slot that nobody uses."""
    with _cells_lock:
        cells = _all_cells.get(hub.token)
        if cells is None:
            cells = _all_cells[hub.token] = _Cells(hub)
    while True:
        try:
            queue, slot = cells.free.popleft()
        except IndexError:
            break
        try:
            if client.call("leave", queue, slot, hub=hub):
                return cells, slot
        except KeyError:  # the queue has gone
            return cells, slot
    try:
        return cells, next(cells.unused)
    except StopIteration:
        raise RuntimeError(f"more than {CELLS} threads and queues: let threads end that only got from a queue") from None


class _Feeder:
    """Says to the hub what this process put and marked as done, in that order. Its thread runs while there is something."""

    def __init__(self) -> None:
        self._items: deque[tuple[Any, Any, Any]] = deque()  # queue, data, buffers; or queue, None, consumer: a mark
        self._changed = threading.Condition(threading.Lock())
        self._thread: threading.Thread | None = None
        self._waiting = False  # the thread, for items
        self._resting = False  # the thread is to end when there is nothing to send
        self._count = 0  # of all items so far
        self._sent = 0  # of them

    def put(self, queue: Queue, data: Any, more: Any) -> None:
        with self._changed:
            self._count += 1
            self._items.append((queue, data, more))
            if self._waiting:
                self._changed.notify_all()
            elif self._thread is None:
                self._start()

    @property
    def is_idle(self) -> bool:
        """Whether all that this process has put is sent."""
        return self._sent == self._count

    def flush(self, queue: Queue, patient: bool = True) -> None:
        """Return when all that was put so far has been sent; if not ``patient``, or the hub takes no more for ``queue``."""
        if self._sent == self._count:
            return
        with self._changed:
            until = self._count
            while self._sent < until and self._thread is not None and (patient or queue._full is None):
                self._changed.wait()

    def rest(self) -> None:
        """Let the thread end, if there is nothing to send."""
        with self._changed:
            thread = self._thread
            if thread is None or not self._waiting or self._items:
                return
            self._resting = True
            self._changed.notify_all()
        thread.join()

    def _start(self) -> None:
        self._resting = False
        thread = threading.Thread(target=self._run, name="QueueFeederThread", daemon=True)
        self._thread = thread
        try:
            thread.start()
        except BaseException:
            self._thread = None
            raise

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._items:
                    self._waiting = True
                    came = self._changed.wait(_IDLE)
                    self._waiting = False
                    if (not came or self._resting) and not self._items:
                        self._thread = None  # under the lock: the next put starts another
                        return
            self._send()

    def _send(self) -> None:
        """Send what there is: puts into the first one's queue, and marks, which may come later than they were made."""
        queue: Queue | None = None
        items: list[Any] = []
        buffers: list[Any] = []
        marks: list[tuple[JoinableQueue, _Consumer]] = []
        size = 0
        while self._items and size < _BATCH and len(items) < _BATCH_ITEMS:
            target, data, more = self._items[0]
            if data is None:
                marks.append((target, more))
            elif queue is None or target is queue:
                queue = target
                size += len(data) + sum(map(len, more))
                items.append(_pack(data, more, buffers))
            else:
                break
            self._items.popleft()
        if queue is not None:
            self._put(queue, items, buffers)
        for target, consumer in marks:
            try:
                target._mark(consumer)
            except HubLost as error:
                target._lost = error
        with self._changed:
            self._sent += len(items) + len(marks)
            self._changed.notify_all()

    def _put(self, queue: Queue, items: list[Any], buffers: list[Any]) -> None:
        try:
            try:
                client.request(queue._hub, ("put", queue._id, (items, 0.0)), buffers)
            except HubFull as error:
                self._set_full(queue, error)
                client.request(queue._hub, ("put", queue._id, (items, None)), buffers)
                self._set_full(queue, None)
        except Exception as error:  # the hub has gone, or the queue
            queue._lost = error

    def _set_full(self, queue: Queue, error: HubFull | None) -> None:
        with self._changed:
            queue._full = error
            self._changed.notify_all()


_feeder = _Feeder()


def _pack(data: Any, own: Any, buffers: list[Any]) -> Any:
    """An item as the wire has it; its buffers are added to the frame's."""
    kinds = bytes(type(each) is bytes for each in own)
    owned = own
    if len(data) >= BULK:
        kinds = b"\0" + kinds
        owned = [data, *own]
        data = None
    if not kinds:
        return data
    buffers += map(memoryview, owned)  # the hub would make ``bytes`` of what are bytes
    return data, kinds


class _Ends(Handle):
    """What all queues have: a way in and a way out."""

    def _open(self, counts: bool, maxsize: int) -> None:
        self._make("queue", maxsize, counts)
        self._reset()

    def _reset(self) -> None:
        self._closed = False
        self._local = threading.local()  # this thread's consumer
        _live.add(self)

    def _put(self, obj: Any, timeout: float | None) -> bool:
        data, own = dumps_result(obj)
        buffers: list[Any] = []
        item = _pack(data, own, buffers)
        return bool(client.request(self._hub, ("put", self._id, ([item], timeout)), buffers)[0])

    def _consumer(self) -> _Consumer:
        try:
            consumer: _Consumer = self._local.consumer
        except AttributeError:
            consumer = self._local.consumer = _Consumer(self._hub, self._id)
        return consumer

    def _get(self, timeout: float | None) -> Any:
        """The next item; None if there was none in time."""
        consumer = self._consumer()
        item = consumer.claim()
        if item is None:
            consumer.pace()
            message = "get", self._id, (consumer.slot, consumer.number, consumer.want, timeout)
            answer, buffers = client.request(self._hub, message)
            if answer is None:
                return None
            number, items = answer
            item = consumer.receive(number, items, buffers)
        return item

    def _after_fork(self) -> None:
        self._local = threading.local()

    def __getstate__(self) -> tuple[Any, ...]:
        return self._share()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._adopt((state[0], state[1]))
        self._reset()

    def empty(self) -> bool:
        """Whether nothing is there to get."""
        return not self._call("size")

    __class_getitem__: Any = classmethod(types.GenericAlias)


_live: weakref.WeakSet[_Ends] = weakref.WeakSet()


class Queue(_Ends):
    """First in, first out. ``maxsize`` objects at most are in it, 0: as many as the hub has memory for.

    ``ctx`` is accepted for compatibility and has no effect.
    """

    _counts = False  # what is done

    def __init__(self, maxsize: int = 0, *, ctx: object = None) -> None:
        self._maxsize = max(0, maxsize)
        self._open(self._counts, self._maxsize)

    def _reset(self) -> None:
        super()._reset()
        self._full: HubFull | None = None  # the hub takes no more for now
        self._lost: Exception | None = None
        self._join_cancelled = False
        self._exit: Any = None

    def _check(self) -> None:
        """Raise what the feeder met."""
        error = self._lost or self._full
        if error is not None:
            raise error.with_traceback(None)

    def put(self, obj: Any, block: bool = True, timeout: float | None = None) -> None:
        """Add an object.

        A full queue makes it wait for ``timeout`` seconds, None: as long as it takes. Raises queue.Full if it is full
        then, or at once without ``block``; ValueError if the queue is closed here; HubFull if the hub has no memory left.
        """
        if self._closed:
            raise ValueError(f"Queue {self!r} is closed")
        self._check()
        try:
            if self._maxsize:
                if not self._put(obj, _limit(block, timeout)):
                    raise Full
                return
            data, buffers = dumps_result(obj)
        except (Full, OSError, MemoryError, KeyError):
            raise
        except Exception as error:
            self._on_queue_feeder_error(_reason(error), obj)
            return
        if self._exit is None and not self._join_cancelled:
            self._exit = util.Finalize(self, _flush_at_exit, (weakref.ref(self),), exitpriority=-5)
        _feeder.put(self, data, buffers)

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Take the first object out.

        An empty queue makes it wait for ``timeout`` seconds, None: as long as it takes. Raises queue.Empty if it is empty
        then, or at once without ``block``; ValueError if the queue is closed here.
        """
        if self._closed:
            raise ValueError(f"Queue {self!r} is closed")
        if not block or timeout is not None:
            _feeder.flush(self, patient=False)
        item = self._get(_limit(block, timeout))
        if item is None:
            raise Empty
        return loads(item) if type(item) is not tuple else loads(*item)

    def qsize(self) -> int:
        """How many objects are in it."""
        _feeder.flush(self, patient=False)
        return int(self._call("size"))

    def empty(self) -> bool:
        """Whether nothing is there to get."""
        return self.qsize() == 0

    def full(self) -> bool:
        """Whether it holds ``maxsize`` objects."""
        return 0 < self._maxsize <= self.qsize()

    def put_nowait(self, obj: Any) -> None:
        """put() without waiting."""
        self.put(obj, False)

    def get_nowait(self) -> Any:
        """get() without waiting."""
        return self.get(False)

    def close(self) -> None:
        """This process puts and gets no more. What it has put is still sent."""
        self._closed = True
        self._local = threading.local()

    def join_thread(self) -> None:
        """Wait until all that this process has put is sent. Only after close()."""
        assert self._closed, f"Queue {self!r} not closed"
        _feeder.flush(self)
        _feeder.rest()

    def cancel_join_thread(self) -> None:
        """Let this process end before all that it has put is sent."""
        self._join_cancelled = True
        if self._exit is not None:
            self._exit.cancel()

    def _after_fork(self) -> None:
        super()._after_fork()
        self._exit = None

    def __getstate__(self) -> tuple[Any, ...]:
        return *super().__getstate__(), self._maxsize

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        super().__setstate__(state)
        self._maxsize = state[2]

    @staticmethod
    def _on_queue_feeder_error(e: BaseException, obj: Any) -> None:
        """What becomes of an object that cannot be pickled: by default its traceback is printed."""
        import traceback

        traceback.print_exception(e, file=sys.stderr)


class JoinableQueue(Queue):
    """A Queue that counts what is done. What a process got and did not mark as done when it died is delivered again."""

    _counts = True

    def task_done(self) -> None:
        """Mark the first object as done that this thread got, and did not mark yet. Raises ValueError if there is none.

        What this process put before, into any queue, is there before the object counts as done.
        """
        consumer = getattr(self._local, "consumer", None)
        if consumer is None or consumer.marked + consumer.cell[OTHERS] >= consumer.number:
            _feeder.flush(self, patient=False)
            self._check()
            self._call("done", -1)
            return
        consumer.marked += 1
        if _feeder.is_idle:
            self._mark(consumer)
        else:
            _feeder.put(self, None, consumer)

    def _mark(self, consumer: _Consumer) -> None:
        cell = consumer.cell
        cell[DONE] += 1
        if cell[DONE] + cell[OTHERS] >= consumer.number and (not consumer.items or cell[RECALLED]):  # else join() waits anyway
            client.post(self._hub, ("done", self._id, (consumer.slot,)))

    def join(self) -> None:
        """Wait until all objects that were put have been marked as done."""
        _feeder.flush(self)
        self._call("join")


class SimpleQueue(_Ends):
    """A queue with put, get and empty alone. ``ctx`` is accepted for compatibility and has no effect."""

    def __init__(self, *, ctx: object = None) -> None:
        self._open(False, 0)

    def put(self, obj: Any) -> None:
        """Add an object; it is in the queue when this returns."""
        self._check_open()
        self._put(obj, None)

    def get(self) -> Any:
        """Take the first object out, when there is one."""
        self._check_open()
        item = self._get(None)
        return loads(item) if type(item) is not tuple else loads(*item)

    def close(self) -> None:
        """This process puts and gets no more."""
        self._closed = True
        self._local = threading.local()

    def _check_open(self) -> None:
        if self._closed:
            raise OSError("handle is closed")


def _reason(error: Exception) -> BaseException:
    """What pickling met, as multiprocessing would report it; it says as well where."""
    reason = error.__cause__
    if reason is None:
        return error
    if hasattr(reason, "add_note"):
        reason.add_note(str(error))
    return reason


def _flush_at_exit(ref: weakref.ref[Queue]) -> None:
    queue = ref()
    if queue is not None:
        _feeder.flush(queue)


def _limit(block: bool, timeout: float | None) -> float | None:
    return (None if timeout is None else max(0.0, timeout)) if block else 0.0


def _in_child() -> None:
    global _feeder, _cells_lock
    _feeder = _Feeder()
    _cells_lock = threading.Lock()
    _all_cells.clear()
    for queue in list(_live):
        queue._after_fork()


launch.at_close.append(_all_cells.clear)
os.register_at_fork(after_in_child=_in_child)
