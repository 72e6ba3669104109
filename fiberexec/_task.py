"""What a task can know of itself."""

from __future__ import annotations

from fiberexec import _worker


class TaskInfo:
    """What a task can know of itself.

    ``id`` is the same in every attempt, ``attempt`` counts from 1, ``last_exception`` is what ended the attempt before
    (None in the first, and when the worker was lost).
    """

    __slots__ = ("attempt", "id", "last_exception")

    def __init__(self, id: int, attempt: int, last_exception: BaseException | None) -> None:
        self.id = id
        self.attempt = attempt
        self.last_exception = last_exception

    def __repr__(self) -> str:
        return f"TaskInfo(id={self.id}, attempt={self.attempt}, last_exception={self.last_exception!r})"


def current_task() -> TaskInfo | None:
    """The task that is being executed here, or None outside of a task."""
    worker = _worker.current
    if worker is None or worker.unit is None:
        return None
    extra = worker.unit[9]
    error = None
    if extra is not None and "error" in extra:
        from fiberexec._serialize import load_exception

        error = load_exception(extra["error"])
    return TaskInfo(_worker.task_id(), worker.unit[2], error)
