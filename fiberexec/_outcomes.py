"""The exceptions that the executor itself gives a task, and the retry policy's word on an outcome."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

from fiberexec import _retry
from fiberexec._errors import BrokenExecutor, ForkedError, TaskTimeout, WorkerLost
from fiberexec._futures import load_outcome
from fiberexec._scheduler import Task
from fiberexec._scheduler import events as ev
from fiberexec._serialize import dump_exception
from fiberexec.backends.base import Exit

if TYPE_CHECKING:
    from fiberexec._connection import Connection


def judge(action: ev.Judge) -> tuple[ev.Judged, Any, BaseException | None]:
    """Ask a task's retry policy: the event that says what follows, and the value or error to settle with."""
    task = action.task
    value: Any = None
    error: BaseException | None
    if action.outcome is None:
        error = timed_out(task)
    else:
        value, error = load_outcome(action.outcome)
    last = None if error is None else dump_exception(error)
    delay, value, error = _retry.judge(task.retry_state, value, error)
    return ev.Judged(task, delay, last), value, error


def failure(
    action: ev.Fail, connection: Connection | None, host: str, broken_by: BaseException | None
) -> BaseException | None:
    """The exception with which a task fails, None: it is cancelled. ``connection`` is to the worker that was lost."""
    task, why, _, exit = action
    if why == ev.CANCELLED:
        return None
    if why == ev.TIMEOUT:
        return timed_out(task)
    if why == ev.BROKEN:
        assert broken_by is not None
        return broken(broken_by)
    pid = 0
    if connection is not None:
        host, pid = connection.host, connection.pid
    return lost(task, exit or Exit(), host, pid)


def timed_out(task: Task) -> TaskTimeout:
    limit = task.profile.timeout or 0.0
    identity = task.id + task.start
    text = f"task {identity} ({task.profile.name}) ran longer than its timeout of {limit:g} s; its worker was stopped"
    return TaskTimeout(text, identity, limit)


def lost(task: Task, exit: Exit, host: str, pid: int) -> WorkerLost:
    losses = max(1, task.infra if exit.infrastructure else task.losses)  # 0: it was never known what was executing
    identity = task.id + task.start
    text = (
        f"task {identity} ({task.profile.name}) lost {losses} worker{'s' * (losses > 1)} while it was executing; the last "
        f"one, pid {pid} on {host}, {_how(exit)}"
    )
    if exit.log.strip():
        text += f". Its last words:\n{exit.log.strip()}"
    return WorkerLost(
        text, task_id=identity, host=host, pid=pid, exitcode=exit.code, reason=exit.reason, log=exit.log, losses=losses
    )


def _how(exit: Exit) -> str:
    if exit.code is None:
        how = "ended"
    elif exit.code >= 0:
        how = f"exited with code {exit.code}"
    else:
        try:
            how = f"was killed by {signal.Signals(-exit.code).name}"
        except ValueError:
            how = f"was killed by signal {-exit.code}"
    return f"{how} ({exit.reason})" if exit.reason else how


def broken(reason: BaseException) -> BrokenExecutor:
    """A new exception for each who hears it: they are raised in many places."""
    if isinstance(reason, BrokenExecutor):
        error = BrokenExecutor(*reason.args)
    else:
        error = BrokenExecutor(f"the executor cannot go on: {type(reason).__name__}: {reason}")
    error.__cause__ = reason
    return error


def forked(parent: int) -> ForkedError:
    return ForkedError(
        f"this executor belongs to process {parent}; process {os.getpid()} was forked from it and must make an executor of "
        "its own"
    )
