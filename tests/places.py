"""A backend of jobs by itself, without an executor, whose ends are collected."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable

from fiberexec.backends.base import Exit, Job, JobBackend, JobEnded

_numbers = itertools.count(1)


class Place:
    """A backend whose ends are collected by a thread, as the launcher does. ``deadline``: seconds that an end may take."""

    def __init__(self, backend: JobBackend, deadline: float) -> None:
        self.program = f"test-{os.getpid()}-{next(_numbers)}"
        self._jobs = backend
        self._deadline = deadline
        self._changed = threading.Condition()
        self._ended: list[JobEnded] = []
        self._thread = threading.Thread(target=backend.watch, args=(self._report,), name="watch")
        self._thread.start()

    def _report(self, ended: list[JobEnded]) -> None:
        with self._changed:
            self._ended += ended
            self._changed.notify_all()

    @property
    def ended(self) -> list[JobEnded]:
        with self._changed:
            return list(self._ended)

    def job(self, number: int, code: str, credentials: bytes = b"") -> Job:
        return Job(f"{self.program}-{number}", self.program, ("python", "-c", code), credentials)

    def start(self, number: int, code: str, credentials: bytes = b"") -> str:
        job = self.job(number, code, credentials)
        self._jobs.start(job)
        return job.id

    def end(self, job: str, seconds: float | None = None) -> Exit:
        """How the job ended. Waits until it has."""

        def found() -> list[Exit]:
            return [one.exit for one in self._ended if one.job == job]

        with self._changed:
            assert self._changed.wait_for(found, seconds or self._deadline), f"{job} has not ended: {self._jobs.explain(job)}"
            assert len(found()) == 1
            return found()[0]

    def says(self, job: str, text: str) -> None:
        """Wait until a job has written a line that contains the text."""
        assert any(text in line for line in self._jobs.logs(job, follow=True))

    def close(self) -> None:
        """Remove all jobs, and end."""
        try:
            self._jobs.remove(self.program)
        finally:
            self.join()

    def join(self) -> None:
        """End, and leave jobs as they are."""
        self._jobs.close()
        self._thread.join(self._deadline)
        assert not self._thread.is_alive()


def eventually(holds: Callable[[], bool], seconds: float) -> None:
    """Wait until something holds, at most so long."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came to hold"
        time.sleep(0.05)
