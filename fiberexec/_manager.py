"""The manager: one thread that owns workers and futures, and the scheduler that it shares with submitting threads.

    submit() ──► Scheduler.handle(Submitted) ──► Send: written by the submitting thread when a worker is idle
                        ▲        │
       events of one turn        └── actions of one turn: send, settle, launch, signal, probe, recall
                        │                    │
    worker streams, backend events ◄── manager thread ──► futures, callbacks, retry policies (no lock held)

Rules:
- ``lock`` guards the scheduler, ``_deferred`` and the order of every outbox. Nothing is sent, unpickled or called under it.
- Sends may be done by any thread; everything else is done by the manager's thread, woken by a byte in a pipe.
- A worker's last frames are read before its end is told to the scheduler: what has arrived never runs again.
"""

from __future__ import annotations

import logging
import math
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from fiberexec import _lifetime, _outcomes
from fiberexec import _messages as messages
from fiberexec._connection import Connection
from fiberexec._scheduler import Limits, Scheduler, Task
from fiberexec._scheduler import events as ev
from fiberexec._states import DELAYED, DONE, QUEUED
from fiberexec._stream import Stream
from fiberexec._waiting import BACKEND, Waiting
from fiberexec._waker import Waker
from fiberexec.backends import base

_logger = logging.getLogger("fiberexec")
_READS = 16  # of one stream in one turn


