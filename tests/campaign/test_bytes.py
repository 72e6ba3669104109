"""Random bytes and mutated frames on every channel: none is accepted, none crashes or hangs the reader.

    channel                         how it is reached here
    any stream                      Stream.feed(), receive() and receive_one()
    worker -> driver                an executor whose backend plays workers that answer with garbage
    driver -> worker                a forked process that is a real worker
    driver -> fork server           a forked process that is a real fork server
    fork server -> driver           LocalBackend.poll()

Out-of-band buffers are data that the stream does not sum: mutations leave their bytes alone.
"""

from __future__ import annotations

import os
import random
import select
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from garbage import any_frame, garbage

from fiberexec import FiberExecutor, _config, _forkserver, _platform, _worker
from fiberexec import _messages as messages
from fiberexec._stream import ProtocolError, Stream, pack
from fiberexec.backends import base
from fiberexec.backends.local import LocalBackend

BOUND = 10.0  # seconds after which a reader that has not said anything hangs
Maker = Callable[[random.Random], bytes]
Inputs = Callable[[int, Maker], Iterator[bytes]]


# -- the stream itself


def frames_of(reader: str, stream: Stream) -> list[Any]:
    """All that a stream delivers until it refuses or the peer has closed."""
    found: list[Any] = []
    try:
        while True:
            found += [stream.receive_one()] if reader == "receive_one" else stream.receive()
    except (ProtocolError, EOFError, BlockingIOError):
        return found


def frames_in(data: bytes) -> list[Any]:
    """All that feed() delivers from ``data``, which comes in two parts."""
    found: list[Any] = []
    stream = Stream(None)  # type: ignore[arg-type]
    half = len(data) // 2
    try:
        for part in (data[:half], data[half:]):
            found += stream.feed(part)
    except ProtocolError:
        pass
    return found


@pytest.mark.parametrize("reader", ["feed", "receive", "receive_one"])
def test_a_stream_delivers_no_frame_from_garbage(
    reader: str, size: Callable[[int, int], int], rng: random.Random
) -> None:
    for _ in range(size(10_000, 500_000) if reader == "feed" else size(2_000, 100_000)):
        data = garbage(rng, *any_frame(rng))
        if reader == "feed":
            found = frames_in(data)
        else:
            ours, theirs = socket.socketpair()
            with ours, theirs:
                theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
                theirs.sendall(data)
                theirs.close()
                ours.settimeout(BOUND if reader == "receive_one" else 0.0)
                found = frames_of(reader, Stream(ours))
        assert not found, data


def test_what_follows_garbage_is_not_delivered_and_what_comes_before_is(rng: random.Random) -> None:
    for _ in range(200):
        good = b"".join(pack(7, b"good"))
        ours, theirs = socket.socketpair()
        with ours, theirs:
            stream = Stream(ours)
            theirs.sendall(good)
            assert stream.receive() == [(7, b"good", [])]
            frame = b"".join(pack(7, rng.randbytes(50)))
            theirs.sendall(frame[:20] + bytes([frame[20] ^ 1]) + frame[21:] + good)
            theirs.close()
            assert frames_of("receive", stream) == []


@pytest.mark.parametrize("value", [os.system, print, Stream, ValueError("x"), random.Random, 1j])
def test_a_body_that_names_anything_is_refused(value: object) -> None:
    import pickle

    with pytest.raises(ProtocolError):
        messages.decode(pickle.dumps(value, 5))


# -- worker -> driver


