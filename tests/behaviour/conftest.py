"""The executors under test, one for each backend that is reachable, and a board on which tasks and tests meet."""

from __future__ import annotations

import json
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import elsewhere
import pytest

from fiberexec import FiberExecutor, _platform

LIMIT = elsewhere.LIMIT  # nothing takes a tenth of it
# An agent that believes to be on the machine of test_resources; what comes behind it in the command is ignored.
MACHINE = """
import runpy, sys
from fiberexec import _platform
_platform.cpu_count = lambda: 4
_platform.memory_total = lambda: 8 << 30
devices = _platform.gpu_devices
_platform.gpu_devices = lambda: devices() or ("0", "1", "2")
sys.argv = ["agent", "-"]
runpy.run_module("fiberexec._agent", run_name="__main__", alter_sys=True)
"""
# The local backend without what only Linux has, for what could depend on it: how workers are watched, stopped and ended.
PORTABLE = {"test_elastic", "test_end", "test_no_waiting", "test_standard", "test_terminate", "test_timeouts"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        module = metafunc.module.__name__.rpartition(".")[2]
        one_host = metafunc.definition.get_closest_marker("one_host")
        backends = ["local", "agents", *(["portable"] if module in PORTABLE else []), *([] if one_host else elsewhere.FURTHER)]
        metafunc.parametrize("backend", backends, indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a backend that can be reached from here."""
    if request.param in elsewhere.NAMES:
        elsewhere.enter(request.param, request, monkeypatch)
        return elsewhere.backend(request.param)
    if request.param == "portable":
        monkeypatch.setattr(_platform, "LINUX", False)
        monkeypatch.setenv("FIBEREXEC_PORTABLE", "1")
        return "local"
    return str(request.param)


@pytest.fixture(scope="session")
def space() -> Iterator[str]:
    yield from elsewhere.spaces()


@pytest.fixture
def make_executor(backend: str, request: pytest.FixtureRequest) -> Iterator[Callable[..., FiberExecutor]]:
    """Makes executors on the backend; whatever still runs there when the test ends is killed."""
    made: list[FiberExecutor] = []

    def make(*args: Any, **options: Any) -> FiberExecutor:
        if backend == "agents" and request.module.__name__.endswith("test_resources"):
            # What its workers share is one pool: in jobs, that of one job.
            options["workers_per_job"] = args[0]
            options["backend_options"] = {"prefix": [sys.executable, "-c", MACHINE]}
        made.append(FiberExecutor(*args, backend=backend, **options))
        return made[-1]

    yield make
    for executor in made:
        executor.kill_workers()
        executor.shutdown()


@pytest.fixture
def executor(make_executor: Callable[..., FiberExecutor]) -> FiberExecutor:
    """An executor with two workers."""
    return make_executor(2)


class Board:
    """Named lists of values that tasks and the test read and append to; it travels, and reaches the test from anywhere."""

    def __init__(self, host: str, port: int) -> None:
        self._address = host, port

    def post(self, name: str, value: Any = None) -> None:
        """Append a value (of JSON) to a list."""
        self._ask("post", name, value)

    def wait(self, name: str, count: int = 1) -> list[Any]:
        """Return a list as soon as it has ``count`` values."""
        found: list[Any] = self._ask("wait", name, count)
        return found

    def read(self, name: str) -> list[Any]:
        """Return a list as it is."""
        return self.wait(name, 0)

    def meet(self, name: str, count: int) -> None:
        """Return when ``count`` tasks are here at the same time."""
        self.post(name)
        self.wait(name, count)

    def _ask(self, *request: Any) -> Any:
        with socket.create_connection(self._address, LIMIT) as connection, connection.makefile("rw") as file:
            file.write(json.dumps(request) + "\n")
            file.flush()
            answer = file.readline()
        if not answer:
            raise TimeoutError(f"nobody answered {request} on the board in {LIMIT:g} seconds")
        return json.loads(answer)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = False  # server_close() waits for them
    request_queue_size = 256

    def __init__(self) -> None:
        self.lists: dict[str, list[Any]] = {}
        self.changed = threading.Condition()
        self.closing = False
        super().__init__((elsewhere.address(), 0), _Handler)


class _Handler(socketserver.StreamRequestHandler):
    server: _Server

    def handle(self) -> None:
        line = self.rfile.readline()
        if not line:
            return
        verb, name, value = json.loads(line)
        with self.server.changed:
            found = self.server.lists.setdefault(name, [])
            if verb == "post":
                found.append(value)
                self.server.changed.notify_all()
            elif not self.server.changed.wait_for(lambda: self.server.closing or len(found) >= value, LIMIT):
                return
            answer = json.dumps(found if verb == "wait" else None)
        try:
            self.wfile.write(answer.encode() + b"\n")
        except OSError:
            pass  # whoever asked has been killed


@pytest.fixture
def board() -> Iterator[Board]:
    with _Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield Board(*server.server_address[:2])  # type: ignore[arg-type]
        with server.changed:
            server.closing = True
            server.changed.notify_all()
        server.shutdown()
        thread.join()


@pytest.fixture
def eventually() -> Callable[..., Any]:
    """Ask until the answer is true, and return it; fail after LIMIT seconds."""

    def ask(question: Callable[[], Any], what: str = "") -> Any:
        deadline = time.monotonic() + LIMIT
        while True:
            answer = question()
            if answer:
                return answer
            if time.monotonic() > deadline:
                pytest.fail(f"not so after {LIMIT:g} seconds: {what or question}")
            time.sleep(0.002)

    return ask
