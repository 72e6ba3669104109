"""Where this program's hub is, and how the root process starts it.

    reserve(): the socket listens, there is an address to give to children, no process yet
    start():   the hub takes over the socket; whoever connected before is served now
    close():   it ends, and its folder goes; without close() that happens when the root process has gone

A child adopts the address of its parent's hub, and starts none of its own.
"""

from __future__ import annotations

import fcntl
import os
import sys
import threading
from _socket import AF_UNIX, SOCK_STREAM, socket
from collections.abc import Callable
from typing import NamedTuple

from fiberexec import _inherited, _platform
from fiberexec._hub import folder
from fiberexec._hub.wire import TOKEN_SIZE
from fiberexec._inherited import JOB
from fiberexec._inherited import in_job as in_job

_BACKLOG = 1024
_END_TIMEOUT = 5.0  # seconds


class Address(NamedTuple):
    """Whoever has it can use the hub. It is a secret."""

    path: str  # of the hub's socket
    token: bytes


DOOR = "hub"  # a socket in the folder of a job, by which its processes reach whatever hub
ADDRESS = "address"  # a file there: the hub's path on its own host, and its token
_lock = threading.RLock()  # guards all that follows
_address: Address | None = None
_listener: socket | None = None  # in the root, while the hub is reserved and not started
_pid = 0  # of the hub, in the root
_lifeline = -1  # the hub ends when its last copy is closed
_folder_lock = -1  # in the root: nobody else removes the hub's folder
_at_end = False  # this process' end has closed what it has open
_OWN = ("fiberexec-", "QueueFeederThread")  # how names of our threads begin: others wait for what these hear
at_close: list[Callable[[], None]] = []  # called before the hub is ended


def address() -> Address:
    """The address of this program's hub, which is reserved if there is none."""
    told = _inherited.hub
    if told is None and _address is None and in_job():
        with open(os.path.join(os.environ[JOB], ADDRESS), "rb") as file:
            path, token = file.read().rsplit(b"\n", 1)
        told = os.fsdecode(path), bytes.fromhex(token.decode())
    if told is not None and told != _address:
        adopt(Address(*told))
    return _address or reserve()


def is_known() -> bool:
    """Whether this program has a hub, or an address for one."""
    return _address is not None or _inherited.hub is not None or in_job()


def adopt(address: Address) -> None:
    """Use the hub of the program that started this process."""
    global _address
    with _lock:
        close()
        _address = Address(*address)


def reserve() -> Address:
    """Bind the socket of this program's hub, if it has none yet; returns the address."""
    global _address, _listener, _folder_lock
    with _lock:
        if _address is None:
            from multiprocessing.util import Finalize

            where, _folder_lock = folder.make()
            path = os.path.join(where, folder.SOCKET)
            listener = socket(AF_UNIX, SOCK_STREAM)
            listener.bind(path)
            listener.listen(_BACKLOG)
            _listener = listener
            _address = Address(path, os.urandom(TOKEN_SIZE))
            Finalize(None, close, exitpriority=-100)  # after the queues' -5: they still flush
        return _address


def way(hub: Address) -> str:
    """The path of the socket by which this process reaches a hub."""
    return os.path.join(os.environ[JOB], DOOR) if in_job() else hub.path


def fileno() -> int:
    """The listening socket, readable when somebody wants the hub; -1 unless it is reserved and not started."""
    listener = _listener
    return -1 if listener is None else listener.fileno()


def start(expected: Address | None = None) -> Address:
    """Start the hub, if this is the root process and it does not run yet; returns its address. Raises OSError.

    A hub that is not the ``expected`` one is left alone: the program's may have been closed meanwhile.
    """
    global _listener, _pid, _lifeline
    with _lock:
        if expected is not None and expected != _address:
            return expected
        where = address()
        if _listener is None:
            return where
        alive, lifeline = os.pipe()
        opened = [alive]
        try:
            actions: list[tuple[object, ...]] = [
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            ]
            for number, fd in enumerate((_listener.fileno(), alive), 3):
                opened.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10))  # no copy overwrites another's source
                actions.append((os.POSIX_SPAWN_DUP2, opened[-1], number))
            package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
            program = f"import sys; sys.path.insert(0, {package!r}); from fiberexec._hub.server import main; main(3, 4)"
            arguments = [sys.executable, "-I", "-S", "-c", program]
            os.write(lifeline, where.token)
            _pid = os.posix_spawn(sys.executable, arguments, os.environ, file_actions=actions)
        except BaseException:
            os.close(lifeline)
            raise
        finally:
            for fd in opened:
                os.close(fd)
        _lifeline = lifeline
        _listener.close()  # so that whoever connects after the hub's end is refused
        _listener = None
        return where


def close() -> None:
    """Close what this process has open to hubs, and end the program's if this is the root; the next call starts another."""
    global _address, _listener, _pid, _lifeline, _folder_lock, _at_end
    with _lock:
        util = sys.modules.get("multiprocessing.util")
        _at_end = util is not None and util.is_exiting()
        for each in at_close:
            each()
        if _listener is not None and _address is not None:
            _listener.close()
            remove_folder(_address.path)
        if _pid and _address is not None:
            os.close(_lifeline)
            _platform.reap(_pid, _END_TIMEOUT)
            remove_folder(_address.path)  # it was killed, or could not start
        if _folder_lock >= 0:
            os.close(_folder_lock)
        _address = _listener = None
        _pid, _lifeline, _folder_lock = 0, -1, -1


def stay_at_end() -> None:
    """Return, unless the program ends and the caller is a user's daemon thread: that waits for the interpreter's end."""
    thread = threading.current_thread()
    if _at_end and thread.daemon and thread is not threading.main_thread() and not thread.name.startswith(_OWN):
        forever = threading.Lock()
        with forever, forever:
            pass


def remove_folder(path: str) -> None:
    """Remove the hub's socket and its folder, with what others put there."""
    folder.remove(os.path.dirname(path))


def _in_child() -> None:
    """A forked child of the root uses the same hub and is not its root."""
    global _lock, _listener, _pid, _lifeline, _folder_lock, _at_end
    _lock = threading.RLock()
    _at_end = False
    if _listener is not None:
        _listener.close()
        _listener = None
    if _pid:
        os.close(_lifeline)
    if _folder_lock >= 0:
        os.close(_folder_lock)  # the parent's stays
    _pid, _lifeline, _folder_lock = 0, -1, -1


os.register_at_fork(after_in_child=_in_child)
