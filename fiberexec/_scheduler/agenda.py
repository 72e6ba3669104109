"""What time it is, what is to be done now, and what is to be looked at later."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class Agenda:
    """Shared by the parts of a scheduler. ``actions`` are those of the event that is being handled, in order."""

    __slots__ = ("_later", "_order", "actions", "now")

    def __init__(self) -> None:
        self.now = 0.0
        self.actions: list[Any] = []
        self._later: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._order = 0

    def at(self, due: float, method: Callable[[Any], None], argument: Any = None) -> None:
        """Call ``method(argument)`` at the first event that comes at ``due`` or later."""
        self._order += 1
        heapq.heappush(self._later, (due, self._order, method, argument))

    def run_due(self) -> None:
        while self._later and self._later[0][0] <= self.now:
            _, _, method, argument = heapq.heappop(self._later)
            method(argument)

    def next_due(self) -> float | None:
        return self._later[0][0] if self._later else None
