"""The hub's end of a link, for `fiberexec doctor` to be reached at: a process, as the hub is, since nng and fork do not agree.

It is told {"host", "ca", "certificate", "key"} on stdin, prints its port, answers each request with the name on its sender's
certificate, and ends with its stdin.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from fiberexec._tls import Authority

_SERVER = "hub"  # the name on its certificate
_START_TIMEOUT = 30.0  # seconds


class Listening:
    """One in a process of its own, while the `with` block lasts, and what tells a probe how to reach it."""

    def __init__(self, host: str) -> None:
        """Listen on this address. Raises OSError where that cannot be done."""
        self._authority = Authority()
        certificate, key = self._authority.certificate(_SERVER, server=True)
        package = __package__.partition(".")[0]
        root = str(sys.modules[package].__path__[0])[: -len(package)]
        paths = [path for path in sys.path if path]
        code = f"import sys; sys.path[:] = {[root, *paths]!r}; from {__name__} import main; main()"
        self._process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None and self._process.stdout is not None
        told = {"host": host, "ca": self._authority.ca, "certificate": certificate, "key": key}
        try:
            self._process.stdin.write(json.dumps(told).encode() + b"\n")
            self._process.stdin.flush()
            ready = select.select([self._process.stdout], [], [], _START_TIMEOUT)[0]
            answer = self._process.stdout.readline().decode() if ready else "it has not started in time"
            if not answer.strip().isdecimal():
                raise OSError(answer.strip() or "it ended at once")
        except BaseException:
            self.__exit__()
            raise
        self.port = int(answer)

    def __enter__(self) -> Listening:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()

    def told(self, job: str, addresses: Sequence[str], linger: float) -> bytes:
        """The credentials of a probe that is to try these addresses ("tls+tcp://host:port"). A secret."""
        certificate, key = self._authority.certificate(job)
        told = {"job": job, "server": _SERVER, "ca": self._authority.ca, "certificate": certificate, "key": key}
        return json.dumps({**told, "hub": list(addresses), "linger": linger}).encode()


def main() -> None:
    """The process."""
    from fiberexec._link import Listener

    told: dict[str, Any] = json.loads(sys.stdin.readline())
    try:
        link = Listener(told["host"], told["ca"], told["certificate"], told["key"])
    except Exception as error:
        print(str(error).replace("\n", " "), flush=True)
        os._exit(1)
    print(link.port, flush=True)
    while True:
        ready, _, _ = select.select([sys.stdin, link], [], [])
        for exchange, _ in link.received():
            link.answer(exchange, (exchange.peer.encode(),))
        if sys.stdin in ready:
            os._exit(0)  # nobody writes more
