"""Every test proves that it left nothing behind: no child process, thread, descriptor or shared memory."""

from __future__ import annotations

import faulthandler
import gc
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

SETTLE = 20.0  # seconds that what a test started may still take to end
OURS = (
    "fiberexec",
    "psm_",
)  # how names begin that fiberexec or multiprocessing gives to files and shared memory

faulthandler.enable()

# A folder of our own for temporary files: what other programs leave in theirs is not ours to find.
FOLDER = os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="tests-")

# A shell that runs the tests in the background makes them ignore Ctrl-C, and so all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
# And nohup a terminal's end: with a handler here the tests still go on, and what they start does not inherit it.
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)


def pytest_unconfigure() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say why tests were skipped, a line for each reason: hundreds of lines would hide what failed."""
    reasons = Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", ()))
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"{count:4} not run: {reason.removeprefix('Skipped: ')}")


def _children() -> dict[str, str]:
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            found[f"process {process.pid}"] = f"{process.status()}: {' '.join(process.cmdline())}"
        except psutil.Error:
            continue  # it ended while we looked
    return found


def _threads() -> dict[str, str]:
    return {f"thread {thread.ident}": thread.name for thread in threading.enumerate()}


def _descriptors() -> dict[str, str]:
    """Open descriptors, each with what it refers to where the system tells."""
    folder = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"
    found = {}
    for name in os.listdir(folder):
        try:
            os.fstat(int(name))
            found[f"descriptor {name}"] = os.readlink(f"{folder}/{name}") if folder.startswith("/proc") else ""
        except OSError:
            continue  # the one that listed the folder
    return found


def _names() -> dict[str, str]:
    """Shared memory, sockets and temporary files that have a name like ours."""
    folders = [folder for folder in (Path("/dev/shm"), Path(tempfile.gettempdir())) if folder.is_dir()]
    return {f"file {path}": "" for folder in folders for path in folder.glob("*") if path.name.startswith(OURS)}


def _inventory() -> dict[str, str]:
    return {**_children(), **_threads(), **_descriptors(), **_names()}


def _left_since(before: dict[str, str]) -> dict[str, str]:
    return {key: what for key, what in _inventory().items() if before.get(key) != what and not _is_harmless(key, what)}


def _is_harmless(key: str, what: str) -> bool:
    """What others keep for the life of the process: a random source, multiprocessing's resource tracker."""
    return what == "/dev/urandom" or "multiprocessing.resource_tracker" in what


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail the test if it leaves a process, thread, descriptor or shared memory behind after SETTLE seconds.

    The marker ``leaks(reason)`` turns it off for one test.
    """
    before = _inventory()
    yield
    if request.node.get_closest_marker("leaks"):
        return
    hub = sys.modules.get("fiberexec._hub.launch")
    if hub is not None:
        hub.close()  # where fiberexec.mp is loaded, executors start one for what their tasks may share
    deadline = time.monotonic() + SETTLE
    pause = 0.001
    left = _left_since(before)
    while left and time.monotonic() < deadline:
        gc.collect()
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
        left = _left_since(before)
    if left:
        pytest.fail("left behind:\n" + "\n".join(f"  {key}: {what}" for key, what in left.items()), pytrace=False)


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests see no setting of whoever runs them."""
    for name in list(os.environ):
        if name in ("KUBERNETES_SERVICE_HOST", "SLURM_JOB_ID"):
            monkeypatch.delenv(name)  # where the tests run decides nothing
        if name.startswith("FIBEREXEC_") and name not in ("FIBEREXEC_CAMPAIGN", "FIBEREXEC_PORTABLE"):
            monkeypatch.delenv(name)
