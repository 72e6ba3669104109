"""A driver outside the cluster: on a host that no pod reaches, and that reaches nothing but the API server."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import services
from services import cluster, network

import fiberexec

from .conftest import apply, eventually, get, kubectl

pytestmark = pytest.mark.timeout(240)
LIMIT = 90.0  # seconds, for what takes a few where nothing else runs
SERVER = ["-p", "tcp", "-d", cluster.ADDRESS, "-j", "REJECT", "--reject-with", "tcp-reset"]


class Driver:
    """A program on that host. It says and hears lines."""

    def __init__(self, host: str, code: str, folder: Path, space: str, kubeconfig: str, image: str) -> None:
        self._folder = tempfile.mkdtemp(
            prefix="fx", dir="/tmp"
        )  # a hub that is killed leaves its own; sockets want short paths
        file = folder / "program.py"
        file.write_text(code)
        environ = {name: value for name, value in os.environ.items() if not name.startswith("FIBEREXEC_")}
        environ |= {
            "KUBECONFIG": kubeconfig,
            "PYTHONPATH": str(Path(fiberexec.__file__).parents[1]),
            "FIBEREXEC_BACKEND": "kubernetes",
            "FIBEREXEC_IMAGE": image,
            "TMPDIR": self._folder,
            "FIBEREXEC_BACKEND_OPTIONS": json.dumps({"namespace": space}),
        }
        command = services.in_host(host, sys.executable, "-u", str(file))
        self.host = host
        self.space = space
        self.said: list[str] = []
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ
        )
        self._changed = threading.Condition()
        self._over = False
        self.errors = ""
        self._threads = [threading.Thread(target=run) for run in (self._read, self._read_errors)]
        for thread in self._threads:
            thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.said.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.errors += line

    def says(self, number: int, seconds: float = LIMIT) -> Any:
        """The value that it says as its so-manieth, from 0."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.said) > number or self._over, seconds), self.errors
            assert len(self.said) > number, self.errors
            return json.loads(self.said[number])

    def tell(self, text: str = "") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{text}\n")
        self.process.stdin.flush()

    def end(self, seconds: float = LIMIT) -> int:
        """Its exit code."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it does not end: {self.said} {self.errors}")
        for thread in self._threads:
            thread.join(LIMIT)
        return code

    def processes(self) -> list[int]:
        """The driver, and all that it has started: its hub, and its link."""
        found = subprocess.run(["ip", "netns", "pids", self.host], capture_output=True, text=True, check=True).stdout
        return [int(pid) for pid in found.split()]

    def link(self) -> int:
        """The process with the link to the outpost."""
        return next(pid for pid in self.processes() if "_kubernetes_outpost" in Path(f"/proc/{pid}/cmdline").read_text())

    def close(self) -> None:
        for pid in self.processes() if self.process.poll() is None else ():
            os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        for thread in self._threads:
            thread.join(LIMIT)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                try:
                    stream.close()
                except OSError:
                    pass
        shutil.rmtree(self._folder, ignore_errors=True)


Outside = Callable[..., Driver]


@pytest.fixture
def host() -> Iterator[str]:
    """A host that reaches the API server only, and that nobody reaches."""
    services.require_kubernetes()
    host = services.require_netns(3)[2]
    network.link("only", host, cluster.ADDRESS)
    yield host
    subprocess.run(services.in_host(host, "iptables", "-F", "OUTPUT"), check=True)
    network.link("restore", host)


@pytest.fixture
def outside(host: str, own_space: str, tmp_path: Path) -> Iterator[Outside]:
    """Starts a program there: outside(code)."""
    made: list[Driver] = []

    def start(code: str, *, image: str | None = None, kubeconfig: str = "") -> Driver:
        if image is None:
            image = services.cluster_image(services.worker_image())
        made.append(Driver(host, PRELUDE + code, tmp_path, own_space, kubeconfig or services.require_kubernetes(), image))
        return made[-1]

    yield start
    for one in made:
        one.close()


PRELUDE = """
import json, os, platform, signal, sys, time
from fiberexec import FiberExecutor, current_task
def say(value): print(json.dumps(value), flush=True)
def where(seconds=0.0, number=0):
    time.sleep(seconds)
    return number, platform.node(), os.getpid(), current_task().attempt
"""


def left(space: str) -> list[str]:
    """What of fiberexec is in a namespace."""
    return [one["metadata"]["name"] for one in get("-n", space, "pods,secrets,jobs", "-l", "fiberexec.program")["items"]]


def test_nothing_but_a_kubeconfig_is_needed(outside: Outside, host: str, own_space: str) -> None:
    driver = outside("""
with FiberExecutor(2) as pool:
    say(pool.submit(where).result())
    say(list(pool.map(pow, range(200), [2] * 200)))
    say(len(pool.submit(bytes, 8 << 20).result()))
    sys.stdin.readline()
    say(pool.submit(where).result())
