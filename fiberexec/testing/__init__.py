"""Tools for those who test programs that use fiberexec, and for those who write a backend.

- ``FakeBackend``: real processes on this machine that fail as scripted: ``FiberExecutor(backend=FakeBackend(...))``.
- ``check_backend(factory)``: the contract of a backend, checked; ``BACKEND_CHECKS`` holds its parts by name.
- ``Simulation``: the scheduler in simulated time, on as many simulated workers as you like.
"""

from __future__ import annotations

from fiberexec.backends.base import Exit, Pool, Resources
from fiberexec.testing._check import BACKEND_CHECKS, check_backend
from fiberexec.testing._fake import FakeBackend
from fiberexec.testing._script import Attempt, Refusal
from fiberexec.testing._simulation import Simulation, Stuck

__all__ = [
    "BACKEND_CHECKS",
    "Attempt",
    "Exit",
    "FakeBackend",
    "Pool",
    "Refusal",
    "Resources",
    "Simulation",
    "Stuck",
    "check_backend",
]
