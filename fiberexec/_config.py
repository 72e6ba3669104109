"""Settings: where each value comes from, what it means, and what is refused.

    arguments ─► FIBEREXEC_* variables ─► fiberexec.toml or [tool.fiberexec] of pyproject.toml ─► defaults

The first that has a value wins, name by name. The file is the nearest one upward from the working directory.

Rules:
- Every value passes the same check wherever it comes from, and a refusal names its source.
- Nothing is imported and no file is read that is not needed: an executor is made in well under a millisecond.
"""

from __future__ import annotations

import operator
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from types import EllipsisType, MappingProxyType
from typing import Any, NamedTuple

from fiberexec._errors import ConfigError

PREFIX = "FIBEREXEC_"
FILE = "fiberexec.toml"
ARGUMENT = "argument"
DEFAULT = "default"
MAX_SECONDS = 1e9  # 31 years; what is longer overflows the system's timers
_MEBIBYTE = 1 << 20


class Settings(NamedTuple):
    """What an executor is made with. Times are in seconds, ``memory`` is in bytes, ``cpu`` in cores."""

    backend: str = "local"  # where workers run; by default what fits where this process is, see place()
    image: str | None = None  # what a container runs, where there are containers
    max_workers: int | None = None  # None: as many as the backend finds sensible
    min_workers: int = 0  # so many stay when there is nothing to do
    cpu: float | None = None  # cpu, memory and gpu: the size of one job; None: as the backend finds it
    memory: int | None = None
    gpu: int | None = None
    workers_per_job: int = 1  # so many share one job
    timeout: float | None = None  # of one attempt of a task; None: no limit
    max_worker_losses: int = 3  # a task fails when it has lost so many workers
    idle_timeout: float | EllipsisType | None = ...  # an idle worker goes; None: never; ...: the backend's
    startup_timeout: float = 600.0  # with no worker alive for so long the executor is broken
    driver_timeout: float = 60.0  # a worker elsewhere goes when the driver has been silent for so long
    prefix_output: bool = False  # name worker and task on each line that a task prints
    env: Mapping[str, str] = MappingProxyType({})  # variables that workers get on top of the driver's
    ship: tuple[str, ...] = ()  # files and folders that workers elsewhere get
    backend_options: Mapping[str, Any] = MappingProxyType({})  # what only this backend knows
    sources: Mapping[str, str] = MappingProxyType({})  # of each value


def load(**arguments: object) -> Settings:
    """Return the settings that apply now.

    An argument that is None or ``...`` counts as not given, except ``idle_timeout=None``, which means never.
    Raises ConfigError for an unknown name and for a wrong value, and names the source of either.
    """
    given: dict[str, tuple[object, str]] = {}
    for name in arguments:
        _known(name, ARGUMENT)
    location, table = _from_file()
    for name in table:
        _known(name, location)
        given[name] = table[name], location
    meant = {location: table.get("backend")}  # by source: the backend whose options those there are
    for variable, text in _from_environment():
        name = variable[len(PREFIX) :].lower()
        given[name] = _read(name, text, variable), variable
    meant[f"{PREFIX}BACKEND_OPTIONS"] = given.get("backend", (None,))[0]
    for name, value in arguments.items():
        if value is not ... and (value is not None or name == "idle_timeout"):
            given[name] = value, ARGUMENT
    wanted = given.get("backend", (None,))[0]
    owner = meant.get(given["backend_options"][1], wanted) if "backend_options" in given else wanted
    if owner != wanted and (owner is not None or wanted == "local"):  # which has none
        del given["backend_options"]  # they are another backend's
    values: dict[str, Any] = {name: check(name, value, source) for name, (value, source) in given.items()}
    for name in ("cpu", "memory"):
        if values.get(name) == 0:
            source = _where(given[name][1])
            raise ConfigError(f"{name} must be greater than 0, got 0 ({source})")
    sources = {name: given[name][1] if name in given else DEFAULT for name in CHECKS}
    if "backend" not in given:
        values["backend"], why = place()
        sources["backend"] = why or DEFAULT
    return Settings(**values, sources=sources)


_PLACES = {"KUBERNETES_SERVICE_HOST": ("kubernetes", "in a pod"), "SLURM_JOB_ID": ("slurm", "in a Slurm allocation")}
_said = False  # place() has logged its choice


