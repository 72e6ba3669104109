"""A small API server for scripted faults: pods that run as soon as they are made, Secrets, one namespace, plain HTTP.

Nothing of it is Kubernetes': what the real one says is tested on the real one.
"""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

NAMESPACE = "test"
Answer = tuple[int, dict[str, str], dict[str, Any]]
DROP: Answer = (0, {}, {})  # no answer: the connection is cut


def failure(code: int, reason: str = "", message: str = "scripted", **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return code, named, {"kind": "Status", "code": code, "reason": reason, "message": message}


class Fake:
    """The server. ``before`` and ``after`` see each request as (method, path, query); what they return is the answer."""

    def __init__(self) -> None:
        self.pods: dict[str, dict[str, Any]] = {}
        self.secrets: dict[str, dict[str, Any]] = {}
        self.requests: list[tuple[float, str, str, dict[str, str]]] = []
        self.before: Callable[[str, str, dict[str, str]], Answer | None] = lambda method, path, query: None
        self.after: Callable[[str, str, dict[str, str]], Answer | None] = lambda method, path, query: None
        self.stalled = False  # watches say nothing more
        self.node = True  # there is a kubelet: pods run, and end when they are deleted
        self.changed = threading.Condition(threading.RLock())
        self._version = 0
        self._oldest = 0  # watches from before are told that it has gone
        self._events: list[tuple[int, str, dict[str, Any]]] = []
        self._epoch = 0  # watches of an older one end
        self._cut = b""  # after this
        self._server: _Server | None = None
        self.port = 0
        self.up()

    # -- the machine

    def up(self) -> None:
        self._server = _Server(("127.0.0.1", self.port), _Handler)
        self._server.fake = self
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), name="fake", daemon=True).start()

    def down(self) -> None:
        """Nobody listens any more, and every connection is cut."""
        server, self._server = self._server, None
        if server is not None:
            self.end_watches()
            server.shutdown()
            server.cut()
            server.server_close()

    def config(self) -> str:
        """A kubeconfig."""
        return json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "fake",
                "clusters": [{"name": "fake", "cluster": {"server": f"http://127.0.0.1:{self.port}"}}],
                "users": [{"name": "fake", "user": {"token": "fake"}}],
                "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake", "namespace": NAMESPACE}}],
            }
        )

    # -- what happens in the cluster

    def tell(self, kind: str, pod: dict[str, Any]) -> None:
        with self.changed:
            self._version += 1
            pod["metadata"]["resourceVersion"] = str(self._version)
            self._events.append((self._version, kind, json.loads(json.dumps(pod))))
            self.changed.notify_all()

    def say(self, pod: str, **status: Any) -> None:
        """Change a pod's status."""
        with self.changed:
            found = self.pods[pod]
            found["status"].update(status)
            self.tell("MODIFIED", found)

    def end(self, pod: str, code: int = 0, reason: str = "") -> None:
        """The pod's container ends."""
        state = {"terminated": {"exitCode": code, "reason": reason or ("Error" if code else "Completed")}}
        self.say(pod, phase="Failed" if code else "Succeeded", containerStatuses=[{"name": "worker", "state": state}])

    def vanish(self, pod: str) -> None:
        """The pod's object goes."""
        with self.changed:
            found = self.pods.pop(pod)
            self.tell("DELETED", found)
            for name in [name for name, one in self.secrets.items() if one["metadata"]["ownerReferences"][0]["name"] == pod]:
                del self.secrets[name]

    def bookmark(self) -> str:
        """Watches are told how far they are, and nothing else; how far."""
        with self.changed:
            self._version += 1
            version = str(self._version)
            self._events.append((self._version, "BOOKMARK", {"metadata": {"resourceVersion": version}}))
            self.changed.notify_all()
            return version

    def compact(self) -> None:
        """What has happened until now can only be listed."""
        with self.changed:
            self._oldest = self._version
            self._events = []

    def end_watches(self, last: bytes = b"") -> None:
        """Every watch ends, after these bytes."""
        with self.changed:
            self._epoch += 1
            self._cut = last
            self.changed.notify_all()

    def count(self, method: str, path: str, **query: str) -> int:
        """How often something was asked. A query of "" stands for none."""
        return sum(
            one[1] == method and bool(re.search(path, one[2])) and all(one[3].get(k, "") == v for k, v in query.items())
            for one in list(self.requests)
        )

    # -- answers

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> Answer:
        with self.changed:
            parts = path.split("/")[5:]  # after /api/v1/namespaces/NAMESPACE
            if parts[:1] == ["events"]:
                return 200, {}, {"items": []}
            if parts[:1] not in (["pods"], ["secrets"]) or path.split("/")[4] != NAMESPACE:
                return failure(403, "Forbidden", f"{path} is forbidden")
            store = self.pods if parts[0] == "pods" else self.secrets
            if method == "POST":
                return self._make(store, body)
            if method == "GET" and len(parts) == 1:
                return self._list(query)
            found = store.get(parts[1])
            if found is None:
                return failure(404, "NotFound", f'pods "{parts[1]}" not found')
            if method == "DELETE":
                self._delete(parts[1], found, int(body.get("gracePeriodSeconds", 30)))
            return 200, {}, found

    def _make(self, store: dict[str, dict[str, Any]], body: dict[str, Any]) -> Answer:
        name = body["metadata"]["name"]
        if name in store:
            return failure(409, "AlreadyExists", f'pods "{name}" already exists')
        body["metadata"].update(uid=f"uid-{name}", namespace=NAMESPACE)
        store[name] = body
        if store is self.pods:
            body["status"] = {"phase": "Pending"}
            self.tell("ADDED", body)
            if self.node:
                body["spec"]["nodeName"] = "node"
                self.say(name, phase="Running", containerStatuses=[{"name": "worker", "state": {"running": {}}}])
        return 201, {}, body

    def _delete(self, name: str, found: dict[str, Any], grace: int) -> None:
        found["metadata"]["deletionTimestamp"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + grace))
        found["metadata"]["deletionGracePeriodSeconds"] = grace
        self.tell("MODIFIED", found)
        if self.node:
            if found["status"]["phase"] == "Running":
                self.end(name, 137)
            self.vanish(name)

    def _list(self, query: dict[str, str]) -> Answer:
        names = sorted(name for name, pod in self.pods.items() if _fits(pod, query))
        start, limit = int(query.get("continue") or 0), int(query.get("limit") or 1_000_000)
        page = [self.pods[name] for name in names[start : start + limit]]
        more = str(start + limit) if start + limit < len(names) else ""
        return 200, {}, {"metadata": {"resourceVersion": str(self._version), "continue": more}, "items": page}

    def epoch(self) -> int:
        """What a watch that begins now belongs to: end_watches() ends it."""
        with self.changed:
            return self._epoch

    def watch(self, epoch: int, query: dict[str, str], write: Callable[[bytes], None]) -> None:
        """Write events until the watch's end."""
        seen = int(query["resourceVersion"])
        end = time.monotonic() + float(query["timeoutSeconds"])
        while True:
            with self.changed:
                if seen < self._oldest:
                    write(_line("ERROR", {"code": 410, "reason": "Expired", "message": "too old resource version"}))
                    return
                events = [] if self.stalled else [event for event in self._events if event[0] > seen]
                if not events:
                    if epoch != self._epoch or time.monotonic() > end:
                        write(self._cut)
                        return
                    self.changed.wait(0.5)
                    continue
            seen = events[-1][0]
            for _, kind, pod in events:
                if kind == "BOOKMARK" or _fits(pod, query):
                    write(_line(kind, pod))


