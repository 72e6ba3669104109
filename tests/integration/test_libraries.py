"""Libraries that take an executor or a ``map``: each gives the answer that it gives without one, from the workers."""

from __future__ import annotations

import multiprocessing.resource_tracker
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fiberexec import FiberExecutor


@pytest.fixture(scope="module", autouse=True)
def resource_tracker() -> None:
    """multiprocessing's lock, made by tqdm, starts it, and it stays: no single test is to blame for it."""
    multiprocessing.resource_tracker.ensure_running()


@pytest.fixture
def ex() -> Iterator[FiberExecutor]:
    with FiberExecutor(2) as executor:
        yield executor


def test_dask_computes_on_the_executor(ex: FiberExecutor) -> None:
    dask = pytest.importorskip("dask")

    @dask.delayed
    def square(x: int) -> tuple[int, int]:
        return x * x, os.getpid()

    @dask.delayed
    def total(pairs: list[tuple[int, int]]) -> tuple[int, set[int]]:
        return sum(value for value, _ in pairs), {pid for _, pid in pairs}

    ((value, pids),) = dask.compute(total([square(x) for x in range(20)]), scheduler=ex)
    assert value == 2470
    assert 1 <= len(pids) <= 2 and os.getpid() not in pids


def test_dask_raises_the_tasks_exception(ex: FiberExecutor) -> None:
    dask = pytest.importorskip("dask")
    with pytest.raises(ZeroDivisionError):
        dask.compute(dask.delayed(divmod)(1, 0), scheduler=ex)
    assert dask.compute(dask.delayed(divmod)(7, 2), scheduler=ex) == ((3, 1),)


def test_dask_bag_and_dataframe_of_local_functions(ex: FiberExecutor) -> None:
    pytest.importorskip("toolz")
    bag = pytest.importorskip("dask.bag")
    offset = 3
    numbers = bag.from_sequence(range(100), npartitions=8).map(lambda x: x + offset).filter(lambda x: x % 2)
    assert numbers.sum().compute(scheduler=ex) == sum(x + 3 for x in range(100) if (x + 3) % 2)


@pytest.fixture
def backend(ex: FiberExecutor) -> Any:
    """joblib takes no executor; its documented way is a backend, and this is all that one over an Executor needs."""
    joblib = pytest.importorskip("joblib")

    class ExecutorBackend(joblib.parallel.ParallelBackendBase):  # type: ignore[misc, name-defined]
        supports_retrieve_callback = True
        default_n_jobs = -1

        def effective_n_jobs(self, n_jobs: int) -> int:
            return ex._max_workers

        def submit(self, func: Callable[[], Any], callback: Callable[[Any], None]) -> Any:
            future = ex.submit(func)
            future.add_done_callback(callback)
            return future

        def retrieve_result_callback(self, future: Any) -> Any:
            return future.result()

    return ExecutorBackend()


def test_joblib_runs_on_the_executor(backend: Any) -> None:
    joblib = pytest.importorskip("joblib")

    def work(x: int) -> tuple[int, int]:
        return x * x, os.getpid()

    with joblib.parallel_config(backend=backend):
        results = joblib.Parallel()(joblib.delayed(work)(x) for x in range(50))
    assert [value for value, _ in results] == [x * x for x in range(50)]
    assert os.getpid() not in {pid for _, pid in results}


def test_joblib_raises_the_tasks_exception_and_goes_on(backend: Any) -> None:
    joblib = pytest.importorskip("joblib")
    with joblib.parallel_config(backend=backend):
        with pytest.raises(ZeroDivisionError):
            joblib.Parallel()(joblib.delayed(divmod)(1, x) for x in (1, 0, 2))
        assert joblib.Parallel()(joblib.delayed(abs)(-x) for x in range(3)) == [0, 1, 2]


def test_joblib_yields_results_as_they_come(backend: Any) -> None:
    joblib = pytest.importorskip("joblib")
    with joblib.parallel_config(backend=backend):
        results = joblib.Parallel(return_as="generator")(joblib.delayed(abs)(-x) for x in range(10))
        assert list(results) == list(range(10))


def test_joblib_inside_a_task_of_the_executor(ex: FiberExecutor) -> None:
    joblib = pytest.importorskip("joblib")

    def work() -> list[int]:
        parallel = joblib.Parallel(n_jobs=2, prefer="threads")
        return list(parallel(joblib.delayed(abs)(-x) for x in range(3)))

    assert ex.submit(work).result() == [0, 1, 2]


