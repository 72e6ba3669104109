"""An engine whose disk is full: what is said, and that it goes on when there is room again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import services

from fiberexec import LaunchError

from .conftest import Engine, Place, bare_engine

pytestmark = [
    pytest.mark.leaks("the engine is a child of the tests, and lives longer than one"),
    pytest.mark.timeout(180),
    # Docker's SDK leaves the socket of a connection that is refused to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"),
]
DISK = 1 << 30  # bytes, of memory: a few times an image


@pytest.fixture(scope="module")
def small_engine() -> Iterator[Engine]:
    with bare_engine(disk=DISK) as engine:
        yield engine


@pytest.fixture
def full(small_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that takes all the room on the disk of the engine that is used."""
    monkeypatch.setenv("DOCKER_HOST", small_engine.url)
    file = small_engine.folder / "d" / "takes-all"
    with open(file, "wb") as taking, pytest.raises(OSError, match="No space left"):
        while True:
            taking.write(bytes(1 << 20))
            taking.flush()
    yield file
    file.unlink(missing_ok=True)


def test_a_container_that_has_no_room_is_refused_until_there_is_some(full: Path, place: Callable[..., Place]) -> None:
    one = place()
    with pytest.raises(LaunchError, match=r"no space left on device.*docker system prune") as caught:
        one.start(1, "pass")
    assert caught.value.final
    full.unlink()
    assert one.end(one.start(2, "pass")).code == 0


@pytest.mark.parametrize("room", [0, 12 << 20], ids=["nothing", "the-files"])
def test_an_image_that_has_no_room_says_so_when_it_is_built(
    room: int, full: Path, place: Callable[..., Place], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "Dockerfile").write_text(f"FROM {services.bare_image()}\nCOPY large /large\n")
    (tmp_path / "large").write_bytes(bytes(8 << 20))
    monkeypatch.chdir(tmp_path)
    os.truncate(full, full.stat().st_size - room)
    with pytest.raises(LaunchError, match=r"(?s)no space left on device.*docker system prune") as caught:
        place(image=None).start(1, "pass")
    assert caught.value.final
