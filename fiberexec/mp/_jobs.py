"""The processes that this process has started: one thread that owns their backends, their streams and their ends.

    Process.start() ── Job ────► jobs thread ── launch, signal ─► backend
    terminate()     ── signal ─►   │    ◄── Started: the child is told what to be like, then what to run; Ended: the end
                                   └──► Job: pid, host, exit, and a byte in the sentinel

Rules:
- A job is launched until it has started, and its one task sent once: nothing that has started ever runs again.
- Signals other than SIGKILL wait until the child is ready: then it dies of them as a program of its own would. SIGTERM
  and SIGKILL give a launch up that has not come to anything yet.
- What a child has sent is read before its end is told.
- A forked child forgets all of it and makes its own when it needs it.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from multiprocessing import util
from typing import Any

from fiberexec import _config
from fiberexec import _messages as messages
from fiberexec._connection import Connection
from fiberexec._errors import ResourceError
from fiberexec._hub import launch as _hub
from fiberexec._retry import LaunchDelay
from fiberexec._scheduler import events as ev
from fiberexec._stream import Buffer, Stream
from fiberexec._waker import Waker
from fiberexec.backends import registry
from fiberexec.backends.base import Backend, Ended, Exit, Refused, Resources, Started
from fiberexec.mp._job import Job, Size, Task, guarded

MAX_PROCESSES = 4096  # at once, of one size
# What a backend that forks may load once for all processes.
PRELOAD = ("fiberexec.mp._child", "fiberexec._serialize._functions")
preload: tuple[str, ...] = ()  # and what the user names


class Jobs:
    """See the module's description. Any thread may call start(), signal() and close()."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the thread's beginning and end, and the making of backends
        self._backends: dict[Size, Backend] = {}
        self._inbox: deque[tuple[Job, int]] = deque()  # what to do: launch (0), or send a signal
        self._thread: threading.Thread | None = None
        self._waker = Waker()
        self.closed = False  # or closing
        # The rest is the thread's own.
        self._selector: Any = None
        self._jobs: dict[int, Job] = {}  # by the worker's number
        self._again: dict[Job, float] = {}  # whose launch failed, and when it is tried again
        self._watched: dict[int, str] = {}
        self._devices: Counter[str] = Counter()
        self._last = 0

    # -- called by any thread

    def start(self, job: Job, setup: Callable[[bool], tuple[bytes, list[Buffer]]], task: Task) -> None:
        """Launch a job. Raises ConfigError for a backend, and ResourceError for a size, that cannot be had."""
        with self._lock:
            job.backend = self._backend_for(job.size)
            job.setup, job.task = setup(job.backend.same_host), task
            self._start()
            self._inbox.append((job, 0))
        self._waker.wake()

    def signal(self, job: Job, number: int) -> None:
        """Send a signal to a job's process, if it has not ended."""
        if job.exit is None:
            self._inbox.append((job, number))
            self._waker.wake()

    def interrupt(self) -> None:
        """Pass a Ctrl-C on, once, to every process: they are in sessions of their own, where the terminal's does not come."""
        for job in list(self._jobs.values()):
            if not job.interrupted:
                job.interrupted = True
                self.signal(job, signal.SIGINT)

    def close(self) -> None:
        """End every process, the backends and the thread; return when that is done."""
        with self._lock:
            self.closed = True
            thread, self._thread = self._thread, None
        self._waker.wake()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def forked(self) -> None:
        """In a forked child: close what is the parent's."""
        for job in self._jobs.values():
            if job.connection is not None:
                job.connection.stream.close()
        for backend in self._backends.values():
            backend.forked()
        if self._selector is not None:
            self._selector.close()
        self._waker.forked()

    def _backend_for(self, size: Size) -> Backend:
        shared = self._backend(size._replace(cpu=None, memory=None, gpu=None))
        if not shared.same_host:
            return self._backend(size)
        asked, has = Resources(size.cpu or 0, size.memory or 0, size.gpu or 0), shared.largest.capacity
        if asked.cpu > has.cpu or asked.memory > has.memory or asked.gpu > has.gpu:
            raise ResourceError(f"the process asks for {asked}, but pool {shared.largest.name!r} has no more than {has}")
        return shared

    def _backend(self, size: Size) -> Backend:
        backend = self._backends.get(size)
        if backend is None:
            backend = self._backends[size] = _make(size)
        return backend

    def _start(self) -> None:
        if self.closed:
            raise RuntimeError("processes cannot be started any more: the program is ending")
        if self._thread is None:
            selector = selectors.PollSelector()  # epoll would not forget what another thread closes: the hub's listener
            try:
                selector.register(self._waker.open(), selectors.EVENT_READ)
                self._selector = selector
                thread = threading.Thread(target=self._run, name="fiberexec-jobs", daemon=True)
                thread.start()
            except BaseException:
                selector.close()
                self._waker.close()
                raise
            self._thread = thread

    # -- the thread

    def _run(self) -> None:
        reason = "the program is ending"
        try:
            while not self.closed:
                self._turn()
        except BaseException as error:  # a defect: nobody may be left waiting
            reason = f"the thread that looks after processes failed: {error!r}"
            raise
        finally:
            with self._lock:
                self.closed = True
            for backend in self._backends.values():
                backend.close()
            for job in {*self._jobs.values(), *(job for job, number in self._inbox if not number)}:
                self._end(job, Exit(None, reason))
            self._selector.close()
            self._waker.close()

    def _turn(self) -> None:
        for key, mask in self._selector.select(self._timeout()):
            job = key.data
            if isinstance(job, Job):
                if mask & selectors.EVENT_WRITE:
                    self._write(job)
                if mask & selectors.EVENT_READ:
                    self._read(job, 16)
            elif job == "hub":
                _start_hub()
        self._waker.clear()
        while self._inbox:
            self._do(*self._inbox.popleft())
        for job in [job for job, due in self._again.items() if due <= time.monotonic()]:
            del self._again[job], self._jobs[job.number]
            self._do(job, 0)
        for backend in list(self._backends.values()):
            for event in backend.poll():
                if isinstance(event, Started):
                    self._started(event)
                elif isinstance(event, Refused):
                    self._refused(self._jobs[event.worker], event)
                elif isinstance(event, Ended):
                    self._end(self._jobs[event.worker], event.exit)
        self._follow()

    def _timeout(self) -> float | None:
        due = [when for backend in list(self._backends.values()) if (when := backend.wakeup()) is not None]
        due += self._again.values()
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _do(self, job: Job, number: int) -> None:
        if not number:
            self._last += 1
            job.number = self._last
            self._jobs[job.number] = job
            job.backend.launch([job.number])
        elif job.number in self._jobs:
            if job.pid is None and number in (signal.SIGTERM, signal.SIGKILL):
                job.given_up = number
                number = signal.SIGKILL
            if job.given_up and job in self._again:
                self._end(job, Exit())
            elif job.ready or number == signal.SIGKILL:
                job.backend.signal(job.number, number, False)
            else:
                job.waiting.append(number)

    def _refused(self, job: Job, event: Refused) -> None:
        """A launch has failed: elsewhere it is tried again, as an executor does, where that can help."""
        job.error, job.failures = event.error, job.failures + 1
        delay = None
        if not (event.final or job.given_up or job.backend.same_host):
            job.delay = job.delay or LaunchDelay(None, _config.load(backend=job.size.backend).startup_timeout)
            delay = job.delay(job.failures, event.error)
        if delay is None:
            self._end(job, Exit())
        else:
            self._again[job] = time.monotonic() + delay

    def _started(self, event: Started) -> None:
        job = self._jobs[event.worker]
        job.error = None
        job.pid, job.host, job.id = event.pid, event.host, event.job
        event.connection.setblocking(False)
        stream = Stream(event.connection)
        connection = Connection(event.worker, event.pid, event.host, stream, job.backend.same_host)
        job.connection = connection
        self._watch(connection.stream, job)
        if job.size.gpu is not None:  # those that the fewest others have
            job.devices = tuple(sorted(event.pool.devices, key=lambda name: self._devices[name])[: job.size.gpu])
            self._devices.update(job.devices)
        connection.outbox.append((messages.SETUP, *job.setup))
        self._write(job)
        job.launched.set()

    def _ready(self, job: Job, error: BaseException | None) -> None:
        """The child is as its parent wants it, and may run; or it cannot be so."""
        connection, task = job.connection, job.task
        assert connection is not None and task is not None
        job.error = error
        if error is not None:
            job.backend.signal(job.number, signal.SIGKILL, False)
            return
        job.ready, job.task = True, None
        connection.outbox.append((messages.TASKS, *task(None if job.size.gpu is None else ",".join(job.devices))))
        self._write(job)
        for number in job.waiting:
            job.backend.signal(job.number, number, False)

    def _write(self, job: Job) -> None:
        connection = job.connection
        assert connection is not None
        mask = selectors.EVENT_READ if connection.write() else selectors.EVENT_READ | selectors.EVENT_WRITE
        try:
            self._selector.modify(connection.stream, mask, job)
        except KeyError:
            pass  # it has closed its end

    def _read(self, job: Job, reads: int | None) -> None:
        connection = job.connection
        assert connection is not None
        events, records, ended = connection.receive(reads)
        for record in records:
            guarded(partial(_log, record))
        for event in events:
            if isinstance(event, ev.WorkerReady) and job.task is not None:
                self._ready(job, event.error)
        if ended:
            self._unwatch(connection.stream)  # its end will be reported, unless the child has only closed what it found open

    def _end(self, job: Job, exit: Exit) -> None:
        connection = job.connection
        if connection is not None:
            self._read(job, None)
            self._unwatch(connection.stream)
            connection.stream.close()
            job.connection = None
        self._jobs.pop(job.number, None)
        self._again.pop(job, None)
        self._devices.subtract(job.devices)
        if job.given_up:
            exit = Exit(-job.given_up)
        elif job.error is not None:
            exit = Exit(None, str(job.error))
        job.finish(exit)

    def _watch(self, file: int | Stream, what: Job | str) -> None:
        self._unwatch(file)  # another with its number, which somebody else has closed
        self._watched.pop(file if isinstance(file, int) else file.fileno(), None)
        self._selector.register(file, selectors.EVENT_READ, what)

    def _unwatch(self, file: int | Stream) -> None:
        try:
            self._selector.unregister(file)
        except (KeyError, ValueError):
            pass

    def _follow(self) -> None:
        """Watch the descriptors that the backends have now, and the hub's listener until the hub serves it."""
        wanted = {fd: "backend" for backend in list(self._backends.values()) for fd in backend.fds()}
        wanted[_hub.fileno()] = "hub"
        wanted.pop(-1, None)
        for fd, _ in self._watched.items() - wanted.items():
            self._unwatch(fd)
        for fd, what in wanted.items() - self._watched.items():
            self._watch(fd, what)
        self._watched = wanted


