"""The driver's end of a worker: what it sends, and what it need not."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from fiberexec import _messages as messages
from fiberexec._connection import Connection, Payload
from fiberexec._scheduler import Profile, Task
from fiberexec._scheduler.events import Send
from fiberexec._serialize import FunctionRef
from fiberexec._stream import Stream

BIG = 4 << 20  # bytes: more than a socket takes at once


@pytest.fixture
def ends() -> Iterator[tuple[Connection, Stream]]:
    """A connection, and the worker's end of its stream."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    with ours, theirs:
        yield Connection(1, 0, "here", Stream(ours), True), Stream(theirs)


def send(number: int, size: int = BIG) -> Send:
    function = FunctionRef.__new__(FunctionRef)
    function.id, function.data, function.buffers = number, b"function", ()
    task = Task(number, Profile(), Payload(function, messages.CALL, bytes(size)))
    return Send(1, [(number, task, 0, 1)], None)


def arrived(connection: Connection, worker: Stream) -> list[int]:
    """The numbers of all that comes out while the connection writes as there is room."""
    found: list[int] = []
    written = False
    while True:
        try:
            for _, body, _ in worker.receive():
                found += [unit[0] for unit in messages.decode(body)[2]]
        except BlockingIOError:
            if written:
                return found
            written = connection.write()


def test_what_is_sent_arrives_in_order(ends: tuple[Any, Any]) -> None:
    connection, worker = ends
    connection.outbox.extend(send(number, size) for number, size in enumerate((10, BIG, 10, BIG, BIG, 10), 1))
    assert not connection.write()
    assert arrived(connection, worker) == [1, 2, 3, 4, 5, 6]
    assert connection.write(), "nothing is left"


def test_what_is_recalled_before_there_is_room_for_it_is_not_sent(ends: tuple[Any, Any]) -> None:
    connection, worker = ends
    connection.outbox.append(send(1))
    assert not connection.write()
    for number in range(2, 50):  # each is recalled, and another sent in its place, while the first is on its way
        connection.outbox.append(send(number))
        assert not connection.write()
        assert connection.stream.backlog <= BIG + 1000, "what may be recalled is packed"
        connection.recalled = number - 1
    assert arrived(connection, worker) == [1, 49]


def test_the_backlog_is_what_is_left_to_be_sent(ends: tuple[Any, Any]) -> None:
    connection, worker = ends
    stream = connection.stream
    for size in (10, 1000, BIG, 0, 70_000, BIG):
        stream.send_some(1, bytes(10), [bytes(size)])
        stream.queue(2, bytes(size % 5000))
        assert stream.backlog == sum(map(len, stream._out))
    assert stream.backlog > BIG
    while not stream.flush():
        assert stream.backlog == sum(map(len, stream._out)) > 0
        worker.receive()
    assert stream.backlog == 0


@pytest.mark.parametrize(
    "said",
    [
        (messages.RESULTS, [(1, 1, messages.VALUE, None, 0, 0.1)]),
        (messages.RESULTS, [(1, 1, messages.VALUE, b"", 0, 10**400)]),
        (messages.RESULTS, [(1, 1, messages.VALUE, b"", 0, float("nan"))]),
        (messages.RESULTS, 5),
        (messages.READY, ()),
    ],
    ids=repr,
)
def test_a_stream_that_is_given_up_holds_its_writer_up_no_longer(ends: tuple[Any, Any], said: tuple[int, Any]) -> None:
    """Whoever passes on what a worker says could never pass on its end either."""
    connection, worker = ends
    kind, message = said
    worker.queue(kind, messages.encode(message))
    worker.queue(messages.RESULTS, bytes(8 << 20))
    assert not worker.flush()
    assert connection.receive(1) == ([], [], True)
    with pytest.raises(BrokenPipeError):
        worker.flush()
