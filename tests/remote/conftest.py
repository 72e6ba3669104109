"""What the tests of remote workers share: jobs that are watched, and a client that speaks to the hub as it likes."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from fiberexec import FiberExecutor, _launcher
from fiberexec._hub import launch
from fiberexec.backends.base import Job, JobEnded
from fiberexec.testing._agents import AgentBackend

LIMIT = 30.0  # seconds after which a test that waits gives up
_HELLO = b"\0SP\0\0\x30\0\0"  # of nng's requester, on any stream


@pytest.fixture
def until() -> Callable[..., Any]:
    """Ask until the answer is true, and return it; fail after ``within`` seconds."""

    def ask(question: Callable[[], Any], within: float = LIMIT, what: str = "") -> Any:
        deadline = time.monotonic() + within
        while not (answer := question()):
            if time.monotonic() > deadline:
                pytest.fail(f"not so after {within:g} seconds: {what or question}")
            time.sleep(0.005)
        return answer

    return ask


@pytest.fixture
def make() -> Iterator[Callable[..., FiberExecutor]]:
    """Makes executors whose workers are in jobs; whatever still runs there when the test ends is killed."""
    made: list[FiberExecutor] = []

    def make_one(workers: int = 1, **options: Any) -> FiberExecutor:
        made.append(FiberExecutor(workers, **{"backend": "agents", **options}))
        return made[-1]

    yield make_one
    for executor in made:
        executor.kill_workers()
        executor.shutdown()


class Jobs:
    """The jobs that were started: their credentials, their agents, and what those started."""

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.rewrite: Callable[[dict[str, Any]], None] | None = None  # changes credentials
        self.silent = False  # nothing is started: the test itself plays the agent
        self.backends: list[Any] = []

    def agents(self) -> list[psutil.Process]:
        """Those that are there, in the order of their start."""
        found = [process.pid for backend in self.backends for process in list(backend._processes.values())]
        there = []
        for pid in sorted(found):
            with suppress(psutil.NoSuchProcess):
                there.append(psutil.Process(pid))
        return there

    def below(self) -> list[psutil.Process]:
        """All processes of all jobs."""
        found = []
        for agent in self.agents():
            try:
                found += [agent, *agent.children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
        return found


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Jobs:
    """Watches what is started from now on."""
    seen = Jobs()
    start, terminate = AgentBackend.start, AgentBackend.terminate
    silent: set[str] = set()

    def watched(backend: AgentBackend, job: Job) -> None:
        seen.started.append(json.loads(job.credentials))
        if seen.rewrite is not None:
            seen.rewrite(seen.started[-1])
            job = job._replace(credentials=json.dumps(seen.started[-1]).encode())
        if backend not in seen.backends:
            seen.backends.append(backend)
        if seen.silent:
            silent.add(job.id)
        else:
            start(backend, job)

    def ended(backend: AgentBackend, names: Sequence[str]) -> None:
        for name in silent.intersection(names):
            silent.discard(name)
            backend._ended.put(JobEnded(name))
        terminate(backend, names)

    monkeypatch.setattr(AgentBackend, "start", watched)
    monkeypatch.setattr(AgentBackend, "terminate", ended)
    return seen


def hub_pid() -> int:
    return launch._pid


@pytest.fixture
def hub() -> Callable[[], psutil.Process]:
    """The hub of this program."""
    return lambda: psutil.Process(hub_pid())


@pytest.fixture
def authority() -> Callable[[], Any]:
    """Who signs the certificates of this program."""

    def get() -> Any:
        launcher = _launcher._launcher
        assert launcher is not None
        return launcher._authority

    return get


class Client:
    """A connection to the hub, made as the test wants it; closed by the test, or with it."""

    def __init__(
        self,
        folder: Path,
        url: str,
        ca: str,
        certificate: str | None = None,
        key: str | None = None,
        tls: bool = True,
        hello: bytes | None = _HELLO,
    ) -> None:
        host, _, port = url.rpartition("//")[2].rpartition(":")
        raw = socket.create_connection((host, int(port)), LIMIT)
        self.sock: Any = raw
        self._numbers = 0
        try:
            if tls:
                context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cadata=ca)
                if certificate is not None and key is not None:
                    file = folder / f"{os.urandom(4).hex()}.pem"
                    file.write_text(certificate + key)
                    context.load_cert_chain(file)
                self.sock = context.wrap_socket(raw, server_hostname="hub")
            if hello is not None:
                self.sock.sendall(hello)
        except BaseException:
            raw.close()
            raise

    def send(self, message: bytes, length: int | None = None) -> None:
        """A request, in nng's way."""
        self._numbers += 1
        body = struct.pack(">I", 0x80000000 | self._numbers) + message
        self.sock.sendall(struct.pack(">Q", len(body) if length is None else length) + body)

    def receive(self) -> bytes | None:
        """The next answer; None if the hub has closed the connection."""
        try:
            head = self._exactly(8)
            return head and self._exactly(*struct.unpack(">Q", head))[4:]
        except OSError:
            return None

    def greet(self) -> bytes:
        """What the hub says first."""
        return self._exactly(8)

    def _exactly(self, count: int) -> bytes:
        found = b""
        while len(found) < count:
            data = self.sock.recv(count - len(found))
            if not data:
                return b""
            found += data
        return found

    def is_closed(self) -> bool:
        """Whether the hub closes the connection, having said no more than how it greets."""
        try:
            while data := self.sock.recv(1 << 16):
                if data.strip(b"\0") not in (b"SP\0\0\x31", b""):
                    return False
        except (ConnectionError, ssl.SSLError):
            pass
        return True

    def close(self) -> None:
        self.sock.close()


@pytest.fixture
def connect(tmp_path: Path) -> Iterator[Callable[..., Client]]:
    """Makes clients: see Client."""
    made: list[Client] = []

    def make_one(url: str, ca: str, *args: Any, **options: Any) -> Client:
        made.append(Client(tmp_path, url, ca, *args, **options))
        return made[-1]

    yield make_one
    for client in made:
        client.close()


@pytest.fixture
def stopped() -> Iterator[Callable[[int], None]]:
    """Stops processes; they go on when the test ends, or when it says so by SIGCONT."""
    pids: list[int] = []

    def stop(pid: int) -> None:
        pids.append(pid)
        os.kill(pid, signal.SIGSTOP)

    yield stop
    for pid in pids:
        try:
            os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            pass


@pytest.fixture
def target(make: Any, jobs: Any) -> Any:
    """A program with an agent at work: its credentials."""
    executor = make(1, driver_timeout=30)
    assert executor.submit(pow, 2, 5).result(LIMIT) == 32
    told = jobs.started[0]
    told["executor"] = executor
    return told


@pytest.fixture
def at_work(target: Any, hub: Any, jobs: Any) -> Any:
    """Call it when everything has been tried: the program goes on as before, with the same hub, agent and worker."""
    executor = target["executor"]
    before = hub().pid, [agent.pid for agent in jobs.agents()], executor.submit(os.getpid).result(LIMIT)

    def check() -> None:
        began = time.monotonic()
        worker = executor.submit(os.getpid).result(LIMIT)
        assert time.monotonic() - began < 20
        assert (hub().pid, [agent.pid for agent in jobs.agents()], worker) == before

    return check
