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
from fiberexec._futures import ItemSink, MapResults
from fiberexec._manager import Manager
from fiberexec._scheduler import Profile, Task
from fiberexec._serialize import FunctionRef, dumps_call, dumps_plain, is_plain

GROUP = 1024  # items in one payload, at most, as long as nothing is known of their cost
GROUP_SECONDS = 0.002  # of measured work in one payload, at most
GROUP_LIMIT = 1 << 11  # items in one payload, however cheap: it is unpickled whole for each part that it is cut into
GROUP_BYTES = 1 << 16  # bytes about, at most, in one payload
_FIRST = 16  # items in the first group, before anything is known of their size


class Mapping:
    """One map(): takes items from their source, and sends them in groups.

    ``single``: an item is the function's only argument; otherwise it is a tuple of all of them. ``first``: the id of the
    first item, where the ids of all have been reserved.
    """

    def __init__(
        self,
        manager: Manager,
        fn: Callable[..., Any],
        ref: FunctionRef,
        profile: Profile,
        source: Iterator[Any],
        single: bool,
        results: ItemSink,
        first: int | None = None,
    ) -> None:
        self._manager = manager
        self._fn = fn
        self._ref = ref
        self._profile = profile
        self._source = source
        self._single = single
        self._results = results
        self._next_id = first
        self._largest = _FIRST
        self.taken = 0  # items
        self.size = 0  # bytes that they were pickled to

    def submit(self, limit: int) -> bool:
        """Take and send up to ``limit`` items as one group. False when the source has no more."""
        items = self.take(limit)
        if items:
            self.send(items)
        return bool(items)

    def take(self, limit: int) -> list[Any]:
        """The next items, ``limit`` at most; none when the source has no more. Raises what the source raises."""
        items = list(islice(self._source, min(limit, self._largest)))
        self.taken += len(items)
        return items

    def send(self, items: list[Any]) -> None:
        """Submit what take() returned. Raises RuntimeError when the manager takes no more tasks."""
        first = self._next_id
        if first is None:
            first = self._manager.new_ids(len(items))
        else:
            self._next_id = first + len(items)
        self._results.expect(first, len(items))
        if self._profile.retry is not None:
            tasks = self._singly(first, items)
        else:
            tasks = self._plain(first, items) or self._pickled(first, items)
        self.size += sum(task.payload.size for task in tasks)
        if not tasks:
            return
        try:
            self._manager.submit(tasks)
        except Exception as error:  # it has taken none of them
            for task in tasks:
                self._results.put(task.id, task.count, error)
            raise

    def _task(self, first: int, count: int, kind: int, data: bytes, buffers: Sequence[Any] = ()) -> Task:
        return Task(first, self._profile, Payload(self._ref, kind, data, buffers), self._results, 0, count)

    def _plain(self, first: int, items: list[Any]) -> list[Task] | None:
        if self._single:
            columns: tuple[list[Any], ...] = (items,)
        else:
            try:
                columns = tuple(map(list, zip(*items, strict=True)))
            except ValueError:  # starmap: not all have as many arguments
                return None
        if not columns or not all(map(is_plain, columns)):
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
                self._results.put(identity, 1, error)
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
                self._results.put(identity, 1, error)
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
    if not columns:
        return iter(())
    results = MapResults(manager)
    single = len(columns) == 1
    source = iter(columns[0]) if single else zip(*columns)
    mapping = Mapping(manager, fn, ref, profile, source, single, results)
    group = chunksize or GROUP_LIMIT
    if buffersize is None:
        while mapping.submit(group):
            pass
    else:
        group = min(group, max(1, buffersize // 4))
        while mapping.taken < buffersize and mapping.submit(min(group, buffersize - mapping.taken)):
            pass
    return _results(manager, mapping, results, deadline, group, buffersize)


def _results(
    manager: Manager, mapping: Mapping, results: MapResults, deadline: float | None, group: int, buffersize: int | None
) -> Iterator[Any]:
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
        if handed < mapping.taken:
            manager.drop(results)
