"""The hub: who may ask it, how it starts and ends, what it gives to whom."""

from __future__ import annotations

import errno
import os
import random
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from fiberexec import mp
from fiberexec._errors import HubLost
from fiberexec._hub import client, launch, wire
from fiberexec._messages import encode
from fiberexec._stream import Stream, pack

from .helpers import LIMIT

PING = b"".join(pack(wire.REQUEST, encode(("ping", wire.HUB, ()))))


def running() -> launch.Address:
    """The address of a hub that runs."""
    client.call("ping", wire.HUB)
    return launch.address()


def connect(address: launch.Address, data: bytes) -> bytes:
    """What the hub answers to these bytes; b"" if it closes."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(LIMIT)
        sock.connect(address.path)
        try:
            sock.sendall(data)
            return sock.recv(1 << 16)
        except ConnectionError:
            return b""


def hello(token: bytes, number: int = 1) -> bytes:
    return wire.HELLO.pack(wire.MAGIC, token, b"k" * wire.KEY_SIZE, os.getpid(), number, 0, 0)


# -- who may ask


def test_the_socket_stands_in_a_folder_of_the_user_alone() -> None:
    folder = Path(running().path).parent
    assert folder.stat().st_mode & 0o777 == 0o700
    assert folder.stat().st_uid == os.getuid()


def test_the_token_is_seen_in_no_list_of_processes() -> None:
    address = running()
    process = psutil.Process(launch._pid)
    seen = " ".join([*process.cmdline(), *process.environ().values()])
    for secret in (address.token.hex(), repr(address.token)[2:-1]):
        assert secret not in seen


def test_who_knows_the_token_is_answered_and_who_does_not_is_refused() -> None:
    address = running()
    assert connect(address, hello(address.token) + PING)
    wrong = bytes([address.token[0] ^ 1]) + address.token[1:]
    for token in (wrong, b"\0" * wire.TOKEN_SIZE):
        assert connect(address, hello(token) + PING) == b""
    assert connect(address, PING) == b""
    with pytest.raises(HubLost, match="refused"):
        client.call("ping", wire.HUB, hub=launch.Address(address.path, wrong))


def test_random_bytes_are_not_accepted_and_harm_nobody() -> None:
    address = running()
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    lock = mp.Lock()
    for number in range(60):
        data = rng.randbytes(rng.choice([1, 10, wire.HELLO.size, 500, 5000]))
        if number % 3 == 1:
            data = hello(address.token, number) + data
        elif number % 3 == 2:
            data = hello(address.token, number) + PING[:9] + data
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(LIMIT)
            sock.connect(address.path)
            try:
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
                assert sock.recv(100) == b""
            except (ConnectionError, BrokenPipeError):
                pass
    with lock:
        assert not lock.acquire(False)


def test_a_body_that_names_code_is_refused() -> None:
    address = running()
    import pickle

    frame = b"".join(pack(wire.REQUEST, pickle.dumps(("ping", wire.HUB, (print,)))))
    assert connect(address, hello(address.token) + frame) == b""


def test_a_call_that_is_wrong_is_answered_with_its_error() -> None:
    running()
    with pytest.raises(KeyError, match="no object"):
        client.call("acquire", 12345, 0.0)
    with pytest.raises((RuntimeError, KeyError)):
        client.call("new", wire.HUB, "no such kind")
    assert client.call("ping", wire.HUB) is None


# -- start and end


def test_a_reserved_hub_starts_when_it_is_needed_and_nothing_is_lost() -> None:
    address = launch.reserve()
    assert launch.fileno() >= 0 and launch._pid == 0
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(address.path)  # as a child would
        sock.sendall(hello(address.token) + PING)
        launch.start()
        assert launch.fileno() == -1
        sock.settimeout(LIMIT)
        assert sock.recv(100)
    assert launch.reserve() == address


def test_close_removes_everything_and_another_hub_can_follow() -> None:
    first = running()
    lock = mp.Lock()
    pid = launch._pid
    launch.close()
    assert not psutil.pid_exists(pid)
    assert not Path(first.path).parent.exists()
    with pytest.raises(HubLost):
        lock.acquire()
    assert running() != first


@pytest.mark.parametrize("attempt", range(5))
def test_who_asks_while_the_hub_is_closed_hears_so_and_leaves_no_connection(attempt: int) -> None:
    hub = running()
    answered = threading.Semaphore(0)
    heard: list[HubLost] = []

    def ask() -> None:
        try:
            while True:
                client.call("ping", wire.HUB, hub=hub)
                answered.release()
        except HubLost as error:
            heard.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert answered.acquire(timeout=LIMIT)
    kept = client._take(hub)
    launch.close()
    client._give_back(kept)
    for thread in threads:
        thread.join(LIMIT)
    assert len(heard) == 4 and kept.stream.fileno() == -1


SCRIPT = """
    import os, signal, sys, time
    from fiberexec import mp
    from fiberexec._hub import launch
    lock = mp.Lock()
    print(launch._pid, launch.address().path, flush=True)
    {end}