def place() -> tuple[str, str]:
    """The backend that fits where this process is, and why; it is local, without a reason, where nothing says otherwise."""
    for variable, (backend, where) in _PLACES.items():
        if os.environ.get(variable):
            why = f"this process is {where} ({variable} is set)"
            _say(backend, why)
            return backend, why
    _say("local", "this process is in no pod and no allocation, and nothing else is set")
    return "local", ""


def _say(backend: str, why: str) -> None:
    global _said
    if not _said and "logging" in sys.modules:  # else nobody could hear
        _said = True
        sys.modules["logging"].getLogger("fiberexec").info("backend %r is used: %s; backend= chooses another", backend, why)


def check(name: str, value: object, source: str = ARGUMENT) -> Any:
    """Return ``value`` as the setting ``name`` holds it, or raise ConfigError, which names ``source``."""
    try:
        return CHECKS[name](value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{name} {error}, got {value!r} ({_where(source)})") from None


# -- checks: return the value as Settings holds it, or raise TypeError or ValueError that says what it must be


def _count(minimum: int) -> Callable[[object], int]:
    must = "must be greater than 0" if minimum == 1 else f"must be {minimum} or more"

    def check_count(value: object) -> int:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError("must be an int")
        number = operator.index(value)
        if number < minimum:
            raise ValueError(must)
        return number

    return check_count


def _seconds(value: object) -> float:
    number = number_of(value, "must be a number of seconds")
    if not 0 < number <= MAX_SECONDS:
        raise ValueError(f"must be greater than 0 and at most {MAX_SECONDS:g} seconds")
    return number


def _idle(value: object) -> float | None:
    if value is None:
        return None
    number = number_of(value, "must be a number of seconds, or None for never")
    if not 0 <= number <= MAX_SECONDS:
        raise ValueError(f"must be 0 to {MAX_SECONDS:g} seconds, or None for never")
    return number


def number_of(value: object, must: str) -> float:
    """Return any kind of number as a float. Raises TypeError, saying ``must``, for what is none."""
    if isinstance(value, (bool, str, bytes)):
        raise TypeError(must)
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(must) from None


def _cpu(value: object) -> float:
    must = "must be a number of cores such as 2 or 0.5, or a str such as '500m'"
    if isinstance(value, str):
        text, milli = (value[:-1], True) if value.endswith("m") else (value, False)
        number = _plain_number(text, must) / (1000 if milli else 1)
    else:
        number = number_of(value, must)
    if not 0 <= number < float("inf"):
        raise ValueError(must)
    return number


_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15, "E": 10**18}
_UNITS.update({f"{unit}i": 1 << 10 * power for power, unit in enumerate("KMGTPE", 1)})


def _memory(value: object) -> int:
    must = "must be an int (MiB) or a str such as '4Gi' or '512M'"
    if isinstance(value, str):
        digits = value.rstrip("kKMGTPEim")
        unit = value[len(digits) :]
        if unit == "m":
            size = _plain_number(digits, must) / 1000
        elif unit in _UNITS:
            size = _plain_number(digits, must) * _UNITS[unit]
        else:
            raise ValueError(must)
        if 0 < size < _MEBIBYTE:
            raise ValueError(f"must be at least 1Mi (this is {size:g} bytes; '512M' and '512Mi' would do)")
    else:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(must)
        size = operator.index(value) * _MEBIBYTE
    if not 0 <= size < 1 << 63:
        raise ValueError(must)
    return int(size)


def _plain_number(text: str, must: str) -> float:
    if not text or not text[0].isdecimal() or not text[-1].isdecimal() or "_" in text:
        raise ValueError(must)
    try:
        return float(text)
    except ValueError:
        raise ValueError(must) from None


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("must be a str")
    if not value or "\0" in value:
        raise ValueError("must not be empty or contain a NUL")
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError("must be True or False")
    return value


def _variables(value: object) -> dict[str, str]:
    if not isinstance(value, Mapping) or not all(isinstance(x, str) for pair in value.items() for x in pair):
        raise TypeError("must map names of variables to str")
    for name, text in value.items():
        if not name or "=" in name or "\0" in name + text:
            raise ValueError("must not have an empty name, '=' in a name, or a NUL anywhere")
    return dict(value)