def _line(kind: str, thing: dict[str, Any]) -> bytes:
    return json.dumps({"type": kind, "object": thing}).encode() + b"\n"


def _fits(pod: dict[str, Any], query: dict[str, str]) -> bool:
    name, _, value = query.get("labelSelector", "").partition("=")
    labels = pod["metadata"].get("labels", {})
    address = query.get("fieldSelector", "").partition("status.podIP=")[2]
    if address and pod["status"].get("podIP") != address:
        return False
    return not name or (labels.get(name) == value if value else name in labels)


class _Server(ThreadingHTTPServer):
    fake: Fake
    daemon_threads = True
    request_queue_size = 128
    allow_reuse_address = True

    def __init__(self, *arguments: Any) -> None:
        self._open: set[socket.socket] = set()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # connections that are cut

    def cut(self) -> None:
        for one in list(self._open):
            try:
                one.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    disable_nagle_algorithm = True

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def _serve(self) -> None:
        fake = self.server.fake
        parts = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        fake.requests.append((time.monotonic(), self.command, parts.path, query))
        told = fake.before(self.command, parts.path, query)
        if told is None and query.get("watch"):
            self._watch(query)
            return
        if told is None:
            told = fake.answer(self.command, parts.path, query, body)
            told = fake.after(self.command, parts.path, query) or told
        code, headers, thing = told
        if not code:
            self.close_connection = True
            return
        data = json.dumps(thing).encode()
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _watch(self, query: dict[str, str]) -> None:
        epoch = self.server.fake.epoch()  # from when its reader knows of it
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.server.fake.watch(epoch, query, self._chunk)
        self.wfile.write(b"0\r\n\r\n")

    def _chunk(self, data: bytes) -> None:
        if data:
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    do_GET = do_POST = do_DELETE = _serve
