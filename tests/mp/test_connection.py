"""Pipes, connections and listeners: multiprocessing's promises, and that ends travel and hear of each other's death."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import threading
from array import array
from collections.abc import Callable
from functools import partial
from multiprocessing import AuthenticationError, BufferTooShort
from multiprocessing import connection as standard
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fiberexec import FiberExecutor, mp
from fiberexec._serialize import dumps, loads
from fiberexec.mp import connection
from fiberexec.mp._hubconnection import HubConnection
from fiberexec.mp.connection import Client, Connection, ConnectionLost, Listener, make_pipe

LARGE = [1 << 16, (1 << 20) + 3]
LOCAL, HUB = "local", "elsewhere"  # backends: what carries their pipes
both = pytest.mark.parametrize("carrier", [LOCAL, HUB], indirect=True)  # a test without it is about descriptors
_backend = LOCAL


@pytest.fixture(autouse=True)
def carrier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What Pipe() makes in this test."""
    backend: str = getattr(request, "param", LOCAL)
    monkeypatch.setitem(globals(), "_backend", backend)
    return backend


def Pipe(duplex: bool = True) -> tuple[Connection, Connection]:
    return make_pipe(duplex, _backend)


def of_the(carrier: str) -> type[Connection]:
    return HubConnection if carrier == HUB else Connection


@pytest.fixture(autouse=True)
def folder_of_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """multiprocessing would make one and keep it to the end."""
    monkeypatch.setitem(mp.current_process()._config, "tempdir", str(tmp_path))  # type: ignore[attr-defined]


def sending(end: Connection, *values: object) -> threading.Thread:
    def send() -> None:
        for value in values:
            end.send(value)

    return in_thread(send)


def in_thread(function: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=function)
    thread.start()
    return thread


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


class Unloadable:
    def __reduce__(self) -> tuple[object, ...]:
        return int, ("not a number",)


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


# -- ends that travel


def travelled(obj: Any) -> Any:
    return loads(*dumps(obj))


def echo(end: Connection) -> None:
    try:
        while True:
            end.send(end.recv())
    except EOFError:
        end.close()


@both
def test_a_child_talks_to_its_parent_and_each_hears_the_other_end() -> None:
    ours, theirs = Pipe()
    process = mp.Process(target=echo, args=(theirs,))
    process.start()
    theirs.close()
    for value in (1, b"x" * LARGE[1], lambda: 7):
        ours.send(value)
        assert dumps(ours.recv()) is not None
    ours.close()
    process.join(60)
    assert process.exitcode == 0

    ours, theirs = Pipe()
    process = mp.Process(target=theirs.send, args=("all",))
    process.start()
    theirs.close()
    assert ours.recv() == "all"
    with pytest.raises(EOFError):
        ours.recv()
    process.join(60)
    ours.close()


@both
def test_ends_travel_through_pipes_tasks_and_results() -> None:
    def work(carrier: Connection) -> Connection:
        end = carrier.recv()
        end.send("from the task")
        reader, writer = Pipe(duplex=False)
        writer.send("made there")
        return reader

    carrier, other = Pipe()
    reader, writer = Pipe(duplex=False)
    with FiberExecutor(1) as executor, carrier, reader:
        future = executor.submit(work, other)
        carrier.send(writer)
        writer.close()
        other.close()
        assert reader.recv() == "from the task"
        result = future.result(60)
        assert (result.readable, result.writable) == (True, False)
        assert result.recv() == "made there"
        result.close()
    for end in (carrier, reader, result):
        assert end.closed


@both
def test_what_was_pickled_outlives_the_object_and_arrives_once(carrier: str) -> None:
    one, other = Pipe()
    pickled = dumps(other)
    other.close()
    one.send(1)
    with loads(*pickled) as arrived, one:
        assert type(arrived) is of_the(carrier) and arrived.recv() == 1
        with pytest.raises(OSError, match="unpickled once"):
            loads(*pickled)
        arrived.send(2)
        assert one.recv() == 2
    with pytest.raises(pickle.PicklingError, match="closed"):
        dumps(one)


def test_plain_pickle_and_subclasses_travel_as_well() -> None:
    class Mine(Connection):
        pass

    one, other = Pipe()
    with one, other, pickle.loads(pickle.dumps(other)) as again, Mine(os.dup(other.fileno())) as mine, travelled(mine) as last:
        for end in (again, last):
            end.send("x")
            assert one.recv() == "x"