"""


@pytest.mark.parametrize(
    "end", ["pass", "os._exit(0)", "os.kill(os.getpid(), signal.SIGKILL)", "if os.fork() == 0: time.sleep(5)"]
)
def test_the_hub_goes_with_its_root_however_that_ends(end: str) -> None:
    script = textwrap.dedent(SCRIPT.format(end=end))
    with subprocess.Popen([sys.executable, "-W", "ignore", "-c", script], stdout=subprocess.PIPE, text=True) as root:
        assert root.stdout is not None
        pid, path = root.stdout.readline().split()
        root.wait(LIMIT)
        deadline = time.monotonic() + LIMIT
        while psutil.pid_exists(int(pid)) or Path(path).parent.exists():
            assert time.monotonic() < deadline, "the hub is still there"
            time.sleep(0.01)


def test_a_forked_child_is_another_process() -> None:
    """What it holds is its own; its end ends neither the hub nor its parent's calls."""
    script = """
        import os, time
        from fiberexec import mp
        lock, other = mp.Lock(), mp.Lock()
        lock.acquire()
        pid = os.fork()
        if pid == 0:
            assert not lock.acquire(False)
            other.acquire()
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        assert other.acquire(timeout=30)
        assert not lock.acquire(False)
        lock.release()
        print("well")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=LIMIT)
    assert (done.stdout, done.stderr) == ("well\n", "")


def test_importing_it_loads_nothing_that_is_slow() -> None:
    script = "import sys, fiberexec.mp.queues; print([m for m in ('dill', 'pynng', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=LIMIT)
    assert done.stdout == "[]\n"


# -- connections


def test_calls_at_once_have_a_connection_each_and_these_are_used_again() -> None:
    event = mp.Event()
    for _ in range(3):
        helpers = [threading.Thread(target=event.wait, args=(0.05,)) for _ in range(8)]
        for each in helpers:
            each.start()
        for each in helpers:
            each.join()
    assert 2 <= len(client._channels) <= 9


def test_the_hub_serves_as_many_processes_as_there_are() -> None:
    address = running()
    socks = []
    for number in range(300):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(address.path)
        sock.sendall(wire.HELLO.pack(wire.MAGIC, address.token, number.to_bytes(16, "big"), 1, 1, 0, 0) + PING)
        socks.append(sock)
    for sock in socks:
        sock.settimeout(LIMIT)
        assert sock.recv(100)
        sock.close()


# -- descriptors


def test_a_deposited_descriptor_is_fetched_once() -> None:
    read, write = os.pipe()
    id = client.deposit(write)
    os.close(write)
    fetched = client.fetch(id)
    assert not os.get_inheritable(fetched)
    os.write(fetched, b"hello")
    os.close(fetched)
    assert os.read(read, 10) == b"hello"
    assert os.read(read, 10) == b""  # the hub has kept no copy
    os.close(read)
    with pytest.raises(KeyError, match="fetched already"):
        client.fetch(id)


def test_a_discarded_descriptor_is_closed() -> None:
    read, write = os.pipe()
    id = client.deposit(write)
    os.close(write)
    client.discard(id)
    client.call("ping", wire.HUB)
    assert os.read(read, 10) == b""
    os.close(read)
    with pytest.raises(KeyError):
        client.fetch(id)


def test_another_process_fetches() -> None:
    read, write = os.pipe()
    id = client.deposit(write)
    os.close(write)

    def fetch() -> None:
        fd = client.fetch(id)
        os.write(fd, b"from there")
        os.close(fd)

    process = mp.Process(target=fetch)
    process.start()
    assert os.read(read, 20) == b"from there"
    assert os.read(read, 20) == b""
    os.close(read)
    process.join()


def test_an_unreachable_hub_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(HubLost, match="has gone") as caught:
        client.call("ping", wire.HUB, hub=launch.Address(str(tmp_path / "none"), b"\0" * 32))
    assert isinstance(caught.value, ConnectionError)
    assert getattr(caught.value.__cause__, "errno", None) == errno.ENOENT


def test_a_stream_of_the_hub_is_of_this_protocol() -> None:
    address = running()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(address.path)
        sock.sendall(hello(address.token) + PING)
        kind, _, _ = Stream(sock).receive_one()  # type: ignore[arg-type]
        assert kind == wire.REPLY
