"""What a Docker engine says of containers: calls that change nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fiberexec._errors import FiberError
from fiberexec.backends._docker_engine import Engine, sdk, shut
from fiberexec.backends._lines import split

_TAIL = 30  # lines of a container's log that are kept


class Reader:
    """Reads an engine. Any thread may call."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def state(self, job: str) -> dict[str, Any]:
        """How a job's container is. Raises what the SDK raises."""
        state: dict[str, Any] = self._engine.client().api.inspect_container(job)["State"]
        return state

    def tail(self, job: str) -> str:
        """The last lines that a job has written; "" where they cannot be had. Raises what the SDK raises for an outage."""
        try:
            return str(self._engine.client().api.logs(job, tail=_TAIL).decode("utf-8", "replace"))
        except sdk().APIError:  # its logging driver keeps nothing that could be read, or it has just gone
            return ""

    def lines(self, job: str, follow: bool) -> Iterator[str]:
        """The lines that a job has written; with ``follow`` until it ends. Raises FiberError for an unknown one."""
        try:
            pieces = self._engine.client().api.logs(job, stream=True, follow=follow)
        except sdk().NotFound:
            raise FiberError(f"there is no job {job!r} on the Docker engine at {self._engine.url()}") from None
        except Exception as error:
            raise self._engine.failed(error, f"reading the log of {job}", name=job) from error
        try:
            for line in split(pieces):
                yield line.removesuffix(b"\n").decode("utf-8", "replace")
        except Exception as error:
            raise self._engine.failed(error, f"reading the log of {job}", name=job) from error
        finally:
            shut(pieces)

    def jobs(self) -> list[dict[str, Any]]:
        """Every container of fiberexec: see base.JobBackend.list()."""
        try:
            client = self._engine.client()
            host = str(client.info().get("Name", ""))
            found = client.api.containers(all=True, filters={"label": "fiberexec.job"})
        except Exception as error:
            raise self._engine.failed(error, "listing containers") from error
        return [
            {
                "id": one["Labels"]["fiberexec.job"],
                "program": one["Labels"].get("fiberexec.program", ""),
                "state": one["State"],
                "host": host,
                "image": one["Image"],
                "started": int(one["Labels"].get("fiberexec.started", 0)),
                "labels": one["Labels"],
            }
            for one in found
        ]
