"""Files and folders that `ship` names, on their way and unpacked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fiberexec._bundle import _archive, check_ship, ship
from fiberexec._errors import ConfigError

from .helpers import names, put


def test_ship_keeps_relative_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(
        tmp_path,
        {"w/data.csv": "1", "w/conf/a.yaml": "a", "w/conf/x/b": "b", "w/deep/er/f": "f", "out.txt": "o", "abs/g": "g"},
    )
    (tmp_path / "w" / "conf" / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "w")
    paths: list[str | Path] = ["data.csv", "conf/", "./deep/er/f", "../out.txt", str(tmp_path / "abs"), Path("conf")]
    check_ship(paths)
    packed = names(ship(paths))
    assert sorted(packed) == ["abs/g", "conf/a.yaml", "conf/empty/", "conf/x/b", "data.csv", "deep/er/f", "out.txt"]
    assert packed["conf/a.yaml"] == b"a"


def test_ship_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, {"a.txt": "", "b/c.txt": "", ".git/config": ""})
    monkeypatch.chdir(tmp_path)
    assert sorted(names(ship(["."]))) == ["a.txt", "b/c.txt"]


def test_ship_of_nothing() -> None:
    check_ship([])
    assert names(ship([])) == {}


def test_ship_sends_what_it_is_told_compiled_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, {"lib.so": b"ELF"})
    monkeypatch.chdir(tmp_path)
    assert names(ship(["lib.so"])) == {"lib.so": b"ELF"}


def test_check_ship_names_the_path_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"'no\.csv'.*current folder is"):
        check_ship(["no.csv"])


def test_check_ship_refuses_two_files_of_one_name(tmp_path: Path) -> None:
    put(tmp_path, {"a/f": "1", "b/f": "2"})
    with pytest.raises(ConfigError, match="would both be 'f'"):
        check_ship([str(tmp_path / "a" / "f"), str(tmp_path / "b" / "f")])


def test_check_ship_refuses_what_is_too_large_and_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "big.bin", "wb") as file:
        file.truncate(300 * 2**20)
    monkeypatch.setattr(_archive, "open", None, raising=False)
    with pytest.raises(ConfigError, match=r"300 MiB.*big\.bin"):
        check_ship([str(tmp_path / "big.bin")])


def test_check_ship_refuses_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="not a file or a folder"):
        check_ship([str(tmp_path / "pipe")])
