"""A hub that is never run, to which tests say what agents might."""

from __future__ import annotations

import os
import socket
import sys
from types import SimpleNamespace
from typing import Any

from fiberexec import _messages as messages
from fiberexec._hub.fleet import Fleet, Launcher
from fiberexec._hub.jobs import Job
from fiberexec._hub.server import Hub
from fiberexec._stream import ProtocolError

VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"
HELLO = "hello", messages.VERSION, VERSION, 1, "elsewhere", ""


class Place:
    """A hub that is never run, with a fleet of two jobs; all that the fleet's owner is told arrives at ``owner``."""

    def __init__(self, folder: Any) -> None:
        listener, self._lifeline = socket.socket(socket.AF_UNIX), os.pipe()
        listener.bind(os.path.join(folder, "hub"))
        listener.listen()
        self._sockets: list[Any] = [listener]
        self.hub = Hub(listener, self._lifeline[0], b"t" * 32)
        self.launcher = Launcher(self.hub, "fx-test")
        self.told: list[tuple[Any, ...]] = []
        self.answers = 0

    def fleet(self) -> Fleet:
        fleet = Fleet(self.hub)
        fleet.launcher = self.launcher
        self.launcher.fleets[fleet] = None
        fleet._settings = ()
        fleet._subscriber = SimpleNamespace(tell=self._tell, backlog=0)  # type: ignore[assignment]
        return fleet

    def _tell(self, *event: object) -> None:
        self.told.append(messages.decode(messages.encode(event)))

    def job(self, fleet: Fleet, worker: int) -> Job:
        fleet.do_launch(None, [worker])  # type: ignore[arg-type]
        job = fleet._job_of(worker)
        assert job is not None
        return job

    def hear(self, job: Job, data: bytes) -> bool:
        """Whether a message that came with this job's certificate is accepted, as the switch sees it."""
        exchange: Any = SimpleNamespace(pipe=1, peer=job.id)
        link = self.hub.switch.links.get(job.id)
        if link is None:
            return False
        try:
            link.hear(self, exchange, data)  # type: ignore[arg-type]
        except (ProtocolError, TypeError, ValueError, LookupError):  # what the switch refuses a connection for
            return False
        finally:
            self.hub.switch.speak()
        return True

    def answer(self, exchange: object, parts: Any) -> None:
        self.answers += 1

    def close(self) -> None:
        for link in self.hub.switch.links.values():
            link.relays.close()
        for peer in list(self.hub._peers.values()):
            self.hub._close(peer)
        self.hub._poller.close()
        for each in self._sockets:
            each.close()
        for fd in self._lifeline:
            os.close(fd)
