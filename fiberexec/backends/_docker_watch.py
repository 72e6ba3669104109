"""What happens to containers, as the engine tells it: a stream of events that heals itself."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from fiberexec.backends._docker_engine import shut

_LONGEST = 2.0  # seconds between attempts to reach an engine that is away
_logger = logging.getLogger("fiberexec")


class Connected(NamedTuple):
    """From here on every event is seen; what happened before must be asked for. ``again``: after an outage."""

    again: bool


class Happened(NamedTuple):
    """An event of a container."""

    job: str
    action: str
    attributes: dict[str, str]


class Events:
    """A thread that reads the engine's events about one driver's containers into a queue."""

    def __init__(self, connect: Callable[[], Any], label: str, into: queue.SimpleQueue[Any]) -> None:
        self._connect = connect
        self._label = label
        self._into = into
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._stream: Any = None
        self._thread = threading.Thread(target=self._run, name="fiberexec-docker-events", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        with self._lock:
            stream, self._stream = self._stream, None
        if stream is not None:
            shut(stream)
        self._thread.join(_LONGEST)

    def _run(self) -> None:
        import tenacity

        again = False
        patient = tenacity.Retrying(
            wait=tenacity.wait_random_exponential(multiplier=0.1, max=_LONGEST),
            stop=tenacity.stop_when_event_set(self._closed),
            sleep=tenacity.sleep_using_event(self._closed),
        )
        while not self._closed.is_set():
            try:
                patient(self._subscribe)
                self._into.put(Connected(again))
                self._read()
            except tenacity.RetryError:
                return  # closed
            except Exception as error:
                _logger.debug("Docker's events ended: %r", error)
            again = True
            self._closed.wait(0.05)  # an engine that is going down may accept for a moment longer

    def _subscribe(self) -> None:
        filters = {"type": "container", "label": self._label, "event": ["die", "destroy", "kill"]}
        stream = self._connect().api.events(filters=filters, decode=True)
        with self._lock:
            if not self._closed.is_set():
                self._stream = stream
                return
        shut(stream)

    def _read(self) -> None:
        stream = self._stream
        if stream is None:
            return
        try:
            for event in stream:
                attributes = (event.get("Actor") or {}).get("Attributes") or {}
                self._into.put(Happened(attributes.get("fiberexec.job", ""), str(event.get("Action", "")), attributes))
        finally:
            with self._lock:
                self._stream = None
            shut(stream)
