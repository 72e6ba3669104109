"""Importing fiberexec is cheap and loads nothing that is not needed."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

import pytest

import fiberexec

ROUNDS = 15
BUDGET = 0.040  # seconds
HEAVY = (
    "pynng",
    "dill",
    "docker",
    "kubernetes",
    "tenacity",
    "click",
    "cryptography",
    "numpy",
    "dataclasses",
    "logging",
)


def seconds(program: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    return time.perf_counter() - start


def loaded(program: str) -> set[str]:
    """The modules that are loaded when the program has run."""
    output = subprocess.run(
        [sys.executable, "-c", f"{program}\nimport json, sys; print(json.dumps(sorted(sys.modules)))"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    return set(json.loads(output))


def test_import_costs_at_most_40_ms_over_a_bare_interpreter() -> None:
    seconds("import fiberexec")  # write the bytecode, if anybody may
    pairs = [(seconds("pass"), seconds("import fiberexec")) for _ in range(ROUNDS)]
    cost = statistics.median(ours for _, ours in pairs) - statistics.median(bare for bare, _ in pairs)
    assert cost <= BUDGET, f"{cost * 1000:.1f} ms"


@pytest.mark.parametrize("module", HEAVY)
def test_import_does_not_load(module: str) -> None:
    assert module not in loaded("import fiberexec") - loaded("pass")


@pytest.mark.parametrize("module", ["pynng", "dill", "docker", "kubernetes", "tenacity", "click", "numpy"])
def test_an_executor_does_not_load(module: str) -> None:
    program = "import fiberexec\nwith fiberexec.FiberExecutor(1) as ex: assert ex.submit(abs, -1).result() == 1"
    assert module not in loaded(program) - loaded("pass")


@pytest.mark.parametrize("module", [*HEAVY, "inspect", "concurrent.futures", "threading"])
def test_a_worker_does_not_load(module: str) -> None:
    program = "import sys, fiberexec._worker, fiberexec._serialize"
    assert module not in loaded(program) - loaded("pass")


def test_every_public_name_is_there_and_named_by_dir() -> None:
    for name in fiberexec.__all__:
        assert getattr(fiberexec, name) is not None
    assert set(fiberexec.__all__) <= set(dir(fiberexec))
    assert fiberexec.__all__ == sorted(fiberexec.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        fiberexec.nothing_of_that_name  # noqa: B018


@pytest.mark.parametrize("name", ["AsyncManager", "Pool", "Process", "Queue", "Ring", "cpu_count"])
def test_names_of_mp_can_be_had_from_the_package(name: str) -> None:
    assert getattr(fiberexec, name) == getattr(fiberexec.mp, name)
    assert "multiprocessing" not in loaded("import fiberexec") - loaded("pass")
