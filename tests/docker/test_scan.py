"""What somebody in a container of the same network finds who tries every port: the hub's, and nothing else of fiberexec."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import psutil
import pytest
import services

from fiberexec import FiberExecutor
from fiberexec._hub import launch

from .conftest import docker

pytestmark = [
    pytest.mark.timeout(300),
    # Docker's SDK leaves the socket of a connection that is refused to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"),
]

# Prints the ports of hosts at which somebody accepts a connection.
SCAN = """
import errno, json, select, socket, sys, time

def scan(host, ports):
    found, waiting, poll, end = [], {}, select.poll(), time.monotonic() + 10
    for port in ports:
        sock = socket.socket()
        sock.setblocking(False)
        why = sock.connect_ex((host, port))
        if why == errno.EINPROGRESS:
            waiting[sock.fileno()] = sock, port
            poll.register(sock, select.POLLOUT)
        else:
            found += [port] * (why == 0)
            sock.close()
    while waiting and time.monotonic() < end:
        for fd, _ in poll.poll(1000):
            sock, port = waiting.pop(fd)
            poll.unregister(fd)
            found += [port] * (sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0)
            sock.close()
    for sock, _ in waiting.values():
        sock.close()
    return found

print(json.dumps([[port for at in range(1, 65536, 500) for port in scan(host, range(at, min(at + 500, 65536)))]
                  for host in sys.argv[1:]]))
"""


def ours() -> set[int]:
    """This program's processes on this host."""
    hub = psutil.Process(launch._pid)
    return {os.getpid(), hub.pid, *(each.pid for one in (hub, psutil.Process()) for each in one.children(recursive=True))}


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root sees whose ports are open")
def test_a_scan_from_a_container_finds_the_hubs_port_and_nothing_else() -> None:
    with FiberExecutor(2, backend="docker", image=services.worker_image(), workers_per_job=2) as executor:
        assert list(executor.map(abs, range(20))) == list(range(20))
        label = f"label=fiberexec.driver={os.getpid()}@{os.uname().nodename}"
        [container] = docker("ps", "-q", "--filter", label).split()
        about: Any = json.loads(docker("inspect", container))[0]["NetworkSettings"]["Networks"]["bridge"]
        driver, worker = about["Gateway"], about["IPAddress"]
        mine = ours()
        listening = [
            (each.laddr.ip, each.laddr.port)
            for each in psutil.net_connections("tcp")
            if each.status == psutil.CONN_LISTEN and each.pid in mine
        ]
        udp = [each for each in psutil.net_connections("udp") if each.pid in mine]
        command = ["docker", "run", "--rm", services.bare_image(), "python", "-c", SCAN, driver, worker]
        done = subprocess.run(command, capture_output=True, text=True, timeout=250)  # of seconds, on an idle machine
        at_driver, at_worker = json.loads(done.stdout)
        assert list(executor.map(abs, range(20))) == list(range(20))
    assert len(listening) == 1 and listening[0][0] == driver and not udp
    assert at_worker == []
    port = listening[0][1]
    owners = {each.laddr.port: each.pid for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN}
    assert port in at_driver
    assert not [each for each in at_driver if each != port and owners.get(each) in mine]
