"""Workers as processes of this machine: forked by a fork server, each with its stream held by the driver itself."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import sys
from _socket import SHUT_WR, SO_SNDBUF, SOL_SOCKET, socket
from collections import deque
from collections.abc import Sequence
from time import monotonic, monotonic_ns
from typing import Any

from fiberexec import _messages as messages
from fiberexec import _platform
from fiberexec._errors import ConfigError, LaunchError
from fiberexec._stream import Frame, ProtocolError, Stream, pack
from fiberexec._worker import CLAIMED, RECALLED, RUNNING, STARTED
from fiberexec.backends.base import Cell, Ended, Exit, JobEvent, Pool, Probed, Recalled, Refused, Resources, Started

MAX_WORKERS = 4096
_FEWER = " or use fewer workers (max_workers=)"
_HINTS = {
    errno.EMFILE: "; raise the limit of open files (ulimit -n)" + _FEWER,
    errno.ENFILE: "; the whole system has too many open files: end other programs" + _FEWER,
    errno.EAGAIN: "; raise the limit of processes (ulimit -u)" + _FEWER,
    errno.ENOMEM: "; free some memory" + _FEWER,
    errno.ENOSPC: "; free some space on the disk of the temporary folder, or set TMPDIR",
}
_SPARE = 64  # cells for workers that are ending while their successors start
_CLOSE_TIMEOUT = 5.0  # seconds
_CLAIM_SHOWS = 0.001  # seconds after which what a worker claimed before it saw a recall is certain to show


class _Process:
    """A worker's process as the backend knows it."""

    def __init__(self, slot: int, connection: socket) -> None:
        self.slot = slot
        self.connection: socket | None = connection  # until it is handed over
        self.pid = 0


