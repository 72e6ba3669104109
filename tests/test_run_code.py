"""What ``fiberexec run`` sends of the user's code, and where it is then."""

from __future__ import annotations

import base64
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from fiberexec._cli import run_base, run_code, run_files
from fiberexec._errors import ConfigError, FiberError


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("train.py", "pkg/__init__.py", "pkg/cli.py", "scripts/go.py", "scripts/data/x.csv", ".git/HEAD"):
        (tmp_path / "proj" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "proj" / name).write_text(name)
    monkeypatch.chdir(tmp_path / "proj")
    return tmp_path / "proj"


def names(code: run_code.Code) -> list[str]:
    return [name for _, name in code.files]


@pytest.mark.parametrize(
    "command, folder",
    [
        (("python", "train.py"), "."),
        (("python3", "-u", "scripts/go.py", "train.py"), "scripts"),
        (("./train.py",), "."),
        (("python", "-m", "pkg.cli"), "."),
        (("python", "-m", "http.server"), None),
        (("python3", "/app/pi_estimation.py"), None),
        (("python", "-c", "print()"), None),
    ],
)
def test_the_folder_of_the_program_is_found(command: tuple[str, ...], folder: str | None) -> None:
    found = run_code.program_folder(command)
    assert (found and os.path.normpath(found)) == folder


def test_what_is_sent_keeps_its_place_relative_to_the_working_folder(project: Path) -> None:
    assert run_code.collect_code(["."]).folder == ""
    assert "pkg/cli.py" in names(run_code.collect_code(["."]))
    assert names(run_code.collect_code(["scripts"])) == ["scripts/data/x.csv", "scripts/go.py"]
    os.chdir("scripts")
    above = run_code.collect_code([".."])
    assert above.folder == "scripts" and "train.py" in names(above)


def test_what_version_control_keeps_is_not_sent() -> None:
    assert not [name for name in names(run_code.collect_code(["."])) if ".git" in name]


def test_a_folder_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"--ship: there is no file or folder .*nowhere"):
        run_code.collect_code(["nowhere"])


def test_whoever_the_program_runs_as_may_use_and_change_what_was_sent(project: Path) -> None:
    (project / "train.py").chmod(0o700)
    with run_code.packed(run_code.collect_code(["."]), b"{}") as file, tarfile.open(fileobj=file) as tar:
        modes = {entry.name: entry.mode for entry in tar}
    assert modes["fiberexec-run/code"] == modes["fiberexec-run/code/pkg"] == 0o777
    assert modes["fiberexec-run/code/train.py"] == 0o777
    assert modes["fiberexec-run/code/pkg/cli.py"] == 0o666
    assert list(modes)[-1] == "fiberexec-run/run.json"  # the first process waits for it: all else must be there


def test_a_file_gets_another_name_where_it_is_copied_to(tmp_path: Path) -> None:
    with run_code.archive(run_code.tree("train.py", "train.py")) as file:
        run_code.unpack(file, str(tmp_path), "other.py")
    assert (tmp_path / "other.py").read_text() == "train.py"


def test_a_folder_is_copied_whole(tmp_path: Path) -> None:
    with run_code.archive(run_code.tree("scripts", "scripts")) as file:
        run_code.unpack(file, str(tmp_path), "copy")
    assert (tmp_path / "copy" / "data" / "x.csv").read_text() == "scripts/data/x.csv"


def given(folder: Path) -> io.BytesIO:
    """A folder as it comes from a job."""
    buffer = io.BytesIO()
    with tarfile.open(mode="w|", fileobj=buffer) as tar:
        tar.add(folder, folder.name)
    buffer.seek(0)
    return buffer


def test_a_file_with_two_names_is_copied_under_both(tmp_path: Path) -> None:
    (there := tmp_path / "there" / "out").mkdir(parents=True)
    (there / "a").write_text("new")
    (there / "b").hardlink_to(there / "a")
    (here := tmp_path / "here" / "out").mkdir(parents=True)
    (here / "a").write_text("of an earlier copy")
    run_code.unpack(given(there), str(here.parent), "copy")
    assert [(here.parent / "copy" / name).read_text() for name in "ab"] == ["new", "new"]
    run_code.unpack(given(there), str(tmp_path))
    assert [(tmp_path / "out" / name).read_text() for name in "ab"] == ["new", "new"]


def test_what_cannot_be_copied_is_left_out_and_the_rest_comes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (there := tmp_path / "there").mkdir()
    (there / "a").symlink_to("/etc/passwd")
    (there / "b").symlink_to("../../elsewhere")
    os.mkfifo(there / "c")
    (there / "d").symlink_to("e")
    (there / "e").write_text("e")
    run_code.unpack(given(there), str(tmp_path), "copy")
    assert sorted(os.listdir(tmp_path / "copy")) == ["d", "e"]
    assert [line.split("'")[1] for line in capsys.readouterr().err.splitlines()] == ["copy/a", "copy/b", "copy/c"]


def test_a_copy_of_nothing_is_an_error(tmp_path: Path) -> None:
    (link := tmp_path / "link").symlink_to("/etc/passwd")
    with pytest.raises(FiberError, match=r"nothing was copied: .*link"):
        run_code.unpack(given(link), str(tmp_path), "copy")


def test_who_gives_an_archive_waits_until_it_has_been_taken(tmp_path: Path) -> None:
    """A node passes on only what it has got when a command ends."""
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    command = [sys.executable, "-m", run_files.__name__, "give", str(tmp_path / "link")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        archive = b""
        while not archive.endswith(run_files.END):
            archive += process.stdout.read1()  # type: ignore[attr-defined]
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.2)
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.wait(30) == 0
    run_code.unpack(io.BytesIO(base64.b64decode(archive[:-1])), str(tmp_path / "there"))
    assert (tmp_path / "there" / "link").read_text() == "text"


def test_what_comes_from_a_job_cannot_be_put_elsewhere(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(mode="w", fileobj=buffer) as tar:
        entry = tarfile.TarInfo("../escaped")
        entry.size = 1
        tar.addfile(entry, io.BytesIO(b"x"))
    buffer.seek(0)
    (tmp_path / "in").mkdir()
    with pytest.raises(tarfile.TarError):
        run_code.unpack(buffer, str(tmp_path / "in"))
    assert not (tmp_path / "escaped").exists()


@pytest.mark.parametrize(
    "command, stem",
    [
        (("python3", "/app/pi_estimation.py"), "pi-estimation"),
        (("python", "-m", "My.Pkg"), "my-pkg"),
        (("./run.sh",), "run-sh"),
        (("python", "-c"), "program"),
    ],
)
def test_a_program_is_called_after_what_it_runs(command: tuple[str, ...], stem: str) -> None:
    name = run_base.default_name(command)
    assert name.rpartition("-")[0] == stem
    assert run_base.checked_name(name) == name