class Manager:
    """See the module's description. ``setup`` is what every worker is told first; see Worker._setup."""

    def __init__(
        self,
        backend: base.Backend,
        limits: Limits,
        setup: Callable[[], tuple[bytes, list[Any]]],
        launch_delay: Callable[[int, BaseException], float | None],
    ) -> None:
        self.backend = backend
        self.scheduler = Scheduler(limits)
        self._setup = setup
        self._launch_delay = launch_delay
        self.lock = threading.Lock()
        self._deferred: deque[Any] = deque()  # actions for the manager's thread
        self.connections: dict[int, Connection] = {}
        self._ask_backend = False  # it has something to say
        self._waiting: Any = None  # a Waiting while there is a thread
        self._refused = 0  # launches in a row
        self._thread: threading.Thread | None = None
        self._waker = Waker()
        self._dropped: deque[Any] = deque()  # sinks that nobody reads any more
        self._touched: deque[Connection] = deque()  # connections with something in their outbox
        self._full: deque[Connection] = deque()  # what the kernel did not take at once; the manager's thread goes on
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

    def cancel(self, tasks: list[Task] | None = None, sink: Any = None) -> None:
        """Cancel what has not been sent: of these tasks, of a sink's, or (neither given) of all."""
        with self.lock:
            if tasks is None:
                tasks = [task for task in self.scheduler.queue.waiting() if sink is None or task.sink is sink]
            cancelled = [task for task in tasks if task.state in (QUEUED, DELAYED)]
            self._handle(ev.Cancelled(cancelled))
        for task in cancelled:
            task.sink.fail(task, None)
            task.sink = None
        self._follow_up()

    def drop(self, sink: Any) -> None:
        """Cancel what waits for a sink that nobody reads any more. For the garbage collector, as abandon()."""
        self._dropped.append(sink)
        self._waker.wake()

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
        self._waker.wake()

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
        self._waker.wake()
        if wait and thread is not None and thread is not threading.current_thread():
            thread.join()

    def abandon(self) -> None:
        """As close(), for the garbage collector: takes no lock, since it may run anywhere."""
        self._abandoned = True
        self._waker.wake()

    # -- under the lock

    def _start(self) -> None:
        if self._thread is None:
            waiting = Waiting()
            try:
                waiting.add(self._waker.open(), self._waker)
                self._waiting = waiting
                thread = threading.Thread(target=self._run, name="fiberexec-manager", daemon=True)
                thread.start()
            except BaseException:  # no more descriptors or threads: the next submit() may find some
                waiting.close()
                self._waker.close()
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
        self._waker.wake()

    def _decide(self, event: Any) -> None:
        actions = self.scheduler.handle(event, time.monotonic())
        if not actions and type(event) is ev.Submitted:
            return
        for action in actions:
            if type(action) is ev.Send:
                connection = self.connections.get(action.worker)
                if connection is not None:
                    connection.outbox.append(action)
                    self._touched.append(connection)
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
        if self._deferred or self._full or self._overslept:
            self._waker.wake()

    def _write(self) -> None:
        while self._touched:
            try:
                connection = self._touched.popleft()
            except IndexError:  # another thread was faster
                return
            try:
                if not connection.write():
                    self._full.append(connection)
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
            if self._failure is None:
                _logger.critical("the manager thread of a FiberExecutor failed", exc_info=True)  # may raise: last
        finally:
            self._end()

    def _end(self) -> None:
        with self.lock:
            self.ended = True
        self.backend.close()
        for connection in self.connections.values():
            connection.stream.close()
        self.connections.clear()
        self._waiting.close()
        self._waker.close()

    def _turn(self) -> None:
        """Wait, read everything that is there, let the scheduler decide, act."""
        events: list[Any] = []
        for owner, readable, writable in self._waiting.wait(self._timeout()):
            if owner is self._waker:
                self._waker.clear()
            elif owner is BACKEND:
                self._ask_backend = True
            else:
                if writable:
                    self._ask_for_room(owner, not owner.write())
                if readable:
                    self._read(owner, events)
        due = self.backend.wakeup()
        if self._ask_backend or (due is not None and due <= time.monotonic()):
            self._ask_backend = False
            self._poll_backend(events)
        if self._failure is not None:
            raise self._failure
        if self._abandoned and not self.scheduler.closing:
            events.append(ev.Closing())
        while self._dropped:
            self.cancel(sink=self._dropped.popleft())
        with self.lock:
            for event in events or (ev.Tick(),):
                self._handle(event)
        self._write()
        self._act()
        for event in events:
            if type(event) is ev.WorkerEnded:
                self._forget(event.worker)
        while self._full:
            self._ask_for_room(self._full.popleft(), True)

    def _timeout(self) -> float | None:
        if self._deferred or self._ask_backend:
            return 0
        with self.lock:
            due = self.scheduler.wakeup()
            self._planned = math.inf if due is None else due
            self._overslept = False
        other = self.backend.wakeup()
        if other is not None and (due is None or other < due):
            due = other
        return None if due is None else max(0.0, due - time.monotonic())

    def _read(self, connection: Connection, events: list[Any]) -> None:
        found, logs, ended = connection.receive(_READS)
        events += found
        self._deferred += logs
        if ended:
            self._waiting.remove(connection.stream)
            self.backend.signal(connection.worker, signal.SIGKILL, True)  # its end will be reported

    def _poll_backend(self, events: list[Any]) -> None:
        delay: float | None = None
        refused = False  # together they are one failure, however many workers were asked for
        for event in self.backend.poll():
            if isinstance(event, base.Started):
                self._refused = 0
                event.connection.setblocking(False)
                connection = Connection(event.worker, event.pid, event.host, Stream(event.connection))
                self.connections[event.worker] = connection
                self._waiting.add(connection.stream, connection)
                connection.outbox.append((messages.SETUP, *self._setup()))
                self._ask_for_room(connection, not connection.write())
                events.append(ev.WorkerStarted(event.worker, event.job, event.pool))
            elif isinstance(event, base.Refused):
                if not refused:
                    refused = True
                    self._refused += 1
                    delay = self._launch_delay(self._refused, event.error)
                events.append(ev.WorkerRefused(event.worker, event.error, None if event.final else delay))
            elif isinstance(event, base.Probed):
                events.append(ev.Probed(event.worker, event.cell.running, event.cell.seconds))
            elif isinstance(event, base.Recalled):
                events.append(ev.RecallDone(event.worker, event.claimed))
            else:
                ended = self.connections.get(event.worker)
                if ended is not None:
                    found, logs, _ = ended.receive(None)
                    events += found
                    self._deferred += logs
                events.append(ev.WorkerEnded(event.worker, event.running, event.exit))
        self._waiting.follow(self.backend.fds())

    def _forget(self, worker: int) -> None:
        connection = self.connections.pop(worker, None)
        if connection is not None:
            self._waiting.remove(connection.stream)
            connection.stream.close()

    def _ask_for_room(self, connection: Connection, wanted: bool) -> None:
        self._waiting.ask_for_room(connection.stream, connection, wanted)

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
            action.task.sink.fail(action.task, self._error(action))
            action.task.sink = None
        elif isinstance(action, ev.Launch):
            self.backend.launch(action.workers)
            self._ask_backend = True
        elif isinstance(action, ev.Signal):
            self.backend.signal(action.worker, action.number, action.group)
        elif isinstance(action, ev.Drain):
            connection = self.connections.get(action.worker)
            if connection is not None:
                connection.outbox.append((messages.DRAIN, messages.encode(None), []))
                self._touched.append(connection)
                self._write()
        elif isinstance(action, ev.Probe):
            self.backend.probe(action.worker)
            self._ask_backend = True
        elif isinstance(action, ev.Recall):
            connection = self.connections.get(action.worker)
            if connection is not None:
                connection.recalled = action.number
            self.backend.recall(action.worker, action.number)
            self._ask_backend = True
        elif isinstance(action, ev.Warn):
            _log(_logger.makeRecord(_logger.name, logging.WARNING, __file__, 0, action.text, (), None))

    def _error(self, action: ev.Fail) -> BaseException | None:
        task, why, worker, exit = action
        if why == ev.CANCELLED:
            return None
        if why == ev.TIMEOUT:
            return _outcomes.timed_out(task)
        if why == ev.BROKEN:
            assert self.scheduler.broken is not None
            return _outcomes.broken(self.scheduler.broken)
        connection = self.connections.get(worker or 0)
        host, pid = (connection.host, connection.pid) if connection is not None else (self.backend.host, 0)
        return _outcomes.lost(task, exit or base.Exit(), host, pid)

    def forked(self, parent: int) -> None:
        """In a forked child: let go of what is the parent's, and end the futures that can never be done here."""
        self.forked_from = parent
        self.lock = threading.Lock()
        self._thread = None
        self.ended = True
        self.backend.forked()
        for connection in self.connections.values():
            connection.stream.close()
        if self._waiting is not None:
            self._waiting.close()
        self._waker.forked()
        _lifetime.abandon_sinks(self, _outcomes.forked(parent), forked=True)


def _log(record: logging.LogRecord) -> None:
    """Hand a record to the program's logging. What its handlers and filters raise must not end the manager's thread."""
    logger = logging.getLogger(record.name)
    try:
        if logger.isEnabledFor(record.levelno):
            logger.handle(record)
    except Exception:
        sys.excepthook(*sys.exc_info())
