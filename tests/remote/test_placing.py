"""Where what a task starts runs: as its own job does, unless it says otherwise."""

from __future__ import annotations

import os
import sys
from typing import Any

from fiberexec import FiberExecutor, _config

LIMIT = 60.0  # seconds, for what takes one


def chosen(**arguments: Any) -> tuple[str, str | None, dict[str, Any], int | None]:
    settings = _config.load(**arguments)
    return settings.backend, settings.image, dict(settings.backend_options), settings.max_workers


def jobs(**arguments: Any) -> tuple[str, str]:
    """The job in which this runs, and that of a task that is submitted here."""
    with FiberExecutor(1, **arguments) as inner:
        return os.environ["FIBEREXEC_JOB"], inner.submit(os.getenv, "FIBEREXEC_JOB").result(LIMIT)


def test_an_executor_in_a_task_has_the_backend_the_image_and_the_options_of_its_job() -> None:
    options = {"python": sys.executable}
    with FiberExecutor(1, backend="agents", image="lab:3", backend_options=options) as executor:
        assert executor.submit(chosen).result(LIMIT) == ("agents", "lab:3", options, None)
        here, there = executor.submit(jobs).result(LIMIT)
        assert here != there


def test_what_the_task_says_goes_first() -> None:
    with FiberExecutor(1, backend="agents", backend_options={"python": sys.executable}) as executor:
        assert executor.submit(chosen, backend="docker").result(LIMIT) == ("docker", None, {}, None)
        here, there = executor.submit(jobs, backend="local").result(LIMIT)
        assert here == there


def test_what_the_driver_says_by_variables_goes_first() -> None:
    with FiberExecutor(1, backend="agents", env={"FIBEREXEC_BACKEND": "local"}) as executor:
        here, there = executor.submit(jobs).result(LIMIT)
        assert here == there
