"""A machine that has run out of something: an exception that says of what, and no finished work is lost.

Each test runs a program of its own, since what it takes away is gone for the whole process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
linux = pytest.mark.skipif(sys.platform != "linux", reason="limits and namespaces of Linux")
Run = Callable[..., str]


# -- descriptors


@linux
def test_without_descriptors_for_the_executor_the_first_submit_says_so(run: Run) -> None:
    out = run("""
ex = FiberExecutor(2, startup_timeout=4)
limit("RLIMIT_NOFILE", descriptors() - 1)
try:
    print("outcome", ex.submit(square, 3).exception(30))
except OSError as error:
    print("outcome", error)
limit("RLIMIT_NOFILE", 256)
ex.shutdown()
""")
    assert "Too many open files" in out


@linux
@pytest.mark.parametrize("spare", range(1, 13, 2))
def test_with_few_descriptors_there_is_a_result_or_an_exception_that_says_so(run: Run, spare: int) -> None:
    """Whatever comes first in short supply: pipes, the fork server's sockets, the workers' sockets."""
    out = run(f"""
import errno
ex = FiberExecutor(2, startup_timeout=4)
limit("RLIMIT_NOFILE", descriptors() - 1 + {spare})
try:
    future = ex.submit(square, 3)
    error = future.exception(30)
except OSError as raised:
    error = raised
limit("RLIMIT_NOFILE", 256)
if error is None:
    assert future.result() == 9
else:
    assert isinstance(error, (OSError, BrokenExecutor)), error
    assert "Too many open files" in str(error), error
    print("refused")
ex.shutdown()
print("over")
""")
    assert "over" in out


@linux
def test_the_message_for_no_descriptors_says_what_to_do(run: Run) -> None:
    out = run("""
ex = FiberExecutor(2, startup_timeout=4)
limit("RLIMIT_NOFILE", descriptors() + 4)
try:
    print(ex.submit(square, 3).exception(30))
except OSError as error:
    print(error)
""")
    assert "ulimit -n" in out


@linux
def test_with_descriptors_for_some_workers_the_work_is_done_by_them(run: Run) -> None:
    out = run("""
with FiberExecutor(40, startup_timeout=10) as ex:
    limit("RLIMIT_NOFILE", descriptors() + 25)
    def slow(n):
        time.sleep(0.01)
        return n * n
    assert list(ex.map(slow, range(200), timeout=30)) == [n * n for n in range(200)]
    stats = ex.stats()
    assert 1 <= stats.started < 40, stats
    assert stats.failed_launches, stats
print("over")
""")
    assert "over" in out
    assert "Too many open files" in out, "there is no warning"


@linux
def test_what_is_finished_is_kept_when_descriptors_run_out(run: Run) -> None:
    out = run("""
import signal
with FiberExecutor(1, startup_timeout=4, max_worker_losses=1) as ex:
    done = [ex.submit(square, n) for n in range(100)]
    [future.result(30) for future in done]
    hoard = []
    pid = ex.workers()[0].pid
    limit("RLIMIT_NOFILE", 64)
    while True:
        try:
            hoard.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            break
    assert ex.submit(square, 5).result(30) == 25  # the worker that is there needs none
    os.kill(pid, signal.SIGKILL)
    error = ex.submit(square, 6).exception(30)
    print(type(error).__name__, error)
    assert error is None or isinstance(error, BrokenExecutor), error
    assert [future.result() for future in done] == [n * n for n in range(100)]
    for fd in hoard:
        os.close(fd)
print("over")
""")
    assert "over" in out


# -- processes and memory


SITE = """
import errno, os
_fork = os.fork
_allowed = int(os.environ["FORKS_ALLOWED"])

def fork():
    global _allowed
    if "fiberexec._forkserver" in __import__("sys").modules:
        _allowed -= 1
        if _allowed < 0:
            number = getattr(errno, os.environ["FORK_ERROR"])
            raise OSError(number, os.strerror(number))
    return _fork()

