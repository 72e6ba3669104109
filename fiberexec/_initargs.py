"""multiprocessing's locks among the initargs: its own pools let workers inherit them, ours must hand them over.

A lock of a spawn context has a name that any process of this host can open. One of a fork context has none any more, so it
is given a new semaphore, with a name, for as long as nobody holds it: tqdm's ``process_map`` passes such a lock.
"""

from __future__ import annotations

import sys
from typing import Any

from fiberexec._errors import ConfigError


class NamedLock:
    """Travels in place of a lock, and is one on arrival."""

    def __init__(self, lock: Any) -> None:
        semaphore = lock._semlock
        self._kind = type(lock)
        self._state = (semaphore.handle, semaphore.kind, semaphore.maxvalue, semaphore.name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _open, (self._kind, self._state)


def _open(kind: Any, state: tuple[Any, ...]) -> Any:
    lock = kind.__new__(kind)
    lock.__setstate__(state)
    return lock


def share_locks(initargs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The initargs, with every multiprocessing lock among them in a form that can be pickled.

    Raises ConfigError for a fork context's lock that is held.
    """
    synchronize = sys.modules.get("multiprocessing.synchronize")
    if synchronize is None:
        return initargs
    return tuple(_share(arg, synchronize) if isinstance(arg, synchronize.SemLock) else arg for arg in initargs)


def _share(lock: Any, synchronize: Any) -> NamedLock:
    import multiprocessing

    fork_context = getattr(lock, "_is_fork_ctx", None)
    if fork_context is None:  # before Python 3.12
        fork_context = multiprocessing.get_start_method() == "fork"
    if fork_context:
        if lock._semlock._is_mine() or lock._semlock._is_zero():
            raise ConfigError(f"{lock!r} in initargs is held: release it before the executor is made")
        semaphore = lock._semlock
        twin = synchronize.SemLock(semaphore.kind, semaphore._get_value(), semaphore.maxvalue, ctx=_spawn())
        lock._semlock = twin._semlock
        lock._twin = twin  # its end would remove the semaphore's name
        lock._is_fork_ctx = False
        lock._make_methods()
    return NamedLock(lock)


def _spawn() -> Any:
    import multiprocessing

    return multiprocessing.get_context("spawn")
