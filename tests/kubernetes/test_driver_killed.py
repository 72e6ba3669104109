"""SIGKILL of a driver, at a random moment: of what it had in the cluster nothing is left, every time."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

from .conftest import eventually, get
from .inside import Inside
from .outside import Outside, left

TIMES = 20 if os.environ.get("FIBEREXEC_CAMPAIGN") == "full" else 5
AT_ONCE = 5  # drivers
TIMEOUT = 10  # driver_timeout
LONGEST = 12.0  # seconds that a driver lives, at most: its start is in it, and some of its work
COLLECTED = 60.0  # seconds: an outpost has 10 s more, its Job 10 s then; the cluster collects when it has time for it
WORK = f"""
with FiberExecutor(2, backend="kubernetes", driver_timeout={TIMEOUT}) as executor:
    executor.submit(abs, -1).result()
    print("1", flush=True)
    AT_WORK
    list(executor.map(time.sleep, [0.05] * 100_000))
"""
pytestmark = pytest.mark.timeout(1800 if TIMES > 5 else 300)


@pytest.fixture
def rng() -> random.Random:
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed: {seed}")
    return random.Random(seed)


def remains(space: str) -> list[str]:
    found = get("-n", space, "pods,secrets,configmaps,jobs", "-l", "fiberexec.program")["items"]
    return [f"{one['kind']} {one['metadata']['name']}" for one in found]


def test_nothing_is_left_of_a_driver_outside_the_cluster(outside: Outside, own_space: str, rng: random.Random) -> None:
    for _ in range(0, TIMES, AT_ONCE):
        began = time.monotonic()
        drivers = [outside(WORK.replace("AT_WORK", "pass")) for _ in range(AT_ONCE)]
        for number, one in enumerate(drivers):
            due = began + rng.uniform(1.0, LONGEST)  # the first two die while they start, the others at work
            if number >= 2:
                one.says(0)
                due = time.monotonic() + rng.uniform(0.0, 1.0)
                assert remains(own_space)
            time.sleep(max(0.0, due - time.monotonic()))  # the random moment
            one.process.send_signal(signal.SIGKILL)
        eventually(lambda: left(own_space) == [] and remains(own_space) == [], TIMEOUT + COLLECTED)


def test_nothing_is_left_of_a_driver_inside_the_cluster(driver: Inside, rng: random.Random) -> None:
    for turn in range(0, TIMES, AT_ONCE):
        names = [f"driver-{turn + number}" for number in range(AT_ONCE)]
        for number, name in enumerate(names):
            at_work = number >= 2
            seconds = rng.uniform(0.0, 1.0) if at_work else rng.uniform(1.0, LONGEST)
            dies = f"threading.Timer({seconds}, os.kill, (os.getpid(), signal.SIGKILL)).start()"
            code = WORK.replace("AT_WORK", dies if at_work else "pass")
            driver(code if at_work else f"{dies}\n{code}", after=600, name=name)

        def died(names: list[str] = names) -> bool:
            return all(driver.phase(name) != "Pending" and "Killed" in driver.said(name) for name in names)

        eventually(died, 120)
        eventually(lambda: remains(driver.space) == [], TIMEOUT + COLLECTED)
