"""Queue, JoinableQueue, SimpleQueue: multiprocessing's, across processes and hosts.

    put() ─► pickled ─► this process' feeder ─► the hub ─► get(): a few at once when they are consumed fast

Rules:
- An object is pickled in put(), so that what is changed later is not seen; what cannot be pickled goes to
  ``_on_queue_feeder_error``, as in multiprocessing.
- A queue with a maxsize is asked for each object, one without gets them in batches from a thread.
- get() claims an item in shared memory before it unpickles it, and says there that it has it when that has ended, well or
  not. What was sent here and not claimed goes to others when they wait for it, and what this process did not get when it
  dies; see _hub/queues.py.
"""

from __future__ import annotations

import os
import sys
import threading
import types
import weakref
from multiprocessing import util
from operator import index
from queue import Empty, Full
from time import monotonic
from typing import Any

from fiberexec._errors import HubFull
from fiberexec._hub import client, launch
from fiberexec._hub.handle import Handle, seconds
from fiberexec._hub.wire import DONE, OTHERS, RECALLED
from fiberexec._serialize import dumps_result, loads
from fiberexec.mp import _feeder
from fiberexec.mp._consumer import Consumer, FarConsumer

__all__ = ["JoinableQueue", "Queue", "SimpleQueue"]

_SOON = 0.1  # seconds that get() allows, whatever its timeout, for what this process has just put to be sent


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
        item = _feeder.pack(data, own, buffers)
        return _feeder.send(self, [item], buffers, timeout)

    def _consumer(self) -> Consumer:
        try:
            consumer: Consumer = self._local.consumer
        except AttributeError:
            make = FarConsumer if launch.in_job() else Consumer
            consumer = self._local.consumer = make(self._hub, self._id)
        return consumer

    def _get(self, timeout: float | None) -> Any:
        """The next object. Raises queue.Empty if there was none in time, and what unpickling it raises."""
        consumer = self._consumer()
        item = consumer.claim()
        if item is None:
            consumer.pace()
            message = "get", self._id, (consumer.slot, consumer.number, consumer.want, timeout)
            answer, buffers = client.request(self._hub, message)
            if answer is None:
                raise Empty
            number, items = answer
            item = consumer.receive(number, items, buffers)
        try:
            return loads(item) if type(item) is not tuple else loads(*item)
        finally:
            consumer.got()

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
        self._maxsize = max(0, index(maxsize))
        self._open(self._counts, self._maxsize)

    def _reset(self) -> None:
        super()._reset()
        self._full: HubFull | None = None  # the hub takes no more for now
        self._put_count = self._sent_count = 0  # by the feeder
        self._lost: Exception | None = None
        self._used = False  # something was put here
        self._join_cancelled = False
        self._exit: Any = None

    def _check(self) -> None:
        """Raise what the feeder met."""
        error = self._lost or self._full
        if error is not None:
            launch.stay_at_end()
            raise error.with_traceback(None)

    def put(self, obj: Any, block: bool = True, timeout: float | None = None) -> None:
        """Add an object.

        A full queue makes it wait for ``timeout`` seconds, None: as long as it takes. Raises queue.Full if it is full
        then, or at once without ``block``; ValueError if the queue is closed here; HubFull if the hub has no memory left.
        """
        if self._closed:
            raise ValueError(f"Queue {self!r} is closed")
        self._check()
        self._used = True
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
        _feeder.feeder.put(self, data, buffers)

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Take the first object out.

        An empty queue makes it wait for ``timeout`` seconds, None: as long as it takes. Raises queue.Empty if it is empty
        then, or at once without ``block``; ValueError if the queue is closed here.
        """
        if self._closed:
            raise ValueError(f"Queue {self!r} is closed")
        limit = _limit(block, timeout)
        if limit is not None:
            started = monotonic()
            _feeder.feeder.flush(self, patient=False, timeout=max(limit, _SOON) if block else None)
            limit = max(0.0, limit - (monotonic() - started))
        return self._get(limit)

    def qsize(self) -> int:
        """How many objects are in it."""
        _feeder.feeder.flush(self, patient=False)
        return int(self._call("size"))

    def empty(self) -> bool:
        """Whether nothing is there to get. Raises OSError if this process has put something, and closed the queue."""
        if self._closed and self._used:
            raise OSError(f"Queue {self!r} is closed")
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
        _feeder.feeder.flush(self)
        _feeder.feeder.rest()

    def cancel_join_thread(self) -> None:
        """Let this process end before all that it has put is sent."""
        self._join_cancelled = True
        if self._exit is not None:
            self._exit.cancel()

    def _after_fork(self) -> None:
        super()._after_fork()
        self._full = None
        self._put_count = self._sent_count = 0
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
            _feeder.feeder.flush_all(self)
            self._check()
            self._call("done", -1)
            return
        consumer.marked += 1
        if _feeder.feeder.is_idle:
            self._mark(consumer)
        else:
            _feeder.feeder.put(self, None, consumer)

    def _mark(self, consumer: Consumer) -> None:
        cell = consumer.cell
        cell[DONE] += 1
        if isinstance(consumer, FarConsumer):
            consumer.tell()
        elif cell[DONE] + cell[OTHERS] >= consumer.number and (not consumer.items or cell[RECALLED]):
            client.post(self._hub, ("done", self._id, (consumer.slot,)))  # else join() waits anyway

    def join(self) -> None:
        """Wait until all objects that were put have been marked as done."""
        _feeder.feeder.flush(self)
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
        return self._get(None)

    def empty(self) -> bool:
        """Whether nothing is there to get."""
        self._check_open()
        return super().empty()

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
        _feeder.feeder.flush(queue)


def _limit(block: bool, timeout: float | None) -> float | None:
    return seconds(timeout) if block else 0.0


def _in_child() -> None:
    for queue in list(_live):
        queue._after_fork()


os.register_at_fork(after_in_child=_in_child)
