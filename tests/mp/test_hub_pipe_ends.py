"""Pipes through the hub: when an end closes, and who hears it."""

from __future__ import annotations

import gc
import os
import random
import signal
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from fiberexec import mp
from fiberexec._errors import HubLost
from fiberexec._hub import client, launch, pipes
from fiberexec._hub.peers import Process
from fiberexec._hub.wire import HUB
from fiberexec._serialize import dumps, loads
from fiberexec.mp import connection
from fiberexec.mp._hubconnection import pipe

from .helpers import LIMIT, MIB, close, forked, in_thread, killed

# -- ends that close


def test_an_end_that_is_collected_is_closed() -> None:
    one, other = pipe(True)
    pid = forked(other.close, lambda: one.poll(LIMIT) or os.abort())
    del other
    gc.collect()
    with one:
        assert os.waitpid(pid, 0)[1] == 0


def test_an_end_is_open_until_the_last_of_its_holders_has_closed() -> None:
    one, other = pipe(True)
    pid = forked(one.close, other.recv, partial(other.send, "still here"), other.recv)
    again = loads(*dumps(other))
    close(other, again)
    with one:
        one.send("speak")
        assert one.recv() == "still here"
        assert not one.poll()
        killed(pid)
        with pytest.raises(EOFError):
            one.recv()
        with pytest.raises(BrokenPipeError):
            one.send(1)


def test_an_end_under_way_is_open() -> None:
    one, other = pipe(True)
    queue = mp.SimpleQueue()
    queue.put(other)
    other.close()
    with one:
        one.send("kept")
        assert not one.poll()
        with queue.get() as arrived:
            assert arrived.recv() == "kept"
        with pytest.raises(EOFError):
            one.recv()


def test_ends_in_a_message_that_nobody_reads_are_closed() -> None:
    pairs = [pipe(True) for _ in range(2000)]  # each in a message of the one before
    for (one, _), (_, other) in pairwise(pairs):
        one.send(other)
        other.close()
    ends = [one for one, _ in pairs]
    last = ends.pop()
    close(*ends)
    assert not last.poll()
    pairs[0][1].close()
    with last, pytest.raises(EOFError):
        last.recv()


def test_senders_and_receivers_that_wait_hear_of_the_end() -> None:
    one, other = pipe(True)
    errors: list[BaseException] = []

    def meet(call: Callable[[], object]) -> None:
        try:
            while True:
                call()
        except Exception as error:
            errors.append(error)

    threads = [in_thread(partial(meet, call)) for call in (one.recv, partial(one.send, bytes(600_000)))]
    assert other.poll(LIMIT)
    other.close()
    for thread in threads:
        thread.join(LIMIT)
    assert sorted(type(error).__name__ for error in errors) == ["BrokenPipeError", "EOFError"]
    one.close()


def test_a_sender_that_is_killed_while_it_sends_leaves_whole_messages() -> None:
    one, other = pipe(True)
    pid = forked(one.close, *[partial(other.send, bytes(20 * MIB))] * 100)
    other.close()
    with one:
        assert one.recv() == bytes(20 * MIB)
        killed(pid)
        with pytest.raises(EOFError):
            for _ in range(4):
                assert one.recv() == bytes(20 * MIB)


def test_what_a_dead_process_received_is_not_delivered_again() -> None:
    one, other = pipe(True)
    told, tell = pipe(False)
    pid = forked(lambda: tell.send(other.recv()), signal.pause)
    with one, other, told, tell:
        one.send("first")
        one.send("second")
        assert told.recv() == "first"
        killed(pid)
        assert other.recv() == "second"
        assert not other.poll()


@pytest.mark.parametrize("seed", range(10))
def test_a_process_that_is_killed_at_any_time_leaves_whole_messages_and_no_open_end(seed: int) -> None:
    choice = random.Random(seed)
    one, other = pipe(True)

    def work() -> None:
        one.close()
        for number in range(10_000):
            reader, writer = pipe(False)
            other.send((number, bytes(choice.choice([10, 1000, 70_000, 2_000_000])), reader))
            reader.close()
            if choice.random() < 0.5:
                writer.close()

    pid = forked(work)
    other.close()
    readers = []
    for number in range(choice.randrange(12)):
        found, _, reader = one.recv()
        assert found == number
        readers.append(reader)
    killed(pid)
    with pytest.raises(EOFError):
        for number in range(len(readers), 10_000):
            found, _, reader = one.recv()
            assert found == number
            readers.append(reader)
    for reader in readers:
        assert reader.poll(LIMIT)
        with reader, pytest.raises(EOFError):
            reader.recv()
    one.close()


def test_the_hub_forgets_a_pipe_whose_ends_are_closed() -> None:
    hub: Any = SimpleNamespace(objects={}, processes={}, bytes=0, limit=MIB, release=lambda size: None)
    process = hub.processes[b"key"] = Process(b"key", 1)
    peer: Any = SimpleNamespace(process=process, buffers=[], undo=None)
    made = hub.objects[1] = pipes.Pipe(hub)
    made.do_open(peer, 1)
    for end in (0, 1):
        assert hub.objects and process.uses
        made.do_close(peer, end)
    assert not hub.objects and not process.uses


def test_a_call_that_is_interrupted_loses_no_message() -> None:
    class Interrupt(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupt

    one, other = pipe(True)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with one, other:
            for call in (other.recv, partial(other.poll, None), partial(connection.wait, [other])):
                signal.setitimer(signal.ITIMER_REAL, 0.05)
                with pytest.raises(Interrupt):
                    call()
            one.send(1)
            assert other.recv() == 1
            for data in (bytes(500_000), bytes(50_000)):
                signal.setitimer(signal.ITIMER_REAL, 0.1)
                sent = 0
                with pytest.raises(Interrupt):
                    while True:
                        one.send(data)
                        sent += 1
                for _ in range(sent):
                    assert other.recv() == data
                if other.poll():  # the one that was interrupted, at its end
                    assert other.recv() == data
                assert not other.poll()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_killed_hub_ends_every_call_with_its_reason() -> None:
    one, other = pipe(True)
    errors: list[BaseException] = []

    def meet(call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:
            errors.append(error)

    calls = one.recv, partial(one.poll, None), partial(connection.wait, [one])
    threads = [in_thread(partial(meet, call)) for call in calls]
    client.call("ping", HUB)
    os.kill(launch._pid, signal.SIGKILL)
    for thread in threads:
        thread.join(LIMIT)
    for call in (partial(one.send, 1), one.recv, partial(dumps, one)):
        meet(call)
    close(one, other)
    assert len(errors) == 6 and all(isinstance(error, HubLost) for error in errors[:5])
    assert "hub" in str(errors[5])
