"""The lives of tasks and workers as tables. An event that a state does not list is an error and changes nothing.

docs/architecture.md draws its diagrams from these tables, and the scheduler's property tests check every step.
"""

from __future__ import annotations

# -- tasks

QUEUED = "queued"  # waits for a worker
SENT = "sent"  # with a worker: executing, or next in line there
JUDGING = "judging"  # its attempt has ended, the retry policy is being asked
DELAYED = "delayed"  # waits for its next attempt
DONE = "done"

TASK = {
    QUEUED: {"assign": SENT, "cancel": DONE, "break": DONE},
    SENT: {"settle": DONE, "judge": JUDGING, "free": QUEUED, "lose": QUEUED, "fail": DONE, "break": DONE},
    JUDGING: {"retry": DELAYED, "settle": DONE, "break": DONE},
    DELAYED: {"due": QUEUED, "cancel": DONE, "break": DONE},
    DONE: {},
}

# -- workers

STARTING = "starting"  # launched, has not said that it is ready
IDLE = "idle"
BUSY = "busy"
DRAINING = "draining"  # was told to finish and go
STOPPING = "stopping"  # was sent a signal
GONE = "gone"

WORKER = {
    STARTING: {"ready": IDLE, "stop": STOPPING, "end": GONE},
    IDLE: {"assign": BUSY, "drain": DRAINING, "stop": STOPPING, "end": GONE},
    BUSY: {"assign": BUSY, "finish": IDLE, "drain": DRAINING, "stop": STOPPING, "end": GONE},
    DRAINING: {"stop": STOPPING, "end": GONE},
    STOPPING: {"stop": STOPPING, "end": GONE},
    GONE: {},
}


class IllegalEvent(RuntimeError):
    """A defect of fiberexec: a lifecycle was asked for a step that its table does not have."""


def step(table: dict[str, dict[str, str]], state: str, event: str) -> str:
    """The state after ``event``. Raises IllegalEvent where the table has none."""
    try:
        return table[state][event]
    except KeyError:
        raise IllegalEvent(f"{event!r} cannot happen in state {state!r}") from None
