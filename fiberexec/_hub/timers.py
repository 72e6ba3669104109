"""What the hub does later: at a time, or after another look at all connections."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from time import monotonic

from fiberexec._hub.shared import Timer, Wait


class Timers:
    """Timers by their times, and what has been put off until all connections have been looked at."""

    def __init__(self) -> None:
        self._entries: list[tuple[float, int, Timer | Wait]] = []
        self._most = 1000  # then those that are done are dropped
        self._order = itertools.count()
        self._looks: list[Callable[[], None]] = []

    def at(self, when: float, timer: Timer | Wait) -> None:
        """Let ``timer`` be due at that time of the monotonic clock; 0: now, after another look at all connections."""
        if when == 0.0:
            self._looks.append(lambda: None if timer.done else timer.due())
            return
        heapq.heappush(self._entries, (when, next(self._order), timer))
        if len(self._entries) > self._most:
            self._entries = [entry for entry in self._entries if not entry[2].done]
            heapq.heapify(self._entries)
            self._most = 2 * len(self._entries) + 1000

    def look(self, call: Callable[[], None]) -> None:
        """Call after another look at all connections."""
        self._looks.append(call)

    def pause(self, now: float, latest: float) -> float:
        """The seconds for which connections may be waited for."""
        if self._looks:
            return 0.0
        if self._entries:
            latest = min(latest, self._entries[0][0])
        return max(0.0, latest - now)

    def run(self) -> None:
        """Do what is due."""
        looks, self._looks = self._looks, []
        for look in looks:
            look()
        if self._entries:
            now = monotonic()
            while self._entries and self._entries[0][0] <= now:
                timer = heapq.heappop(self._entries)[2]
                if not timer.done:
                    timer.due()
