"""What travels to a worker and back: arrays, frames, large bytes, modules that change."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fiberexec import FiberExecutor

LIMIT = 60.0
Make = Callable[..., FiberExecutor]
MIB = 1 << 20


# -- data


def test_arrays_arrive_writable_both_ways(executor: FiberExecutor) -> None:
    np = pytest.importorskip("numpy")

    def double(array: Any) -> Any:
        array *= 2
        return array, bool(array.flags.writeable)

    for array in (
        np.arange(10), np.arange(2 * MIB, dtype="f8"), np.asfortranarray(np.ones((300, 400))), np.arange(1000)[::3],
        np.zeros((0, 5)), np.array(5.0), np.arange(MIB, dtype=">i4"),
    ):  # fmt: skip
        back, writable = executor.submit(double, array.copy(order="K")).result(LIMIT)
        assert writable and back.flags.writeable
        assert back.dtype == array.dtype and np.array_equal(back, array * 2)
        back += 1


def test_arrays_of_records_dates_and_objects(executor: FiberExecutor) -> None:
    np = pytest.importorskip("numpy")
    for array in (
        np.zeros(50, dtype=[("a", "i4"), ("b", "f8")]), np.array(["2024-02-29", "NaT"], dtype="datetime64[D]"),
        np.array([{"a": 1}, None, [2]], dtype=object), np.array(["x", "yy"]),
    ):  # fmt: skip
        back = executor.submit(lambda a: a, array).result(LIMIT)
        assert back.dtype == array.dtype and repr(back) == repr(array)


@pytest.mark.one_host("the images have no pandas")
def test_frames_arrive_equal_and_can_be_changed(executor: FiberExecutor) -> None:
    pd = pytest.importorskip("pandas")

    def add(frame: Any) -> Any:
        frame["c"] = frame["a"] + 1
        frame.loc[0, "a"] = -1
        return frame

    frame = pd.DataFrame({"a": range(1000), "b": [str(i) for i in range(1000)]})
    back = executor.submit(add, frame).result(LIMIT)
    assert list(back.columns) == ["a", "b", "c"] and back["a"][0] == -1 and frame["a"][0] == 0
    back.loc[1, "c"] = 5
    pd.testing.assert_series_equal(back["b"], frame["b"])


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_64_mib_there_and_back(executor: FiberExecutor, kind: Any) -> None:
    data = kind(os.urandom(MIB)) * 64
    back = executor.submit(lambda value: value, data).result(LIMIT)
    assert type(back) is kind and back == data


@pytest.mark.skipif(os.environ.get("FIBEREXEC_CAMPAIGN") != "full", reason="1 GiB travels in the full campaign only")
def test_1_gib_there_and_back(executor: FiberExecutor) -> None:
    data = bytes(1 << 30)
    back = executor.submit(lambda value: value, data).result(LIMIT)
    assert len(back) == 1 << 30 and back == data


def test_large_payloads_do_not_block_small_ones(executor: FiberExecutor, board: Any) -> None:
    """The worker's stream is full and nobody reads it: the driver does not wait for it."""

    def hold(data: Any) -> int:
        board.post("held")
        board.wait("go")
        return len(data)

    held = executor.submit(hold, bytes(16 * MIB))
    board.wait("held")
    assert executor.submit(len, bytes(MIB)).result(LIMIT) == MIB
    board.post("go")
    assert held.result(LIMIT) == 16 * MIB


# -- modules


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes modules of the user's, and forgets them when the test ends."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    written: set[str] = set()

    def write(name: str, text: str) -> Any:
        (tmp_path / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        if name in written:
            return importlib.reload(sys.modules[name])
        written.add(name)
        return importlib.import_module(name)

    yield write
    for name in written:
        sys.modules.pop(name, None)


def test_a_module_of_the_users_that_appears_late_is_found(executor: FiberExecutor, package: Any) -> None:
    executor.submit(int).result(LIMIT)
    module = package("fiber_test_late", "def value(): return 'late'\n")
    assert executor.submit(module.value).result(LIMIT) == "late"


def test_a_module_that_is_edited_and_reloaded_is_new_in_the_workers(backend: str, make_executor: Make, package: Any) -> None:
    if backend != "local":
        pytest.skip("a job keeps the version of a module that it got first: docs/code-on-hosts.md")
    executor = make_executor(1)
    module = package("fiber_test_edited", "def value(): return 'one'\n")
    assert executor.submit(module.value).result(LIMIT) == "one"
    for text in ("two", "three", "four!"):
        module = package("fiber_test_edited", f"def value(): return {text!r}\n")
        assert executor.submit(module.value).result(LIMIT) == text
        assert list(executor.map(lambda _, used=module: used.value(), range(3))) == [text] * 3


def test_what_an_edited_module_is_used_by_is_new_too(backend: str, make_executor: Make, package: Any) -> None:
    if backend != "local":
        pytest.skip("a job keeps the version of a module that it got first: docs/code-on-hosts.md")
    executor = make_executor(1)
    package("fiber_test_inner", "def value(): return 'one'\n")
    outer = package("fiber_test_outer", "import fiber_test_inner\ndef value(): return fiber_test_inner.value()\n")
    assert executor.submit(outer.value).result(LIMIT) == "one"
    package("fiber_test_inner", "def value(): return 'and now two'\n")
    assert outer.value() == executor.submit(outer.value).result(LIMIT) == "and now two"
