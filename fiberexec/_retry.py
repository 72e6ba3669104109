"""tenacity's policies, evaluated step by step: nothing here sleeps, so thousands of tasks can wait at once.

A ``tenacity.Retrying`` object is only read: its ``before``, ``retry``, ``after``, ``stop``, ``wait``, ``before_sleep``,
``retry_error_callback``, ``retry_error_cls`` and ``reraise`` are asked in the order in which tenacity asks them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from fiberexec._errors import ConfigError

_FIRST_DELAY, _LAST_DELAY = 0.1, 10.0  # seconds between launches that fail, doubled each time


def check(name: str, policy: Any) -> None:
    """Raise ConfigError, naming the argument, for what is neither a policy nor None."""
    if policy is None:
        return
    from tenacity import AsyncRetrying, BaseRetrying

    if not isinstance(policy, BaseRetrying) or isinstance(policy, AsyncRetrying):
        raise ConfigError(
            f"{name} must be a tenacity.Retrying object, got {policy!r}; for example "
            f"{name}=tenacity.Retrying(stop=tenacity.stop_after_attempt(3))"
        )


def begin(policy: Any, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The state of one task's retries, before its first attempt."""
    from tenacity import RetryCallState

    state = RetryCallState(policy, fn, args, kwargs)
    if policy.before is not None:
        policy.before(state)
    return state


def judge(state: Any, value: Any, error: BaseException | None) -> tuple[float | None, Any, BaseException | None]:
    """What follows from an attempt's outcome: (seconds until the next attempt, -, -), or (None, value, error) at the end.

    What the user's own predicates and callbacks raise is the task's exception.
    """
    try:
        return _judge(state, value, error)
    except BaseException as raised:
        return None, None, raised


def _judge(state: Any, value: Any, error: BaseException | None) -> tuple[float | None, Any, BaseException | None]:
    from tenacity import Future as Outcome
    from tenacity import RetryAction, TryAgain

    policy = state.retry_object
    outcome: Future[Any] = Outcome(state.attempt_number)
    if error is None:
        outcome.set_result(value)
    else:
        outcome.set_exception(error)
    state.outcome = outcome
    state.outcome_timestamp = time.monotonic()
    if not getattr(policy, "enabled", True) or (not isinstance(error, TryAgain) and not policy.retry(state)):
        return None, value, error
    if policy.after is not None:
        policy.after(state)
    state.upcoming_sleep = delay = float(policy.wait(state)) if policy.wait is not None else 0.0
    if not delay >= 0:  # a nan would stay at the top of the queue of what waits, and hold up all others
        raise ValueError(f"the wait of a retry policy must be 0 or more seconds, got {delay}")
    if policy.stop is not None and policy.stop(state):
        if policy.retry_error_callback is not None:
            return None, policy.retry_error_callback(state), None
        if policy.reraise and error is not None:
            return None, None, error
        final = policy.retry_error_cls(outcome)
        final.__cause__ = error
        return None, None, final
    state.next_action = RetryAction(delay)
    state.idle_for += delay
    if policy.before_sleep is not None:
        policy.before_sleep(state)
    state.prepare_for_next_attempt()
    if policy.before is not None:
        policy.before(state)
    return delay, None, None


class LaunchDelay:
    """Seconds until a launch that failed is tried again, None: never.

    ``policy`` is a ``tenacity.Retrying``; without one launches are tried for ``patience`` seconds after the first failure.
    """

    def __init__(self, policy: Any, patience: float) -> None:
        self._policy = policy
        self._patience = patience
        self._since = 0.0
        self._state: Any = None

    def __call__(self, failures: int, error: BaseException) -> float | None:
        """``failures``: in a row, this one included."""
        now = time.monotonic()
        if failures == 1:
            self._since = now
            self._state = None if self._policy is None else begin(self._policy, LaunchDelay.__call__, (), {})
        if self._state is not None:
            return judge(self._state, None, error)[0]
        if now - self._since > self._patience:
            return None
        rest = self._patience - (now - self._since)
        return float(min(_LAST_DELAY, _FIRST_DELAY * 2 ** (failures - 1), max(rest, 0.01)))
