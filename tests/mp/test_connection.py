"""Pipe, Connection, wait, Listener and Client: messages."""

from __future__ import annotations

import os
import pickle
import socket
import threading
from array import array
from functools import partial
from multiprocessing import AuthenticationError, BufferTooShort
from multiprocessing import connection as standard

import numpy as np
import pytest

from fiberexec.mp import connection
from fiberexec.mp.connection import Client, Connection, ConnectionLost, Listener

from .carriers import LARGE, Pipe, both
from .helpers import Unloadable, in_thread, sending

pytestmark = pytest.mark.usefixtures("carrier", "folder_of_sockets")


@both
@pytest.mark.parametrize("duplex", [True, False])
@pytest.mark.parametrize(
    "value",
    [None, 1, "text", b"x", [1, {"a": (2.5, None)}], bytes(LARGE[0] - 30), b"x" * LARGE[1], list(range(100_000))],
    ids=lambda value: f"{type(value).__name__}-{len(value) if hasattr(value, '__len__') else value}",
)
def test_what_is_sent_is_received(value: object, duplex: bool) -> None:
    receiver, sender = Pipe(duplex)
    with receiver, sender:
        thread = sending(sender, value, "next")
        assert receiver.recv() == value
        assert receiver.recv() == "next"
        thread.join()


@both
@pytest.mark.parametrize("size", LARGE)
def test_arrays_arrive_writable_whatever_their_size(size: int) -> None:
    receiver, sender = Pipe()
    with receiver, sender:
        sent = np.arange(size, dtype="u1").reshape(-1, 1)
        sent.flags.writeable = False
        thread = in_thread(lambda: sender.send({"array": sent, "raw": bytearray(size)}))
        received = receiver.recv()
        thread.join()
        assert (received["array"] == sent).all()
        received["array"][0] = 7
        assert received["raw"] == bytearray(size)


@both
def test_functions_travel_by_value() -> None:
    offset = 5
    receiver, sender = Pipe()
    with receiver, sender:
        sender.send(lambda x: x + offset)
        assert receiver.recv()(2) == 7


@both
def test_what_cannot_be_pickled_raises_and_sends_nothing() -> None:
    receiver, sender = Pipe()
    with receiver, sender:
        with pytest.raises(pickle.PicklingError):
            sender.send((bytes(LARGE[1]), threading.Lock()))
        assert not receiver.poll()


@both
@pytest.mark.parametrize("size", [10, *LARGE])
def test_a_message_whose_unpickling_raises_costs_that_message_only(size: int) -> None:
    receiver, sender = Pipe()
    with receiver, sender:
        thread = sending(sender, (Unloadable(), bytes(size), Unloadable()), "next")
        with pytest.raises(ValueError, match="not a number"):
            receiver.recv()
        assert receiver.recv() == "next"
        thread.join()


@both
@pytest.mark.parametrize("size", [0, 1, 5000, *LARGE])
def test_bytes_and_objects_are_the_same_messages(size: int) -> None:
    one, other = Pipe()
    with one, other:
        data = os.urandom(size)

        def send() -> None:
            one.send(data)
            one.send_bytes(pickle.dumps(data))
            one.send_bytes(data)

        thread = in_thread(send)
        assert pickle.loads(other.recv_bytes()) == data
        assert other.recv() == data
        assert other.recv_bytes() == data
        thread.join()


@pytest.mark.parametrize("size", [100, LARGE[1]])
def test_an_end_talks_to_multiprocessing(size: int) -> None:
    ours, end = Pipe()
    theirs = standard.Connection(os.dup(end.fileno()))
    with ours, end, theirs:
        for sender, receiver in ((ours, theirs), (theirs, ours)):
            thread = in_thread(partial(sender.send, [bytes(size)]))
            assert receiver.recv() == [bytes(size)]
            thread.join()


@both
def test_send_bytes_takes_a_part_and_checks_it() -> None:
    one, other = Pipe()
    data = bytes(range(26))
    with one, other:
        for offset, size in ((0, None), (5, None), (7, 8), (26, None), (26, 0)):
            one.send_bytes(data, offset, size)
            assert other.recv_bytes() == data[offset : None if size is None else offset + size]
        for wrong in ((27,), (22, 5), (26, 1), (-1,), (4, -1)):
            with pytest.raises(ValueError):
                one.send_bytes(data, *wrong)
        with pytest.raises(TypeError):
            one.send_bytes("text")  # type: ignore[arg-type]


