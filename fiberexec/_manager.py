"""The manager: one thread that owns workers and futures, and the scheduler that it shares with submitting threads.

    submit() ──► Scheduler.handle(Submitted) ──► Send: written by the submitting thread when a worker is idle
                        ▲        │
       events of one turn        └── actions of one turn: send, settle, launch, signal, probe, recall
                        │                    │
    Switchboard: streams, backend ◄──► manager thread ──► futures, callbacks, retry policies (no lock held)

Rules:
- ``lock`` guards the scheduler, ``_deferred`` and the order of every outbox. Nothing is sent, unpickled or called under it.
- Sends may be done by any thread; everything else is done by the manager's thread, woken by a byte in a pipe.
"""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from fiberexec import _lifetime, _outcomes
from fiberexec._scheduler import Limits, Scheduler, Task
from fiberexec._scheduler import events as ev
from fiberexec._states import DELAYED, DONE, QUEUED
from fiberexec._switchboard import Switchboard
from fiberexec.backends import base

_logger = logging.getLogger("fiberexec")


class Manager:
    """See the module's description; for ``setup`` and ``launch_delay`` see Switchboard."""

    def __init__(
        self,
        backend: base.Backend,
        limits: Limits,
        setup: Callable[[], tuple[bytes, list[Any]]],
        launch_delay: Callable[[int, BaseException], float | None],
    ) -> None:
        self.backend = backend
        self.switchboard = Switchboard(backend, setup, launch_delay)
        self.scheduler = Scheduler(limits)
        self.lock = threading.Lock()
        self._deferred: deque[Any] = deque()  # actions for the manager's thread
        self._thread: threading.Thread | None = None
        self._dropped: deque[Any] = deque()  # sinks that nobody reads any more
        self._planned = math.inf  # when the manager's thread will wake up by itself
        self._overslept = False  # that is too late for the scheduler
        self._abandoned = False  # nobody can submit any more
        self._ids = 1
        self._failure: BaseException | None = None  # see _interrupted()
        self.ended = False
        self.forked_from = 0  # the parent's pid, in a forked child
        self.waits_at_exit = True  # the interpreter ends when every task has its outcome
        _lifetime.register(self)

    # -- called by any thread

    def new_ids(self, count: int) -> int:
        """Reserve ids for ``count`` items; returns the first."""
        with self.lock:
            first = self._ids
            self._ids += count
        return first

    def check_open(self) -> None:
        """Raise what submit() raises for an executor that takes no more tasks."""
        if self.forked_from:
            raise _outcomes.forked(self.forked_from)
        broken = self.scheduler.broken
        if broken is not None:
            raise _outcomes.broken(broken)
        if self.scheduler.closing or self._abandoned:
            raise RuntimeError("cannot schedule new futures after shutdown")
        if _lifetime.exiting and self.waits_at_exit:
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    def submit(self, tasks: list[Task]) -> None:
        """Take tasks in. What an idle worker can run now is sent by this very thread."""
        with self.lock:
            self.check_open()  # somebody may have closed or broken it since the caller looked
            self._start()
            self._handle(ev.Submitted(tasks))
        self._follow_up()

    def cancel(self, sink: Any = None) -> None:
        """Cancel everything that has not been sent, or what of it goes to this sink."""
        with self.lock:
            waiting = self.scheduler.queue.waiting()
            cancelled = self._take_out(waiting if sink is None else [task for task in waiting if task.sink is sink])
        self._fail_all(cancelled)

    def cancel_tasks(self, tasks: list[Task]) -> None:
        """Cancel those of these tasks that have not been sent."""
        with self.lock:
            cancelled = self._take_out(tasks)
        self._fail_all(cancelled)

    def _take_out(self, tasks: list[Task]) -> list[Task]:
        cancelled = [task for task in tasks if task.state in (QUEUED, DELAYED)]
        self._handle(ev.Cancelled(cancelled))
        return cancelled

    def _fail_all(self, tasks: list[Task]) -> None:
        for task in tasks:
            task.sink.fail(task, None)
            task.sink = None
        self._follow_up()

    def drop(self, sink: Any) -> None:
        """Cancel what waits for a sink that nobody reads any more. For the garbage collector, as abandon()."""
        self._dropped.append(sink)
        self.switchboard.wake()

    def terminate(self, task: Task) -> bool:
        """Stop one task; False when its outcome is there."""
        with self.lock:
            if task.state is DONE:
                return False
            self._handle(ev.Terminated(task))
        self._follow_up()
        return True

    def terminate_all(self) -> None:
        """Cancel what waits and stop what runs."""
        self.cancel()
        with self.lock:
            for worker in list(self.scheduler.fleet.workers.values()):
                for unit in list(worker.inflight):
                    self._handle(ev.Terminated(unit.task))
        self._follow_up()

    def tell(self, event: Any) -> None:
        """Hand an event to the scheduler; its actions are done by the manager's thread."""
        with self.lock:
            if not self.ended:
                self._start()
                self._handle(event)
        self._write()
        self.switchboard.wake()

    def close(self, wait: bool) -> None:
        """Take no more tasks; end when the last one has its outcome. ``wait``: return when everything is gone."""
        if self.forked_from:
            return
        with self.lock:
            thread = self._thread
            if thread is None:
                self.scheduler.closing = True
                self.ended = True
            else:
                self._handle(ev.Closing())
        self.switchboard.wake()
        if wait and thread is not None and thread is not threading.current_thread():
            thread.join()

    def abandon(self) -> None:
        """As close(), for the garbage collector: takes no lock, since it may run anywhere."""
        self._abandoned = True
        self.switchboard.wake()

    # -- under the lock

    def _start(self) -> None:
        if self._thread is None:
            self.switchboard.open()
            try:
                thread = threading.Thread(target=self._run, name="fiberexec-manager", daemon=True)
                thread.start()
            except BaseException:  # no more threads, as there may be no descriptors: the next submit() may find some
                self.switchboard.hang_up()
                raise
            self._thread = thread

    def _handle(self, event: Any) -> None:
        """Let the scheduler take an event. Sends go to outboxes, in order; the rest is deferred."""
        try:
            self._decide(event)
        except BaseException as error:
            self._interrupted(error)
            raise

    def _interrupted(self, error: BaseException) -> None:
        """A Ctrl-C has come in the middle of something that has to be done whole: the tables cannot be trusted any more."""
        self._failure = error
        self.switchboard.wake()

    def _decide(self, event: Any) -> None:
        actions = self.scheduler.handle(event, time.monotonic())
        if not actions and type(event) is ev.Submitted:
            return
        for action in actions:
            if type(action) is ev.Send:
                self.switchboard.send(action.worker, action)
            else:
                self._deferred.append(action)
        due = self.scheduler.wakeup()
        if due is not None and due < self._planned:
            self._planned = due
            self._overslept = True

    # -- after the lock, by any thread

    def _follow_up(self) -> None:
        """Write what _handle() has put into outboxes, and let the manager's thread do the rest."""
        self._write()
        if self._deferred or self.switchboard.full or self._overslept:
            self.switchboard.wake()

    def _write(self) -> None:
        try:
            self.switchboard.write()
        except BaseException as error:
            self._interrupted(error)
            raise

    # -- the manager's thread

    def _run(self) -> None:
        try:
            while not self.scheduler.finished:
                self._turn()
        except BaseException as error:  # a defect: say so to everyone who waits instead of leaving them waiting
            self.scheduler.broken = error
            self.scheduler.closing = True
            _lifetime.abandon_sinks(self, _outcomes.broken(error), forked=False)
            if not isinstance(error, KeyboardInterrupt):
                _logger.critical("the manager thread of a FiberExecutor failed", exc_info=True)  # may raise: last
        finally:
            self._end()

    def _end(self) -> None:
        with self.lock:
            self.ended = True
        self.switchboard.close()

    def _turn(self) -> None:
        """Wait, read everything that is there, let the scheduler decide, act."""
        events, logs = self.switchboard.wait(self._due())
        self._deferred += logs
        if self._failure is not None:
            raise self._failure
        if self._abandoned and not self.scheduler.closing:
            events.append(ev.Closing())
        while self._dropped:
            self.cancel(self._dropped.popleft())
        with self.lock:
            for event in events or (ev.Tick(),):
                self._handle(event)
        self._write()
        self._act()
        for event in events:
            if type(event) is ev.WorkerEnded:
                self.switchboard.forget(event.worker)

    def _due(self) -> float | None:
        """When there will be something to do, whatever happens."""
        if self._deferred:
            return 0.0
        with self.lock:
            due = self.scheduler.wakeup()
            self._planned = math.inf if due is None else due
            self._overslept = False
        return due

    # -- actions

    def _act(self) -> None:
        while self._deferred:
            action = self._deferred.popleft()
            if type(action) is ev.Settle:
                task = action.task
                task.sink.deliver(task, action.outcome)
                task.sink = None
            elif isinstance(action, logging.LogRecord):
                _log(action)
            else:
                self._do(action)

    def _do(self, action: Any) -> None:
        if isinstance(action, ev.Judge):
            task, sink = action.task, action.task.sink
            event, value, error = _outcomes.judge(action)
            self.tell(event)
            if event.delay is None and task.doom is None:
                sink.settle(task, value, error)
                task.sink = None
        elif isinstance(action, ev.Fail):
            connection = self.switchboard.connections.get(action.worker or 0)
            error = _outcomes.failure(action, connection, self.backend.host, self.scheduler.broken)
            action.task.sink.fail(action.task, error)
            action.task.sink = None
        elif isinstance(action, ev.Warn):
            _log(_logger.makeRecord(_logger.name, logging.WARNING, __file__, 0, action.text, (), None))
        else:
            self.switchboard.do(action)

    def forked(self, parent: int) -> None:
        """In a forked child: let go of what is the parent's, and end the futures that can never be done here."""
        self.forked_from = parent
        self.lock = threading.Lock()
        self._thread = None
        self.ended = True
        self.switchboard.forked()
        _lifetime.abandon_sinks(self, _outcomes.forked(parent), forked=True)


def _log(record: logging.LogRecord) -> None:
    """Hand a record to the program's logging. What its handlers and filters raise must not end the manager's thread."""
    logger = logging.getLogger(record.name)
    try:
        if logger.isEnabledFor(record.levelno):
            logger.handle(record)
    except Exception:
        sys.excepthook(*sys.exc_info())
