"""The thread that says to the hub what this process has put into queues."""

from __future__ import annotations

import os
import threading
from _collections import deque  # type: ignore[import-not-found]
from collections import Counter
from collections.abc import Mapping
from time import monotonic
from typing import TYPE_CHECKING, Any

from fiberexec._errors import HubFull, HubLost
from fiberexec._hub import client
from fiberexec._messages import BULK

if TYPE_CHECKING:
    from fiberexec._hub.handle import Handle
    from fiberexec.mp._consumer import Consumer
    from fiberexec.mp.queues import JoinableQueue, Queue

_BATCH = 1 << 20  # bytes, about, and
_BATCH_ITEMS = 4096  # items at most, in one frame of the feeder
_IDLE = 0.05  # seconds after which the feeder's thread ends


class Feeder:
    """Says to the hub what this process put and marked as done, in that order. Its thread runs while there is something.

    What the hub has no memory for waits in a thread of its own, and with it what follows in the same queue and all marks.
    """

    def __init__(self) -> None:
        self._items: deque[tuple[Any, Any, Any]] = deque()  # queue, data, buffers; or queue, None, consumer: a mark
        self._held: deque[tuple[Any, Any, Any]] = deque()  # of them: what waits for queues that are stuck
        self._stuck: set[Queue] = set()
        self._freed: list[Queue] = []  # of those: the hub has taken what was to go first
        self._changed = threading.Condition(threading.Lock())
        self._thread: threading.Thread | None = None
        self._waiting = False  # the thread, for items
        self._resting = False  # the thread is to end when there is nothing to send
        self._count = 0  # of all items so far
        self._sent = 0  # of them

    def put(self, queue: Queue, data: Any, more: Any) -> None:
        with self._changed:
            self._count += 1
            queue._put_count += 1
            self._items.append((queue, data, more))
            if self._waiting:
                self._changed.notify_all()
            elif self._thread is None:
                self._start()

    @property
    def is_idle(self) -> bool:
        """Whether all that this process has put is sent."""
        return self._sent == self._count

    def flush(self, queue: Queue, patient: bool = True, timeout: float | None = None) -> None:
        """Return when all that was put so far into ``queue`` has been sent, or ``timeout`` seconds have passed.

        If not ``patient``, also when the hub takes no more for it.
        """
        if queue._sent_count == queue._put_count:
            return
        with self._changed:
            until = queue._put_count
            self._changed.wait_for(
                lambda: queue._sent_count >= until or self._thread is None or not (patient or queue._full is None), timeout
            )

    def flush_all(self, queue: Queue) -> None:
        """Return when all that was put so far, into any queue, has been sent, or the hub takes no more for ``queue``."""
        with self._changed:
            until = self._count
            while self._sent < until and self._thread is not None and queue._full is None:
                self._changed.wait()

    def rest(self) -> None:
        """Let the thread end, if there is nothing to send."""
        with self._changed:
            thread = self._thread
            if thread is None or not self._waiting or self._items or self._stuck:
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
                self._go_on()
                while not self._items:
                    self._waiting = True
                    came = self._changed.wait(None if self._stuck else _IDLE)
                    self._waiting = False
                    self._go_on()
                    if (not came or self._resting) and not self._items and not self._stuck:
                        self._thread = None  # under the lock: the next put starts another
                        return
            self._send()

    def _go_on(self) -> None:
        if self._freed:
            self._stuck.difference_update(self._freed)
            self._freed.clear()
            self._items.extendleft(reversed(self._held))
            self._held.clear()

    def _send(self) -> None:
        """Send what there is: puts into the first one's queue, and marks, which may come later than they were made."""
        queue: Queue | None = None
        items: list[Any] = []
        buffers: list[Any] = []
        marks: list[tuple[JoinableQueue, Consumer]] = []
        size = 0
        while self._items and size < _BATCH and len(items) < _BATCH_ITEMS:
            target, data, more = self._items[0]
            if self._stuck and (data is None or target in self._stuck):
                self._held.append((target, data, more))
            elif data is None:
                marks.append((target, more))
            elif queue is None or target is queue:
                queue = target
                size += len(data) + sum(map(len, more))
                items.append(pack(data, more, buffers))
            else:
                break
            self._items.popleft()
        if queue is not None:
            self._put(queue, items, buffers)
        if self._stuck and marks:  # what was put before is not there yet
            self._held.extend((target, None, consumer) for target, consumer in marks)
            return
        for target, consumer in marks:
            try:
                target._mark(consumer)
            except HubLost as error:
                target._lost = error
        if marks:
            self._done(Counter(target for target, _ in marks))

    def _put(self, queue: Queue, items: list[Any], buffers: list[Any]) -> None:
        try:
            send(queue, items, buffers, 0.0)
        except HubFull as error:
            with self._changed:
                queue._full = error
                self._stuck.add(queue)
                self._changed.notify_all()
            args = queue, items, buffers
            try:
                threading.Thread(target=self._insist, args=args, name="QueueFeederThread", daemon=True).start()
            except RuntimeError:  # no more threads: then all wait
                self._insist(*args)
            return
        except Exception as error:  # the hub has gone, or the queue
            queue._lost = error
        self._done({queue: len(items)})

    def _insist(self, queue: Queue, items: list[Any], buffers: list[Any]) -> None:
        """Put, whenever the hub has memory."""
        try:
            send(queue, items, buffers, None)
        except Exception as error:
            queue._lost = error
        with self._changed:
            queue._full = None
            self._freed.append(queue)
        self._done({queue: len(items)})

    def _done(self, counts: Mapping[Any, int]) -> None:
        """So many have been sent, by queue."""
        with self._changed:
            for queue, count in counts.items():
                self._sent += count
                queue._sent_count += count
            self._changed.notify_all()


def send(queue: Handle, items: list[Any], buffers: list[Any], timeout: float | None) -> bool:
    """Put items into a queue of the hub; whether there was room for them in ``timeout`` seconds."""
    deadline = monotonic() + timeout if timeout else 0.0
    again = False
    while True:
        answer = client.request(queue._hub, ("put", queue._id, (items, timeout, again)), buffers)[0]
        if answer is not None:
            return bool(answer)
        again = True  # the hub could not keep them until there was room
        timeout = max(0.0, deadline - monotonic()) if timeout is not None else None


def pack(data: Any, own: Any, buffers: list[Any]) -> Any:
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


feeder = Feeder()


def _in_child() -> None:
    global feeder
    feeder = Feeder()


os.register_at_fork(after_in_child=_in_child)