@both
@pytest.mark.parametrize("size", [10, LARGE[1] // 4])
def test_bytes_are_received_into_a_buffer(size: int) -> None:
    one, other = Pipe()
    with one, other:
        data = array("i", range(size))
        target = array("i", bytes(4 * (size + 3)))
        thread = in_thread(lambda: one.send_bytes(data))
        assert other.recv_bytes_into(target, 12) == 4 * size
        thread.join()
        assert target == array("i", [0, 0, 0]) + data
        for wrong in (-1, 4 * len(target) + 1):
            with pytest.raises(ValueError, match="offset"):
                other.recv_bytes_into(target, wrong)


@both
def test_a_message_that_does_not_fit_comes_with_the_exception() -> None:
    one, other = Pipe()
    with one, other:
        one.send_bytes(b"too long")
        one.send_bytes(b"next")
        with pytest.raises(BufferTooShort) as caught:
            other.recv_bytes_into(bytearray(4))
        assert caught.value.args == (b"too long",)
        assert other.recv_bytes() == b"next"


@both
def test_a_message_above_maxlength_closes_the_way_in() -> None:
    one, other = Pipe()
    with one, other:
        with pytest.raises(ValueError):
            other.recv_bytes(-1)
        one.send_bytes(b"12345")
        assert other.recv_bytes(5) == b"12345"
        one.send_bytes(b"123456")
        with pytest.raises(OSError, match="bad message length"):
            other.recv_bytes(5)
        with pytest.raises(OSError):
            other.recv_bytes()
        other.send(1)
        assert one.recv() == 1


def test_the_time_limit_of_other_sockets_is_not_theirs() -> None:
    socket.setdefaulttimeout(0.001)
    try:
        one, other = Pipe()
        with one, other:
            reader, writer = Pipe(duplex=False)
            one.send([writer])
            arrived = other.recv()[0]
            for end in (one, other, reader, arrived):
                assert os.get_blocking(end.fileno())
                end.close()
            writer.close()
    finally:
        socket.setdefaulttimeout(None)


@both
def test_arrays_of_bytes_are_sent_whole_whatever_their_shape() -> None:
    one, other = Pipe()
    with one, other:
        one.send_bytes(memoryview(bytes(range(12))).cast("B", (3, 4)))
        assert other.recv_bytes() == bytes(range(12))


@both
def test_one_way_pipes_refuse_the_other_way() -> None:
    reader, writer = Pipe(duplex=False)
    with reader, writer:
        writer.send(1)
        assert reader.recv() == 1
        assert (reader.readable, reader.writable, writer.readable, writer.writable) == (True, False, False, True)
        for wrong in (lambda: reader.send(2), writer.recv, writer.poll, lambda: reader.send_bytes(b""), writer.recv_bytes):
            with pytest.raises(OSError):
                wrong()


@both
def test_a_closed_end_raises_and_the_other_hears_it() -> None:
    one, other = Pipe()
    with other:
        with one:
            one.send("last")
        assert one.closed
        for call in (one.recv, one.recv_bytes, one.fileno, one.poll, lambda: one.send(1)):
            with pytest.raises(OSError, match="closed"):
                call()
        assert other.poll() and other.recv() == "last"
        assert other.poll()
        for call in (other.recv, other.recv_bytes, lambda: other.recv_bytes_into(bytearray(9))):
            with pytest.raises(EOFError):
                call()
        with pytest.raises(BrokenPipeError):
            other.send(1)


@pytest.mark.parametrize("duplex", [True, False])
@pytest.mark.parametrize("size", [10, LARGE[1]])
@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_an_end_that_is_half_way_through_a_message_ends_in_eof(duplex: bool, size: int, fraction: float) -> None:
    receiver, sender = Pipe(duplex)
    message = pickle.dumps(bytes(size))
    with receiver:
        with sender:
            os.write(sender.fileno(), len(message).to_bytes(4, "big") + message[: int(min(size, 20000) * fraction)])
        with pytest.raises(ConnectionLost):
            receiver.recv()
        with pytest.raises(EOFError):
            receiver.recv()


@both
def test_an_end_that_left_messages_unread_ends_in_eof() -> None:
    one, other = Pipe()
    with one:
        one.send("never read")
        other.send("read")
        other.close()
        assert one.recv() == "read"
        with pytest.raises(EOFError):
            one.recv()
        with pytest.raises(EOFError):
            one.recv()


@pytest.mark.parametrize("head", [b"\xff\xff\xff\xf0", b"\x80\x00\x00\x00"])
def test_garbage_is_no_message(head: bytes) -> None:
    one, other = Pipe()
    with one, other:
        os.write(one.fileno(), head)
        with pytest.raises(OSError, match="bad message length"):
            other.recv()


@both
def test_wait_gives_the_ends_that_are_ready() -> None:
    pairs = [Pipe() for _ in range(3)]
    assert connection.wait([one for one, _ in pairs], 0) == []
    pairs[1][1].send(1)
    pairs[2][1].close()
    ready = connection.wait([one for one, _ in pairs], 10)
    assert set(ready) == {pairs[1][0], pairs[2][0]}
    for pair in pairs:
        for end in pair:
            end.close()


@pytest.mark.parametrize("family", standard.families)  # type: ignore[attr-defined]
@pytest.mark.parametrize("authkey", [None, b"secret"])
def test_listeners_and_clients_meet(family: str, authkey: bytes | None) -> None:
    with Listener(family=family, authkey=authkey) as listener:
        clients: list[Connection] = []
        thread = in_thread(lambda: clients.append(Client(listener.address, authkey=authkey)))
        with listener.accept() as accepted:
            thread.join()
            with clients[0] as client:
                assert type(client) is type(accepted) is Connection
                client.send(lambda: 1729)
                assert accepted.recv()() == 1729
    with pytest.raises(OSError):
        listener.accept()


def test_a_client_without_the_key_is_refused() -> None:
    with Listener(authkey=b"right") as listener:
        errors: list[BaseException] = []

        def connect() -> None:
            try:
                Client(listener.address, authkey=b"wrong")
            except BaseException as error:
                errors.append(error)

        thread = in_thread(connect)
        with pytest.raises(AuthenticationError):
            listener.accept()
        thread.join()
        assert isinstance(errors[0], (AuthenticationError, EOFError, ConnectionResetError))
