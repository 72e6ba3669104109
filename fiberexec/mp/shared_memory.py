"""Shared memory by name: multiprocessing's own, which reaches the processes of one host."""

from __future__ import annotations

from multiprocessing.shared_memory import ShareableList, SharedMemory

__all__ = ["ShareableList", "SharedMemory"]
