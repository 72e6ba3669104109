"""The switchboard: the lines to all workers, and the backend that starts and ends them.

    send() ─► Connection.outbox ─► write() ─► stream          by any thread
    do() ───► backend: launch, signal, probe, recall          by the manager's thread, as all the rest
    wait() ◄─ what streams and backend say: events for the scheduler, records for the log

A worker's last frames are read before its end is told: what has arrived never runs again.
"""

from __future__ import annotations

import logging
import signal
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from fiberexec import _messages as messages
from fiberexec._connection import Connection
from fiberexec._scheduler import events as ev
from fiberexec._stream import Stream
from fiberexec._waiting import BACKEND, Waiting
from fiberexec._waker import Waker
from fiberexec.backends import base

_READS = 16  # of one stream in one turn


class Switchboard:
    """See the module's description. ``setup`` is what every worker is told first; see Worker._setup.

    ``launch_delay`` is told how many launches have failed in a row, and why, and says after how many seconds to try again.
    """

    def __init__(
        self,
        backend: base.Backend,
        setup: Callable[[], tuple[bytes, list[Any]]],
        launch_delay: Callable[[int, BaseException], float | None],
    ) -> None:
        self.backend = backend
        self.connections: dict[int, Connection] = {}
        self._setup = setup
        self._launch_delay = launch_delay
        self._refused = 0  # launches in a row
        self._ask_backend = False  # it has something to say
        self._waker = Waker()
        self._waiting: Any = None  # a Waiting from open() on
        self._touched: deque[Connection] = deque()  # connections with something in their outbox
        self.full: deque[Connection] = deque()  # what the kernel did not take at once; the manager's thread goes on

    # -- called by any thread

    def open(self) -> None:
        """Be ready for wait(). Raises OSError when there are no more descriptors."""
        waiting = Waiting()
        try:
            waiting.add(self._waker.open(), self._waker)
        except BaseException:
            waiting.close()
            raise
        self._waiting = waiting

    def wake(self) -> None:
        """End the manager's wait(); for the garbage collector too."""
        self._waker.wake()

    def send(self, worker: int, what: Any) -> None:
        """Put something into a worker's outbox, to be called in order. write() sends it."""
        connection = self.connections.get(worker)
        if connection is not None:
            connection.outbox.append(what)
            self._touched.append(connection)

    def write(self) -> None:
        """Send what is in outboxes as far as the kernel takes it."""
        while self._touched:
            try:
                connection = self._touched.popleft()
            except IndexError:  # another thread was faster
                return
            if not connection.write():
                self.full.append(connection)

    # -- the manager's thread

    def wait(self, due: float | None) -> tuple[list[Any], list[logging.LogRecord]]:
        """Wait for something until ``due`` (a time.monotonic(), None: for ever); return all that has been said."""
        while self.full:
            self._ask_for_room(self.full.popleft(), True)
        events: list[Any] = []
        logs: list[logging.LogRecord] = []
        for owner, readable, writable in self._waiting.wait(self._timeout(due)):
            if owner is self._waker:
                self._waker.clear()
            elif owner is BACKEND:
                self._ask_backend = True
            else:
                if writable:
                    self._ask_for_room(owner, not owner.write())
                if readable:
                    self._read(owner, events, logs)
        due = self.backend.wakeup()
        if self._ask_backend or (due is not None and due <= time.monotonic()):
            self._ask_backend = False
            self._poll(events, logs)
        return events, logs

    def _timeout(self, due: float | None) -> float | None:
        if self._ask_backend:
            return 0
        other = self.backend.wakeup()
        if other is not None and (due is None or other < due):
            due = other
        return None if due is None else max(0.0, due - time.monotonic())

    def _read(self, connection: Connection, events: list[Any], logs: list[logging.LogRecord]) -> None:
        found, records, ended = connection.receive(_READS)
        events += found
        logs += records
        if ended:
            self._waiting.remove(connection.stream)
            self.backend.signal(connection.worker, signal.SIGKILL, True)  # its end will be reported

    def _poll(self, events: list[Any], logs: list[logging.LogRecord]) -> None:
        delay: float | None = None
        refused = False  # together they are one failure, however many workers were asked for
        for event in self.backend.poll():
            if isinstance(event, base.Started):
                self._refused = 0
                event.connection.setblocking(False)
                connection = Connection(event.worker, event.pid, event.host, Stream(event.connection), self.backend.same_host)
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
            elif isinstance(event, base.Leaving):
                events.append(ev.WorkerLeaving(event.worker))
            else:
                ended = self.connections.get(event.worker)
                if ended is not None:
                    found, records, _ = ended.receive(None)
                    events += found
                    logs += records
                events.append(ev.WorkerEnded(event.worker, event.running, event.exit))
        self._waiting.follow(self.backend.fds())

    def _ask_for_room(self, connection: Connection, wanted: bool) -> None:
        self._waiting.ask_for_room(connection.stream, connection, wanted)

    def do(self, action: ev.Launch | ev.Signal | ev.Drain | ev.Probe | ev.Recall) -> None:
        """Do what the scheduler wants of a worker."""
        if isinstance(action, ev.Launch):
            self.backend.launch(action.workers)
            self._ask_backend = True
        elif isinstance(action, ev.Signal):
            self.backend.signal(action.worker, action.number, action.group)
        elif isinstance(action, ev.Drain):
            self.send(action.worker, (messages.DRAIN, messages.encode(None), []))
            self.write()
        elif isinstance(action, ev.Probe):
            self.backend.probe(action.worker)
            self._ask_backend = True
        else:
            connection = self.connections.get(action.worker)
            if connection is not None:
                connection.recalled = action.number
            self.backend.recall(action.worker, action.number)
            self._ask_backend = True

    def forget(self, worker: int) -> None:
        """A worker has ended, and everyone has heard so."""
        connection = self.connections.pop(worker, None)
        if connection is not None:
            self._waiting.remove(connection.stream)
            connection.stream.close()

    def close(self) -> None:
        """End all workers and the backend, and return when that is done."""
        self.backend.close()
        for connection in self.connections.values():
            connection.stream.close()
        self.connections.clear()
        self.hang_up()

    def hang_up(self) -> None:
        """Undo open()."""
        self._waiting.close()
        self._waker.close()

    def forked(self) -> None:
        """In a forked child: let go of what is the parent's."""
        self.backend.forked()
        for connection in self.connections.values():
            connection.stream.close()
        if self._waiting is not None:
            self._waiting.close()
        self._waker.forked()
