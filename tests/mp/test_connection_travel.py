"""Ends of pipes travel, and their processes die."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import threading
from functools import partial
from multiprocessing import connection as standard
from typing import Any

import pytest

from fiberexec import FiberExecutor, mp
from fiberexec._serialize import dumps, loads
from fiberexec.mp.connection import Connection

from .carriers import LARGE, Pipe, both, of_the
from .helpers import Unloadable, forked, in_thread, sending

pytestmark = pytest.mark.usefixtures("carrier", "folder_of_sockets")


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
