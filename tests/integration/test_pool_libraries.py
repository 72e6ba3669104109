"""Libraries that take a pool: each gives the answer that it gives without one, from the pool's workers."""

from __future__ import annotations

import operator
import os
import random
from collections.abc import Iterator
from typing import Any

import pytest

from fiberexec.mp.pool import Pool


@pytest.fixture
def pool() -> Iterator[Pool]:
    with Pool(2) as pool:
        yield pool


def test_dask_computes_on_the_pool(pool: Pool) -> None:
    dask = pytest.importorskip("dask")
    squares = [dask.delayed(lambda x: (x * x, os.getpid()))(x) for x in range(20)]
    found = dask.compute(*squares, scheduler="processes", pool=pool)
    assert sum(value for value, _ in found) == 2470
    assert os.getpid() not in {pid for _, pid in found}
    with pytest.raises(ZeroDivisionError):
        dask.compute(dask.delayed(operator.floordiv)(1, 0), scheduler="processes", pool=pool)


def test_dasks_way_of_calling_apply_async(pool: Pool) -> None:
    """All by position: function, args, kwds, callback, error_callback."""
    heard: list[Any] = []
    pool.apply_async(divmod, (7, 2), {}, heard.append, None).wait(30)
    pool.apply_async(divmod, (7, 0), {}, None, heard.append).wait(30)
    assert heard[0] == (3, 1) and isinstance(heard[1], ZeroDivisionError)


def test_scipy_minimizes_with_the_pools_map(pool: Pool) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    options = {"updating": "deferred", "seed": 1, "maxiter": 5, "polish": False}
    alone = optimize.differential_evolution(optimize.rosen, [(0, 2)] * 2, **options)
    found = optimize.differential_evolution(optimize.rosen, [(0, 2)] * 2, workers=pool.map, **options)
    assert found.x.tolist() == alone.x.tolist() and found.nfev == alone.nfev


def test_emcee_samples_the_same_chain(pool: Pool) -> None:
    emcee, numpy = pytest.importorskip("emcee"), pytest.importorskip("numpy")

    def chain(pool: Pool | None) -> Any:
        start = numpy.random.default_rng(1).normal(size=(8, 2))
        sampler = emcee.EnsembleSampler(8, 2, lambda x: -0.5 * float(numpy.sum(x**2)), pool=pool)
        sampler.random_state = numpy.random.RandomState(1).get_state()
        sampler.run_mcmc(start, 20)
        return sampler.get_chain()

    assert numpy.array_equal(chain(pool), chain(None))


def test_dynesty_samples_the_same_evidence(pool: Pool) -> None:
    dynesty, numpy = pytest.importorskip("dynesty"), pytest.importorskip("numpy")

    def evidence(**options: Any) -> float:
        sampler = dynesty.NestedSampler(
            lambda x: -0.5 * float(numpy.sum(x**2)),
            lambda u: 20 * u - 10,
            2,
            nlive=50,
            rstate=numpy.random.default_rng(1),
            **options,
        )
        sampler.run_nested(dlogz=1.0, print_progress=False)
        return float(sampler.results.logz[-1])

    assert abs(evidence(pool=pool, queue_size=pool.size) - evidence()) < 1.5


def test_deap_evolves_the_same_population(pool: Pool) -> None:
    base, tools = pytest.importorskip("deap.base"), pytest.importorskip("deap.tools")
    algorithms, creator = pytest.importorskip("deap.algorithms"), pytest.importorskip("deap.creator")
    creator.create("Fitness", base.Fitness, weights=(1.0,))
    creator.create("Individual", list, fitness=creator.Fitness)

    def evolve(over: Any) -> list[list[int]]:
        chance = random.getstate()
        random.seed(1)
        toolbox = base.Toolbox()
        toolbox.register("bit", random.randint, 0, 1)
        toolbox.register("individual", tools.initRepeat, creator.Individual, toolbox.bit, 20)
        toolbox.register("population", tools.initRepeat, list, toolbox.individual)
        toolbox.register("evaluate", lambda individual: (sum(individual),))
        toolbox.register("mate", tools.cxTwoPoint)
        toolbox.register("mutate", tools.mutFlipBit, indpb=0.05)
        toolbox.register("select", tools.selTournament, tournsize=3)
        toolbox.register("map", over)
        population, _ = algorithms.eaSimple(toolbox.population(30), toolbox, 0.5, 0.2, 5, verbose=False)
        random.setstate(chance)
        return list(map(list, population))

    assert evolve(pool.map) == evolve(map)


def test_nautilus_finds_how_many_workers_a_pool_has(pool: Pool) -> None:
    nautilus = pytest.importorskip("nautilus")
    prior = nautilus.Prior()
    for name in "ab":
        prior.add_parameter(name, (-5, 5))
    sampler = nautilus.Sampler(prior, lambda at: -0.5 * (at["a"] ** 2 + at["b"] ** 2), n_live=100, pool=pool, seed=1)
    sampler.run(n_eff=100, n_like_max=600)
    assert sampler.n_like >= 100


def test_pymoo_evaluates_with_starmap(pool: Pool) -> None:
    """What its StarmapParallelization does."""
    assert list(pool.starmap(lambda f, x: f(x), [[abs, x] for x in (-1, 2, -3)])) == [1, 2, 3]
    pytest.importorskip("pymoo.parallelization.starmap").StarmapParallelization(pool.starmap)(abs, [-1, 2])


def test_platypus_evaluates_and_ends_the_pool() -> None:
    platypus = pytest.importorskip("platypus")
    pool = Pool(2)
    with platypus.PoolEvaluator(pool) as evaluator:
        algorithm = platypus.NSGAII(platypus.DTLZ2(), evaluator=evaluator)
        algorithm.run(200)
    assert len(algorithm.result) > 0
    with pytest.raises(ValueError, match="not running"):
        pool.map(abs, [1])
