"""Clocks that are wrong, or jump: what has to wait goes by the clock that only runs, and certificates allow for a day."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fiberexec
from fiberexec import BrokenExecutor

LIMIT = 60.0
ROOT = Path(fiberexec.__file__).parent
HOUR = 3600

# What tells a process the time of day, so many seconds off as a file says. No other clock is touched.
SHIM = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long offset(void) {
    char text[32] = {0};
    const char *path = getenv("CLOCK_OFFSET");
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0) return 0;
    if (read(fd, text, sizeof text - 1) < 0) text[0] = 0;
    close(fd);
    return atol(text);
}
int clock_gettime(clockid_t which, struct timespec *now) {
    int result = syscall(SYS_clock_gettime, which, now);
    if (!result && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE)) now->tv_sec += offset();
    return result;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec real;
    clock_gettime(CLOCK_REALTIME, &real);
    now->tv_sec = real.tv_sec;
    now->tv_usec = real.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *where) {
    struct timespec real;
    clock_gettime(CLOCK_REALTIME, &real);
    if (where) *where = real.tv_sec;
    return real.tv_sec;
}
"""

PROGRAM = """
import json, os, sys, time
from fiberexec import FiberExecutor

here, there, *offsets = json.loads(sys.argv[1])

def work(number):
    time.sleep(0.05)
    return number, time.time()

def put(path, offset):
    with open(path + ".new", "w") as file:
        file.write(str(offset))
    os.rename(path + ".new", path)

if __name__ == "__main__":
    began, steady = time.time(), time.monotonic()
    prefix = ["env", "CLOCK_OFFSET=" + there]
    with FiberExecutor(
        2, backend="agents", backend_options={"prefix": prefix}, driver_timeout=20, timeout=30, max_worker_losses=1
    ) as executor:
        differences = []
        for mine, theirs in offsets:
            put(here, mine)
            put(there, theirs)
            found = [future.result(30) for future in [executor.submit(work, number) for number in range(20)]]
            assert [number for number, _ in found] == list(range(20))
            differences.append(round((found[-1][1] - time.time()) / 60))
        lost = executor.stats().lost
    print(json.dumps([differences, lost, time.monotonic() - steady]))
"""


@pytest.fixture
def shim(tmp_path: Path) -> dict[str, str]:
    """The variables of a process whose clock is as a file says."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("no C compiler, or not Linux: other clocks for some processes take both")
    (tmp_path / "shim.c").write_text(SHIM)
    library = tmp_path / "shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(tmp_path / "shim.c")], check=True, timeout=60)
    return {"LD_PRELOAD": str(library)}


def test_clocks_that_jump_by_an_hour_on_either_side_do_no_harm(shim: dict[str, str], tmp_path: Path) -> None:
    """Those of driver and hub, and those of agents and workers: from the start, and while tasks run."""
    here, there = tmp_path / "here", tmp_path / "there"
    offsets = [(0, -HOUR), (0, HOUR), (HOUR, HOUR), (-HOUR, HOUR), (HOUR, -HOUR), (0, 0)]
    for path, offset in zip((here, there), offsets[0]):
        path.write_text(str(offset))
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), json.dumps([str(here), str(there), *offsets])],
        env={**os.environ, **shim, "CLOCK_OFFSET": str(here), "PYTHONPATH": str(ROOT.parent)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    differences, lost, seconds = json.loads(done.stdout)
    assert differences == [-60, 60, 0, 120, -120, 0]  # the clocks were what they should be
    assert lost == 0 and seconds < LIMIT


@pytest.mark.parametrize("hours", [-23, 24 * 365])
def test_a_host_whose_clock_is_wrong_by_hours_or_ahead_by_a_year_can_work(
    shim: dict[str, str], make: Any, tmp_path: Path, hours: int
) -> None:
    (tmp_path / "there").write_text(str(hours * HOUR))
    prefix = ["env", f"CLOCK_OFFSET={tmp_path / 'there'}", f"LD_PRELOAD={shim['LD_PRELOAD']}"]
    assert make(1, backend_options={"prefix": prefix}).submit(int, "1").result(LIMIT) == 1


def test_a_host_whose_clock_is_days_behind_says_that_it_may_be(shim: dict[str, str], make: Any, tmp_path: Path) -> None:
    from tenacity import Retrying, stop_after_attempt

    (tmp_path / "there").write_text(str(-100 * HOUR))
    prefix = ["env", f"CLOCK_OFFSET={tmp_path / 'there'}", f"LD_PRELOAD={shim['LD_PRELOAD']}"]
    once = Retrying(stop=stop_after_attempt(1), reraise=True)
    executor = make(1, backend_options={"prefix": prefix}, driver_timeout=2, launch_retry=once)
    error = executor.submit(int).exception(LIMIT)
    assert isinstance(error, BrokenExecutor) and "clock" in str(error), error


# Where the time of day is asked for: to be shown, or to be compared with times that others have written.
SHOWN = {
    "cli.py", "_bundle/_archive.py", "_serialize/_versions.py", "backends/_kubernetes_make.py", "backends/docker.py",
    "_cli/run_docker.py", "_cli/run_job.py", "_cli/processes.py", "_cli/job_checks.py", "_cli/places.py", "_cli/probe.py",
}  # fmt: skip


def test_nothing_waits_by_the_time_of_day() -> None:
    asks = re.compile(r"\btime\.time\(|\btime_ns\(|from time import .*\btime\b|datetime\.now|CLOCK_REALTIME")
    found = {str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if asks.search(path.read_text(encoding="utf-8"))}
    assert found - {"_tls.py"} <= SHOWN, "a deadline goes by time.monotonic()"
