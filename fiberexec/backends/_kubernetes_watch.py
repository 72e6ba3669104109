"""What happens to the pods of a program: one list and one watch, whoever of the program wants to know.

    list ─► Listed ─► watch ─► Seen, Seen, ...      the watch ends, or breaks: it goes on where it was
                       410 Gone ─► list again        nothing has come for a while: likewise
"""

from __future__ import annotations

import json
import logging
import os
import queue
import random
import threading
import time
from typing import Any, NamedTuple

from fiberexec.backends._kubernetes_api import Api, ApiError, lines, shut, wait_for_server
from fiberexec.backends._kubernetes_config import Setup

PAGE = 500  # pods in one answer
PATIENCE = 30.0  # seconds that the first list may take
_LENGTH = 240  # seconds that one watch lasts
_SILENCE = 90.0  # seconds without anything, bookmarks included, after which a watch is taken for dead
_FINAL = (401, 403, 404)
_logger = logging.getLogger("fiberexec")


class Seen(NamedTuple):
    """A pod as it is now, or as it was when it went."""

    pod: dict[str, Any]
    gone: bool


class Listed(NamedTuple):
    """Each of these pods is there, and no other that was made before ``asked`` (of time.monotonic())."""

    names: frozenset[str]
    asked: float


class Back(NamedTuple):
    """The server answers again."""


class Watch:
    """A thread that tells subscribers about pods. See acquire()."""

    def __init__(self, context: str | None, namespace: str, program: str) -> None:
        self._api = Api(context)
        self._path = f"/api/v1/namespaces/{namespace}/pods"
        self._query = {"labelSelector": f"fiberexec.program={program}"}
        self._lock = threading.Lock()
        self._subscribers: list[queue.SimpleQueue[Any]] = []
        self._version = ""  # of what has been seen; "": list first
        self._stream: Any = None
        self._ready = threading.Event()
        self._error: Exception | None = None  # why there is none, and will be none
        self._said: ApiError | None = None  # what the server has said last instead of listing: it is there
        self._closed = threading.Event()
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="fiberexec-kubernetes-watch", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> None:
        """Return when pods are being watched. Raises ApiError and Setup where that cannot be."""
        came = self._ready.wait(seconds)
        error = self._error  # once: the thread may take it back at any moment
        if error is not None:
            raise error
        if not came:
            raise self._said or ApiError(0, "", f"it has not listed pods within {seconds:g} s", self._api.server().url)

    def subscribe(self, into: queue.SimpleQueue[Any]) -> None:
        with self._lock:
            self._subscribers.append(into)

    def unsubscribe(self, into: queue.SimpleQueue[Any]) -> bool:
        """Whether anybody is left."""
        with self._lock:
            self._subscribers.remove(into)
            return bool(self._subscribers)

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        with self._lock:
            stream, self._stream = self._stream, None
        if stream is not None:
            shut(stream)
        self._api.close()
        self._thread.join(2.0)

    # -- the thread

    def _tell(self, item: Seen | Listed | Back) -> None:
        with self._lock:
            subscribers = list(self._subscribers)
        for one in subscribers:
            one.put(item)

    def _run(self) -> None:
        import tenacity

        patient = tenacity.Retrying(
            wait=wait_for_server,
            stop=tenacity.stop_when_event_set(self._closed),
            sleep=tenacity.sleep_using_event(self._closed),
        )
        while not self._closed.is_set():
            try:
                patient(self._follow)  # returns when it has made progress
            except tenacity.RetryError:
                return  # closed

    def _follow(self) -> None:
        try:
            if not self._version:
                self._list()
            self._read(self._open())
        except (ApiError, Setup) as error:
            self._failed = True
            if not self._closed.is_set():
                _logger.debug("watching pods: %s", error)
            if isinstance(error, Setup) or error.status in _FINAL:
                self._error = error
                self._ready.set()
            elif error.status not in (0, 410):
                self._said = error
            raise

    def _list(self) -> None:
        asked = time.monotonic()
        names: list[str] = []
        query: dict[str, Any] = {**self._query, "limit": PAGE}
        while True:
            found = self._api.call("GET", self._path, query, patience=0.0)
            for pod in found["items"]:
                names.append(pod["metadata"]["name"])
                self._tell(Seen(pod, False))
            version = found["metadata"]["resourceVersion"]
            query["continue"] = found["metadata"].get("continue")
            if not query["continue"]:
                break
        self._tell(Listed(frozenset(names), asked))
        self._version = version

    def _open(self) -> Any:
        length = _LENGTH + random.randrange(30)  # else all programs come back at the same moment
        query = {**self._query, "watch": 1, "allowWatchBookmarks": "true", "timeoutSeconds": length}
        try:
            stream = self._api.stream(self._path, {**query, "resourceVersion": self._version}, _SILENCE)
        except ApiError as error:
            if error.status == 410:
                self._version = ""
            raise
        with self._lock:
            self._stream = stream
        if self._closed.is_set():
            shut(stream)
        self._error = self._said = None
        self._ready.set()
        if self._failed:
            self._failed = False
            self._tell(Back())
        return stream

    def _read(self, stream: Any) -> None:
        """Tell what comes. Raises ApiError if that was nothing."""
        began, count = time.monotonic(), 0
        trouble: ApiError | None = None
        try:
            for line in lines(stream):
                if not line.strip():
                    continue
                event = json.loads(line)
                kind, pod = event["type"], event["object"]
                if kind == "ERROR":
                    trouble = ApiError(int(pod.get("code") or 0), str(pod.get("reason")), str(pod.get("message")), "")
                    if trouble.status == 410 or pod.get("reason") in ("Expired", "Gone"):
                        self._version = ""
                    break
                count += 1
                self._version = pod["metadata"]["resourceVersion"]
                if kind != "BOOKMARK":
                    self._tell(Seen(pod, kind == "DELETED"))
        except ApiError as error:
            trouble = error
        except (ValueError, KeyError, TypeError) as error:
            trouble = ApiError(0, "", f"it said what is no event: {error!r}", "")  # a line that was cut
        finally:
            with self._lock:
                self._stream = None
            shut(stream)
        if not count and (trouble is not None or time.monotonic() < began + 1):
            raise trouble or ApiError(0, "", "a watch ended at once", "")
        if trouble is not None:
            self._failed = True


_lock = threading.Lock()  # guards _watches
_watches: dict[tuple[str | None, str, str], Watch] = {}


def _in_child() -> None:
    """A forked child has none of these threads."""
    global _lock
    _lock = threading.Lock()
    _watches.clear()


os.register_at_fork(after_in_child=_in_child)


def acquire(context: str | None, namespace: str, program: str, into: queue.SimpleQueue[Any]) -> Watch:
    """The watch over a program's pods in a namespace, which from now on tells this queue as well."""
    key = context, namespace, program
    with _lock:
        watch = _watches.get(key)
        if watch is None:
            watch = _watches[key] = Watch(*key)
        watch.subscribe(into)
    return watch


def release(watch: Watch, into: queue.SimpleQueue[Any]) -> None:
    """The queue is told no more; the watch ends with the last one."""
    with _lock:
        if watch.unsubscribe(into):
            return
        for key in [key for key, found in _watches.items() if found is watch]:
            del _watches[key]
    watch.close()
