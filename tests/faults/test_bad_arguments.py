"""Wrong types and values in every argument: an exception at the earliest moment that names what is wrong."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fiberexec
from fiberexec import BrokenExecutor, ConfigError, FiberExecutor, ResourceError

NAN, INF = float("nan"), float("inf")
WRONG: dict[str, list[Any]] = {
    "max_workers": [0, -1, 1.5, "2", True, 10**6, 10**30, NAN, [2], b"2"],
    "mp_context": ["fork", 1, object],
    "initializer": [1, "print", [print]],
    "initargs": [1, "ab", [1], None],
    "max_tasks_per_child": [0, -1, 1.5, "2", True],
    "backend": ["", "lcoal", 7, b"local", "docker-swarm"],
    "image": ["", 5, b"x", "a\0b"],
    "cpu": [0, -1, NAN, INF, "many", "1x", "", True, [1], 10**6],
    "memory": [0, -1, 1.5, "4X", "Gi", "", "512m", True, 10**12, "1e400Gi"],
    "gpu": [-1, 1.5, "1", True, 10**6],
    "min_workers": [-1, 1.5, "2", True, 10**6],
    "workers_per_job": [0, -1, 1.5, "2"],
    "retry": [1, 3.0, "twice", True, print, object()],
    "timeout": [0, -1, NAN, INF, "5", True, 1e300, [5]],
    "max_worker_losses": [0, -1, 1.5, "3", True],
    "idle_timeout": [-1, NAN, INF, "5", True],
    "startup_timeout": [0, -1, NAN, INF, "5", True],
    "driver_timeout": [0, -1, NAN, INF, "5"],
    "launch_retry": [1, "twice", print],
    "ship": ["one.py", 5, [5], [""], ["a\0b"]],
    "env": ["A=B", {"A": 1}, {1: "A"}, {"": "x"}, {"A=": "x"}, {"A": "\0"}, [("A", "B")]],
    "backend_options": ["x", 5, {1: 2}, {"nothing": 1}],
}
OPTIONS: dict[str, list[Any]] = {
    "timeout": [0, -1, NAN, INF, "5", True, 1e300],
    "retry": [1, "twice", True, print],
    "priority": [1.5, "high", None, True, NAN],
    "cpu": [-1, NAN, INF, "many", True, [1]],
    "memory": [-1, 1.5, "4X", True],
    "gpu": [-1, 1.5, "1", True],
    "max_worker_losses": [0, -1, 1.5, "3", True, None],
}


def cases(table: dict[str, list[Any]]) -> Any:
    pairs = [(name, value) for name, values in table.items() for value in values]
    found = [pytest.param(name, value, id=f"{name}={value!r:.40}") for name, value in pairs]
    return pytest.mark.parametrize(("name", "value"), found)


@cases(WRONG)
def test_a_wrong_argument_is_refused_when_the_executor_is_made(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        FiberExecutor(**{name: value})
    assert name in str(caught.value), str(caught.value)


@cases(OPTIONS)
def test_a_wrong_option_is_refused_when_the_view_is_made(name: str, value: Any) -> None:
    with FiberExecutor(1) as ex:
        with pytest.raises((ValueError, TypeError)) as caught:
            ex.options(**{name: value})
        assert name in str(caught.value), str(caught.value)


@cases({name: OPTIONS[name] for name in ("cpu", "memory", "gpu")})
def test_a_wrong_resource_is_refused_by_the_decorator(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        fiberexec.meta(**{name: value})
    assert name in str(caught.value), str(caught.value)


def test_an_unknown_argument_is_named() -> None:
    with pytest.raises(TypeError, match="max_worker"):
        FiberExecutor(max_worker=2)  # type: ignore[call-arg]


@pytest.mark.parametrize("wrong", [{"time_out": 5}, {"resources": {}}, {"max_workers": 3}])
def test_an_unknown_option_is_named(wrong: dict[str, Any]) -> None:
    with FiberExecutor(1) as ex:
        with pytest.raises(TypeError, match=next(iter(wrong))):
            ex.options(**wrong)


def test_an_unknown_backend_is_named_beside_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match="did you mean 'local'"):
        FiberExecutor(backend="lokal")


def test_an_option_that_the_backend_does_not_know_is_named() -> None:
    with pytest.raises(ConfigError, match="namespace"):
        FiberExecutor(backend_options={"namespace": "x"})


def test_a_huge_worker_count_says_how_many_there_can_be() -> None:
    with pytest.raises(ConfigError, match=r"at most \d+"):
        FiberExecutor(10**6)


def test_more_workers_at_least_than_at_most_are_refused() -> None:
    with pytest.raises(ConfigError, match="min_workers=3"):
        FiberExecutor(2, min_workers=3)


def test_a_refused_argument_leaves_nothing_behind_and_names_where_it_came_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FIBEREXEC_TIMEOUT", "soon")
    with pytest.raises(ConfigError, match="FIBEREXEC_TIMEOUT"):
        FiberExecutor()
    monkeypatch.delenv("FIBEREXEC_TIMEOUT")
    (tmp_path / "fiberexec.toml").write_text("max_workers = -3\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"fiberexec\.toml"):
        FiberExecutor()


# -- tasks


@pytest.mark.parametrize("what", [None, 5, "print", [print], object()])
def test_what_cannot_be_called_is_refused_by_submit_and_map(what: Any) -> None:
    with FiberExecutor(1) as ex:
        for view in (ex, ex.options(timeout=5)):
            with pytest.raises(TypeError, match="callable"):
                view.submit(what)
            with pytest.raises(TypeError, match="callable"):
                view.map(what, [1])
        assert ex.submit(abs, -1).result(30) == 1


def test_submit_without_a_function_is_a_type_error() -> None:
    with FiberExecutor(1) as ex, pytest.raises(TypeError):
        ex.submit()  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "wrong",
    [
        {"chunksize": 0},
        {"chunksize": -1},
        {"chunksize": 1.5},
        {"chunksize": "4"},
        {"buffersize": 0},
        {"buffersize": -1},
        {"buffersize": 1.5},
        {"buffersize": "4"},
        {"timeout": "5"},
        {"timeout": NAN},
    ],
    ids=str,
)
def test_a_wrong_argument_of_map_is_refused_at_once(wrong: dict[str, Any]) -> None:
    taken = []

    def numbers() -> Iterator[int]:
        for number in range(3):
            taken.append(number)
            yield number

    with FiberExecutor(1) as ex:
        with pytest.raises((TypeError, ValueError)) as caught:
            ex.map(abs, numbers(), **wrong)
        assert next(iter(wrong)) in str(caught.value)
        assert not taken, "items were taken before the argument was looked at"


def test_what_cannot_be_iterated_is_refused_at_once() -> None:
    with FiberExecutor(1) as ex, pytest.raises(TypeError):
        ex.map(abs, 5)  # type: ignore[arg-type]


def test_an_iterable_that_raises_raises_where_it_is_read_and_nothing_else_is_lost() -> None:
    def numbers() -> Iterator[int]:
        yield 1
        raise LookupError("no more")

    with FiberExecutor(1) as ex:
        before = ex.submit(abs, -7)
        with pytest.raises(LookupError, match="no more"):
            list(ex.map(abs, numbers()))
        with pytest.raises(LookupError, match="no more"):
            list(ex.map(abs, numbers(), buffersize=1))
        assert before.result(30) == 7
        assert ex.submit(abs, -8).result(30) == 8


def test_a_task_that_can_never_fit_is_refused_and_says_what_there_is() -> None:
    with FiberExecutor(1) as ex:
        for options in ({"cpu": 10**6}, {"memory": 10**9}, {"gpu": 1000}):
            with pytest.raises(ResourceError, match=r"cpu=.*memory=.*gpu="):
                ex.options(**options).submit(abs, 1)
        assert ex.submit(abs, -8).result(30) == 8


def test_wrong_arguments_of_the_function_are_its_own_exception() -> None:
    with FiberExecutor(1) as ex:
        assert isinstance(ex.submit(abs).exception(30), TypeError)
        assert isinstance(ex.submit(abs, 1, 2, x=3).exception(30), TypeError)


@pytest.mark.parametrize("how", ["submit", "map", "view.submit", "view.map"])
def test_nothing_is_taken_after_shutdown(how: str) -> None:
    ex = FiberExecutor(1)
    view = ex.options(timeout=5)
    assert ex.submit(abs, -1).result(30) == 1
    ex.shutdown()
    ex.shutdown()
    target = view if how.startswith("view") else ex
    with pytest.raises(RuntimeError, match="after shutdown"):
        if how.endswith("submit"):
            target.submit(abs, 1)
        else:
            target.map(abs, [1])


def test_nothing_is_taken_after_a_shutdown_that_came_before_any_task() -> None:
    ex = FiberExecutor(1)
    ex.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        ex.submit(abs, 1)


# -- initializers


def sleep_for_ever() -> None:
    time.sleep(600)


def raise_in_the_initializer() -> None:
    raise LookupError("the initializer has no luck")


def crash_in_the_initializer() -> None:
    os.write(2, b"words of an initializer\n")
    os._exit(9)


def deaf_initializer() -> None:
    import signal

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sleep_for_ever()


def exit_in_the_initializer() -> None:
    sys.exit("enough")


@pytest.mark.parametrize("initializer", [sleep_for_ever, deaf_initializer])
@pytest.mark.parametrize("workers", [1, 3])
def test_an_initializer_that_hangs_breaks_the_executor_after_startup_timeout(
    initializer: Callable[[], None], workers: int
) -> None:
    began = time.monotonic()
    with FiberExecutor(workers, initializer=initializer, startup_timeout=2) as ex:
        futures = [ex.submit(abs, -1) for _ in range(5)]
        for future in futures:
            error = future.exception(30)
            assert isinstance(error, BrokenExecutor), error
            assert "startup_timeout" in str(error)
            assert isinstance(error.__cause__, TimeoutError)
        with pytest.raises(BrokenExecutor, match="startup_timeout"):
            ex.submit(abs, -1)
    assert time.monotonic() - began < 15


def test_an_initializer_that_raises_breaks_the_executor_with_its_exception() -> None:
    with FiberExecutor(2, initializer=raise_in_the_initializer) as ex:
        error = ex.submit(abs, -1).exception(30)
        assert isinstance(error, BrokenExecutor)
        assert isinstance(error.__cause__, LookupError)
        assert "no luck" in str(error.__cause__)
        with pytest.raises(BrokenExecutor):
            ex.submit(abs, -1)


def test_an_initializer_that_exits_breaks_the_executor() -> None:
    with FiberExecutor(2, initializer=exit_in_the_initializer) as ex:
        assert isinstance(ex.submit(abs, -1).exception(30), BrokenExecutor)


@pytest.mark.parametrize("workers", [1, 3])
def test_an_initializer_that_crashes_breaks_the_executor_with_its_last_words(workers: int) -> None:
    with FiberExecutor(workers, initializer=crash_in_the_initializer) as ex:
        error = ex.submit(abs, -1).exception(30)
        assert isinstance(error, BrokenExecutor)
        assert "words of an initializer" in str(error) + str(error.__cause__)
        assert "exit code 9" in str(error) + str(error.__cause__)


def test_an_initializer_that_cannot_travel_is_refused_with_the_executor() -> None:
    import threading

    with pytest.raises((TypeError, ValueError, fiberexec.PicklingError)):
        FiberExecutor(1, initializer=print, initargs=(threading.Event(), sys._getframe()))


def test_an_initializer_with_wrong_arguments_breaks_the_executor_with_the_reason() -> None:
    with FiberExecutor(1, initializer=sleep_for_ever, initargs=(1, 2)) as ex:
        error = ex.submit(abs, -1).exception(30)
        assert isinstance(error, BrokenExecutor)
        assert isinstance(error.__cause__, TypeError)
