"""What the command line of ``fiberexec run`` asks for, beside what files and variables say; and of the commands around it."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import IO, Any

import pytest
from click.testing import CliRunner, Result

from fiberexec import ConfigError, _config
from fiberexec._cli import places
from fiberexec._cli import run as run_command
from fiberexec._cli.run_base import Wanted, variables
from fiberexec.backends import _docker_options, registry
from fiberexec.cli import main


class Place:
    """One that starts nothing, and has a file."""

    name, where = "docker", ""

    def __init__(self) -> None:
        self.asked: list[Wanted] = []

    def start(self, wanted: Wanted, said: Any) -> None:
        self.asked.append(wanted)

    def has(self, name: str) -> bool:
        return True

    def fetch(self, name: str, path: str) -> IO[bytes]:
        file = io.BytesIO()
        with tarfile.open(mode="w", fileobj=file) as archive:
            entry = tarfile.TarInfo(path)
            entry.size = 3
            archive.addfile(entry, io.BytesIO(b"abc"))
        file.seek(0)
        return file

    def close(self) -> None:
        pass


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Place:
    found = Place()
    monkeypatch.setattr(run_command, "_place", lambda *_: found)
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".git").mkdir()
    return found


def fiberexec(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def wanted(place: Place, *options: str) -> Wanted:
    done = fiberexec("run", "--backend", "docker", "--detach", "--ship", "", *options, "true")
    assert done.exit_code == 0, done.output
    return place.asked[-1]


def test_a_dockerfile_that_is_named_outdoes_an_image_of_the_settings(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIBEREXEC_IMAGE", "lab:3")
    assert wanted(place).settings.image == "lab:3"
    assert wanted(place, "--dockerfile", "Dockerfile.new").settings.image is None
    both = fiberexec("run", "--image", "lab:4", "--dockerfile", "Dockerfile.new", "true")
    assert both.exit_code == 2 and "--image and --dockerfile exclude each other" in both.output


VOLUMES = [
    'volumes = ["./data:/data", "cache:/cache:ro"]',
    'volumes = {"./data" = "/data", "cache" = {bind = "/cache", mode = "ro"}}',
]


@pytest.mark.parametrize("volumes", VOLUMES)
def test_volumes_of_the_settings_and_of_the_command_line_mean_the_same_where_the_program_is(
    volumes: str, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fiberexec.toml").write_text(f"[backend_options]\n{volumes}\n")
    pytest.importorskip("docker")
    asked = wanted(place, "--volume", "more:/more:ro")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # as in the program's container
    for name, value in variables(asked, "image:1").items():
        monkeypatch.setenv(name, value)
    mounts = _docker_options.check(_config.load()).host["mounts"]
    assert [(one["Source"], one["Target"], one["ReadOnly"]) for one in mounts] == [
        (str(tmp_path / "data"), "/data", False),
        ("cache", "/cache", True),
        ("more", "/more", True),
    ]
    again = wanted(place, "--volume", "/x:/data").settings.backend_options["mounts"]
    assert [one["source"] for one in again] == ["/x", "cache", "more"]  # the command line has the last word


def test_mounts_that_are_none_are_refused_with_what_they_must_be(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("docker")
    (tmp_path / "fiberexec.toml").write_text('[backend_options]\nmounts = ["./a:/b"]\n')
    asked = wanted(place, "--volume", "/x:/x")
    with pytest.raises(ConfigError, match="mounts must have what docker"):
        _docker_options.check(asked.settings)


def test_a_file_is_not_copied_into_a_folder_that_there_is_not(place: Place, tmp_path: Path) -> None:
    done = fiberexec("cp", "night:a.txt", "new/")
    assert done.exit_code == 1 and "there is no folder new/" in done.output and not (tmp_path / "new").exists()
    assert fiberexec("cp", "night:a.txt", "b.txt").exit_code == 0
    assert (tmp_path / "b.txt").read_text() == "abc"


@pytest.mark.parametrize("command", [("ps",), ("logs", "x"), ("kill", "x"), ("clean", "--dry-run")])
def test_commands_ask_the_namespace_that_they_are_told(command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Backend:
        def list(self) -> list[Any]:
            return []

        def close(self) -> None:
            pass

    def create(name: str, settings: Any) -> Any:
        asked.append((name, settings.backend_options))
        return Backend()

    monkeypatch.setattr(registry, "create_jobs", create)
    monkeypatch.setattr(places.processes, "table", dict)
    fiberexec(*command, "--backend", "kubernetes", "--namespace", "work")
    assert asked == [("kubernetes", {"namespace": "work"})]
