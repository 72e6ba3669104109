"""CPython's own tests of ``multiprocessing``, taken from the interpreter that runs this, against ``fiberexec.mp``.

multiprocessing itself, with spawn, passes or skips each of them on Python 3.10 to 3.13 (``run_multiprocessing.py
--spawn``); fiberexec.mp has to pass all but those in EXCLUDED, which says why. Each class runs in a process of its own.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import runpy
import sys
from pathlib import Path

import pytest

import fiberexec.mp

if importlib.util.find_spec("test") is None or importlib.util.find_spec("test._test_multiprocessing") is None:
    pytest.skip(f"Python {sys.version.split()[0]} at {sys.base_prefix} ships no tests", allow_module_level=True)

TOOL = runpy.run_path(str(Path(__file__).with_name("run_multiprocessing.py")))
EXCLUDED = TOOL["EXCLUDED"]
CASES = TOOL["cases"]()
SKIPPED = {  # by multiprocessing too
    "TestInvalidFamily.test_invalid_family_win32",
    "TestStartMethod.test_preload_resources",
    "WithManagerTestBarrier.test_thousand",
    "WithManagerTestPool.test_enter",
    "WithManagerTestPool.test_imap_handle_iterable_exception",
    "WithManagerTestPool.test_imap_unordered_handle_iterable_exception",
    "WithManagerTestPool.test_map_handle_iterable_exception",
    "WithManagerTestPool.test_resource_warning",
    "WithManagerTestQueue.test_queue_feeder_donot_stop_onexc",
    "WithManagerTestQueue.test_queue_feeder_on_queue_feeder_error",
    "WithManagerTestSemaphore.test_timeout",
    "WithProcessesTestProcess.test_forkserver_sigint",
    "WithProcessesTestProcess.test_forkserver_sigkill",
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", CASES)
def test_what_multiprocessing_passes_passes(name: str) -> None:
    outcomes = TOOL["run"]([case for case in CASES[name] if not TOOL["excluded"](case)])
    wrong = [
        f"{outcome.case}: {outcome.status}\n{outcome.text}" for outcome in outcomes if outcome.status in ("failed", "ended")
    ]
    assert not wrong, "\n".join(wrong)
    assert {outcome.case for outcome in outcomes if outcome.status == "skipped"} <= SKIPPED


def test_at_most_one_case_in_twenty_is_excluded() -> None:
    every = [case for found in CASES.values() for case in found if case not in SKIPPED]
    assert 20 * len([case for case in every if TOOL["excluded"](case)]) <= len(every)


@pytest.mark.parametrize("name", EXCLUDED)
def test_an_exclusion_names_what_exists_and_says_why(name: str) -> None:
    since, why = EXCLUDED[name]
    assert name in CASES or any(name in found for found in CASES.values()) or sys.version_info < since
    assert len(why) > 20


@pytest.mark.parametrize("module", ["", *(f".{entry.name}" for entry in pkgutil.iter_modules(fiberexec.mp.__path__))])
def test_every_public_name_of_a_module_is_there(module: str) -> None:
    found = importlib.import_module(f"fiberexec.mp{module}")
    assert [name for name in getattr(found, "__all__", []) if not hasattr(found, name)] == []
