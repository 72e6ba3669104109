"""The words that scripts of faults are written in: what an attempt, or a launch, comes to."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Attempt(NamedTuple):
    """How one attempt at one item goes in a Simulation.

    It takes ``seconds`` and ends in "value", "error" or "crash"; ``seconds=inf`` is an item that hangs. A ``stubborn`` one
    ignores SIGTERM.
    """

    seconds: float = 0.001
    ends: str = "value"
    stubborn: bool = False


class Refusal(NamedTuple):
    """A launch that fails with ``error``.

    ``again``: seconds after which another try makes sense; None: never. A FakeBackend leaves the number of seconds to
    the executor's ``launch_retry``.
    """

    error: BaseException
    again: float | None = None


Work = Callable[[int, int], Attempt]  # of an item's number and of the attempt, both from 1
Launch = Callable[[int], float | Refusal]  # of the launch's number, from 1: seconds until the worker is there, or why not
