"""Lanes of waiting tasks. A lane holds what can stand in one line: same priority, same needs."""

from __future__ import annotations

import heapq
from collections import deque

from fiberexec._scheduler.records import Task
from fiberexec._states import QUEUED
from fiberexec.backends.base import Resources

_LOOK = 64  # that many tasks that were put back are kept in order


class Lane:
    """One line, first come first served. ``alone``: its tasks get a worker, and its job, for themselves."""

    __slots__ = ("alone", "demand", "listed", "priority", "tasks")

    def __init__(self, priority: int, demand: Resources | None, alone: bool) -> None:
        self.priority = priority
        self.demand = demand
        self.alone = alone
        self.listed = True  # the queue knows it
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
    """All lanes, and the tasks that wait for their next attempt."""

    def __init__(self) -> None:
        self.items = 0  # waiting in lanes
        self._lanes: dict[tuple[int, Resources | None, bool], Lane] = {}
        self._delayed: list[tuple[float, int, Task]] = []
        self._order = 0

    def lanes(self) -> list[Lane]:
        """The lanes with something in them: by priority, then by who came first. Empty ones are forgotten."""
        lanes = []
        for key, lane in list(self._lanes.items()):
            if lane.head() is None:
                lane.listed = False
                del self._lanes[key]
            else:
                lanes.append(lane)
        if len(lanes) > 1:
            lanes.sort(key=lambda lane: (-lane.priority, lane.tasks[0].id + lane.tasks[0].start))
        return lanes

    def extend(self, tasks: list[Task]) -> int:
        """Add tasks at the end of their lanes; returns how many items they have."""
        profile = None
        items = 0
        for task in tasks:
            if task.profile is not profile:
                profile = task.profile
                append = self._lane_of(task).tasks.append
            append(task)
            items += task.stop - task.start
        self.items += items
        return items

    def push(self, task: Task) -> None:
        self._lane_of(task).tasks.append(task)
        self.items += task.stop - task.start

    def push_front(self, task: Task) -> None:
        """Put a task back where it came from: first, but behind older ones that were put back before it."""
        tasks = self._lane_of(task).tasks
        age = task.id + task.start
        place = 0
        for other in tasks:
            if other.id + other.start > age or place == _LOOK:
                break  # found, or too many to look at: about right will do
            place += 1
        tasks.insert(place, task)
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
        found = [task for lane in self._lanes.values() for task in lane.tasks]
        return found + [task for _, _, task in self._delayed]

    def _lane_of(self, task: Task) -> Lane:
        profile = task.profile
        lane = profile.lane
        if lane is not None and lane.listed and not task.alone:
            return lane
        key = profile.priority, profile.demand, task.alone
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = Lane(*key)
        if not task.alone:
            profile.lane = lane
        return lane
