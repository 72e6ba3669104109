"""What the kubernetes backend knows: of each job, and of what all of them have in common."""

from __future__ import annotations

import threading
import time
from typing import Any

from fiberexec._errors import LaunchError
from fiberexec.backends import _kubernetes_pods as pods
from fiberexec.backends.base import Exit

LASTING = 15.0  # seconds after which what passes sometimes is taken not to
EARLY = 10.0  # seconds: a pod that ends by itself before may be one that cannot work
_META = ("name", "deletionTimestamp", "deletionGracePeriodSeconds")
_PROOFS = 3  # so many early ends, and none that lived longer, prove it
_VALID = 30.0  # seconds that a verdict holds: whoever mends what is wrong need not start anew


class Known:
    """A job as the backend knows it."""

    def __init__(self) -> None:
        self.asked = self.since = time.monotonic()  # when it was wanted; when it was made
        self.image = ""
        self.starting = False  # start() is at work
        self.started = False  # start() has succeeded: its end is to be reported
        self.unwanted = False  # nobody wants it any more
        self.deleted = False  # and the server has been told so
        self.gone = False  # its object is
        self.heard: pods.Trouble | None = None  # why it does not start, as its events say
        self._missed = 0.0  # since when they say that something is missing
        self.exit: Exit | None = None  # how it ended, where that is known before the end
        self.pod: dict[str, Any] = {}  # as it was last seen, without what is of no use
        self._trouble: pods.Trouble | None = None  # why it does not start, as its object says
        self._troubled = 0.0  # since when that is final
        self._running = 0.0  # since when
        self._gone = 0.0

    def see(self, pod: dict[str, Any], gone: bool) -> None:
        """Its object is now like this, or was when it went."""
        meta = pod["metadata"]
        self.pod = {
            "metadata": {name: meta[name] for name in _META if name in meta},
            "spec": {name: pod["spec"].get(name) for name in ("nodeName", "containers")},
            "status": pod.get("status", {}),
        }
        self.gone = self.gone or gone
        if pods.is_running(pod):
            self._running = self._running or time.monotonic()
        if pods.is_set_up(pod):
            self.heard = None
        found = pods.trouble_of(pod)
        if found is None or self._trouble is None or not pods.is_terse(found):
            self._trouble = found
            self._troubled = (self._troubled or time.monotonic()) if found is not None and found.final else 0.0

    def hear(self, reason: str, message: str) -> None:
        """An event says why it is not set up: a volume that is missing may yet come, and a new node's drivers do."""
        if self.mute:
            missing = "not found" in message and "registered CSI drivers" not in message
            self._missed = (self._missed or time.monotonic()) if missing else 0.0
            self.heard = pods.Trouble(reason, message, missing and time.monotonic() >= self._missed + LASTING)

    @property
    def trouble(self) -> pods.Trouble | None:
        """Why it does not start, as far as that is known."""
        return None if self._running else self._trouble or self.heard

    @property
    def mute(self) -> bool:
        """Whether its events alone can say why it does not start."""
        return self._trouble is None and not pods.is_set_up(self.pod)

    @property
    def hopeless(self) -> bool:
        """Whether it will not start."""
        trouble = self.trouble
        if trouble is None or not trouble.final:
            return False
        return not trouble.passes or time.monotonic() >= self._troubled + LASTING

    @property
    def runs(self) -> bool:
        """Whether it has started, and not ended."""
        return bool(self._running) and not (self.gone or pods.has_ended(self.pod))

    @property
    def ran(self) -> bool:
        """Whether it has run for longer than one that cannot work."""
        return bool(self._running) and self.seconds > EARLY

    @property
    def seconds(self) -> float:
        """How long it has run."""
        return time.monotonic() - self._running if self._running else 0.0

    @property
    def waits(self) -> bool:
        """Whether it has neither started nor been given up."""
        return not (self._running or self.unwanted or self.gone)

    @property
    def owed(self) -> bool:
        """Whether it has yet to be deleted."""
        return self.unwanted and not (self.starting or self.deleted or self.gone)

    @property
    def lingers(self) -> bool:
        """Whether its object has gone, and nobody said that its processes have."""
        return bool(self._gone)

    def over(self, linger: float) -> bool:
        """Whether nothing of it runs any more. What has been removed by force is given ``linger`` seconds."""
        if self.pod and pods.has_ended(self.pod):
            return True
        if not self.gone:
            return False
        if not self._running:
            return True
        self._gone = self._gone or time.monotonic()
        return time.monotonic() >= self._gone + linger


class Verdicts:
    """What is wrong with all jobs alike. Any thread may ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._early: dict[str, int] = {}  # ends of pods that did not live long, by image; -1: some did
        self._until = 0.0
        self.text = ""

    def check(self) -> None:
        """Raise LaunchError while it is known that no job can start."""
        with self._lock:
            if self.hold:
                raise LaunchError(self.text, final=True)

    @property
    def hold(self) -> bool:
        """Whether it is known that no job can start."""
        return bool(self.text) and time.monotonic() < self._until

    def settle(self, text: str) -> None:
        """No job can start."""
        with self._lock:
            self.text, self._until = text, time.monotonic() + _VALID

    def renew(self) -> None:
        """What was settled has shown again."""
        with self._lock:
            self._until = time.monotonic() + _VALID

    def works(self, image: str) -> bool:
        """Whether pods of an image have been seen to work."""
        return self._early.get(image) == -1

    def learn(self, image: str, lived: float, exit: Exit, reason: str, others: bool) -> bool:
        """Note how a pod ended by itself; returns whether no other can do better.

        ``reason`` says why, if its last lines tell; ``others``: there are pods that have lived longer.
        """
        with self._lock:
            if others or lived >= EARLY:
                if not reason:
                    self._early[image] = -1
                return bool(reason) and not others and self._early.get(image) != -1
            if exit.code is not None and exit.code <= 0:
                return False
            seen = self._early.get(image, 0)
            if seen >= 0:
                self._early[image] = seen + 1
            return bool(reason) or seen + 1 >= _PROOFS
