"""The user's folder of code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fiberexec._bundle import _modules


@pytest.fixture
def src(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of the user's, on the driver's sys.path."""
    folder = tmp_path / "src"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    _modules._projects.cache_clear()
    yield folder
    _modules._projects.cache_clear()
