"""The driver's end of one worker: what it knows already, what is to be sent, what came back."""

from __future__ import annotations

import logging
import sys
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

from fiberexec import _messages as messages
from fiberexec._scheduler import Task
from fiberexec._scheduler import events as ev
from fiberexec._scheduler.events import Send
from fiberexec._serialize import FunctionRef, load_exception
from fiberexec._stream import Buffer, Stream

_LONGEST = 1e12  # seconds, beyond which no task has taken


class Payload:
    """What a task carries: its function, and the pickled arguments of its items."""

    __slots__ = ("buffers", "data", "function", "kind", "size")

    def __init__(self, function: FunctionRef, kind: int, data: bytes, buffers: Sequence[Buffer] = ()) -> None:
        self.function = function
        self.kind = kind
        self.data = data
        self.buffers = buffers or ()  # an empty list each would be work for the garbage collector
        self.size = len(data) + sum(map(len, buffers)) if buffers else len(data)


class Connection:
    """Any thread may call write(); the manager's thread alone reads, and closes."""

    def __init__(self, worker: int, pid: int, host: str, stream: Stream, same_host: bool) -> None:
        self.worker = worker
        self.pid = pid
        self.host = host
        self.stream = stream
        self._same_host = same_host
        self.outbox: deque[Send | tuple[int, bytes, list[Buffer]]] = deque()  # filled under the manager's lock, in order
        self.recalled = 0  # items up to this number have been taken back
        self._known: dict[int, None] = {}  # ids of functions that the worker has, oldest first
        self._told: dict[str, Any] = {}  # see _changes()
        self._lock = threading.Lock()  # guards the stream's sending side: one frame after the other

    KEPT = 1024  # functions that a worker keeps

    def write(self) -> bool:
        """Send the outbox as far as the kernel takes it. True when all is sent, or the worker has gone."""
        with self._lock:
            try:
                while self.stream.flush():
                    if not self.outbox:
                        return True
                    item = self.outbox.popleft()
                    if isinstance(item, Send):
                        item = messages.TASKS, *self._pack(item)
                    self.stream.send_some(*item)
                return False  # what is left waits in the outbox: it may be recalled before there is room for it
            except OSError:
                self.outbox.clear()
                return True  # its end will be reported

    def _pack(self, send: Send) -> tuple[bytes, list[Buffer]]:
        functions: list[tuple[int, bytes, int]] = []
        forget: list[int] = []
        units: list[tuple[Any, ...]] = []
        function_buffers: list[Buffer] = []
        buffers: list[Buffer] = []
        known = self._known
        for number, task, start, stop in send.units:
            payload = task.payload
            if payload is None or number <= self.recalled:
                continue  # the executor has broken, or the task was taken back, before this was written
            ref = payload.function
            if ref.id not in known:
                known[ref.id] = None
                functions.append((ref.id, ref.data, len(ref.buffers)))
                function_buffers += ref.buffers
            data: bytes | None = payload.data
            taken = len(payload.buffers)
            if len(payload.data) >= messages.BULK:
                buffers.append(payload.data)
                data = None
                taken += 1
            if payload.buffers:
                buffers += payload.buffers
            units.append(
                (
                    number,
                    task.id + start,
                    task.attempt,
                    ref.id,
                    start,
                    stop,
                    payload.kind,
                    data,
                    taken,
                    _extra(task, send.devices),
                )
            )
        changes = self._changes() if functions else None
        while len(known) > self.KEPT and len(known) > len(units):
            oldest = next(iter(known))
            del known[oldest]
            forget.append(oldest)
        return messages.encode((functions, forget, units, changes)), function_buffers + buffers

    def _changes(self) -> dict[str, Any] | None:
        """What has changed in this process since the worker was told, of what a new function may need."""
        now = surroundings(self._same_host)
        changed = {name: value for name, value in now.items() if self._told.get(name) != value}
        self._told.update(changed)
        return changed or None

    def receive(self, reads: int | None) -> tuple[list[Any], list[logging.LogRecord], bool]:
        """What has arrived, as events for the scheduler and records for the log, and whether the stream has ended.

        ``reads`` bounds how often a worker that sends a lot is read; None: until nothing is left.
        """
        events: list[Any] = []
        logs: list[logging.LogRecord] = []
        try:
            while reads is None or reads > 0:
                for kind, body, buffers in self.stream.receive():
                    self._take(kind, messages.decode(body), buffers, events, logs)
                if reads is not None:
                    reads = reads - 1 if self.stream.in_bulk else 0
        except BlockingIOError:
            pass
        except (EOFError, OSError, ValueError, TypeError, LookupError, AttributeError):
            # It has closed, or is no worker of ours: see _take().
            self.stream.deafen()
            return events, logs, True
        return events, logs, False

    def _take(self, kind: int, message: Any, buffers: list[Any], events: list[Any], logs: list[logging.LogRecord]) -> None:
        if kind == messages.RESULTS:
            records = []
            position = 0
            for number, count, status, data, taken, seconds in message:
                if not (count >= 1 and taken >= 0 and 0 <= seconds < _LONGEST):
                    raise ValueError("a record that no worker writes")
                outcome: Any = None
                if status != messages.RECALLED:
                    owned: Any = buffers[position : position + taken] if taken else ()
                    position += taken
                    outcome = status, owned.pop(0) if data is None else data, owned
                records.append((number, count, outcome, seconds))
            events.append(ev.Replied(self.worker, records))
        elif kind == messages.LOG:
            from fiberexec._output import log_record

            logs.append(log_record(message, self.worker, self.pid, self.host))
        elif kind == messages.READY:
            version, python, self.pid, self.host, error = message
            mine = f"{sys.version_info[0]}.{sys.version_info[1]}"
            reason: BaseException | None = None
            if (version, python) != (messages.VERSION, mine):
                reason = RuntimeError(
                    f"worker {self.pid} on {self.host} runs Python {python} and protocol {version}, the driver Python {mine} "
                    f"and protocol {messages.VERSION}: use the same versions on both sides"
                )
            elif error is not None:
                reason = load_exception(error)
            events.append(ev.WorkerReady(self.worker, reason))


def surroundings(same_host: bool) -> dict[str, Any]:
    """What workers follow this process in: see Worker._adapt. Those on other hosts find modules in places of their own."""
    now: dict[str, Any] = {"path": list(sys.path)} if same_host else {}
    if "multiprocessing.managers" in sys.modules:
        now["authkey"] = bytes(sys.modules["multiprocessing"].current_process().authkey)
    if "fiberexec.mp" in sys.modules:  # what tasks make to share lives as long as this program
        from fiberexec._hub import launch

        try:
            now["hub"] = tuple(launch.start())
        except OSError:
            pass  # they hear of it when they need it
    return now


def _extra(task: Task, devices: tuple[str, ...] | None) -> dict[str, Any] | None:
    if devices is None and task.error is None and task.profile.timeout is None:
        return None
    extra: dict[str, Any] = {}
    if devices is not None:
        extra["devices"] = ",".join(devices)
    if task.error is not None:
        extra["error"] = task.error
    if task.profile.timeout is not None:
        extra["timed"] = True
    return extra