class LocalBackend:
    """See base.Backend. ``cpu``, ``memory`` and ``gpu`` of the settings narrow what tasks are promised of the machine."""

    name = "local"
    same_host = True
    idle_timeout: float | None = None

    def __init__(self, settings: Any, max_workers: int | None = None) -> None:
        if settings.backend_options:
            raise ConfigError(
                f"backend 'local' has no options, got backend_options={dict(settings.backend_options)!r}"
            )
        if not _platform.LINUX:
            import tempfile  # noqa: F401  in this thread: one that is forked in the middle of an import stays locked
        self.host = _platform.host_name()
        self.largest = _machine(settings)
        self.default_workers = _platform.cpu_count()
        if max_workers is not None and max_workers > MAX_WORKERS:
            raise ConfigError(f"max_workers={max_workers}: backend 'local' runs at most {MAX_WORKERS} processes")
        count = (max_workers or self.default_workers) + _SPARE
        self._slots = deque(range(count))
        self._processes: dict[int, _Process] = {}
        self._server = 0  # the fork server's pid, 0 when there is none
        self._control: socket | None = None
        self._stream: Stream | None = None
        self._lifeline = -1
        self._cells_fd = -1
        self._cells = memoryview(b"")
        self._events: list[JobEvent] = []
        self._recalls: deque[tuple[float, int, int]] = deque()  # when the answer is due, worker, number
        self._count = count
        self._preload: tuple[str, ...] = ()
        self._folder = ""

    # -- the contract

    def launch(self, workers: Sequence[int]) -> None:
        for worker in workers:
            try:
                self._launch(worker)
            except OSError as error:
                self._events.append(Refused(worker, _explained(error)))

    def signal(self, worker: int, number: int, group: bool) -> None:
        if worker in self._processes:
            self._tell(messages.SIGNAL, (worker, int(number), group))

    def probe(self, worker: int) -> None:
        cell = self.peek(worker)
        if cell is not None:
            self._events.append(Probed(worker, cell))

    def peek(self, worker: int) -> Cell | None:
        process = self._processes.get(worker)
        if process is None:
            return None
        cell = self._cell(process.slot)
        return Cell(cell[RUNNING], (monotonic_ns() - cell[STARTED]) / 1e9, cell[CLAIMED])

    def recall(self, worker: int, number: int) -> None:
        process = self._processes.get(worker)
        if process is not None:
            self._cell(process.slot)[RECALLED] = number
            self._tell(messages.SIGNAL, (worker, int(signal.SIGURG), False))
            self._recalls.append((monotonic() + _CLAIM_SHOWS, worker, number))

    def wakeup(self) -> float | None:
        return self._recalls[0][0] if self._recalls else None

    def fds(self) -> Sequence[int]:
        return () if self._control is None else (self._control.fileno(),)

    def poll(self) -> list[JobEvent]:
        if self._stream is not None:
            try:
                for frame in self._stream.receive():
                    self._handle(frame)
            except BlockingIOError:
                pass
            except (OSError, EOFError, ProtocolError):
                self._server_gone()
        while self._recalls and self._recalls[0][0] <= monotonic():
            _, worker, number = self._recalls.popleft()
            cell = self.peek(worker)
            if cell is not None:
                self._events.append(Recalled(worker, number, cell.claimed))
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        server, control = self._server, self._control
        if server and control is not None:
            try:  # say goodbye, and listen until it has gone
                control.settimeout(_CLOSE_TIMEOUT)
                control.shutdown(SHUT_WR)
                while control.recv(1 << 16):
                    pass
            except OSError:
                pass
        self._forget_server()
        if server:
            _platform.reap(server, _CLOSE_TIMEOUT)

    def forked(self) -> None:
        self._forget_server()

    def preload(self, modules: tuple[str, ...]) -> None:
        """Load modules once, for all the processes that will be started. To be called before the first launch()."""
        self._preload = modules

    def remove_at_end(self, folder: str) -> None:
        """Remove a folder when this process has gone, however that comes. To be called before the first launch()."""
        self._folder = folder

    # -- the fork server

    def _launch(self, worker: int) -> None:
        if not self._slots:
            raise OSError(errno.EAGAIN, f"{self._count} processes are running")
        if not self._server:
            self._start_server()
        ours, theirs = _platform.stream_pair()
        try:
            for end in (ours, theirs):
                end.setsockopt(SOL_SOCKET, SO_SNDBUF, 1 << 20)
            slot = self._slots.popleft()
            cell = self._cell(slot)
            cell[RUNNING] = cell[STARTED] = cell[CLAIMED] = cell[RECALLED] = 0
            assert self._control is not None
            frame = b"".join(pack(messages.FORK, messages.encode((worker, slot))))
            _platform.send_fd(self._control, frame, theirs.fileno())
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        self._processes[worker] = _Process(slot, ours)

    def _start_server(self) -> None:
        if not sys.executable:
            raise OSError(errno.ENOENT, "sys.executable is empty: there is no interpreter to start workers with")
        opened: list[int] = []
        try:
            opened += (end.detach() for end in _platform.stream_pair())
            opened += os.pipe()
            opened.append(_platform.make_cells(self._count))
            control, remote, alive, lifeline, cells = opened
            actions: list[tuple[Any, ...]] = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
            for number, fd in enumerate((remote, cells, alive), 3):
                opened.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10))  # so that no copy overwrites another's source
                actions.append((os.POSIX_SPAWN_DUP2, opened[-1], number))
            package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
            program = (
                "import sys; sys.path[:] = [p for p in sys.path if p]; "
                f"sys.path.insert(0, {package!r}); from fiberexec._forkserver import main; main(3, 4, 5)"
            )
            arguments = [sys.executable, *_interpreter_flags(), "-c", program]
            # What this process blocks or ignores is its own affair: a fork server that hears of no child hangs.
            default = (signal.SIGCHLD, signal.SIGTERM, signal.SIGURG)
            self._server = os.posix_spawn(
                sys.executable, arguments, os.environ, file_actions=actions, setsigmask=(), setsigdef=default
            )
        except BaseException:
            for fd in opened:
                os.close(fd)
            raise
        for fd in (remote, alive, *opened[5:]):
            os.close(fd)
        self._control = socket(fileno=control)
        self._control.setblocking(False)
        self._stream = Stream(self._control)
        self._lifeline = lifeline
        self._cells_fd = cells
        self._cells = _platform.map_cells(cells)
        if self._preload:
            self._tell(messages.PRELOAD, self._preload)
        if self._folder:
            self._tell(messages.REMOVE, self._folder)

    def _handle(self, frame: Frame) -> None:
        kind, body, _ = frame
        message = messages.decode(body)
        if kind == messages.FORKED:
            worker, pid = message
            process = self._processes[worker]
            process.pid = pid
            connection, process.connection = process.connection, None
            assert connection is not None
            self._events.append(Started(worker, pid, self.host, connection, self.largest, f"local-{pid}"))
        elif kind == messages.REFUSED:
            worker, number, text = message
            process = self._processes.pop(worker)
            self._slots.append(process.slot)
            if process.connection is not None:
                process.connection.close()
            self._events.append(Refused(worker, _explained(OSError(number, text))))
        elif kind == messages.EXITED:
            worker, status, log, for_memory = message
            if for_memory:
                log += _platform.memory_story()
            self._ended(worker, Exit(os.waitstatus_to_exitcode(status), "OOMKilled" if for_memory else "", log))

    def _ended(self, worker: int, exit: Exit) -> None:
        process = self._processes.pop(worker)
        if process.connection is not None:
            process.connection.close()
        self._events.append(Ended(worker, exit, self._cell(process.slot)[RUNNING]))
        self._slots.append(process.slot)

    def _server_gone(self) -> None:
        """The fork server died; the kernel or we end its workers, and the next launch starts another one."""
        for process in self._processes.values():
            if process.pid:
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except OSError:
                    pass
        exit = Exit(None, "the fork server died", infrastructure=True)
        for worker in list(self._processes):
            self._ended(worker, exit)
        self.close()

    def _forget_server(self) -> None:
        self._server = 0
        for process in self._processes.values():
            if process.connection is not None:
                process.connection.close()
        self._processes.clear()
        if self._control is not None:
            self._control.close()
            os.close(self._lifeline)
            os.close(self._cells_fd)
        self._control = self._stream = None
        self._cells = memoryview(b"")  # the last reference: unmapped

    def _tell(self, kind: int, message: object) -> None:
        if self._control is not None:
            try:
                self._control.sendall(b"".join(pack(kind, messages.encode(message))))
            except OSError:
                pass  # the next poll() sees that it has gone

    def _cell(self, slot: int) -> memoryview:
        return self._cells[slot * _platform.CELL_WORDS : (slot + 1) * _platform.CELL_WORDS]


