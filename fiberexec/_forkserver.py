"""The preloaded parent of workers: forks them in milliseconds, reaps them, reports how they ended.

    driver (manager thread) ── FORK + the worker's socket, SIGNAL ──► fork server ──fork()──► worker (own session)
                            ◄── FORKED, REFUSED, EXITED ───────────      ▲ stderr of the workers, passed on
Rules:
- One thread, no module of the user's: forking is safe, and a worker starts as clean as a fresh interpreter.
- When the control stream ends the driver has gone: every worker's group is killed, then the fork server ends.
- A worker's group is killed when the worker has ended, and so are orphans in no living worker's session.
- The driver waits for the first worker, so modules that cost milliseconds (enum, re, socket) are not loaded before it.
- The last lines that a worker wrote to stderr are kept for the report; all of it is passed on.
"""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]
import gc
import os
import select
import sys
from _collections import deque  # type: ignore[import-not-found]
from _collections_abc import Collection
from _socket import socket
from time import monotonic, sleep

from fiberexec import _messages as messages
from fiberexec import _platform, _worker
from fiberexec._stream import Frame, ProtocolError, Stream, pack

_END_TIMEOUT = 2.0  # seconds
_PAUSE = 0.01  # seconds
_GLANCE = 1000  # milliseconds between two looks at the driver
TAIL = 2048  # bytes of stderr that are kept of each worker


class _Child:
    """A worker as its parent sees it."""

    def __init__(self, worker: int, pid: int, stderr: int) -> None:
        self.worker = worker
        self.pid = pid
        self.stderr = stderr
        self.tail = b""