os.fork = fork
"""


@pytest.fixture
def no_more_forks(tmp_path: Path) -> Callable[[int, str], dict[str, str]]:
    """The environment in which the fork server can fork so many workers, then gets this error."""

    def environment(allowed: int, error: str) -> dict[str, str]:
        folder = tmp_path / "site"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(SITE)
        return {"first": str(folder), "FORKS_ALLOWED": str(allowed), "FORK_ERROR": error}

    return environment


Forks = Callable[[int, str], dict[str, str]]


@pytest.mark.parametrize(
    ("error", "text"), [("ENOMEM", "Cannot allocate memory"), ("EAGAIN", "temporarily unavailable")]
)
def test_without_memory_for_any_worker_the_executor_says_so(
    run: Run, no_more_forks: Forks, error: str, text: str
) -> None:
    out = run(
        """
with FiberExecutor(2, startup_timeout=4) as ex:
    futures = [ex.submit(square, n) for n in range(5)]
    for future in futures:
        error = future.exception(30)
        assert isinstance(error, BrokenExecutor), error
        assert isinstance(error.__cause__, (OSError, LaunchError)), error.__cause__
    print(error, "because of", error.__cause__)
print("over")
""",
        **no_more_forks(0, error),
    )
    assert "over" in out
    assert text in out
    assert "max_workers" in out, "it does not say what to do"


@pytest.mark.parametrize("allowed", [1, 3])
def test_with_memory_for_some_workers_the_work_is_done_by_them(run: Run, no_more_forks: Forks, allowed: int) -> None:
    out = run(
        """
def slow(n):
    time.sleep(0.01)
    return n * n
with FiberExecutor(6, startup_timeout=10) as ex:
    allowed, end = int(os.environ["FORKS_ALLOWED"]), time.monotonic() + 30
    while ex.stats().started < allowed and time.monotonic() < end:
        assert list(ex.map(slow, range(60), timeout=30)) == [n * n for n in range(60)]
    assert ex.stats().started == allowed, ex.stats()
print("over")
""",
        **no_more_forks(allowed, "ENOMEM"),
    )
    assert "over" in out
    assert "Cannot allocate memory" in out, "there is no warning"


def test_what_is_finished_is_kept_when_no_more_worker_can_be_forked(run: Run, no_more_forks: Forks) -> None:
    out = run(
        """
with FiberExecutor(1, startup_timeout=8) as ex:
    done = [ex.submit(square, n) for n in range(100)]
    assert [future.result(30) for future in done] == [n * n for n in range(100)]
    killer = ex.submit(os._exit, 1)
    waiting = ex.submit(square, 4)
    assert isinstance(killer.exception(30), BrokenExecutor), killer.exception()
    assert isinstance(waiting.exception(30), BrokenExecutor), waiting.exception()
    assert [future.result() for future in done] == [n * n for n in range(100)]
print("over")
""",
        **no_more_forks(1, "ENOMEM"),
    )
    assert "over" in out


def can_run(python: str, user: int, package_root: str) -> bool:
    probe = [python, "-c", "import sys, fiberexec.executor; sys.exit(sys.version_info < (3, 10))"]
    environment = {"PYTHONPATH": package_root, "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        return not subprocess.run(
            probe, user=user, group=user, extra_groups=[], cwd="/", env=environment, capture_output=True, check=False
        ).returncode
    except OSError:
        return False


@linux
@pytest.mark.skipif(not ROOT, reason="becomes another user, whose processes are counted")
def test_with_no_process_left_for_this_user_the_executor_says_so(
    run: Run, tmp_path: Path, package_root: str
) -> None:
    """The kernel itself refuses: RLIMIT_NPROC binds every user but root."""
    user = 61_234
    for folder in [tmp_path, *tmp_path.parents]:
        if folder.stat().st_mode & 0o005 != 0o005:
            if not str(folder).startswith("/tmp/"):
                pytest.skip(f"{folder} is closed to other users")
            folder.chmod(0o755)
    python = next((each for each in (sys.executable, "/usr/bin/python3") if can_run(each, user, package_root)), None)
    if python is None:
        pytest.skip("there is no interpreter that another user can run")
    out = run(
        """
limit("RLIMIT_NPROC", 2)  # this process and the manager's thread
with FiberExecutor(2, startup_timeout=4) as ex:
    error = ex.submit(square, 3).exception(30)
    assert isinstance(error, BrokenExecutor), error
    print(error)
print("over")
""",
        user=user,
        python=python,
    )
    assert "over" in out
    assert "temporarily unavailable" in out
