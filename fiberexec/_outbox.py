"""What a worker has to say, until it is sent: results, which wait for company, and log records, which do not."""

from __future__ import annotations

import sys
from _thread import allocate_lock
from time import monotonic

from fiberexec import _messages as messages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from fiberexec._stream import Buffer, Stream

    Record = tuple[int, int, int, bytes | None, int, float]

FLUSH_BYTES = 1 << 20


class Outbox:
    """Filled by the worker's main thread, signal handlers in it included, and (log records) by threads of tasks."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._results: list[tuple[Record, Sequence[Buffer]]] = []
        self._logs: list[tuple[Any, ...]] = []
        self._bytes = 0  # of data in _results
        self.flushed = 0.0  # when results were sent last
        self._sending = allocate_lock()  # held by the thread that writes to the stream; nobody waits for it

    def reply(self, number: int, size: int, status: int, data: bytes, buffers: Sequence[Buffer], seconds: float) -> None:
        """What became of ``size`` items from ``number`` on. What is large is sent at once."""
        if len(data) >= messages.BULK:
            self._results.append(((number, size, status, None, len(buffers) + 1, seconds), (data, *buffers)))
            self.flush()
            return
        self._results.append(((number, size, status, data, len(buffers), seconds), buffers))
        self._bytes += len(data)
        if self._bytes > FLUSH_BYTES or buffers:
            self.flush()

    def log(self, record: tuple[Any, ...]) -> None:
        """Send a log record."""
        self._logs.append(record)
        self.flush()

    def flush(self) -> None:
        """Send what is there. Whoever is sending already, in this or another thread, takes it along."""
        while (self._results or self._logs) and self._sending.acquire(False):
            try:
                while self._logs:
                    self._stream.send(messages.LOG, messages.encode(self._logs.pop(0)))
                batch = self._results[:]
                if batch:
                    flush_output()  # what a task printed is there when it is done
                    del self._results[: len(batch)]
                    self._bytes = 0
                    buffers = [buffer for _, owned in batch for buffer in owned]
                    self._stream.send(messages.RESULTS, messages.encode([record for record, _ in batch]), buffers)
                    self.flushed = monotonic()
            finally:
                self._sending.release()


def flush_output() -> None:
    """Write out what tasks have printed."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:  # it is closed, or replaced by something else, or in the middle of a print
            pass
