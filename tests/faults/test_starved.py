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
BEGIN = """
import os, resource, sys, time, warnings
from fiberexec import BrokenExecutor, FiberExecutor, LaunchError

def square(n):
    return n * n

def limit(name, number):
    resource.setrlimit(getattr(resource, name), (number, resource.getrlimit(getattr(resource, name))[1]))

def descriptors():
    return len(os.listdir("/proc/self/fd"))
"""


@pytest.fixture
def run(tmp_path: Path, package_root: str) -> Run:
    """``run(source, before=[...], **environment)`` runs a program to its end and returns what it printed."""

    def run_program(
        source: str,
        before: list[str] | None = None,
        user: int | None = None,
        python: str = sys.executable,
        **environment: str,
    ) -> str:
        program = tmp_path / "program.py"
        program.write_text(BEGIN + source)
        path = os.pathsep.join([*filter(None, [environment.pop("first", "")]), package_root])
        done = subprocess.run(
            [*(before or []), python, "-W", "error::ResourceWarning", str(program)],
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            cwd="/",
            user=user,
        )
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    return run_program


# -- descriptors


@linux
def test_without_descriptors_for_the_executor_the_first_submit_says_so(run: Run) -> None:
    out = run("""
ex = FiberExecutor(2, startup_timeout=1)
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
ex = FiberExecutor(2, startup_timeout=1)
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
ex = FiberExecutor(2, startup_timeout=1)
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
with FiberExecutor(40, startup_timeout=1) as ex:
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
with FiberExecutor(1, startup_timeout=1, max_worker_losses=1) as ex:
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
with FiberExecutor(2, startup_timeout=1) as ex:
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
with FiberExecutor(6, startup_timeout=1) as ex:
    assert list(ex.map(slow, range(60), timeout=30)) == [n * n for n in range(60)]
    assert ex.stats().started == int(os.environ["FORKS_ALLOWED"]), ex.stats()
print("over")
""",
        **no_more_forks(allowed, "ENOMEM"),
    )
    assert "over" in out
    assert "Cannot allocate memory" in out, "there is no warning"


