"""Queues: the hub's side.

An item is bytes that are never read here: on the wire ``bytes``, or (bytes or None, kinds), where kinds has a byte for each
of the frame's buffers that belong to it: 1 if it is of type ``bytes``, which is made again where it is used. None: the bytes
are the first of these buffers.

A consumer is one thread of one process at one queue. It gets as many items as it wants, when there are that many, and
says in its cell how far it is; what it has not claimed can be taken back without asking it:

    consumer: CLAIMED = n, then: is RECALLED >= n?  ─► it was too late: CLAIMED = n - 1, and it asks again
    hub:      RECALLED = all that was sent, SETTLE seconds later: CLAIMED tells what it has kept

A consumer in a job on another host has no memory in common with the hub: it tells what it has written into its cell, and is
told of a recall, which it answers.

Rules:
- An item belongs to the consumer that got it: claimed it and unpickled it, or failed to. In a queue that counts
  (JoinableQueue) not before it was marked as done. What else its process held when it died goes back to the front, in order.
- The first item of an answer is the consumer's, however long it takes to read it. What it holds beyond that and has not
  claimed after HOLD seconds is taken back, or at once when a get() that must not wait finds nothing else.
- Items that wait for a place in a full queue may take some memory, too. What comes beyond that is let go, and asked for when
  it is its turn.
- A cell is told on any connection, so later words may come first: they only grow.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from fiberexec._errors import HubFull
from fiberexec._hub.consumers import Consumer, Item, unpacked
from fiberexec._hub.shared import PARKED, Shared, Timer, Wait, first
from fiberexec._hub.wire import CLAIMED, DONE, GOT, OTHERS, RECALLED

if TYPE_CHECKING:
    from fiberexec._hub.peers import Peer, Process
    from fiberexec._hub.server import Hub

HOLD = 0.005  # seconds that a consumer may hold what it has not claimed
SETTLE = 0.001  # seconds after which what was claimed before a recall was seen is certain to show
RESEND = 1.0  # seconds that others let who has the next place send his items again
PARKS = 8  # part of the hub's memory, beside it, for items that wait for a place: those beyond are sent again
ANSWER = 1.0  # seconds that a get() which must not wait allows consumers on other hosts to answer a recall
_BATCH = 1 << 18  # bytes in one answer, more than one item


class Queue(Shared):
    looks = ("size",)

    def __init__(self, hub: Hub, maxsize: int, counts: bool) -> None:
        super().__init__(hub)
        self._maxsize = maxsize
        self._counts = counts
        self._items: deque[Item] = deque()
        self._consumers: dict[tuple[Process, int], Consumer] = {}
        self._getting: OrderedDict[Get, None] = OrderedDict()
        self._putting: OrderedDict[Put, None] = OrderedDict()
        self._joining: OrderedDict[Wait, None] = OrderedDict()
        self._called: Timer | None = None  # somebody is to send again; due when others need not wait for him any more
        self._unfinished = 0

    # -- operations

    def do_put(self, peer: Peer, items: list[Any], timeout: float | None, again: bool = False) -> Any:
        """Answers whether there was room, in time; None: there is now, and the items are to be sent ``again``."""
        found = unpacked(items, peer.buffers)
        if again:
            self._called_back()
        if self._called is not None or (self._putting and not again) or self._is_full():
            Put(self, peer, timeout, found, again)
            self.admit()
            return PARKED
        self._add(found)
        self.admit()
        return True

    def do_get(self, peer: Peer, slot: int, claimed: int, want: int, timeout: float | None) -> Any:
        """Answers (number of the first, items), or None when there was none in time. ``claimed`` is the caller's word."""
        consumer = self._consumer(peer.process, slot)
        consumer.end_recall()
        self._settle(consumer)
        self._take_back(consumer, claimed)
        if timeout is not None and timeout < 2 * HOLD and not self._items:
            self._glance(Get(self, peer, None, consumer, want), timeout)
        else:
            Get(self, peer, timeout, consumer, want)
        self._deliver()
        return PARKED

    def _glance(self, get: Get, timeout: float) -> None:
        """Let a get() which must not wait have what consumers do not need to keep."""
        holders = [each for each in self._consumers.values() if each.last > each.kept]
        for each in holders:
            self._recall(each)
        if any(each.is_far and each.recall for each in holders):
            get.asked = monotonic() + timeout
            timeout += ANSWER
        elif holders:
            timeout += 2 * SETTLE
        self.hub.at(monotonic() + timeout if timeout > 0 else 0.0, get)

    def do_size(self, peer: Peer) -> int:
        return len(self._items) + sum(max(0, each.last - each.kept) for each in self._consumers.values())

    def do_tell(self, peer: Peer, slot: int, claimed: int, got: int, done: int) -> None:
        """What a consumer on another host has written into its cell."""
        consumer = self._consumers.get((peer.process, slot))
        if consumer is not None:
            consumer.hear(claimed, got, done)
            self._settle(consumer)

    def do_recalled(self, peer: Peer, slot: int, number: int, *cell: int) -> None:
        """A consumer on another host has seen a recall."""
        consumer = self._consumers.get((peer.process, slot))
        if consumer is not None:
            consumer.hear(*cell)
            if consumer.recall is not None and consumer.recalls == number:
                self._recalled(consumer)

    def do_done(self, peer: Peer, slot: int) -> None:
        """A consumer has marked in its cell what is done; or, with slot -1, a process marks what another thread got."""
        if slot >= 0:
            self._settle(self._consumer(peer.process, slot))
            return
        for consumer in self._consumers.values():
            self._settle(consumer)
        if not self._unfinished:
            raise ValueError("task_done() called too many times")
        self._mark_any(peer.process)

    def do_join(self, peer: Peer) -> Any:
        if not self._unfinished:
            return None
        Wait(peer, self._joining, None)
        return PARKED

    def do_leave(self, peer: Peer, slot: int, *cell: int) -> bool:
        """A thread has ended: what it did not claim goes back. Answers whether its cell is free."""
        consumer = self._consumers.get((peer.process, slot))
        if consumer is None:
            return True
        if cell:
            consumer.hear(*cell)
        self._settle(consumer)
        self._undo(consumer)
        if consumer.held:
            return False  # in a queue that counts: another thread may still mark these as done
        del self._consumers[peer.process, slot]
        return True

    def gone(self, process: Process) -> None:
        for key in [key for key in self._consumers if key[0] is process]:
            consumer = self._consumers.pop(key)
            consumer.end_recall()
            self._settle(consumer)
            self._take_back(consumer, consumer.first - 1)
        self._deliver()

    def free(self) -> None:
        """Let go of what consumers have got and did not say so yet."""
        for consumer in self._consumers.values():
            self._settle(consumer)

    def dropped(self) -> None:
        for item in self._items:
            self.hub.release(item.size)
        self._items.clear()
        for consumer in self._consumers.values():
            consumer.end_recall()
            if consumer.holding is not None:
                consumer.holding.done = True
            for item in consumer.held:
                self.hub.release(item.size)
            consumer.held.clear()
        self._consumers.clear()

    # -- what is there

    def _is_full(self) -> bool:
        if self.hub.bytes > self.hub.limit:
            self.hub.free()
        return 0 < self._maxsize <= len(self._items) or self.hub.bytes > self.hub.limit

    def _add(self, items: list[Item]) -> None:
        self._items += items
        self._unfinished += len(items)
        self.hub.bytes += sum(item.size for item in items)
        if self._getting:
            self._deliver()

    def admit(self) -> None:
        """Let those put for whom there is room now."""
        while self._putting and self._called is None and not self._is_full():
            put = first(self._putting)
            items = put.items
            if items is None:
                self._called = Timer(self._go_on)
                self.hub.at(monotonic() + RESEND, self._called)
                put.peer.undo = self._go_on
                put.finish(None)
            else:
                put.finish(True)
                self._add(items)
        if self._putting and self.hub.bytes > self.hub.limit:
            self.hub.starved[self] = None

    def _called_back(self) -> None:
        if self._called is not None:
            self._called.done = True
            self._called = None

    def _go_on(self) -> None:
        """Who was to send again does not, or takes long."""
        self._called_back()
        self.admit()

    def _deliver(self) -> None:
        while self._getting and self._items:
            get = first(self._getting)
            most = min(get.want, -(-len(self._items) // len(self._getting)))
            consumer = get.consumer
            answer: list[Any] = []
            buffers: list[Any] = []
            number = consumer.promised = consumer.last + 1
            size = 0
            while self._items and len(answer) < most and (not size or size + self._items[0].size <= _BATCH):
                item = self._items.popleft()
                consumer.held.append(item)
                size += item.size
                answer.append((item.data, item.kinds) if item.kinds else item.data)
                buffers += item.buffers
            consumer.cell[RECALLED] = 0
            if len(answer) > 1:
                consumer.since = monotonic()
                if consumer.holding is None:
                    self._look_after(consumer)
            get.leave()
            get.peer.undo = partial(self._undo, consumer)
            get.peer.reply((number, answer), buffers)
        self.admit()

    # -- consumers

    def _consumer(self, process: Process, slot: int) -> Consumer:
        consumer = self._consumers.get((process, slot))
        if consumer is None:
            consumer = self._consumers[process, slot] = Consumer(process, slot)
            cell = consumer.cell
            cell[CLAIMED] = cell[RECALLED] = cell[DONE] = cell[OTHERS] = cell[GOT] = 0
            process.uses[self] = None
        return consumer

    def _settle(self, consumer: Consumer) -> None:
        """Let go of what now belongs to the consumer."""
        if self._counts:
            fresh = consumer.cell[DONE] - consumer.done
            consumer.done += fresh
            for _ in range(fresh):
                if not self._mark(consumer):
                    self._mark_any(consumer.process)
            return
        got = consumer.cell[GOT]
        while consumer.first <= got and consumer.held:
            item = consumer.held.popleft()
            consumer.first += 1
            self.hub.release(item.size)

    def _mark(self, consumer: Consumer) -> bool:
        """Mark the first item as done that the consumer has claimed; False if there is none."""
        if not consumer.held or consumer.first > consumer.cell[CLAIMED]:
            return False
        item = consumer.held.popleft()
        consumer.first += 1
        self.hub.release(item.size)
        self._finished()
        return True

    def _mark_any(self, process: Process) -> None:
        """task_done() without an item of the caller's own: it means one of its process, or of any."""
        for consumer in sorted(self._consumers.values(), key=lambda each: each.process is not process):
            if self._mark(consumer):
                consumer.cell[OTHERS] += 1
                later = Timer(partial(self._settle, consumer))  # it may be done by now and not have seen this
                self.hub.at(monotonic() + SETTLE, later)
                return
        if self._unfinished:
            self._finished()

    def _finished(self) -> None:
        self._unfinished -= 1
        while self._joining and not self._unfinished:
            first(self._joining).finish(None)

    def _take_back(self, consumer: Consumer, claimed: int) -> None:
        """Put what a consumer holds beyond ``claimed`` to the front."""
        held = consumer.held
        while held and consumer.last > claimed:
            self._items.appendleft(held.pop())

    def _undo(self, consumer: Consumer) -> None:
        """The last answer was not seen."""
        self._take_back(consumer, consumer.cell[CLAIMED])
        self._deliver()

    def _look_after(self, consumer: Consumer) -> None:
        consumer.holding = Timer(partial(self._held, consumer))
        self.hub.at(consumer.since + HOLD, consumer.holding)

    def _held(self, consumer: Consumer) -> None:
        consumer.holding = None
        if consumer.last > consumer.kept:
            if monotonic() < consumer.since + HOLD:
                self._look_after(consumer)
            else:
                self._recall(consumer)

    def _recall(self, consumer: Consumer) -> None:
        if consumer.recall is None:
            consumer.recall = Timer(partial(self._recalled, consumer))
            consumer.recalls += 1
            if consumer.is_far:
                consumer.process.tell_recall(consumer.slot, consumer.last, consumer.recalls)
                return
            consumer.cell[RECALLED] = consumer.last
            self.hub.at(monotonic() + SETTLE, consumer.recall)

    def _recalled(self, consumer: Consumer) -> None:
        """What is claimed stays held until the consumer has got it: it may be about to see that it was too late."""
        consumer.recall = None
        self._settle(consumer)
        self._take_back(consumer, consumer.kept)
        self._deliver()
        if consumer.is_far and not any(each.recall for each in self._consumers.values()):
            for get in self._getting:
                if get.asked:
                    self.hub.at(get.asked, get)  # nobody can give it anything


class Get(Wait):
    __slots__ = ("asked", "consumer", "want")

    def __init__(self, queue: Queue, peer: Peer, timeout: float | None, consumer: Consumer, want: int) -> None:
        super().__init__(peer, queue._getting, timeout)
        self.consumer = consumer
        self.want = want
        self.asked = 0.0  # when it would be over but for recalls that are to be answered

    def due(self) -> None:
        self.finish(None)


class Put(Wait):
    """``items``: None if they are to be sent again, since the hub keeps no more for those who wait."""

    __slots__ = ("items", "shared", "size")

    def __init__(self, queue: Queue, peer: Peer, timeout: float | None, items: list[Item], again: bool) -> None:
        super().__init__(peer, queue._putting, timeout)
        if again:
            queue._putting.move_to_end(self, last=False)
        hub = queue.hub
        size = sum(item.size for item in items)
        keep = timeout == 0 or hub.parked + size <= hub.limit // PARKS  # it does not wait for long
        self.items: list[Item] | None = items if keep else None
        self.size = size if keep else 0
        self.shared = queue
        hub.parked += self.size

    def leave(self) -> None:
        super().leave()
        self.items = None  # its time may come much later
        self.shared.hub.parked -= self.size
        self.size = 0

    def due(self) -> None:
        hub = self.shared.hub
        self.shared.admit()  # there may be room by now
        if self.done:
            return
        if hub.bytes > hub.limit or not self.shared._maxsize:
            self.fail(
                HubFull(
                    f"the hub holds {hub.bytes} bytes, and its limit is {hub.limit}: consumers do not keep up; "
                    "give the queue a maxsize, or let more processes consume"
                )
            )
        else:
            self.finish(False)
