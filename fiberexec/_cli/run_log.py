"""What a program in a pod writes: each line once, however often the API server has to be asked for it."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

from fiberexec.backends import _kubernetes_pods as pods
from fiberexec.backends._kubernetes_api import Api, ApiError, shut
from fiberexec.backends._lines import split

_SILENT = 60.0  # seconds without a line after which the log is asked for again, in case the connection has died unseen
_SECOND = 10**9  # nanoseconds, in which nodes stamp lines
_SKEW = 5 * _SECOND  # by how much a line may be older than one that stands before it
_TIME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)")


class PodLog:
    """The log of a pod's worker container.

    A node stamps stdout and stderr apart, and then writes them into one log: its lines are nearly in the order of their
    times. So the last seconds are asked for again, and their lines known by their times.
    """

    def __init__(self, api: Api) -> None:
        self._api = api
        self._newest = 0  # time of a line that came, in nanoseconds
        self._times: deque[int] = deque()  # of the lines of the last seconds that came

    def read(self, path: str, over: bool) -> Iterator[bytes]:
        """What is new in it, given by its path in the API.

        Raises ApiError if a program is ``over`` and not all of it could be read.
        """
        import urllib3

        query = {"container": pods.WORKER, "follow": "true", "timestamps": "true"}
        since = max(0, self._newest - _SKEW)
        if since:
            query["sinceTime"] = f"{datetime.fromtimestamp(since // _SECOND, timezone.utc):%Y-%m-%dT%H:%M:%SZ}"
        try:
            stream = self._api.stream(path, query, read=_SILENT, patience=5.0)
        except ApiError as error:
            if over or not isinstance(error.__cause__, urllib3.exceptions.ReadTimeoutError):
                raise
            return  # not every server begins its answer before there is a line
        known = Counter(self._times)
        try:
            for line in _whole_lines(stream, over):
                stamp, _, text = line.partition(b" ")
                time = _time(stamp.decode("ascii", "replace"))
                if known[time] > 0:
                    known[time] -= 1
                elif time > since:  # what has none is the kubelet's own
                    self._note(time)
                    yield text
        except ApiError:
            if over:
                raise
            # else the program is looked at, and what has not come is asked for again

    def _note(self, time: int) -> None:
        self._times.append(time)
        self._newest = max(self._newest, time)
        while self._times[0] < self._newest - _SKEW:
            self._times.popleft()


def _whole_lines(stream: Any, over: bool) -> Iterator[bytes]:
    """The lines of a log, with their ends. The last may have none, if the program is ``over``: else the rest is yet to come.

    Raises ApiError when the stream breaks.
    """
    import urllib3

    try:
        for line in split(stream.stream(1 << 16, decode_content=False)):
            if over or line.endswith(b"\n"):
                yield line
    except (urllib3.exceptions.HTTPError, OSError, ValueError, AttributeError) as error:
        raise ApiError(0, "", f"{type(error).__name__}: {error}", "") from error
    finally:
        shut(stream)


def _time(stamp: str) -> int:
    """Nanoseconds since 1970 of a time as a node writes it, in its own zone; 0 if it is none."""
    found = _TIME.fullmatch(stamp)
    if found is None:
        return 0
    second, part, zone = found.groups()
    moment = datetime.fromisoformat(second + ("+00:00" if zone == "Z" else zone))
    return int(moment.timestamp()) * _SECOND + int(f"{part or '':0<9}")
