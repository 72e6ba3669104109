"""map(): items become groups with one payload each; results come back in order.

A group of plain values is pickled as a whole and run at the speed of C. Other items are pickled one by one, so that one
that cannot be pickled, or does harm when it is unpickled, is alone with it. The scheduler cuts groups as it needs to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from fiberexec import _messages as messages
from fiberexec import _retry
from fiberexec._connection import Payload
from fiberexec._futures import MapResults
from fiberexec._manager import Manager
from fiberexec._scheduler import Profile, Task
from fiberexec._serialize import FunctionRef, dumps_call, dumps_plain, is_plain

GROUP = 1024  # items in one payload, at most, as long as nothing is known of their cost
GROUP_SECONDS = 0.002  # of measured work in one payload, at most
GROUP_LIMIT = 1 << 14  # items in one payload, however cheap
GROUP_BYTES = 1 << 16  # bytes about, at most, in one payload
_FIRST = 16  # items in the first group, before anything is known of their size


class _Mapping:
    """One map(): takes items, submits groups."""

    def __init__(
        self, manager: Manager, fn: Callable[..., Any], ref: FunctionRef, profile: Profile, columns: tuple[Iterable[Any], ...]
    ) -> None:
        self._manager = manager
        self._fn = fn
        self._ref = ref
        self._profile = profile
        self._single = len(columns) == 1
        self._source = iter(columns[0]) if self._single else zip(*columns)
        self._largest = _FIRST
        self.results = MapResults(manager)
        self.taken = 0  # items

    def submit(self, limit: int) -> bool:
        """Take and submit up to ``limit`` items as one group. False when the source has no more."""
        items = list(islice(self._source, min(limit, self._largest)))
        if not items:
            return False
        first = self._manager.new_ids(len(items))
        self.results.expect(first, len(items))
        self.taken += len(items)
        if self._profile.retry is not None:
            tasks = self._singly(first, items)
        else:
            tasks = self._plain(first, items) or self._pickled(first, items)
        if tasks:
            self._manager.submit(tasks)
        return True

    def cancel(self) -> None:
        self._manager.drop(self.results)

    def _task(self, first: int, count: int, kind: int, data: bytes, buffers: Sequence[Any] = ()) -> Task:
        return Task(first, self._profile, Payload(self._ref, kind, data, buffers), self.results, 0, count)

    def _plain(self, first: int, items: list[Any]) -> list[Task] | None:
        columns = (items,) if self._single else tuple(map(list, zip(*items, strict=True)))
        if not all(map(is_plain, columns)):
            return None
        data = dumps_plain(columns)
        self._adapt(len(data), len(items))
        return [self._task(first, len(items), messages.COLUMNS, data)]

    def _pickled(self, first: int, items: list[Any]) -> list[Task]:
        tasks: list[Task] = []
        group: list[bytes] = []
        size = 0
        total = 0

        def close(end: int) -> None:
            nonlocal group, size
            if group:
                tasks.append(self._task(end - len(group), len(group), messages.ITEMS, messages.encode(group)))
                group, size = [], 0

        for identity, item in enumerate(items, first):
            args = (item,) if self._single else item
            try:
                data, buffers = dumps_call(args, {})
            except Exception as error:
                close(identity)
                self.results.put(identity, 1, error)
                continue
            total += len(data)
            if buffers or len(data) > GROUP_BYTES:
                close(identity)
                tasks.append(self._task(identity, 1, messages.CALL, data, buffers))
                continue
            group.append(data)
            size += len(data)
            if size > GROUP_BYTES:
                close(identity + 1)
        close(first + len(items))
        self._adapt(total, len(items))
        return tasks

    def _singly(self, first: int, items: list[Any]) -> list[Task]:
        tasks = []
        for identity, item in enumerate(items, first):
            args = (item,) if self._single else item
            try:
                data, buffers = dumps_call(args, {})
            except Exception as error:
                self.results.put(identity, 1, error)
                continue
            task = self._task(identity, 1, messages.CALL, data, buffers)
            task.retry_state = _retry.begin(self._profile.retry, self._fn, args, {})
            tasks.append(task)
        return tasks

    def _adapt(self, size: int, count: int) -> None:
        cost = self._profile.cost
        most = GROUP if cost is None else min(GROUP_LIMIT, int(GROUP_SECONDS / max(cost, 1e-7)))
        self._largest = max(1, min(most, 8 * count, GROUP_BYTES * count // max(size, 1)))


def submit_map(
    manager: Manager,
    fn: Callable[..., Any],
    ref: FunctionRef,
    profile: Profile,
    columns: tuple[Iterable[Any], ...],
    deadline: float | None,
    chunksize: int | None,
    buffersize: int | None,
) -> Iterator[Any]:
    """See ``FiberExecutor.map()``."""
    mapping = _Mapping(manager, fn, ref, profile, columns)
    group = chunksize or GROUP_LIMIT
    if not columns:
        return iter(())
    if buffersize is None:
        while mapping.submit(group):
            pass
    else:
        group = min(group, max(1, buffersize // 4))
        while mapping.taken < buffersize and mapping.submit(min(group, buffersize - mapping.taken)):
            pass
    return _results(mapping, deadline, group, buffersize)


def _results(mapping: _Mapping, deadline: float | None, group: int, buffersize: int | None) -> Iterator[Any]:
    results = mapping.results
    handed = 0  # over to the consumer
    ahead = 0 if buffersize is None else buffersize - group
    more = buffersize is not None
    try:
        while handed < mapping.taken:
            values = results.take(deadline)
            if not more and len(values) > 1:  # plain ones: what is kept here of them is small
                handed += len(values)
                yield from values
                continue
            values.reverse()
            while values:  # taken out one by one: nothing is kept here that the consumer has let go
                handed += 1
                if more and mapping.taken - handed <= ahead:
                    more = mapping.submit(group)
                yield values.pop()
    finally:
        mapping.cancel()
