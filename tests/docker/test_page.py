"""The how-to for Docker says what the code says."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from fiberexec.backends import (
    _docker_engine,
    _docker_errors,
    _docker_images,
    _docker_options,
    _docker_reader,
    _image_errors,
    _images,
    docker,
)

PAGE = (Path(__file__).parents[2] / "docs" / "docker.md").read_text()
# What the engine itself says, as the errors' rules expect it.
ENGINE = [
    "pull access denied",
    "unauthorized",
    "manifest unknown",
    "bind source path does not exist",
    "no space left on device",
]
ENGINE += ["could not select device driver"]
SOURCE = "".join(
    " ".join(re.sub(r'"\s*\n\s*f?"|[{}]', "", inspect.getsource(module)).split())
    for module in (_docker_engine, _docker_errors, _docker_images, _docker_reader, _image_errors, _images, docker)
)


@pytest.mark.parametrize("heading", re.findall(r"^### (.*)$", PAGE, re.MULTILINE))
def test_each_message_that_is_explained_exists(heading: str) -> None:
    for part in re.split(r"\s*\.\.\.\s*|, (?=unauthorized)", heading):
        words = part.replace(" (permission denied)", "").strip()
        if words in ENGINE:
            assert any(re.search(pattern, words, re.IGNORECASE) for pattern, _, _ in _docker_errors._RULES), words
        else:
            assert words in SOURCE, words


def test_every_option_of_fiberexecs_own_is_explained() -> None:
    table = PAGE.partition("| Option |")[2].partition("\n\n")[0]
    assert sorted(set(re.findall(r"`([a-z_]+)`", "".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE))))) == sorted(
        _docker_options._OURS
    )