class ForkServer:
    """See the module's description. ``run()`` returns when the driver has gone or said goodbye."""

    def __init__(self, control: socket, cells: int, lifeline: int) -> None:
        self._control = control
        self._stream = Stream(control)
        self._cells = _platform.map_cells(cells)
        self._lifeline = lifeline
        self._sockets: deque[int] = deque()  # received, not yet matched with their FORK
        self._children: dict[int, _Child] = {}  # by pid
        self._by_worker: dict[int, _Child] = {}
        self._wake, wakeup = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(wakeup, False)
        self._wakeup = wakeup
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)
        self._poll.register(self._wake, select.POLLIN)
        self._stderr = select.poll()
        self._stderr.register(2, select.POLLOUT)
        self._driver = os.getppid()
        self._adopting = False
        self._folder = ""  # to be removed at the end
        self._kills = _platform.memory_kills()

    def run(self) -> None:
        while os.getppid() == self._driver:  # a forked child of the driver may keep its descriptors open
            for fd, _ in self._poll.poll(_GLANCE):
                if fd == self._control.fileno():
                    try:
                        data, fds = _platform.receive_fds(self._control, 1 << 16, 64)
                    except OSError:
                        data, fds = b"", []
                    self._sockets += fds
                    if not data:
                        return
                    try:
                        for frame in self._stream.feed(data):
                            self._handle(frame)
                    except (ProtocolError, OSError):
                        return
                elif fd == self._wake:
                    os.read(self._wake, 4096)
                    self._reap()
                else:
                    child = next((c for c in self._children.values() if c.stderr == fd), None)
                    if child is not None and not self._pass_on(child):
                        self._mute(child)  # readable and empty: everybody has closed it

    def end(self) -> None:
        """Kill what is left, and remove what that leaves behind."""
        if self._folder:
            import shutil

            shutil.rmtree(self._folder, ignore_errors=True)
        for child in self._children.values():
            _kill_group(child.pid)
        deadline = monotonic() + _END_TIMEOUT
        while monotonic() < deadline:
            self._sweep(())
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    sleep(0.0005)
            except ChildProcessError:
                return

    def _sweep(self, spare: Collection[int]) -> None:
        """Kill the children, but for workers in ``spare`` and what is in their sessions."""
        for pid in _platform.children(os.getpid()):
            try:
                if os.getsid(pid) not in spare and pid not in spare:
                    os.kill(pid, signal.SIGKILL)
            except OSError:
                pass  # it has ended meanwhile

    def _handle(self, frame: Frame) -> None:
        kind, body, _ = frame
        message = messages.decode(body)
        if kind == messages.FORK:
            self._fork(*message)
        elif kind == messages.SIGNAL:
            worker, number, group = message
            child = self._by_worker.get(worker)
            if child is not None:
                if group:
                    _kill_group(child.pid, number)
                else:
                    _kill(child.pid, number)
        elif kind == messages.PRELOAD:
            for name in message:
                try:
                    __import__(name)
                except Exception:
                    pass  # whoever needs it hears of it
        elif kind == messages.REMOVE:
            self._folder = message

    def _report(self, kind: int, message: object) -> None:
        try:
            self._control.sendall(b"".join(pack(kind, messages.encode(message))))
        except OSError:
            pass  # the driver has gone, as run() is about to see

    def _fork(self, worker: int, slot: int) -> None:
        fd = self._sockets.popleft()
        try:
            read, write = os.pipe()
        except OSError as error:
            os.close(fd)
            self._report(messages.REFUSED, (worker, error.errno, error.strerror))
            return
        gc.freeze()
        try:
            pid = os.fork()
        except OSError as error:
            for each in (fd, read, write):
                os.close(each)
            self._report(messages.REFUSED, (worker, error.errno, error.strerror))
            return
        if pid == 0:
            self._become_worker(slot, fd, read, write)
        os.close(fd)
        os.close(write)
        os.set_blocking(read, False)
        child = self._children[pid] = self._by_worker[worker] = _Child(worker, pid, read)
        self._poll.register(child.stderr, select.POLLIN)
        self._report(messages.FORKED, (worker, pid))
        if not self._adopting:  # not before the first worker: it starts meanwhile
            self._adopting = True
            _platform.adopt_orphans()
            import fiberexec._output  # noqa: F401  so that later workers have it for free, and logging

    def _become_worker(self, slot: int, fd: int, read: int, write: int) -> None:
        try:
            os.setsid()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _platform.tie_group_to(self._lifeline)
            os.dup2(write, 2)
            for each in (read, write, self._wake, self._wakeup, self._lifeline):
                os.close(each)
            for child in self._children.values():
                if child.stderr >= 0:
                    os.close(child.stderr)
            self._control.close()
            size = _platform.CELL_WORDS
            cell = self._cells[slot * size : (slot + 1) * size]
            _worker.Worker(socket(fileno=fd), cell).main()
        except BaseException as error:  # a worker that cannot start must not go on as a second fork server
            os.write(2, f"fiberexec: a worker could not start: {error!r}\n".encode(errors="replace"))
        finally:
            os._exit(1)

    def _reap(self) -> None:
        ended = False
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            ended = True
            child = self._children.pop(pid, None)
            if child is None:
                continue  # an adopted one
            _kill_group(pid)
            self._by_worker.pop(child.worker, None)
            while self._pass_on(child, last=True):
                pass
            self._mute(child)
            kills = _platform.memory_kills()
            for_memory = kills > self._kills and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            self._kills = kills
            self._report(messages.EXITED, (child.worker, status, child.tail.decode(errors="replace"), for_memory))
        if ended:
            self._sweep(self._children)  # descendants of the dead that had left the group

    def _mute(self, child: _Child) -> None:
        if child.stderr >= 0:
            self._poll.unregister(child.stderr)
            os.close(child.stderr)
            child.stderr = -1

    def _pass_on(self, child: _Child, last: bool = False) -> bool:
        """Forward what the worker wrote to stderr; False when there is nothing more."""
        writable = bool(self._stderr.poll(0))
        if not writable and not last:
            sleep(_PAUSE)  # whoever reads our stderr is slow: let the worker wait for it, and nothing else
            return True
        try:
            data = os.read(child.stderr, 4096) if child.stderr >= 0 else b""
        except BlockingIOError:
            return False
        if not data:
            return False
        child.tail = (child.tail + data)[-TAIL:]
        try:
            if writable:
                os.write(2, data)
        except OSError:
            pass  # the driver's stderr has gone; the tail is still there for the report
        return True


def _kill(pid: int, number: int = signal.SIGKILL) -> None:
    try:
        os.kill(pid, number)
    except OSError:
        pass


def _kill_group(pid: int, number: int = signal.SIGKILL) -> None:
    try:
        os.killpg(pid, number)
    except OSError:
        _kill(pid, number)  # it has not become a leader yet


def main(control: int, cells: int, lifeline: int) -> None:
    """The fork server's program: descriptors of the control socket, of the cells and of the pipe that says "alive"."""
    os.setsid()
    while (fd := os.open(os.devnull, os.O_RDWR)) < 3:  # where the driver's output is closed, nothing of ours takes its place
        pass
    os.close(fd)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    server = ForkServer(socket(fileno=control), cells, lifeline)
    code = 1
    try:
        server.run()
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        server.end()
        os._exit(code)
