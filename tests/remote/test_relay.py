"""Relays: whatever goes in at one end comes out of the other, and a slow reader holds up nobody but his own writer."""

from __future__ import annotations

import random
import select
import socket
from collections.abc import Callable, Iterator

import pytest

from fiberexec import _platform
from fiberexec._relay import PIECE, WINDOW, Relays
from fiberexec._session import CLOSE, CREDIT, DATA, OPEN, Packet, Session
from fiberexec._stream import ProtocolError

KERNEL = 1 << 20  # bytes that the buffers of a socketpair may hold


class Side:
    """One end of a session, with a loop of its own."""

    def __init__(self, key: bytes) -> None:
        self.session = Session(key)
        self.calls: dict[int, Callable[[int], None]] = {}
        self.poll = select.poll()
        self.opened: list[int] = []
        self.relays = Relays(self.session.push, self, self.opened.append)

    def follow(self, fd: int, events: int, call: Callable[[int], None]) -> None:
        self.calls[fd] = call
        self.poll.register(fd, events)

    def unfollow(self, fd: int) -> None:
        del self.calls[fd]
        self.poll.unregister(fd)

    def turn(self) -> bool:
        ready = self.poll.poll(0)
        for fd, events in ready:
            if fd in self.calls:
                self.calls[fd](events)
        return bool(ready)


class Wire:
    """Two sides, and what carries their messages: as many in a turn as one wants."""

    def __init__(self) -> None:
        self.sides = Side(b"k" * 16), Side(b"k" * 16)
        self.made: list[socket.socket] = []

    def channel(self, number: int = 2) -> tuple[socket.socket, socket.socket]:
        """The outer ends of a channel; they do not block."""
        outer = []
        for side in self.sides:
            ours, theirs = _platform.stream_pair()
            side.relays.add(number, theirs)
            outer.append(socket.socket(fileno=ours.detach()))
            outer[-1].setblocking(False)
        self.made += outer
        return outer[0], outer[1]

    def turn(self) -> bool:
        busy = [side.turn() for side in self.sides]
        for side, other in (self.sides, self.sides[::-1]):
            busy.append(side.session.has_output)
            for packet in other.session.accept(b"".join(side.session.take())):
                other.relays.handle(packet)
        return any(busy)

    def settle(self) -> None:
        """Go on until nothing moves."""
        for _ in range(1000):
            if not self.turn():
                return
        pytest.fail("it never becomes quiet")


@pytest.fixture
def wire() -> Iterator[Wire]:
    made = Wire()
    yield made
    for side in made.sides:
        side.relays.close()
        assert not side.calls and not side.relays.channels
    for sock in made.made:
        sock.close()


def read_all(sock: socket.socket) -> bytes:
    found = bytearray()
    try:
        while data := sock.recv(1 << 20):
            found += data
    except BlockingIOError:
        pass
    return bytes(found)


def fill(wire: Wire, sock: socket.socket) -> int:
    """Write until nobody takes more; returns how many bytes that were."""
    count = 0
    while True:
        try:
            count += sock.send(bytes(1 << 16))
        except BlockingIOError:
            wire.settle()
            if not select.select([], [sock], [], 0)[1]:
                return count


def test_bytes_arrive_whole_and_in_order_both_ways_at_once(wire: Wire) -> None:
    seed = 11
    print("seed", seed)
    chance = random.Random(seed)
    ends = wire.channel()
    sent = [chance.randbytes(6 << 20) for _ in ends]
    rest = [memoryview(data) for data in sent]
    arrived = [bytearray(), bytearray()]
    while rest[0] or rest[1] or len(arrived[0]) < len(sent[1]) or len(arrived[1]) < len(sent[0]):
        for i, end in enumerate(ends):
            if rest[i]:
                try:
                    rest[i] = rest[i][end.send(rest[i][: chance.choice([1, 1000, 1 << 18])]) :]
                except BlockingIOError:
                    pass
            if chance.random() < 0.5:
                arrived[i] += read_all(end)
        wire.turn()
    assert arrived[0] == sent[1] and arrived[1] == sent[0]


