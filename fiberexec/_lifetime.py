"""What becomes of managers when the interpreter ends, when the process forks, and when one of them fails."""

from __future__ import annotations

import gc
import os
import sys
import threading
import weakref
from typing import TYPE_CHECKING

from fiberexec._futures import FiberFuture, ItemSink

if TYPE_CHECKING:
    from fiberexec._manager import Manager

_managers: weakref.WeakSet[Manager] = weakref.WeakSet()
exiting = False  # the interpreter


def register(manager: Manager) -> None:
    """Look after this manager from now on."""
    _managers.add(manager)


def abandon_sinks(manager: Manager, reason: BaseException, *, forked: bool) -> None:
    """End whatever still waits for a manager, wherever it is: none of its tables can be trusted any more."""
    if gc.get_freeze_count():
        gc.unfreeze()  # what is frozen is not found
    for sink in gc.get_objects():
        if isinstance(sink, (FiberFuture, ItemSink)) and sink._manager is manager:
            if forked:
                sink.forked()
            sink.abandon(reason)


def _at_exit() -> None:
    """Let every executor finish what it was given, as the standard's do when the interpreter ends.

    A manager whose owner ends it later (``waits_at_exit`` is false) is left alone.
    """
    global exiting
    exiting = True
    # What ends a program; at a prompt it may have been typed long ago.
    interrupted = isinstance(getattr(sys, "last_value", None), KeyboardInterrupt) and not hasattr(sys, "ps1")
    for manager in [manager for manager in _managers if manager.waits_at_exit]:
        if interrupted:
            manager.terminate_all()
        manager.close(wait=True)


def _in_child() -> None:
    parent = os.getppid()
    for manager in list(_managers):
        if not manager.forked_from:
            manager.forked(parent)


threading._register_atexit(_at_exit)  # type: ignore[attr-defined]
os.register_at_fork(after_in_child=_in_child)