""")
    assert driver.says(0)[1].startswith("fx-")
    assert driver.says(1) == [n * n for n in range(200)]
    assert driver.says(2) == 8 << 20
    jobs = get("-n", own_space, "pods", "-l", "fiberexec.job,fiberexec.role!=outpost")["items"]
    [outpost] = get("-n", own_space, "pods", "-l", "fiberexec.role=outpost")["items"]
    [owner] = get("-n", own_space, "jobs", "-l", "fiberexec.role=outpost")["items"]
    assert jobs and all(one["metadata"]["ownerReferences"][0]["uid"] == owner["metadata"]["uid"] for one in jobs)
    # It has nothing that anybody could want: no key, no token, no rights.
    assert outpost["spec"]["automountServiceAccountToken"] is False and not outpost["spec"].get("volumes")
    # And there was no other way.
    reach = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 2)"
    address = outpost["status"]["podIP"]
    assert subprocess.run(services.in_host(host, sys.executable, "-c", reach, address, "4711"), capture_output=True).returncode
    with pytest.raises(OSError):
        socket.create_connection((network.address(host), 9), 2)
    driver.tell()
    driver.says(3)
    assert driver.end() == 0 and driver.errors == ""
    eventually(lambda: left(own_space) == [])


WORK = """
with FiberExecutor(2, driver_timeout=60) as pool:
    futures = [pool.submit(where, 1.0, number) for number in range({tasks})]
    say(futures[0].result())
    found = [future.result() for future in futures]
    say(found)
    say(pool.stats().lost)
"""


def check_that_nothing_was_lost(driver: Driver, tasks: int) -> None:
    found = driver.says(1, 200)
    assert [each[0] for each in found] == list(range(tasks))
    assert {each[3] for each in found} == {1} and driver.says(2) == 0
    assert len({(each[1], each[2]) for each in found}) <= 2  # no worker was started again
    assert driver.end() == 0


@pytest.mark.parametrize("how", ["drop", "cut", "reset"])
def test_a_tunnel_that_is_broken_for_30_s_costs_nothing(how: str, outside: Outside, host: str) -> None:
    driver = outside(WORK.format(tasks=70))
    driver.says(0)
    rule = ["iptables", "-w", "10", "{}", "OUTPUT", *SERVER]
    if how == "reset":  # every connection to the server is refused
        subprocess.run(services.in_host(host, *(part.format("-I") for part in rule)), check=True)
    elif how == "cut":
        network.link("cut", host)
    else:
        network.link("drop", host, network.DRIVER)
    time.sleep(30.0)  # the outage itself
    if how == "reset":
        subprocess.run(services.in_host(host, *(part.format("-D") for part in rule)), check=True)
    else:
        network.link("restore", host)
        network.link("only", host, cluster.ADDRESS)
    check_that_nothing_was_lost(driver, 70)


def test_a_stream_that_breaks_again_and_again_costs_nothing(outside: Outside, host: str) -> None:
    driver = outside(WORK.format(tasks=30))
    driver.says(0)
    link = driver.link()
    for _ in range(5):
        before = connections(host, link)
        assert before
        for port in before:
            rule = ["OUTPUT", "-p", "tcp", "--sport", port, "-j", "REJECT", "--reject-with", "tcp-reset"]
            subprocess.run(services.in_host(host, "iptables", "-w", "10", "-I", *rule), check=True)
        eventually(lambda before=before: bool(connections(host, link) - before))  # type: ignore[misc]
    check_that_nothing_was_lost(driver, 30)


def connections(host: str, pid: int) -> set[str]:
    """The local ports of a process' connections with the API server."""
    found = subprocess.run(
        services.in_host(host, "ss", "-tnpH", "state", "established"), capture_output=True, text=True, check=True
    )
    lines = [line for line in found.stdout.splitlines() if f"pid={pid}," in line and cluster.ADDRESS in line]
    return {match[1] for line in lines if (match := re.search(r"\S+:(\d+)\s+\S*" + re.escape(cluster.ADDRESS), line))}


@pytest.mark.parametrize("what", ["outpost", "link"])
def test_an_outpost_that_is_lost_is_replaced_and_the_work_moves_without_a_charge(
    what: str, outside: Outside, own_space: str
) -> None:
    driver = outside("""
with FiberExecutor(2, driver_timeout=15) as pool:
    futures = [pool.submit(where, 1.0, number) for number in range(20)]
    say(futures[0].result())
    say([future.result() for future in futures])
""")
    driver.says(0)
    if what == "outpost":
        kubectl("-n", own_space, "delete", "pod", "-l", "fiberexec.role=outpost", "--wait=false")
    else:
        os.kill(driver.link(), signal.SIGKILL)
    assert [each[0] for each in driver.says(1, 150)] == list(range(20))
    assert driver.end() == 0
    eventually(lambda: left(own_space) == [])


@pytest.mark.parametrize("what", ["driver", "everything", "laptop"])
def test_nothing_is_left_of_a_program_that_was_killed(what: str, outside: Outside, host: str, own_space: str) -> None:
    driver = outside("""
with FiberExecutor(2, driver_timeout=10) as pool:
    say(pool.submit(where).result())
    pool.submit(where, 1000.0)
    pool.submit(where, 1000.0)
    time.sleep(1000)
""")
    driver.says(0)
    pids = [driver.process.pid] if what == "driver" else driver.processes()
    if what == "laptop":  # it is closed: nothing of it is heard any more
        network.link("drop", host)
        os.kill(driver.process.pid, signal.SIGSTOP)
    else:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    # The outpost waits for driver_timeout and 10 s; its Job stays for 10 s; then the cluster collects what it owned.
    eventually(lambda: left(own_space) == [], 60)