def _machine(settings: Any) -> Pool:
    """What this machine has, or the part of it that the settings name."""
    devices = _platform.gpu_devices()
    has = Resources(_platform.cpu_count(), _platform.memory_total(), len(devices))
    asked = Resources(
        has.cpu if settings.cpu is None else settings.cpu,
        has.memory if settings.memory is None else settings.memory,
        has.gpu if settings.gpu is None else settings.gpu,
    )
    if asked.cpu > has.cpu or asked.memory > has.memory or asked.gpu > has.gpu:
        raise ConfigError(f"the executor asks for {asked}, but this machine has {has}")
    return Pool("local", asked, devices[: asked.gpu])


def _explained(error: OSError) -> LaunchError:
    hint = _HINTS.get(error.errno or 0, "")
    explained = LaunchError(f"no process could be started on this machine: {error}{hint}")
    explained.__cause__ = error
    return explained


def _interpreter_flags() -> list[str]:
    """The options that give another interpreter the same mode as this one."""
    flags = sys.flags
    found = ["-I"] if flags.isolated else []
    found += ["-E"] if flags.ignore_environment and not flags.isolated else []
    found += ["-s"] if flags.no_user_site and not flags.isolated else []
    found += ["-S"] if flags.no_site else []
    found += ["-B"] if flags.dont_write_bytecode else []
    found += ["-" + "O" * flags.optimize] if flags.optimize else []
    found += ["-" + "b" * flags.bytes_warning] if flags.bytes_warning else []
    found += [f"-W{option}" for option in sys.warnoptions]
    found += [f"-X{name}" if value is True else f"-X{name}={value}" for name, value in sys._xoptions.items()]
    return found
