"""Archives become folders: whole, or not at all."""

from __future__ import annotations

import io
import os
import stat
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from fiberexec._bundle import install, ship, unpack

from .helpers import put


def archive(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        for name, data in files.items():
            made.writestr(name, data)
    return buffer.getvalue()


DIGEST = "ab" * 32


def test_unpacking_keeps_content_folders_and_executable_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, {"w/run.sh": "#!/bin/sh", "w/conf/a": "1"})
    (tmp_path / "w" / "run.sh").chmod(0o700)
    (tmp_path / "w" / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "w")
    digest, data = ship(["."])
    place = Path(unpack(digest, data, str(tmp_path / "there")))
    assert place == tmp_path / "there" / digest
    assert (place / "conf" / "a").read_text() == "1" and (place / "empty").is_dir()
    assert stat.S_IMODE((place / "run.sh").stat().st_mode) == 0o755
    assert unpack(digest, b"not looked at", str(tmp_path / "there")) == str(place)


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "a\\..\\evil", "a//b", "./a"])
def test_a_name_that_leads_out_of_the_folder_is_refused_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    data = archive(good=b"1", **{name: b"2"})
    with pytest.raises(ValueError, match="outside"):
        unpack(DIGEST, data, str(tmp_path / "code"))
    assert os.listdir(tmp_path / "code") == [] and os.listdir(tmp_path) == ["code"]


@pytest.mark.parametrize("digest", ["", "..", "../" * 21 + "x", "AB" * 32, "ab" * 31])
def test_what_is_no_digest_is_no_folder(digest: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="digest"):
        unpack(digest, archive(a=b""), str(tmp_path / "code"))


def test_a_damaged_archive_leaves_nothing(tmp_path: Path) -> None:
    data = bytearray(archive(good=b"1" * 1000))
    data[200] ^= 1
    with pytest.raises(zipfile.BadZipFile):
        unpack(DIGEST, bytes(data), str(tmp_path / "code"))
    assert os.listdir(tmp_path / "code") == []


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as made, made.open("zeros", "w") as file:
        for _ in range(257):
            file.write(bytes(2**20))
    with pytest.raises(ValueError, match="too large"):
        unpack(DIGEST, buffer.getvalue(), str(tmp_path / "code"))


def test_unpacking_in_many_threads_at_once_gives_one_whole_folder(tmp_path: Path) -> None:
    data = archive(**{f"d{n}/f": b"%d" % n for n in range(100)})
    failed: list[BaseException] = []
    start = threading.Barrier(6)

    def go() -> None:
        start.wait()
        try:
            place = unpack(DIGEST, data, str(tmp_path / "code"))
            assert all((Path(place) / f"d{n}" / "f").read_bytes() == b"%d" % n for n in range(100))
        except BaseException as error:
            failed.append(error)

    crowd = [threading.Thread(target=go) for _ in range(6)]
    for one in crowd:
        one.start()
    for one in crowd:
        one.join()
    assert not failed and os.listdir(tmp_path / "code") == [DIGEST]


def test_install_puts_its_finder_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    finder = install(lambda name: None, str(tmp_path))
    assert sys.meta_path[-1] is finder
