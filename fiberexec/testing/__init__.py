"""Tools for those who test programs that use fiberexec, or who write a backend."""

from __future__ import annotations

from fiberexec.testing._simulation import Attempt, SimulatedWorker, Simulation, Stuck

__all__ = ["Attempt", "SimulatedWorker", "Simulation", "Stuck"]
