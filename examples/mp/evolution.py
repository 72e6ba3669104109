"""Evolution strategies learn to balance a pole: gymnasium's CartPole, a linear policy, and a pool.

    pip install gymnasium matplotlib
    python examples/mp/evolution.py [generations] [--plot learning.png]

Each generation tries a population of policies around the current one, each in some episodes, and moves
towards those that did better (Salimans et al., 2017, "Evolution Strategies as a Scalable Alternative to
Reinforcement Learning"). The policies are mirrored pairs, and are judged by rank.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from fiberexec import mp

POPULATION = 20  # mirrored pairs
EPISODES = 2  # for each policy
SIGMA, RATE = 0.5, 0.4  # spread of the population; size of a step

environment: Any = None


def prepare() -> None:
    """Make this worker's environment, once."""
    global environment
    import gymnasium

    environment = gymnasium.make("CartPole-v1")


def score(task: tuple[np.ndarray, int]) -> float:
    """The mean number of steps for which a policy keeps the pole up, at most 500."""
    policy, seed = task
    total = 0.0
    for episode in range(EPISODES):
        state, _ = environment.reset(seed=seed + episode)
        over = False
        while not over:
            state, reward, failed, truncated, _ = environment.step(int(policy @ state > 0))
            total += reward
            over = failed or truncated
    return total / EPISODES


def evolve(pool: Any, generations: int) -> list[float]:
    """Return the mean score of each generation's own policy."""
    source = np.random.default_rng(1)
    policy = np.zeros(4)
    curve = []
    for generation in range(generations):
        noise = source.standard_normal((POPULATION, 4))
        noise = np.concatenate([noise, -noise])
        seed = 1000 * (generation + 1)
        tasks = [(policy + SIGMA * direction, seed) for direction in noise]
        *scores, own = pool.map(score, [*tasks, (policy, seed)])
        ranks = np.argsort(np.argsort(scores)) / (len(scores) - 1) - 0.5
        policy = policy + RATE / SIGMA * (ranks @ noise) / len(noise) * 4
        curve.append(own)
        print(f"generation {generation}: {own:.0f} steps, the best of the population {max(scores):.0f}")
        if own >= 500 and curve[-3:] == [500.0] * 3:
            break
    return curve


def plot(curve: list[float], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.plot(curve, marker="o")
    pyplot.xlabel("generation")
    pyplot.ylabel("steps that the pole stays up")
    pyplot.ylim(0, 510)
    pyplot.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="evolution strategies on CartPole")
    parser.add_argument("generations", type=int, nargs="?", default=15)
    parser.add_argument("--plot", metavar="FILE", help="save the learning curve as a picture")
    options = parser.parse_args()
    with mp.Pool(2, initializer=prepare) as pool:
        curve = evolve(pool, options.generations)
    print(f"learned: {curve[0]:.0f} steps at first, {curve[-1]:.0f} in the end")
    if options.plot:
        plot(curve, options.plot)


if __name__ == "__main__":
    main()