def test_a_slow_consumer_holds_up_its_own_writer_within_bounds(wire: Wire) -> None:
    slow_in, slow_out = wire.channel(2)
    quick_in, quick_out = wire.channel(4)
    taken = fill(wire, slow_in)
    assert taken <= WINDOW + 4 * KERNEL
    kept = sum(sum(map(len, relay._out)) for side in wire.sides for relay in side.relays.channels.values())
    assert kept + sum(side.session.backlog for side in wire.sides) <= WINDOW
    assert not wire.turn()  # and nobody is busy meanwhile
    quick_in.sendall(b"quick")
    wire.settle()
    assert quick_out.recv(100) == b"quick"
    arrived = 0
    while arrived < taken:
        arrived += len(read_all(slow_out))
        wire.turn()
    wire.settle()
    assert slow_in.send(b"more") == 4


def test_what_was_written_before_the_end_arrives_before_it(wire: Wire) -> None:
    left, right = wire.channel()
    count = fill(wire, left)
    left.close()
    arrived = 0
    while arrived < count:
        wire.turn()
        data = read_all(right)
        arrived += len(data)
    wire.settle()
    assert right.recv(1) == b""
    assert not any(side.relays.channels for side in wire.sides)


def test_an_end_with_data_unread_ends_the_channel_and_what_its_other_side_sent_last_arrives(wire: Wire) -> None:
    left, right = wire.channel()
    left.sendall(b"never read")
    wire.settle()
    right.sendall(b"last words")
    right.close()  # with data unread: the kernel resets the connection
    wire.settle()
    assert left.recv(100) == b"last words"
    assert left.recv(100) == b""
    assert not any(side.relays.channels for side in wire.sides)


def test_an_end_that_nobody_reads_any_more_does_not_make_the_loop_busy(wire: Wire) -> None:
    left, right = wire.channel()
    fill(wire, left)
    right.close()
    wire.settle()  # it fails if it goes on for ever
    assert not any(side.relays.channels for side in wire.sides)
    with pytest.raises(OSError):
        left.sendall(bytes(10 << 20))


def test_both_ends_may_close_at_once(wire: Wire) -> None:
    left, right = wire.channel()
    left.sendall(b"a")
    right.sendall(b"b")
    left.close()
    right.close()
    wire.settle()
    assert not any(side.relays.channels for side in wire.sides)


def test_the_end_is_told_after_everything_is_written(wire: Wire) -> None:
    left, right = wire.channel()
    count = fill(wire, left)
    told: list[int] = []
    arrived = 0
    wire.sides[1].relays.channels[2].at_close = lambda: told.append(arrived)
    left.close()
    while not told:
        wire.turn()
        arrived += len(read_all(right))
    assert count - arrived <= KERNEL  # what the kernel has taken


def test_a_writer_that_has_gone_is_not_waited_for_though_its_child_keeps_the_end_open(wire: Wire) -> None:
    left, right = wire.channel()
    heir = left.dup()
    count = fill(wire, left)
    left.close()
    wire.sides[0].relays.channels[2].finish()
    arrived = 0
    while arrived < count:
        arrived += len(read_all(right))
        wire.turn()
    wire.settle()
    assert right.recv(1) == b"" and not wire.sides[0].relays.channels
    heir.close()


def test_a_channel_is_opened_from_the_other_side(wire: Wire) -> None:
    ours, theirs = _platform.stream_pair()
    wire.sides[0].relays.open(9, theirs)
    wire.settle()
    assert wire.sides[1].opened == [9]
    ours.close()
    wire.settle()


def packet(kind: int, data: bytes = b"", channel: int = 2) -> Packet:
    return Packet(kind, channel, data)


@pytest.mark.parametrize(
    "wrong",
    [
        [packet(DATA, bytes(PIECE))] * 9,
        [packet(DATA, b"x"), packet(CLOSE), packet(DATA, b"x")],
        [packet(99)],
        [packet(CREDIT, bytes(7) + b"\xff")],
    ],
    ids=["more than the window", "after the end", "of no kind", "credit without end"],
)
def test_what_breaks_the_rules_is_a_protocol_error(wire: Wire, wrong: list[Packet]) -> None:
    wire.channel()
    fill_socket = bytes(1 << 16)
    try:
        while True:
            wire.sides[0].relays.channels[2]._socket.send(fill_socket)  # so that nothing can be delivered
    except BlockingIOError:
        pass
    with pytest.raises(ProtocolError):
        for each in wrong:
            wire.sides[0].relays.handle(each)


def test_packets_for_channels_that_have_ended_are_left_alone(wire: Wire) -> None:
    for kind in (DATA, CREDIT, CLOSE):
        wire.sides[0].relays.handle(Packet(kind, 77, b"x"))
    wire.sides[0].relays.handle(Packet(OPEN, 77, b""))
    assert wire.sides[0].opened == [77]