def test_mp_works_the_same(outside: Outside) -> None:
    driver = outside("""
import fiberexec.mp as mp
def double(value): return 2 * value, platform.node()
def echo(inbox, outbox):
    outbox.put((inbox.get(), platform.node()))
with mp.Pool(2) as pool:
    found = pool.map(double, range(10))
    say([value for value, _ in found])
    say(sorted({host[:3] for _, host in found}))
inbox, outbox = mp.Queue(), mp.Queue()
process = mp.Process(target=echo, args=(inbox, outbox))
process.start()
inbox.put("hello")
say(outbox.get())
process.join()
say(process.exitcode)
""")
    assert driver.says(0) == [2 * number for number in range(10)] and driver.says(1) == ["fx-"]
    text, where = driver.says(2)
    assert text == "hello" and where.startswith("fx-") and driver.says(3) == 0
    assert driver.end() == 0


FAILS = """
from fiberexec import BrokenExecutor
try:
    with FiberExecutor(2, startup_timeout=15) as pool:
        pool.submit(where).result()
except BrokenExecutor as error:
    say(f"{error} {error.__cause__}")
"""


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("localhost:1/no/such:image", r"does not start: \w+Pull\w*: .*What to do: correct image="),
        ("No/Name", r"does not start: InvalidImageName: .*What to do|is no name of an image"),
        ("bare", r"fiberexec"),
    ],
)
def test_an_outpost_that_cannot_start_says_why(image: str, expected: str, outside: Outside, own_space: str) -> None:
    driver = outside(FAILS, image=services.cluster_image(services.bare_image()) if image == "bare" else image)
    assert re.search(expected, driver.says(0), re.DOTALL)
    assert driver.end() == 0
    eventually(lambda: left(own_space) == [])


def test_who_gives_up_an_outpost_that_does_not_start_does_not_wait_for_it(outside: Outside, own_space: str) -> None:
    driver = outside(
        """
pool = FiberExecutor(2)
future = pool.submit(where)
sys.stdin.readline()
pool.shutdown(cancel_futures=True)
say(future.cancelled())
""",
        image="localhost:1/no/such:image",
    )
    eventually(lambda: "ErrImagePull" in driver.errors)  # the warning
    driver.tell()
    assert driver.says(0, 20) is True
    assert driver.end() == 0
    eventually(lambda: left(own_space) == [])


def limited(space: str, folder: Path, rules: list[dict[str, Any]]) -> str:
    """A kubeconfig for somebody who may do just this."""
    apply(
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "me", "namespace": space}},
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "Role",
            "metadata": {"name": "fiberexec", "namespace": space},
            "rules": rules,
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": {"name": "fiberexec", "namespace": space},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "fiberexec"},
            "subjects": [{"kind": "ServiceAccount", "name": "me", "namespace": space}],
        },
    )
    token = kubectl("-n", space, "create", "token", "me")
    config = json.loads(kubectl("config", "view", "--raw", "-o", "json"))
    config["users"][0]["user"] = {"token": token}
    path = folder / "kubeconfig"
    path.write_text(json.dumps(config))
    path.chmod(0o600)
    return str(path)


RULES: list[dict[str, Any]] = [
    {"apiGroups": [""], "resources": ["pods"], "verbs": ["create", "delete", "get", "list", "watch"]},
    {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]},
    {"apiGroups": [""], "resources": ["events"], "verbs": ["list"]},
    {"apiGroups": [""], "resources": ["secrets"], "verbs": ["create"]},
]
MORE: list[dict[str, Any]] = [
    {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["create", "delete", "get"]},
    {"apiGroups": [""], "resources": ["pods/portforward"], "verbs": ["create", "get"]},
]


def test_it_works_with_the_smallest_role(outside: Outside, own_space: str, tmp_path: Path) -> None:
    driver = outside(
        "with FiberExecutor(2) as pool:\n    say(pool.submit(where).result())",
        kubeconfig=limited(own_space, tmp_path, RULES + MORE),
    )
    assert driver.says(0)[1].startswith("fx-")
    assert driver.end() == 0
    eventually(lambda: left(own_space) == [])


@pytest.mark.parametrize(("rules", "missing"), [(RULES, "jobs"), (RULES + MORE[:1], "pods/portforward")])
def test_who_lacks_a_right_is_told_which(
    rules: list[dict[str, Any]], missing: str, outside: Outside, own_space: str, tmp_path: Path
) -> None:
    driver = outside(FAILS, kubeconfig=limited(own_space, tmp_path, rules))
    said = driver.says(0)
    assert f"{missing} in namespace {own_space}" in said and "pods/portforward], verbs: [create, get]" in said
    assert driver.end() == 0
    eventually(lambda: left(own_space) == [])
