"""Shared objects whose users have neither memory nor descriptors in common: processes in jobs, the hub behind their agents."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from fiberexec import FiberExecutor, LaunchError, _config, mp
from fiberexec._hub import launch
from fiberexec.backends.base import Job
from fiberexec.mp import connection
from fiberexec.mp._hubconnection import HubConnection
from fiberexec.testing._agents import AgentBackend

from .helpers import LIMIT, LONG, ended, eventually, process


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


@pytest.mark.one_host("it counts the launches of agents")
@pytest.mark.parametrize("final", [False, True])
def test_a_launch_that_fails_for_a_while_is_tried_again(final: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = []

    def start(backend: AgentBackend, job: Job, real: Any = AgentBackend.start) -> None:
        starts.append(job.id)
        if len(starts) < 3:
            raise LaunchError("the engine is away", final=final)
        real(backend, job)

    monkeypatch.setattr(AgentBackend, "start", start)
    if final:
        with pytest.raises(LaunchError, match="the engine is away"):
            process(print)
        assert len(starts) == 1
    else:
        assert ended(process(print)) == [0]
        assert len(starts) == 3


@pytest.mark.one_host("no agent is ever launched")
def test_a_launch_that_waits_for_its_next_try_can_be_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = threading.Event()

    def start(backend: AgentBackend, job: Job) -> None:
        failed.set()
        raise LaunchError("the engine is away")

    monkeypatch.setattr(AgentBackend, "start", start)
    helper = process(print)
    assert failed.wait(LIMIT)
    helper.terminate()
    assert ended(helper) == [-signal.SIGTERM]


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


@pytest.mark.one_host("the settings are those of one backend")
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


# -- whole jobs


@pytest.mark.one_host("the agent is killed here")
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
    assert time.monotonic() - began < 20
    assert ended(helper) == [0]
    manager.join()