class Garbler:
    """A backend whose workers answer their first task with garbage, and go when they are killed."""

    name = "garbler"
    host = "nowhere"
    largest = base.Pool("nowhere", base.Resources(1.0, 1 << 30, 0))
    default_workers = 1
    idle_timeout = None
    same_host = True

    def __init__(self, answer: Callable[[int], bytes | None]) -> None:
        self._answer = answer  # None: the right one
        self._events: deque[base.JobEvent] = deque()
        self._ends: dict[int, socket.socket] = {}
        self._wake = os.pipe()
        self._players: list[threading.Thread] = []
        self.lives = 0

    def launch(self, workers: Sequence[int]) -> None:
        for worker in workers:
            ours, theirs = socket.socketpair()
            self._tell(base.Started(worker, 10**6 + worker, self.host, ours, self.largest, "job"))
            self.lives += 1
            player = threading.Thread(target=self._play, args=(worker, theirs, self.lives))
            self._players = [one for one in self._players if one.is_alive()] + [player]
            player.start()

    def _play(self, worker: int, sock: socket.socket, life: int) -> None:
        with sock:
            stream = Stream(sock)
            version = ".".join(map(str, sys.version_info[:2]))
            while True:
                try:
                    kind, body, _ = stream.receive_one()
                    if kind == messages.SETUP:
                        ready = (messages.VERSION, version, 1, self.host, None)
                        stream.send(messages.READY, messages.encode(ready))
                    elif kind == messages.TASKS:
                        number = messages.decode(body)[2][0][0]
                        answer = self._answer(number)
                        if answer is not None:
                            sock.sendall(answer)
                            break
                        stream.send(messages.RESULTS, messages.encode([result(number, "right")]))
                    elif kind == messages.DRAIN:
                        break
                except (OSError, EOFError):
                    break
        self._tell(base.Ended(worker, base.Exit(-9), 1))

    def _tell(self, event: base.JobEvent) -> None:
        self._events.append(event)
        os.write(self._wake[1], b"x")

    def signal(self, worker: int, number: int, group: bool) -> None:
        pass  # they go by themselves

    def probe(self, worker: int) -> None:
        pass

    def peek(self, worker: int) -> base.Cell | None:
        return None

    def recall(self, worker: int, number: int) -> None:
        pass

    def fds(self) -> Sequence[int]:
        return self._wake[:1]

    def wakeup(self) -> float | None:
        return None

    def poll(self) -> list[base.JobEvent]:
        if select.select([self._wake[0]], [], [], 0)[0]:
            os.read(self._wake[0], 4096)
        found = []
        while self._events:
            found.append(self._events.popleft())
        return found

    def close(self) -> None:
        for player in self._players:
            player.join(BOUND)
        for fd in self._wake:
            os.close(fd)

    def forked(self) -> None:
        pass


def result(number: int, value: object) -> tuple[Any, ...]:
    import pickle

    return number, 1, messages.VALUE, pickle.dumps(value), 0, 0.001


def test_the_manager_accepts_no_result_from_garbage(size: Callable[[int, int], int], rng: random.Random) -> None:
    rest = size(1_000, 50_000)

    def answer(number: int) -> bytes | None:
        nonlocal rest
        rest -= 1
        if rest < 0:
            return None
        return garbage(rng, b"".join(pack(messages.RESULTS, messages.encode([result(number, "wrong")]))))

    backend = Garbler(answer)
    with FiberExecutor(1, backend=backend, max_worker_losses=10**9) as ex:
        assert ex.submit(abs, 1).result(size(60, 1200)) == "right"
        assert ex.stats().done == 1
    assert backend.lives >= size(1_000, 50_000)


# -- driver -> worker, driver -> fork server