def _make(size: Size) -> Backend:
    settings = _config.load(backend=size.backend)
    settings = settings._replace(
        cpu=settings.cpu if size.cpu is None else size.cpu,
        memory=settings.memory if size.memory is None else size.memory,
        gpu=settings.gpu if size.gpu is None else size.gpu,
    )
    backend = registry.create(settings.backend, settings, MAX_PROCESSES)
    hints: dict[str, object] = {"preload": (*PRELOAD, *preload)}  # not every backend has a use for them
    folder = os.path.dirname(_hub.address().path)
    if _hub.fileno() >= 0:  # until the hub runs nobody else would do it if this process were killed
        hints["remove_at_end"] = folder
    for name, value in hints.items():
        take = getattr(backend, name, None)
        if take is not None:
            take(value)
    return backend


def _log(record: logging.LogRecord) -> None:
    logger = logging.getLogger(record.name)
    if logger.isEnabledFor(record.levelno):
        logger.handle(record)


def _start_hub() -> None:
    """A child is the first to use a shared object."""
    try:
        _hub.start()
    except OSError:
        _hub.close()  # who waits for it hears that


_jobs: Jobs | None = None
_making = threading.Lock()


def get() -> Jobs:
    """This process' jobs."""
    global _jobs
    with _making:
        if _jobs is None or _jobs.closed:
            _jobs = Jobs()
            util.Finalize(None, _pass_on_interrupt, exitpriority=100)  # before children are joined,
            util.Finalize(None, close, exitpriority=-100)  # and after that
        return _jobs


def close() -> None:
    """End every process that this one has started, and what looks after them; the next one starts anew."""
    global _jobs
    with _making:
        jobs, _jobs = _jobs, None
    if jobs is not None:
        jobs.close()


def _pass_on_interrupt() -> None:
    """At the end of the program, if a Ctrl-C ended it; at a prompt it may have been typed long ago."""
    reason = sys.exc_info()[1] or getattr(sys, "last_value", None)
    if isinstance(reason, KeyboardInterrupt) and not hasattr(sys, "ps1") and _jobs is not None:
        _jobs.interrupt()


def _in_child() -> None:
    global _jobs, _making
    _making = threading.Lock()
    jobs, _jobs = _jobs, None
    if jobs is not None:
        jobs.forked()


os.register_at_fork(after_in_child=_in_child)