def _paths(value: object) -> tuple[str, ...]:
    if isinstance(value, (str, bytes, os.PathLike)) or not isinstance(value, Iterable):
        raise TypeError("must be a list of paths")
    return tuple(_text(os.fspath(path)) for path in value)


def _options(value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise TypeError("must map names of options to values")
    return dict(value)


CHECKS: dict[str, Callable[[object], object]] = {
    "backend": _text,
    "image": _text,
    "max_workers": _count(1),
    "min_workers": _count(0),
    "cpu": _cpu,
    "memory": _memory,
    "gpu": _count(0),
    "workers_per_job": _count(1),
    "timeout": _seconds,
    "max_worker_losses": _count(1),
    "idle_timeout": _idle,
    "startup_timeout": _seconds,
    "driver_timeout": _seconds,
    "prefix_output": _flag,
    "env": _variables,
    "ship": _paths,
    "backend_options": _options,
}
"""Every setting, and what checks it; ``check()`` serves the options of tasks too."""


# -- sources


def _known(name: str, source: str) -> None:
    if name not in CHECKS:
        nearest = _nearest(name)
        raise ConfigError(
            f"unknown setting {name!r} ({_where(source)})"
            + (f": did you mean {nearest!r}?" if nearest else f"; the settings are {', '.join(CHECKS)}")
        )


def _nearest(name: str) -> str | None:
    from difflib import get_close_matches

    return next(iter(get_close_matches(name, CHECKS, 1, 0.7)), None)


def _where(source: str) -> str:
    return "an argument" if source == ARGUMENT else f"from {source}"


def _from_environment() -> list[tuple[str, str]]:
    """The variables that are settings. One that is nearly a setting is an error, others are not for us."""
    found = []
    for variable, text in os.environ.items():
        if variable.startswith(PREFIX) and text:
            name = variable[len(PREFIX) :].lower()
            if name in CHECKS:
                found.append((variable, text))
            elif nearest := _nearest(name):
                raise ConfigError(f"unknown variable {variable}: did you mean {PREFIX}{nearest.upper()}?")
    return found


_WORDS = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(("0", "false", "no", "off"), False)


def _read(name: str, text: str, variable: str) -> object:
    """The value that a variable's text stands for, or the text itself, for check() to refuse."""
    kind = CHECKS[name]
    if kind is _flag:
        return _WORDS.get(text.lower(), text)
    if kind is _paths:
        return text.split(os.pathsep)
    if kind in (_variables, _options):
        import json

        try:
            return json.loads(text)
        except ValueError as error:
            must = 'must be a JSON object such as {"KEY": "value"}'
            raise ConfigError(f"{name} {must} (from {variable}): {error}") from None
    if kind is _idle and text.lower() in ("none", "never"):
        return None
    if kind not in (_text, _cpu):
        for number in (int, float):
            try:
                return number(text)
            except ValueError:
                continue
    return text


def _from_file() -> tuple[str, Mapping[str, object]]:
    """The path of the nearest file that has settings, and its table."""
    try:
        folder = os.getcwd()
    except OSError:
        return "", {}  # the working directory is gone
    while True:
        for base in (FILE, "pyproject.toml"):
            path = os.path.join(folder, base)
            if os.path.isfile(path):
                table = _read_file(path, base == FILE)
                if table is not None:
                    return path, table
        parent = os.path.dirname(folder)
        if parent == folder:
            return "", {}
        folder = parent


def _read_file(path: str, ours: bool) -> Mapping[str, object] | None:
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        if not ours:
            return None  # somebody else's file
        raise ConfigError(f"cannot read the settings in {path}: {error}") from error
    if not ours and b"fiberexec" not in data:
        return None  # not worth parsing
    from importlib import import_module

    toml = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        document = toml.loads(data.decode())
    except ValueError as error:
        if not ours:
            return None
        raise ConfigError(f"cannot read the settings in {path}: {error}") from error
    table = document
    if not ours:
        tool = document.get("tool")
        table = tool.get("fiberexec") if isinstance(tool, dict) else None
    if table is not None and not isinstance(table, Mapping):
        raise ConfigError(f"[tool.fiberexec] in {path} must be a table, got {table!r}")
    return table