def in_a_child(run: Callable[[], None]) -> int:
    """Fork; the child leads a session, says nothing, and never comes back."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            for fd in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
            run()
        finally:
            os._exit(0)
    return pid


def assert_it_ends(pid: int, data: bytes) -> None:
    deadline = time.monotonic() + BOUND
    pause = 0.0002
    while not os.waitpid(pid, os.WNOHANG)[0]:
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            pytest.fail(f"hangs after {data!r}")
        time.sleep(pause)
        pause = min(2 * pause, 0.05)


def everything(sock: socket.socket) -> bytes:
    sock.settimeout(BOUND)
    found = b""
    try:
        while data := sock.recv(65536):
            found += data
    except ConnectionResetError:
        pass
    return found


def setup() -> bytes:
    message = {
        "path": sys.path,
        "argv": [],
        "cwd": "/",
        "env": {},
        "log_levels": {"root": 30},
        "prefix": False,
        "initializer": None,
    }
    return b"".join(pack(messages.SETUP, messages.encode(message)))


def task() -> bytes:
    """A task that answers."""
    import pickle

    unit = (1, 1, 1, 5, 0, 1, messages.CALL, pickle.dumps(((1,), {})), 0, None)
    return b"".join(pack(messages.TASKS, messages.encode(([(5, pickle.dumps(abs), 0)], [], [unit]))))


def ask_a_worker(data: bytes) -> bytes:
    """What a worker says to it."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            cell = memoryview(bytearray(8 * _platform.CELL_WORDS)).cast("Q")

            def run() -> None:
                ours.close()
                _worker.Worker(theirs, cell).main()

            pid = in_a_child(run)
        try:
            ours.sendall(data)
            ours.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it has refused already
        answer = everything(ours)
        assert_it_ends(pid, data)
    return answer


def test_a_worker_runs_nothing_from_garbage(size: Callable[[int, int], int], rng: random.Random) -> None:
    assert b"FX" in ask_a_worker(setup() + task()), "not even the right frames are answered"
    ready = ask_a_worker(setup())
    for _ in range(size(200, 10_000)):
        if rng.randrange(2):
            data, right = garbage(rng, setup()), b""
        else:
            data, right = setup() + garbage(rng, task()), ready
        found = len(ask_a_worker(data))
        assert abs(found - len(right)) <= (8 if right else 0), data  # READY holds a pid, of so many bytes or so many more


def ask_a_fork_server(data: bytes, cells: int) -> bytes:
    ours, theirs = socket.socketpair()
    alive, lifeline = os.pipe()
    own, workers = socket.socketpair()
    with ours, own, workers:
        with theirs:

            def run() -> None:
                ours.close()
                own.close()
                os.close(lifeline)
                server = _forkserver.ForkServer(theirs, cells, alive)
                try:
                    server.run()
                finally:
                    server.end()

            pid = in_a_child(run)
        os.close(alive)
        try:
            socket.send_fds(ours, [data], [workers.fileno()])
            ours.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        answer = everything(ours)
        os.close(lifeline)
        assert_it_ends(pid, data)
    return answer


def test_a_fork_server_does_nothing_from_garbage(size: Callable[[int, int], int], rng: random.Random) -> None:
    cells = _platform.make_cells(4)
    try:
        fork = b"".join(pack(messages.FORK, messages.encode((1, 0))))
        kill = b"".join(pack(messages.SIGNAL, messages.encode((1, 9, True))))
        assert b"FX" in ask_a_fork_server(fork, cells), "not even the right frame is answered"
        for _ in range(size(200, 10_000)):
            data = garbage(rng, rng.choice([fork, kill]))
            assert ask_a_fork_server(data, cells) == b"", data
    finally:
        os.close(cells)


# -- fork server -> driver


def test_the_driver_believes_no_fork_server_that_sends_garbage(
    size: Callable[[int, int], int], rng: random.Random
) -> None:
    exited = b"".join(pack(messages.EXITED, messages.encode((1, 9, "", False))))
    forked = b"".join(pack(messages.FORKED, messages.encode((1, os.getpid()))))
    settings = _config.load()
    for _ in range(size(4_000, 200_000)):
        data = garbage(rng, rng.choice([exited, forked]))
        backend = LocalBackend(settings)
        ours, theirs = socket.socketpair()
        with theirs:
            theirs.sendall(data)
        ours.setblocking(False)
        backend._control, backend._stream = ours, Stream(ours)
        backend._lifeline, backend._cells_fd = os.open(os.devnull, os.O_RDONLY), os.open(os.devnull, os.O_RDONLY)
        deadline = time.monotonic() + BOUND
        while backend.fds():
            assert backend.poll() == [], data
            assert time.monotonic() < deadline, data