def test_sockets_and_connections_of_multiprocessing_travel() -> None:
    one, other = standard.Pipe()
    with one, other, travelled(other) as again:
        again.send(lambda: 5)
        assert one.recv()() == 5
    left, right = socket.socketpair()
    with left, right, travelled(right) as same:
        assert (same.family, same.type, same.proto) == (right.family, right.type, right.proto)
        same.sendall(b"hello")
        assert left.recv(5) == b"hello"


@both
def test_more_ends_than_a_message_can_carry_arrive_all() -> None:
    one, other = Pipe()
    pairs = [Pipe(duplex=False) for _ in range(260)]
    with one, other:
        thread = sending(one, [writer for _, writer in pairs])
        arrived = other.recv()
        thread.join()
        for number, (end, (reader, writer)) in enumerate(zip(arrived, pairs)):
            end.send(number)
            assert reader.recv() == number
            for each in (end, reader, writer):
                each.close()


@both
def test_ends_that_arrive_as_bytes_or_cannot_be_unpickled_are_closed() -> None:
    one, other = Pipe()
    with one, other:
        for receive, error in ((other.recv_bytes, None), (other.recv, ValueError)):
            reader, writer = Pipe(duplex=False)
            one.send([writer] if error is None else [writer, Unloadable()])
            one.send("next")
            writer.close()
            if error is None:
                message = receive()
                with pytest.raises(OSError, match="unpickled once"):
                    loads(message)
            else:
                with pytest.raises(error):
                    receive()
            with reader, pytest.raises(EOFError):
                reader.recv()
            assert other.recv() == "next"


@both
def test_ends_in_a_message_that_cannot_be_pickled_are_not_kept() -> None:
    one, other = Pipe()
    reader, writer = Pipe(duplex=False)
    with one, other, reader:
        for refuse in (one.send, dumps):
            with pytest.raises(pickle.PicklingError):
                refuse([writer, threading.Lock()])
        writer.close()
        with pytest.raises(EOFError):
            reader.recv()


# -- ends whose process dies


@both
@pytest.mark.parametrize("reads", [True, False])
def test_an_end_that_was_under_way_to_a_killed_process_is_heard(reads: bool) -> None:
    carrier, theirs = Pipe()
    reader, writer = Pipe(duplex=False)

    def child() -> None:
        for end in (carrier, reader, writer):
            end.close()
        kept = theirs.recv() if reads else None
        theirs.send(1)
        signal.pause()
        del kept

    pid = forked(child)
    theirs.close()
    with carrier, reader:
        carrier.send(writer)
        writer.close()
        assert carrier.recv() == 1
        assert not reader.poll()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with pytest.raises(EOFError):
            reader.recv()


def forked(*calls: Callable[[], object]) -> int:
    pid = os.fork()
    if not pid:
        signal.alarm(60)
        try:
            for call in calls:
                call()
        finally:
            os._exit(0)
    return pid


def test_a_process_that_is_killed_half_way_through_a_send_is_heard() -> None:
    ours, theirs = Pipe()
    pid = forked(ours.close, partial(theirs.send, bytes(64 << 20)))
    theirs.close()
    assert ours.poll(60)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with ours:
        for call in (ours.recv, ours.recv_bytes):
            with pytest.raises(EOFError):
                call()


@both
def test_a_sender_hears_that_its_reader_was_killed() -> None:
    ours, theirs = Pipe()
    pid = forked(ours.close, partial(theirs.send, "here"), signal.pause)
    theirs.close()
    assert ours.recv() == "here"

    def kill() -> None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    thread = in_thread(kill)
    with ours:
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            ours.send(bytes(64 << 20))
        with pytest.raises(EOFError):
            ours.recv()
    thread.join()


@both
def test_a_child_that_is_killed_is_heard_whether_it_has_the_end_yet_or_not() -> None:
    for wait in (True, False):
        ours, theirs = Pipe()
        process = mp.Process(target=echo, args=(theirs,))
        process.start()
        theirs.close()
        if wait:
            ours.send(1)
            assert ours.recv() == 1
        process.kill()
        with ours:
            assert ours.poll(60)
            with pytest.raises(EOFError):
                ours.recv()
        process.join(60)
