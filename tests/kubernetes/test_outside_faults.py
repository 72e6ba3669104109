"""A driver outside the cluster whose way there breaks, or is lost, and one that is killed."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time

import pytest
import services
from services import cluster, network

from .conftest import eventually, kubectl
from .outside import Driver, Outside, left

pytestmark = pytest.mark.timeout(240)
SERVER = ["-p", "tcp", "-d", cluster.ADDRESS, "-j", "REJECT", "--reject-with", "tcp-reset"]


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


def break_it(how: str, host: str) -> None:
    """``reset``: every connection to the server is refused."""
    if how == "reset":
        subprocess.run(services.in_host(host, "iptables", "-w", "10", "-I", "OUTPUT", *SERVER), check=True)
    elif how == "cut":
        network.link("cut", host)
    else:
        network.link("drop", host, network.DRIVER)


def mend_it(how: str, host: str) -> None:
    if how == "reset":
        subprocess.run(services.in_host(host, "iptables", "-w", "10", "-D", "OUTPUT", *SERVER), check=True)
    else:
        network.link("restore", host)
        network.link("only", host, cluster.ADDRESS)


def test_a_tunnel_that_is_broken_for_30_s_costs_nothing(outside: Outside, hosts: list[str]) -> None:
    drivers = {how: outside(WORK.format(tasks=70), host=host) for how, host in zip(("drop", "cut", "reset"), hosts)}
    for driver in drivers.values():
        driver.says(0)
    for how, driver in drivers.items():
        break_it(how, driver.host)
    time.sleep(30.0)  # the outage itself
    for how, driver in drivers.items():
        mend_it(how, driver.host)
    for driver in drivers.values():
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


def test_an_outpost_that_is_lost_is_replaced_and_the_work_moves_without_a_charge(
    outside: Outside, hosts: list[str], own_space: str
) -> None:
    code = """
with FiberExecutor(2, driver_timeout=15) as pool:
    futures = [pool.submit(where, 1.0, number) for number in range(20)]
    say(futures[0].result())
    say([future.result() for future in futures])
"""
    without_outpost, without_link = drivers = [outside(code, host=host) for host in hosts[:2]]
    program = without_outpost.says(0)[1].rpartition("-")[0]  # the pod's name has it
    label = f"fiberexec.role=outpost,fiberexec.program={program}"
    assert kubectl("-n", own_space, "delete", "pod", "-l", label, "--wait=false")
    without_link.says(0)
    os.kill(without_link.link(), signal.SIGKILL)
    for driver in drivers:
        assert [each[0] for each in driver.says(1, 150)] == list(range(20))
        assert driver.end() == 0
    eventually(lambda: left(own_space) == [])


def test_nothing_is_left_of_a_program_that_was_killed(outside: Outside, hosts: list[str], own_space: str) -> None:
    code = """
with FiberExecutor(2, driver_timeout=10) as pool:
    say(pool.submit(where).result())
    pool.submit(where, 1000.0)
    pool.submit(where, 1000.0)
    time.sleep(1000)
"""
    alone, whole, laptop = drivers = [outside(code, host=host) for host in hosts]
    for driver in drivers:
        driver.says(0)
    alone.process.kill()
    for pid in whole.processes():
        with contextlib.suppress(ProcessLookupError):  # it has heard that another has gone
            os.kill(pid, signal.SIGKILL)
    network.link("drop", laptop.host)  # it is closed: nothing of it is heard any more
    os.kill(laptop.process.pid, signal.SIGSTOP)
    # The outpost waits for driver_timeout and 10 s; its Job stays for 10 s; then the cluster collects what it owned.
    eventually(lambda: left(own_space) == [], 80)
