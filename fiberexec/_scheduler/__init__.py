"""Every hard decision as a pure state machine: ``Scheduler.handle(event, now) -> actions``.

No threads, no sockets, no clock, no user code: a simulated cluster of thousands of workers runs in microseconds.

    records   Task, Profile, Unit, WorkerRecord: plain data
    events    what happened (in), what to do (out)
    agenda    the time, the actions of this event, what is to be looked at later
    queue     lanes of waiting tasks, by priority and by what they need
    fleet     the workers, and the resources that are promised on them
    assign    which waiting task goes to which worker, in batches of measured work
    hands     the units in a worker's hands, and how they are cut
    watch     time limits, recalls from workers that are slow
    crew      launches, failed starts, workers that have to go
    blame     what a dead worker's tasks are charged with
    core      Scheduler: one method an event
"""

from fiberexec._scheduler.core import Scheduler
from fiberexec._scheduler.records import Limits, Profile, Task

__all__ = ["Limits", "Profile", "Scheduler", "Task"]