def test_what_is_finished_is_kept_when_no_more_worker_can_be_forked(run: Run, no_more_forks: Forks) -> None:
    out = run(
        """
with FiberExecutor(1, startup_timeout=1) as ex:
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
with FiberExecutor(2, startup_timeout=1) as ex:
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


# -- files


@pytest.mark.parametrize("home", ["/proc", "/nonexistent"])
def test_a_home_that_cannot_be_written_is_not_needed(run: Run, home: str) -> None:
    out = run(
        """
with FiberExecutor(2) as ex:
    assert list(ex.map(square, range(100))) == [n * n for n in range(100)]
print("over")
""",
        HOME=home,
        XDG_RUNTIME_DIR=home,
        XDG_CACHE_HOME=home,
    )
    assert "over" in out


WORK = """
with FiberExecutor(2) as ex:
    assert list(ex.map(square, range(100))) == [n * n for n in range(100)]
    assert len(ex.submit(bytes, 1 << 22).result(30)) == 1 << 22
    assert ex.submit(os._exit, 3).exception(30).exitcode == 3
    assert ex.submit(square, 7).result(30) == 49
print("over")
"""


def test_a_missing_temporary_folder_is_not_needed(run: Run) -> None:
    assert "over" in run(WORK, TMPDIR="/nonexistent")


def in_a_namespace(script: str) -> list[str]:
    """The words that run a program among mounts of its own, after this script; skips where that cannot be."""
    words = ["unshare", "--mount", "--propagation", "private", "sh", "-c", f'set -e; {script}; exec "$@"', "sh"]
    try:
        tried = subprocess.run([*words, "true"], capture_output=True, text=True, timeout=30, check=False)
    except OSError:
        pytest.skip("there is no unshare here")
    if tried.returncode:
        pytest.skip(f"this user may not mount: {tried.stderr.strip()}")
    return words


@linux
@pytest.mark.parametrize("portable", ["", "1"])
def test_without_dev_shm_all_goes_on(run: Run, portable: str) -> None:
    make = (
        "mount -t tmpfs none /dev && for n in 'null 3' 'zero 5' 'random 8' 'urandom 9'; do "
        "set -- \"$@\"; mknod -m 666 /dev/${n% *} c 1 ${n#* }; done; [ ! -e /dev/shm ]"
    )
    assert "over" in run(WORK, before=in_a_namespace(make), FIBEREXEC_PORTABLE=portable)


@linux
@pytest.mark.parametrize("portable", ["", "1"])
def test_on_a_full_disk_there_are_results_or_an_exception_that_says_so(
    run: Run, tmp_path: Path, portable: str
) -> None:
    folder = tmp_path / "full"
    folder.mkdir()
    make = f"mount -t tmpfs -o size=64k none {folder} && mount -t tmpfs -o size=64k none /dev/shm"
    out = run(
        """
import tempfile
assert tempfile.gettempdir() == os.environ["TMPDIR"]
for place in (tempfile.gettempdir(), "/dev/shm"):
    with open(place + "/all", "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError as error:
            print("filled", place, error)
ex = FiberExecutor(2, startup_timeout=1)
error = None
try:
    error = ex.submit(square, 3).exception(30)
    assert error or ex.submit(bytes, 1 << 22).result(30) == bytes(1 << 22)
except OSError as raised:
    error = raised
if error is not None:
    assert "No space left" in str(error), error
ex.shutdown()
print("over", error)
""",
        before=in_a_namespace(make),
        TMPDIR=str(folder),
        FIBEREXEC_PORTABLE=portable,
    )
    assert "over" in out


@linux
def test_a_standard_error_on_a_full_disk_costs_no_task(run: Run) -> None:
    """What workers write to stderr goes nowhere, and nothing else is lost."""
    out = run("""
os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
def talk(n):
    os.write(2, b"x" * 100_000)
    print("aloud", n, file=sys.stderr)
    return n
with FiberExecutor(2) as ex:
    assert list(ex.map(talk, range(20), timeout=30)) == list(range(20))
print("over")
""")
    assert "over" in out


@linux
def test_a_standard_output_on_a_full_disk_is_the_tasks_own_exception(run: Run) -> None:
    out = run("""
saved = os.dup(1)
os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
def talk(n):
    print("aloud", n, flush=True)
with FiberExecutor(1) as ex:
    error = ex.submit(talk, 1).exception(30)
    assert isinstance(error, OSError), error
    assert ex.submit(square, 3).result(30) == 9
os.write(saved, b"over")
os.dup2(saved, 1)
""")
    assert "over" in out


@linux
def test_a_standard_error_that_nobody_reads_any_more_costs_no_task(run: Run) -> None:
    out = run("""
read, write = os.pipe()
os.dup2(write, 2)
os.close(read)
def talk(n):
    os.write(2, b"x" * 1000)
    return n
with FiberExecutor(2) as ex:
    assert list(ex.map(talk, range(20), timeout=30)) == list(range(20))
print("over")
""")
    assert "over" in out


@linux
def test_closed_standard_streams_of_the_driver_cost_no_task(run: Run) -> None:
    out = run("""
saved = os.dup(1)
for fd in (0, 1, 2):
    os.close(fd)
with FiberExecutor(2) as ex:
    assert list(ex.map(square, range(20), timeout=30)) == [n * n for n in range(20)]
os.write(saved, b"over")
""")
    assert "over" in out


def test_a_working_directory_that_has_gone_costs_no_task(run: Run, tmp_path: Path) -> None:
    out = run(f"""
os.mkdir({str(tmp_path / "gone")!r})
os.chdir({str(tmp_path / "gone")!r})
os.rmdir({str(tmp_path / "gone")!r})
with FiberExecutor(2) as ex:
    assert list(ex.map(square, range(20), timeout=30)) == [n * n for n in range(20)]
print("over")
""")
    assert "over" in out
