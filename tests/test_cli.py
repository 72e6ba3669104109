"""The command: ``fiberexec config`` and ``--version``."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from click.testing import CliRunner

from fiberexec import _config
from fiberexec.cli import main


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rows(output: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split() for line in output.splitlines()}


def test_config_prints_each_value_and_where_it_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fiberexec.toml").write_text("max_workers = 7\n")
    monkeypatch.setenv("FIBEREXEC_MEMORY", "4Gi")
    result = CliRunner().invoke(main, ["config"])
    assert result.exit_code == 0
    found = rows(result.output)
    assert list(found) == list(_config.CHECKS)
    assert found["max_workers"] == ["max_workers", "7", str(tmp_path / "fiberexec.toml")]
    assert found["memory"] == ["memory", "4096", "MiB", "FIBEREXEC_MEMORY"]
    assert found["timeout"] == ["timeout", "None", "default"]


def test_config_does_not_print_what_may_be_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIBEREXEC_ENV", '{"API_KEY": "hush"}')
    result = CliRunner().invoke(main, ["config"])
    assert "API_KEY" in result.output
    assert "hush" not in result.output


def test_config_says_what_is_wrong_with_a_setting_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIBEREXEC_MAX_WORKER", "7")
    result = CliRunner().invoke(main, ["config"])
    assert result.exit_code == 1
    assert "did you mean FIBEREXEC_MAX_WORKERS" in result.output
    assert "Traceback" not in result.output


def test_version_is_that_of_the_package() -> None:
    try:
        expected = version("fiberexec")
    except PackageNotFoundError:
        expected = "unknown (not installed)"
    output = subprocess.run(
        [sys.executable, "-m", "fiberexec", "--version"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    assert output.strip() == f"fiberexec {expected}"
