"""What a task prints and logs, on its way out of the worker. Loaded only when a worker needs it."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable
from typing import Any


class _Prefixed(io.TextIOBase):
    """A text stream that puts the worker and the task in front of every line."""

    def __init__(self, target: Any, task_id: Callable[[], int]) -> None:
        self._target = target
        self._task_id = task_id
        self._at_start = True  # of a line

    def write(self, text: str) -> int:
        prefix = f"[worker {os.getpid()} task {self._task_id()}] "
        for line in text.splitlines(keepends=True):
            self._target.write(prefix + line if self._at_start else line)
            self._at_start = line.endswith(("\n", "\r"))
        self._target.flush()
        return len(text)

    def flush(self) -> None:
        self._target.flush()

    def fileno(self) -> int:
        return int(self._target.fileno())

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return str(self._target.encoding)


def prefix_output(task_id: Callable[[], int]) -> None:
    """Let every line that Python code of this process prints begin with the worker's pid and the task's id."""
    sys.stdout = _Prefixed(sys.stdout, task_id)
    sys.stderr = _Prefixed(sys.stderr, task_id)


class _Forward(logging.Handler):
    def __init__(self, send: Callable[[tuple[Any, ...]], None]) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.exc_text
            if record.exc_info and not text:
                text = logging.Formatter().formatException(record.exc_info)
            where = (record.pathname, record.lineno, record.funcName)
            self._send((record.name, record.levelno, record.getMessage(), *where, text, record.created))
        except Exception:
            self.handleError(record)


def log_levels() -> dict[str, int]:
    """The loggers that have a level of their own, by name; the root is "root"."""
    root = logging.getLogger()
    loggers = [root, *root.manager.loggerDict.values()]
    return {each.name: each.level for each in loggers if isinstance(each, logging.Logger) and each.level}


def forward_logging(levels: dict[str, int], send: Callable[[tuple[Any, ...]], None]) -> None:
    """Send what this process logs to the driver, as tuples of plain values; ``levels`` are the driver's, by logger."""
    for name, level in levels.items():
        logging.getLogger(None if name == "root" else name).setLevel(level)
    logging.getLogger().addHandler(_Forward(send))


def log_record(message: tuple[Any, ...], worker: int, pid: int, host: str) -> logging.LogRecord:
    """The driver's copy of a worker's record; ``worker``, ``task`` and ``host`` are attributes of it."""
    task, name, level, text, path, line, function, exception, created = message
    origin = f"worker {pid}@{host}" + (f" task {task}" if task else "")
    record = logging.LogRecord(name, level, path, line, f"[{origin}] {text}", None, None, function)
    record.exc_text = exception
    record.created = created
    record.process = pid
    record.processName = origin
    record.worker, record.task, record.host = worker, task, host
    return record
