"""Files and folders that are full, missing or closed: only what needs them fails, and says so."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

linux = pytest.mark.skipif(sys.platform != "linux", reason="namespaces and devices of Linux")
Run = Callable[..., str]


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
ex = FiberExecutor(2, startup_timeout=4)
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


@linux
def test_nothing_of_ours_takes_the_place_of_closed_streams(run: Run, tmp_path: Path) -> None:
    """A task's own file must not become what its children print to, and its last words go to the report."""
    out = run(f"""
def work():
    fd = os.open({str(tmp_path / "mine")!r}, os.O_RDWR | os.O_CREAT)
    os.system("echo printed; echo printed >&2")
    return fd, os.read(fd, 100)
def crash():
    os.write(2, b"my last words")
    os._exit(3)
saved = os.dup(1)
os.close(1)
os.close(2)
with FiberExecutor(1, max_worker_losses=1) as ex:
    fd, text = ex.submit(work).result(30)
    assert fd > 2 and text == b"", (fd, text)
    assert "my last words" in ex.submit(crash).exception(30).log
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
