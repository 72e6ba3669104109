"""Lanes of waiting tasks. A lane holds what can stand in one line: same priority, same needs."""

from __future__ import annotations

import heapq
from collections import deque

from fiberexec._scheduler.records import Profile, Task
from fiberexec._states import QUEUED
from fiberexec.backends.base import Resources


class Lane:
    """One line, first come first served."""

    __slots__ = ("demand", "priority", "tasks")

    def __init__(self, priority: int, demand: Resources | None) -> None:
        self.priority = priority
        self.demand = demand
        self.tasks: deque[Task] = deque()

    def head(self) -> Task | None:
        """The first task that still waits; those that were cancelled meanwhile are dropped."""
        tasks = self.tasks
        while tasks:
            if tasks[0].state is QUEUED:
                return tasks[0]
            tasks.popleft()
        return None


class Queue:
    """All lanes, most urgent first, and the tasks that wait for their next attempt."""

    def __init__(self) -> None:
        self.lanes: list[Lane] = []
        self.items = 0  # waiting in lanes
        self._delayed: list[tuple[float, int, Task]] = []
        self._order = 0

    def lane_of(self, profile: Profile) -> Lane:
        if profile.lane is None:
            for lane in self.lanes:
                if lane.priority == profile.priority and lane.demand == profile.demand:
                    break
            else:
                lane = Lane(profile.priority, profile.demand)
                self.lanes.append(lane)
                self.lanes.sort(key=lambda lane: -lane.priority)
            profile.lane = lane
        return profile.lane

    def push(self, task: Task) -> None:
        self.lane_of(task.profile).tasks.append(task)
        self.items += task.stop - task.start

    def push_front(self, task: Task) -> None:
        self.lane_of(task.profile).tasks.appendleft(task)
        self.items += task.stop - task.start

    def delay(self, task: Task, due: float) -> None:
        self._order += 1
        heapq.heappush(self._delayed, (due, self._order, task))

    def next_due(self) -> float | None:
        return self._delayed[0][0] if self._delayed else None

    def pop_due(self, now: float) -> list[Task]:
        found = []
        while self._delayed and self._delayed[0][0] <= now:
            found.append(heapq.heappop(self._delayed)[2])
        return found

    def waiting(self) -> list[Task]:
        """Every task in a lane or delayed."""
        found = [task for lane in self.lanes for task in lane.tasks]
        return found + [task for _, _, task in self._delayed]
