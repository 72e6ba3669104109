"""Pipes that pass through the hub: where they are chosen, what they hold, and what becomes of them when processes die.

What they share with the other pipes is in test_connection.py.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from multiprocessing import connection as standard
from types import SimpleNamespace
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from fiberexec import mp
from fiberexec._errors import HubFull, HubLost
from fiberexec._hub import client, launch, pipes
from fiberexec._hub.server import Process
from fiberexec._hub.wire import HUB
from fiberexec._serialize import dumps, loads
from fiberexec.mp import connection
from fiberexec.mp._hubconnection import HubConnection, pipe

LIMIT = 30.0  # seconds after which a test that waits gives up
MIB = 1 << 20


def in_thread(function: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=function)
    thread.start()
    return thread


def eventually(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def forked(*calls: Callable[[], object]) -> int:
    pid = os.fork()
    if not pid:
        signal.alarm(60)
        try:
            for call in calls:
                call()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    return pid


def killed(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def close(*ends: Any) -> None:
    for end in ends:
        end.close()


# -- which pipes these are


def test_the_backend_decides_when_a_pipe_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    for backend in ("local", "elsewhere"):
        monkeypatch.setenv("FIBEREXEC_BACKEND", backend)
        ends = [*mp.Pipe(), *connection.Pipe(), *mp.get_context("fork").Pipe(False), *mp.get_context("local").Pipe()]
        made += ends
        expected = [backend == "elsewhere"] * 6 + [False] * 2
        assert [isinstance(end, HubConnection) for end in ends] == expected
        assert all(isinstance(end, standard.Connection) for end in ends)
    close(*made)


def test_there_is_no_descriptor_and_that_is_said() -> None:
    one, other = pipe(True)
    with one, other, pytest.raises(OSError, match="no descriptor"):
        one.fileno()
    with pytest.raises(OSError, match="closed"):
        one.fileno()


# -- waiting


def test_poll_takes_its_time_and_no_more() -> None:
    one, other = pipe(True)
    with one, other:
        began = time.monotonic()
        assert not one.poll(0.1)
        assert 0.1 <= time.monotonic() - began < LIMIT
        assert not one.poll(-1)
        thread = in_thread(partial(other.send, 1))
        assert one.poll(None) and one.poll()
        thread.join()


def test_wait_takes_them_with_sockets_and_sentinels() -> None:
    ends = [pipe(True) for _ in range(3)]
    plain = mp.get_context("local").Pipe()
    process = mp.Process(target=signal.pause)
    process.start()
    objects = [process.sentinel, plain[0], *(one for one, _ in ends)]
    assert connection.wait(objects, 0) == connection.wait(objects, 0.05) == []
    for timeout in (0, LIMIT, None):
        ends[1][1].send(1)
        assert connection.wait(objects, timeout) == [ends[1][0]]
        assert ends[1][0].recv() == 1
    for act, expected in ((partial(plain[1].send, 1), plain[0]), (partial(ends[2][1].send, 2), ends[2][0])):
        found: list[Any] = []
        thread = in_thread(lambda: found.extend(connection.wait(objects, LIMIT)))  # noqa: B023
        act()
        thread.join()
        assert found == [expected]
        expected.recv()
    process.kill()
    assert connection.wait(objects, LIMIT) == [process.sentinel]
    process.join(LIMIT)
    ends[0][1].close()
    assert connection.wait(objects[1:], LIMIT) == [ends[0][0]]
    with pytest.raises(EOFError):
        ends[0][0].recv()
    close(*plain, *(end for pair in ends for end in pair))
    with pytest.raises(OSError, match="closed"):
        connection.wait([ends[0][0]], 0)


def test_waiting_uses_no_time_of_the_processor() -> None:
    one, other = pipe(True)
    with one, other:
        one.poll()
        hub = psutil.Process(launch._pid)
        before = sum(hub.cpu_times()[:2]) + time.process_time()
        assert connection.wait([one], 0.3) == []
        assert sum(hub.cpu_times()[:2]) + time.process_time() - before < 0.1


# -- what is under way


def test_a_sender_waits_while_the_pipe_is_full_and_the_other_way_is_free() -> None:
    one, other = pipe(True)
    message = bytes(100_000)
    sent: list[int] = []

    def send() -> None:
        for number in range(30):
            one.send_bytes(message)
            sent.append(number)

    with one, other:
        thread = in_thread(send)
        eventually(lambda: len(sent) >= pipes.CAPACITY // 101_000)
        other.send("back")
        assert one.recv() == "back"
        assert len(sent) <= pipes.CAPACITY // len(message)
        for _ in range(30):
            assert other.recv_bytes() == message
        thread.join()
        assert not other.poll()


def test_the_hub_holds_no_more_than_one_large_message_for_each_way() -> None:
    one, other = pipe(True)
    message = bytes(32 * MIB)
    with one, other:
        threads = [in_thread(partial(one.send_bytes, message)) for _ in range(6)]
        assert other.poll(LIMIT)
        hub = psutil.Process(launch._pid)
        peak = 0
        for _ in range(6):
            assert other.poll(LIMIT)
            peak = max(peak, hub.memory_info().rss)
            assert other.recv_bytes() == message
        for thread in threads:
            thread.join()
        assert peak < 4 * 32 * MIB
        eventually(lambda: hub.memory_info().rss < 2 * 32 * MIB)


def test_a_hub_without_memory_says_so() -> None:
    one, other = pipe(True)
    with one, other:
        client.call("limit", HUB, 10 * MIB)
        with pytest.raises(HubFull, match="limit"):
            one.send(bytes(11 * MIB))
        one.send(bytes(9 * MIB))
        with pytest.raises(HubFull, match="limit"):
            other.send(bytes(2 * MIB))
        assert other.recv() == bytes(9 * MIB)
        other.send(bytes(2 * MIB))
        assert one.recv() == bytes(2 * MIB)


def test_a_hundred_pipes_work_at_once() -> None:
    pairs = [pipe(True) for _ in range(100)]

    def work(number: int) -> None:
        one, other = pairs[number]
        for value in range(10):
            one.send((number, value))
            assert other.recv() == (number, value)
        other.send(number)

    threads = [in_thread(partial(work, number)) for number in range(100)]
    left = {one: number for number, (one, _) in enumerate(pairs)}
    while left:
        ready = connection.wait(left, LIMIT)
        assert ready
        for one in ready:
            assert one.recv() == left.pop(one)
    for thread in threads:
        thread.join()
    close(*(end for pair in pairs for end in pair))


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