@pytest.fixture
def quiet_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the thread that tqdm keeps."""
    monkeypatch.setattr(pytest.importorskip("tqdm").tqdm, "monitor_interval", 0)


@pytest.mark.usefixtures("quiet_tqdm")
@pytest.mark.parametrize("chunksize", [1, 7])
def test_tqdm_process_map(chunksize: int, capsys: pytest.CaptureFixture[str]) -> None:
    """What ``process_map`` does: it passes its lock in ``initargs`` and replaces ``submit``, to move its bar."""
    concurrent = pytest.importorskip("tqdm.contrib.concurrent")

    def work(x: int, y: int) -> int:
        return x * y

    options = {"max_workers": 2, "chunksize": chunksize, "lock_name": "mp_lock", "ascii": True}
    results = concurrent._executor_map(FiberExecutor, work, range(20), range(20), **options)
    assert results == [x * x for x in range(20)]
    assert "100%" in capsys.readouterr().err


@pytest.mark.usefixtures("quiet_tqdm")
def test_tqdm_bars_inside_the_tasks() -> None:
    concurrent = pytest.importorskip("tqdm.contrib.concurrent")

    def work(n: int) -> int:
        from tqdm import tqdm

        return sum(tqdm(range(n), disable=None, leave=False))

    results = concurrent._executor_map(FiberExecutor, work, range(5), max_workers=2, lock_name="mp_lock", disable=True)
    assert results == [sum(range(n)) for n in range(5)]


def test_scipy_differential_evolution(ex: FiberExecutor) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    target = 0.25

    def cost(x: Any) -> float:
        return float(((x - target) ** 2).sum())

    options: dict[str, Any] = {"bounds": [(-1, 1)] * 2, "maxiter": 5, "popsize": 5, "seed": 7}
    options.update(updating="deferred", polish=False)
    serial = optimize.differential_evolution(cost, **options)
    parallel = optimize.differential_evolution(cost, workers=ex.map, **options)
    assert parallel.x.tolist() == serial.x.tolist()
    assert parallel.nfev == serial.nfev


def test_scipy_brute_and_quad_vec(ex: FiberExecutor) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    integrate = pytest.importorskip("scipy.integrate")

    def cost(x: Any) -> float:
        return float((x[0] - 0.5) ** 2 + x[1] ** 2)

    best = optimize.brute(cost, ((-1, 1), (-1, 1)), Ns=9, finish=None, workers=ex.map)
    assert best.tolist() == [0.5, 0.0]
    integral, _ = integrate.quad_vec(lambda x: x**2, 0, 3, workers=ex.map)
    assert integral == pytest.approx(9.0)


def test_emcee_walks_the_same_chain_as_without_a_pool(ex: FiberExecutor) -> None:
    emcee = pytest.importorskip("emcee")
    numpy = pytest.importorskip("numpy")
    start = numpy.random.default_rng(5).normal(size=(8, 2))

    def log_probability(x: Any) -> float:
        return float(-0.5 * (x**2).sum())

    chains = []
    for pool in (None, ex):
        sampler = emcee.EnsembleSampler(8, 2, log_probability, pool=pool)
        sampler.random_state = numpy.random.RandomState(11).get_state()
        sampler.run_mcmc(start, 5)
        chains.append(sampler.get_chain())
    assert numpy.array_equal(*chains)


def test_numpy_and_pandas_come_back_whole_and_writable(ex: FiberExecutor) -> None:
    numpy = pytest.importorskip("numpy")
    pandas = pytest.importorskip("pandas")

    def grow(array: Any) -> Any:
        array += 1
        return array

    arrays = list(ex.map(grow, [numpy.zeros(100_000), numpy.zeros((300, 300), order="F")]))
    assert [float(array.sum()) for array in arrays] == [100_000.0, 90_000.0]
    for array in arrays:
        array += 1  # writable
    frame = pandas.DataFrame({"key": ["a", "b", "a"], "value": [1, 2, 3]})
    sums = ex.submit(lambda f: f.groupby("key").value.sum(), frame).result()
    assert sums.to_dict() == {"a": 4, "b": 2}
