"""A driver outside the cluster: on a host that no pod reaches, and that reaches nothing but the API server."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
import services
from services import network

from .conftest import eventually, get
from .outside import Outside, left

pytestmark = pytest.mark.timeout(240)


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


ENDS = {  # how a program ends that has work under way, and its exit code
    "sys.exit(3)": 3,
    "1 / 0": 1,
    "os._exit(4)": 4,
    "os.close(1); list(pool.map(print, range(10)))": 0,
}


def test_a_program_that_ends_badly_ends_and_leaves_nothing(outside: Outside, own_space: str) -> None:
    drivers = [
        outside(f"""
pool = FiberExecutor(1, driver_timeout=10)
say(pool.submit(where).result())
futures = [pool.submit(where, 0.1) for _ in range(5)]
{end}
""")
        for end in ENDS
    ]
    for one in drivers:
        one.says(0)
    assert [one.end() for one in drivers] == list(ENDS.values())
    eventually(lambda: left(own_space) == [])
