"""The tunnel to a hub that jobs cannot reach: what it carries arrives, whole, however often its stream breaks."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from fiberexec import _tunnel
from fiberexec._session import KEY_SIZE

LIMIT = 60.0


class Ends:
    """Both ends in threads, an echo as the hub, and the streams between the ends."""

    def __init__(self) -> None:
        self.streams: list[socket.socket] = []
        self.made = threading.Condition()
        self.over = False
        self._hub = socket.create_server(("127.0.0.1", 0))
        self.agents, self._inner = _free(2)
        self.outer = _tunnel.OuterEnd(self.agents, self._inner)
        self.inner = _tunnel.InnerEnd(os.urandom(KEY_SIZE), self._hub.getsockname()[1], self._connect)
        self._threads = [threading.Thread(target=run) for run in (self._serve, self._outer, self._turn)]
        for thread in self._threads:
            thread.start()

    def _connect(self) -> socket.socket:
        stream = socket.create_connection(("127.0.0.1", self._inner), LIMIT)
        with self.made:
            self.streams.append(stream.dup())
            self.made.notify_all()
        return stream

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._hub.accept()
            except OSError:
                return
            thread = threading.Thread(target=_echo, args=(peer,))
            thread.start()
            self._threads.append(thread)

    def _outer(self) -> None:
        while not self.over:
            self.outer.turn()

    def _turn(self) -> None:
        while not self.over:
            self.inner.turn()

    def cut(self) -> None:
        """Break the newest stream, and wait for the next."""
        with self.made:
            count = len(self.streams)
            self.streams[-1].shutdown(socket.SHUT_RDWR)
            assert self.made.wait_for(lambda: len(self.streams) > count, LIMIT)

    def close(self) -> None:
        self.over = True
        self._hub.shutdown(socket.SHUT_RDWR)
        self._hub.close()
        for thread in self._threads[1:3]:
            thread.join()
        for end in (self.outer, self.inner):
            end.detach()
            end.relays.close()
        self.outer._agents.close()
        self.outer._streams.close()
        for stream in self.streams:
            stream.close()
        for thread in self._threads:
            thread.join(LIMIT)


def _free(count: int) -> list[int]:
    found = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in found]
    for each in found:
        each.close()
    return ports


def _echo(peer: socket.socket) -> None:
    with peer:
        try:
            while data := peer.recv(1 << 16):
                peer.sendall(data)
        except OSError:
            pass


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ends]:
    monkeypatch.setattr(_tunnel, "BEAT", 0.5)
    ends = Ends()
    with ends.made:
        assert ends.made.wait_for(lambda: ends.streams, LIMIT)
    yield ends
    ends.close()


def exchange(ends: Ends, size: int, seed: int, found: list[bool]) -> None:
    data = random.Random(seed).randbytes(size)
    with socket.create_connection(("127.0.0.1", ends.agents), LIMIT) as client:
        sender = threading.Thread(target=client.sendall, args=(data,))
        sender.start()
        got = bytearray()
        while len(got) < size:
            part = client.recv(1 << 16)
            if not part:
                break
            got += part
        sender.join()
    found.append(bytes(got) == data)


def test_what_goes_in_comes_out_and_back(ends: Ends) -> None:
    found: list[bool] = []
    for size in (1, 1000, 3 << 20):
        exchange(ends, size, size, found)
    assert found == [True] * 3


def test_a_stream_that_breaks_again_and_again_costs_nothing(ends: Ends) -> None:
    found: list[bool] = []
    threads = [threading.Thread(target=exchange, args=(ends, 4 << 20, seed, found)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        ends.cut()
    for thread in threads:
        thread.join()
    assert found == [True] * 4


def test_a_hub_that_does_not_listen_ends_the_connection(ends: Ends) -> None:
    ends.inner._port = _free(1)[0]
    with socket.create_connection(("127.0.0.1", ends.agents), LIMIT) as client:
        assert client.recv(1) == b""


class Full:
    """A listener of a process that has no descriptor for who comes first."""

    def __init__(self, door: Any) -> None:
        self.tries = 0
        self._door = door

    def __getattr__(self, name: str) -> Any:
        return getattr(self._door, name)

    def _accept(self) -> Any:
        self.tries += 1
        if self.tries == 1:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return self._door._accept()


@pytest.mark.parametrize("door", ["_agents", "_streams"])
def test_an_outer_end_without_descriptors_takes_who_waits_when_there_are_some(door: str, ends: Ends) -> None:
    found: list[bool] = []
    exchange(ends, 1, 1, found)
    full = Full(getattr(ends.outer, door))
    setattr(ends.outer, door, full)
    if door == "_streams":
        ends.cut()
    exchange(ends, 1000, 1, found)
    assert found == [True] * 2 and 2 <= full.tries < 10  # it did not try all the time


def test_an_inner_end_without_a_descriptor_ends_that_connection_and_no_other(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = _tunnel.socket
    failed: list[Any] = []

    def once(*arguments: Any, **named: Any) -> Any:
        if arguments and not failed:  # those that were accepted are given by number
            failed.append(arguments)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return made(*arguments, **named)

    monkeypatch.setattr(_tunnel, "socket", once)
    with socket.create_connection(("127.0.0.1", ends.agents), LIMIT) as client:
        assert client.recv(1) == b""
    found: list[bool] = []
    exchange(ends, 1000, 1, found)
    assert found == [True] and failed


def test_only_what_is_said_proves_that_the_other_end_is_there(ends: Ends) -> None:
    before = ends.inner.told
    exchange(ends, 1, 1, [])
    assert ends.inner.told > before
    silent, ends.over = socket.socketpair(), True
    ends._threads[2].join(LIMIT)  # the inner end stands still
    told = ends.inner.told = 1.0
    with silent[0]:
        ends.inner.attach(silent[1])
        assert ends.inner.told == told < ends.inner.heard


def program(patience: float, **options: Any) -> subprocess.Popen[str]:
    ports = map(str, _free(2))
    command = [sys.executable, "-m", "fiberexec._tunnel", *ports, str(patience), "0.1"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


def test_the_outer_end_has_as_many_descriptors_as_it_may() -> None:
    with program(LIMIT, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 256))) as process:
        while not _catches(process.pid, signal.SIGTERM):
            assert process.poll() is None
        with open(f"/proc/{process.pid}/limits") as file:
            (limits,) = (line.split()[3:5] for line in file if line.startswith("Max open files"))
        process.terminate()
    assert limits == ["256", "256"]


def test_the_outer_end_ends_when_it_hears_nothing() -> None:
    with program(0.5) as process:
        _, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 0 and errors == "fiberexec: nothing was heard of the driver for 0.5 seconds\n"


def test_the_outer_end_ends_on_sigterm() -> None:
    with program(LIMIT) as process:
        while not _catches(process.pid, signal.SIGTERM):
            assert process.poll() is None
        process.terminate()
        assert process.wait(LIMIT) == 0


def _catches(pid: int, number: int) -> bool:
    with open(f"/proc/{pid}/status") as file:
        (mask,) = (line.split()[1] for line in file if line.startswith("SigCgt:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_agents_come_by_either_version_of_ip(host: str, ends: Ends) -> None:
    if ":" in host and not os.path.exists("/proc/net/if_inet6"):
        pytest.skip("this host has no IPv6")
    with socket.create_connection((host, ends.agents), LIMIT) as client:
        client.sendall(b"hello")
        assert client.recv(5, socket.MSG_WAITALL) == b"hello"
