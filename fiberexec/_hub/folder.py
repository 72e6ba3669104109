"""The folder where a hub's socket stands, and those of programs that were killed together with their hub.

A program holds a lock on its folder as long as it lives. Whoever makes a folder removes those of the same user that nobody
holds a lock on, and whose socket nobody listens at.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from _socket import AF_UNIX, SOCK_STREAM, socket

_PREFIX = "fiberexec-hub-"
SOCKET = "hub"  # the socket's name in it
_LONGEST = 100  # bytes of a Unix socket's path, which every system takes


def place(prefix: str) -> str:
    """Where to make a folder with this prefix, in which sockets are to stand: their paths must not be long."""
    parent = tempfile.gettempdir()
    return parent if len(os.fsencode(parent)) + len(f"/{prefix}12345678/listener-12345678") <= _LONGEST else "/tmp"


def make() -> tuple[str, int]:
    """A new folder that only this user may enter, and the descriptor that holds its lock; -1 where locks are not to be had."""
    parent = place(_PREFIX)
    sweep(parent)
    while True:
        folder = tempfile.mkdtemp(prefix=_PREFIX, dir=parent)
        try:
            return folder, _lock(folder)
        except (FileNotFoundError, BlockingIOError):
            pass  # somebody sweeps, and has taken it for one that is left
        except OSError:
            return folder, -1


def sweep(parent: str) -> None:
    """Remove the folders in ``parent`` that programs of this user have left."""
    try:
        with os.scandir(parent) as entries:
            found = [entry for entry in entries if entry.name.startswith(_PREFIX)]
    except OSError:
        return  # it cannot be listed
    for entry in found:
        try:
            if entry.stat(follow_symlinks=False).st_uid != os.geteuid() or not entry.is_dir(follow_symlinks=False):
                continue
            lock = _lock(entry.path)
        except OSError:
            continue  # it is in use, or has gone, or nobody can know
        try:
            if not _listens(os.path.join(entry.path, SOCKET)):
                remove(entry.path)
        finally:
            os.close(lock)


def remove(folder: str) -> None:
    """Remove a folder, with what others put there."""
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def _lock(folder: str) -> int:
    """Raises BlockingIOError if somebody holds it, FileNotFoundError if the folder has gone, OSError if there are no locks."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.stat(folder)  # it may have been removed before it was locked; no other has its name
    except OSError:
        os.close(fd)
        raise
    return fd


def _listens(path: str) -> bool:
    sock = socket(AF_UNIX, SOCK_STREAM)
    sock.setblocking(False)
    try:
        sock.connect(path)
    except (ConnectionRefusedError, FileNotFoundError):
        return False
    except OSError:
        pass  # many ask it
    finally:
        sock.close()
    return True
