"""The options of a task, checked: what ``FiberExecutor.options()`` takes, and ``@meta``."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

from fiberexec import _config, _retry
from fiberexec._errors import ConfigError, ResourceError
from fiberexec._scheduler import Profile
from fiberexec.backends.base import Pool, Resources

F = TypeVar("F", bound=Callable[..., Any])
_KEPT = 4096  # profiles


class TaskOptions(NamedTuple):
    """See FiberExecutor.options()."""

    timeout: float | None = None
    retry: Any = None
    priority: int = 0
    cpu: float | None = None
    memory: int | None = None  # bytes
    gpu: int | None = None
    max_worker_losses: int = 3

    def changed(self, changes: dict[str, Any]) -> TaskOptions:
        """A checked copy with some values changed. Raises ConfigError."""
        return self._replace(**{name: _checked(name, value) for name, value in changes.items()})


def _checked(name: str, value: Any) -> Any:
    if name == "retry":
        _retry.check(name, value)
        return value
    if name == "priority":
        return check_int(name, value, None)
    if value is None and name != "max_worker_losses":
        return None
    return _config.check(name, value)


def check_int(name: str, value: Any, least: int | None) -> int:
    """Return value, an integer of any kind, as an int. Raises ConfigError unless it is one, and at least ``least``."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ConfigError(f"{name} must be an int, got {value!r}")
    number = operator.index(value)
    if least is not None and number < least:
        raise ConfigError(f"{name} must be at least {least}, got {number}")
    return number


def sizes(given: dict[str, Any]) -> dict[str, Any]:
    """cpu in cores, memory in bytes and gpu in devices, from what a user may write; None stays None."""
    return {name: None if value is None else _config.check(name, value) for name, value in given.items()}


def meta(*, cpu: float | str | None = None, memory: int | str | None = None, gpu: int | None = None) -> Callable[[F], F]:
    """Give a function the resources that each of its tasks needs; they travel with it.

    ``cpu`` is in cores (2, 0.5 or "500m"), ``memory`` in MiB or as a string such as "4Gi", ``gpu`` in devices. Options of
    the executor come first. Raises ConfigError for values that make no sense, and for what takes no attributes: builtin
    functions, bound methods.
    """
    resources = tuple(sizes({"cpu": cpu, "memory": memory, "gpu": gpu}).values())

    def mark(function: F) -> F:
        try:
            function.__fiberexec_meta__ = resources  # type: ignore[attr-defined]
        except (AttributeError, TypeError):  # of a type that is built in
            raise ConfigError(f"meta cannot mark {function!r}: wrap it in a def") from None
        return function

    return mark


class Profiles:
    """The scheduler's profiles of one set of options, by function."""

    def __init__(self, options: TaskOptions, largest: Pool) -> None:
        self.options = options
        self._largest = largest
        self._profiles: dict[int, Profile] = {}

    def of(self, function: Callable[..., Any], identity: int, name: str) -> Profile:
        """The profile of a function. Raises ResourceError if its tasks can never fit."""
        profile = self._profiles.get(identity)
        if profile is None:
            options = self.options
            if len(self._profiles) >= _KEPT:
                self._profiles.clear()  # costs a measurement, no more
            profile = self._profiles[identity] = Profile(
                name,
                priority=options.priority,
                demand=self._demand(function, name),
                timeout=options.timeout,
                retry=options.retry,
                max_losses=options.max_worker_losses,
            )
        return profile

    def _demand(self, function: Callable[..., Any], name: str) -> Resources | None:
        options = self.options
        while isinstance(function, partial) and not hasattr(function, "__fiberexec_meta__"):
            function = function.func
        cpu, memory, gpu = getattr(function, "__fiberexec_meta__", (None, None, None))
        demand = Resources(
            (cpu or 0.0) if options.cpu is None else options.cpu,
            (memory or 0) if options.memory is None else options.memory,
            (gpu or 0) if options.gpu is None else options.gpu,
        )
        has = self._largest.capacity
        if demand.cpu > has.cpu or demand.memory > has.memory or demand.gpu > has.gpu:
            raise ResourceError(
                f"task {name} asks for {demand}, but pool {self._largest.name!r} has no more than {has}; "
                "what it has is said by cpu=, memory= and gpu= of the executor"
            )
        return demand if any(demand) else None
