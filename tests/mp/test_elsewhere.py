"""Shared objects whose users have neither memory nor descriptors in common: processes in jobs, the hub behind their agents."""

from __future__ import annotations

import ctypes
import gc
import os
import queue as standard
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from fiberexec import FiberExecutor, _config, mp
from fiberexec._hub import launch
from fiberexec.mp import connection
from fiberexec.mp._hubconnection import HubConnection

from .helpers import LIMIT, LONG, ended, eventually, process

BACKENDS = ["agents"]


@pytest.fixture(autouse=True, params=BACKENDS)
def elsewhere(request: pytest.FixtureRequest, backend: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FIBEREXEC_BACKEND", request.param)
    return str(request.param)


def agents() -> list[Any]:
    """The agents of this program's jobs."""
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if "fiberexec._agent" in child.cmdline():
                found.append(child)
        except psutil.Error:
            continue
    return found


def test_a_process_knows_that_it_is_in_a_job() -> None:
    def look(answer: Any) -> None:
        answer.put((launch.in_job(), mp.get_start_method(), os.getppid()))

    answer = mp.Queue()
    helper = process(look, answer)
    in_job, _, parent = answer.get(timeout=LIMIT)
    assert in_job and parent != os.getpid() and not launch.in_job()
    assert ended(helper) == [0]


def test_a_process_has_its_parents_environment_and_arguments_of_this_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(answer: Any) -> None:
        answer.put((os.environ.get("ADDED_LATER"), sys.argv))

    answer = mp.Queue()
    assert ended(process(print)) == [0]  # there is a backend now
    monkeypatch.setenv("ADDED_LATER", "y")
    monkeypatch.setattr(sys, "argv", ["program", "argument"])
    helper = process(look, answer)
    assert answer.get(timeout=LIMIT) == ("y", ["program", "argument"])
    assert ended(helper) == [0]


def test_what_a_process_starts_has_the_settings_of_its_parent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def look(answer: Any) -> None:
        settings = _config.load()
        answer.put(
            (settings.backend, settings.memory, settings.backend_options, settings.idle_timeout, settings.prefix_output)
        )

    def start(answer: Any) -> None:
        os.chdir("/")  # where no file of settings is
        process(look, answer).join()

    monkeypatch.chdir(tmp_path)
    text = 'memory = 64\nbackend_options = {address = "127.0.0.1"}\nprefix_output = true\nidle_timeout = 5.5\n'
    Path("fiberexec.toml").write_text(text)
    answer = mp.Queue()
    assert ended(process(start, answer)) == [0]
    assert answer.get(timeout=LIMIT) == ("agents", 64 << 20, {"address": "127.0.0.1"}, 5.5, True)
    monkeypatch.delenv("FIBEREXEC_BACKEND")
    child = mp.get_context("agents").Process(target=start, args=(answer,))
    child.start()
    assert ended(child) == [0]
    assert answer.get(timeout=LIMIT)[0] == "agents"


# -- queues


@pytest.mark.parametrize("kind", ["Queue", "JoinableQueue"])
def test_what_a_consumer_took_ahead_and_sits_on_goes_to_others(kind: str) -> None:
    def consume(source: Any, told: Any, go_on: Any) -> None:
        for _ in range(400):  # fast, so that it takes some ahead
            source.get()
        told.put("sits")
        go_on.wait()

    source, told, go_on = getattr(mp, kind)(), mp.Queue(), mp.Event()
    for number in range(1000):
        source.put(number)
    helper = process(consume, source, told, go_on)
    assert told.get(timeout=LIMIT) == "sits"
    assert sorted(source.get(timeout=LIMIT) for _ in range(600)) == list(range(400, 1000))
    with pytest.raises(standard.Empty):
        source.get_nowait()
    assert source.empty()
    go_on.set()
    assert ended(helper) == [0]


def test_who_does_not_want_to_wait_gets_what_a_consumer_does_not_need() -> None:
    def consume(source: Any, told: Any, go_on: Any) -> None:
        for _ in range(300):
            source.get()
        told.set()
        go_on.wait()

    source, told, go_on = mp.Queue(), mp.Event(), mp.Event()
    for number in range(500):
        source.put(number)
    helper = process(consume, source, told, go_on)
    assert told.wait(LIMIT)
    assert sorted(source.get_nowait() for _ in range(200)) == list(range(300, 500))
    go_on.set()
    assert ended(helper) == [0]


def test_several_consumers_get_every_item_once_and_fast() -> None:
    def consume(source: Any, results: Any) -> None:
        for item in iter(source.get, None):
            results.put(item)

    source, results = mp.Queue(), mp.Queue()
    helpers = [process(consume, source, results) for _ in range(3)]
    for number in range(5000):
        source.put(number)
    assert sorted(results.get(timeout=LIMIT) for _ in range(5000)) == list(range(5000))
    for _ in helpers:
        source.put(None)
    assert ended(*helpers) == [0] * 3


@pytest.mark.parametrize("kind", ["Queue", "JoinableQueue"])
def test_what_a_killed_consumer_had_got_stays_got_and_the_rest_comes_back_in_order(kind: str) -> None:
    def consume(source: Any, told: Any) -> None:
        for _ in range(300):
            source.get()
            if kind == "JoinableQueue":
                source.task_done()
        told.set()
        time.sleep(LONG)

    source, told = getattr(mp, kind)(), mp.Event()
    for number in range(700):
        source.put(number)
    victim = process(consume, source, told)
    assert told.wait(LIMIT)
    victim.kill()
    assert ended(victim) == [-signal.SIGKILL]
    assert [source.get(timeout=LIMIT) for _ in range(400)] == list(range(300, 700))
    assert source.empty()


def test_threads_of_a_job_that_end_give_back_what_they_took_ahead() -> None:
    def consume(source: Any, results: Any) -> None:
        def some() -> None:
            for _ in range(200):
                results.put(source.get())

        for _ in range(3):
            thread = threading.Thread(target=some)
            thread.start()
            thread.join()
            gc.collect()
        results.put(sorted(source.get() for _ in range(400)))

    source, results = mp.Queue(), mp.Queue()
    for number in range(1000):
        source.put(number)
    helper = process(consume, source, results)
    got = [results.get(timeout=LIMIT) for _ in range(600)]
    assert sorted(got + results.get(timeout=LIMIT)) == list(range(1000))
    assert ended(helper) == [0]


# -- both directions, nested


def test_what_a_process_makes_its_parent_uses_and_nested_ones_too() -> None:
    def grandchild(items: Any, end: Any, lock: Any, value: Any) -> None:
        with lock:
            value.value += 1
        items.put("from below")
        end.send(end.recv() * 2)

    def child(results: Any) -> None:
        made = mp.Queue(), *mp.Pipe(), mp.Lock(), mp.Value("i", 40), mp.Event(), mp.Barrier(2)
        items, ours, theirs, lock, value, event, barrier = made
        results.put((items, ours, lock, value, event, barrier))
        nested = process(grandchild, items, theirs, lock, value)
        theirs.close()
        ready = connection.wait([nested.sentinel], LIMIT)
        assert ready == [nested.sentinel] and nested.exitcode == 0
        barrier.wait(LIMIT)
        assert event.wait(LIMIT)

    results = mp.Queue()
    helper = process(child, results)
    items, end, lock, value, event, barrier = results.get(timeout=LIMIT)
    end.send(21)
    assert items.get(timeout=LIMIT) == "from below"
    assert end.recv() == 42
    with pytest.raises(EOFError):
        end.recv()
    with lock:
        assert value.value == 41
    barrier.wait(LIMIT)
    event.set()
    assert ended(helper) == [0]


def test_a_task_shares_objects_with_its_driver() -> None:
    def task(queue: Any) -> Any:
        queue.put("here")
        made = mp.Queue()
        made.put("there")
        time.sleep(0)  # the feeder may still have it: a task's end waits for nobody
        made.qsize()
        return made

    queue = mp.Queue()
    with FiberExecutor(1) as executor:
        made = executor.submit(task, queue).result(LIMIT)
        assert queue.get(timeout=LIMIT) == "here" and made.get(timeout=LIMIT) == "there"


def test_wait_takes_pipes_sentinels_and_sockets_in_a_job() -> None:
    def look(end: Any, results: Any) -> None:
        nested = process(time.sleep, LONG)
        ours, theirs = socket.socketpair()
        everything = [end, nested.sentinel, ours]
        found = [connection.wait(everything, 0.01)]
        theirs.send(b"x")
        found.append([everything.index(each) for each in connection.wait(everything, LIMIT)])
        ours.recv(1)
        results.put(None)
        found.append([everything.index(each) for each in connection.wait(everything, LIMIT)])
        end.recv()
        nested.kill()
        found.append([everything.index(each) for each in connection.wait(everything, LIMIT)])
        nested.join()
        ours.close()
        theirs.close()
        results.put(found)

    ours, theirs = mp.Pipe()
    results = mp.Queue()
    helper = process(look, theirs, results)
    assert results.get(timeout=LIMIT) is None
    ours.send("now")
    assert results.get(timeout=LIMIT) == [[], [2], [0], [1]]
    assert ended(helper) == [0]
    ours.close()
    theirs.close()


# -- what cannot travel


def test_a_descriptor_from_this_host_is_refused_there_and_its_other_end_hears() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(LIMIT)
        helper = process(print, theirs)
        theirs.close()
        assert ended(helper) == [1]
        assert ours.recv(1) == b""


def test_a_descriptor_from_a_job_is_refused_when_it_is_pickled() -> None:
    def child(results: Any) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            try:
                results.send(ours)
            except Exception as error:
                results.send(str(error))

    ours, theirs = mp.Pipe()
    helper = process(child, theirs)
    assert "stays on its host" in ours.recv()
    assert ended(helper) == [0]
    ours.close()
    theirs.close()


# -- listeners


def test_a_listener_in_a_job_is_reached_by_name_and_needs_the_key() -> None:
    def listen(address: Any) -> None:
        with connection.Listener(authkey=b"secret") as listener:
            address.put(listener.address)
            with pytest.raises(mp.AuthenticationError):
                listener.accept()
            with listener.accept() as client:
                client.send(client.recv() + 1)

    address = mp.Queue()
    helper = process(listen, address)
    name = address.get(timeout=LIMIT)
    with pytest.raises(mp.AuthenticationError):
        connection.Client(name, authkey=b"wrong")
    with connection.Client(name, authkey=b"secret") as client:
        client.send(1)
        assert client.recv() == 2
        with pytest.raises(EOFError):
            client.recv()
    assert ended(helper) == [0]
    with pytest.raises(ConnectionRefusedError):
        connection.Client(name)


def test_who_is_not_accepted_yet_hears_that_the_listener_was_killed() -> None:
    def listen(address: Any) -> None:
        with connection.Listener() as listener:
            address.put(listener.address)
            time.sleep(LONG)

    address = mp.Queue()
    victim = process(listen, address)
    with connection.Client(address.get(timeout=LIMIT)) as client:
        assert not client.poll(0.01)
        victim.kill()
        with pytest.raises(EOFError):
            client.recv()
    assert ended(victim) == [-signal.SIGKILL]


def test_a_listener_here_is_reached_from_a_job_and_closing_it_ends_accept() -> None:
    def call(name: str) -> None:
        with connection.Client(name) as client:
            client.send(os.getpid())

    with connection.Listener() as listener:
        helper = process(call, listener.address)
        with listener.accept() as client:
            assert isinstance(client, HubConnection)
            assert client.recv() == helper.pid
        errors: list[BaseException] = []

        def accept() -> None:
            try:
                listener._listener.accept()
            except OSError as error:
                errors.append(error)

        thread = threading.Thread(target=accept)
        thread.start()
    thread.join(LIMIT)
    assert len(errors) == 1
    assert ended(helper) == [0]


# -- Value and Array


class Body(ctypes.Structure):
    _fields_ = (("mass", ctypes.c_double), ("low", ctypes.c_int, 3), ("high", ctypes.c_int, 5), ("place", ctypes.c_int * 3))


def test_an_array_in_the_hub_has_what_a_ctypes_array_has() -> None:
    local = (ctypes.c_int * 6)(*range(6))
    array = mp.RawArray("i", range(6))
    for key in (0, -1, slice(None), slice(1, 4), slice(None, None, 2), slice(None, None, -1), slice(4, 1, -2), slice(3, 3)):
        assert array[key] == local[key], key
    array[1:3] = local[1:3] = [10, 20]
    array[-1] = local[-1] = 50
    assert list(array) == list(local) and len(array) == 6
    for wrong, error in ((lambda: array[6], IndexError), (lambda: array[-7], IndexError), (lambda: array["x"], TypeError)):
        with pytest.raises(error):
            wrong()
    with pytest.raises(ValueError):
        array[0:2] = [1, 2, 3]
    with pytest.raises(ValueError):
        array[::2] = [1, 2, 3]
    with pytest.raises(TypeError):
        array[0] = "x"
    text = mp.Array("c", 5)
    text.value = b"abc"
    assert text[0] == b"a" and text[1:3] == b"bc" and text.raw == b"abc\0\0"
    with pytest.raises(ValueError):
        text.raw = b"too long"


def test_structures_in_the_hub_are_written_field_by_field() -> None:
    bodies = mp.RawArray(Body, 2)
    bodies[1].mass = 2.5
    bodies[1].low, bodies[1].high = 2, -3
    bodies[1].place[2] = 7
    bodies[1].place[0:2] = [5, 6]
    assert (bodies[1].mass, bodies[1].low, bodies[1].high, bodies[1].place[:]) == (2.5, 2, -3, [5, 6, 7])
    assert (bodies[0].mass, bodies[0].low, bodies[0].place[:]) == (0, 0, [0, 0, 0])
    assert [body.mass for body in bodies] == [0, 2.5]
    with pytest.raises(AttributeError):
        bodies[0].weight = 1
    with pytest.raises(AttributeError):
        print(bodies[0].weight)


def test_large_arrays_are_read_and_written_in_parts() -> None:
    def double(array: Any) -> None:
        array[1000:200_000] = [2 * number for number in array[1000:200_000]]

    array = mp.RawArray("q", 300_000)
    array[:] = range(300_000)
    assert ended(process(double, array)) == [0]
    assert array[999] == 999 and array[1000] == 2000 and array[199_999] == 399_998 and array[200_000] == 200_000


def test_there_is_no_memory_to_look_into_and_that_is_said() -> None:
    value, array = mp.Value("i"), mp.Array("d", 3)
    for shared in (value, array):
        with pytest.raises(TypeError, match="other hosts"):
            shared.get_obj()
    numpy = pytest.importorskip("numpy")
    raw = mp.RawArray("d", 3)
    with pytest.raises(TypeError, match="other hosts"):
        numpy.asarray(raw)
    with pytest.raises(TypeError):
        numpy.frombuffer(raw)


def test_memory_of_a_jobs_own_host_is_had_from_the_local_context() -> None:
    def child(answer: Any) -> None:
        context = mp.get_context("local")
        array = context.Array("i", 3)

        def fill(array: Any) -> None:
            memoryview(array.get_obj()).cast("B").cast("i")[1] = 5

        helper = context.Process(target=fill, args=(array,))
        helper.start()
        helper.join()
        answer.put((helper.exitcode, array[:]))

    answer = mp.Queue()
    helper = process(child, answer)
    assert answer.get(timeout=LIMIT) == (0, [0, 5, 0])
    assert ended(helper) == [0]


def test_memory_goes_with_its_last_handle() -> None:
    from fiberexec._hub import client
    from fiberexec._hub.wire import HUB

    array = mp.RawArray("b", 100)
    id = array._memory._id
    del array
    with pytest.raises(KeyError):
        client.call("ping", HUB), client.call("read", id, 0, 1)


# -- whole jobs


def test_what_a_job_held_that_is_killed_with_its_agent_comes_back() -> None:
    def hold(lock: Any, end: Any, source: Any, barrier: Any, told: Any) -> None:
        lock.acquire()
        source.get()
        threading.Thread(target=barrier.wait, daemon=True).start()
        while not barrier.n_waiting:
            time.sleep(0.001)
        told.set()
        time.sleep(LONG)

    lock, source, barrier, told = mp.Lock(), mp.JoinableQueue(), mp.Barrier(2), mp.Event()
    ours, theirs = mp.Pipe()
    source.put("item")
    victim = process(hold, lock, theirs, source, barrier, told)
    theirs.close()
    assert told.wait(LIMIT)
    (agent,) = agents()
    agent.kill()
    with pytest.raises(EOFError):
        ours.recv()
    assert lock.acquire(timeout=LIMIT)
    assert source.get(timeout=LIMIT) == "item"
    with pytest.raises(threading.BrokenBarrierError):
        barrier.wait(LIMIT)
    victim.join(LIMIT)
    assert victim.exitcode not in (None, 0)
    lock.release()
    ours.close()


def test_a_process_that_is_killed_while_it_sends_leaves_whole_messages() -> None:
    def send(end: Any) -> None:
        while True:
            end.send(b"x" * 3_000_000)

    ours, theirs = mp.Pipe()
    victim = process(send, theirs)
    theirs.close()
    assert len(ours.recv()) == 3_000_000
    victim.kill()
    with pytest.raises(EOFError):
        while True:
            assert len(ours.recv()) == 3_000_000
    assert ended(victim) == [-signal.SIGKILL]
    ours.close()


def test_a_manager_is_reached_from_everywhere_and_its_death_is_heard() -> None:
    def use(numbers: Any, told: Any) -> None:
        numbers.append(os.getpid())
        told.put(numbers)
        try:
            while True:
                numbers.append(0)
        except mp.managers.ManagerLost:
            told.put("lost")

    told = mp.Queue()
    manager = mp.Manager()
    assert manager.address.startswith("fiberexec-hub:")
    numbers = manager.list()
    helper = process(use, numbers, told)
    again = told.get(timeout=LIMIT)
    assert again[0] == helper.pid
    manager._process.kill()
    assert told.get(timeout=LIMIT) == "lost"
    began = time.monotonic()
    with pytest.raises(mp.managers.ManagerLost):
        eventually(lambda: again.append(1))
    assert time.monotonic() - began < 5
    assert ended(helper) == [0]
    manager.join()
