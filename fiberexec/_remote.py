"""Workers in jobs: what the manager sees as a backend, in front of the hub and whoever starts jobs for it.

    manager ── launch, signal, probe, recall ─► RemoteBackend ─► the hub's Fleet ─► agents
            ◄─ Started, Ended, ... ───────────      ◄─ events, as they come
            ◄═ each worker's stream, through the hub ═►
"""

from __future__ import annotations

import select
import sys
from collections.abc import Sequence
from time import monotonic
from typing import Any

from fiberexec import _bundle, _config, _platform
from fiberexec import _messages as messages
from fiberexec._errors import ConfigError, HubLost, LaunchError
from fiberexec._hub import client, launch
from fiberexec._hub.wire import HUB
from fiberexec._stream import ProtocolError
from fiberexec.backends.base import (
    Cell,
    Ended,
    Exit,
    JobBackend,
    JobEvent,
    Leaving,
    Pool,
    Probed,
    Recalled,
    Refused,
    Resources,
    Started,
)

_CLOSE_TIMEOUT = 60.0  # seconds that the ends of all jobs may take
_WARN_AFTER = 30.0  # seconds without a job that was asked for; then the user hears what is known of it
_EARLY = 5.0  # seconds, or a tenth, of startup_timeout before its end: then why there is no job is asked for the last time


class Elsewhere:
    """What a process in a job knows of a backend that the launcher of its program uses for it."""

    def __init__(self, name: str, settings: _config.Settings) -> None:
        cpu = _platform.cpu_count() if settings.cpu is None else settings.cpu
        memory = _platform.memory_total() if settings.memory is None else settings.memory
        self.name = name
        self.largest = Pool(name, Resources(cpu, memory, settings.gpu or 0))
        self.default_workers = _platform.cpu_count()
        self.idle_timeout: float | None = 60.0


class RemoteBackend:
    """See base.Backend. ``jobs`` says what a job is like; the launcher makes another one of it."""

    same_host = False

    def __init__(self, jobs: JobBackend | Elsewhere, settings: _config.Settings) -> None:
        self.name = jobs.name
        self.host = jobs.name
        self.largest = jobs.largest
        self.default_workers = jobs.default_workers
        if settings.max_workers is None:
            import logging

            said = "backend %r: at most %d workers, since max_workers is not given"
            logging.getLogger("fiberexec").info(said, self.name, self.default_workers)
        self.idle_timeout = jobs.idle_timeout
        if settings.ship:
            _bundle.check_ship(settings.ship)
        self._ship = settings.ship
        self._settings = plain(settings)
        self._workers_per_job = settings.workers_per_job
        self._timeout = settings.driver_timeout
        self._hub: launch.Address | None = None
        self._fleet = 0
        self._events: Any = None  # the channel by which they come
        self._found: list[JobEvent] = []
        self._workers: dict[int, bool] = {}  # those that have not ended: whether they have started
        patience = settings.startup_timeout
        last = patience - min(_EARLY, patience / 10)
        self._glances = (min(_WARN_AFTER, last / 2), last)  # seconds after which it is asked why there is no job yet
        self._starting: dict[int, float] = {}  # workers that have not started: since when
        self._asked = (0, 0)  # how often, and about which of them
        self._cells: dict[int, Cell] = {}
        self._lost: BaseException | None = None

    def launch(self, workers: Sequence[int]) -> None:
        self._workers.update(dict.fromkeys(workers, False))
        self._starting.update(dict.fromkeys(workers, monotonic()))
        try:
            if self._events is None:
                self._begin()
            self._post("launch", list(workers))
        except (OSError, RuntimeError, ValueError) as error:
            for worker in workers:
                self._refuse(worker, error, isinstance(error, (HubLost, ValueError)))

    def _begin(self) -> None:
        """Become known to the hub."""
        if self._lost is not None:
            raise self._lost
        from fiberexec import _launcher

        self._hub = hub = launch.start()
        launcher = 0 if launch.in_job() else _launcher.get()
        self._fleet = client.call("new", HUB, "fleet", hub=hub)
        if self._ship:
            digest, archive = _bundle.ship(self._ship)
            self._settings[1]["ship"] = [digest]
            client.call("ship", self._fleet, digest, buffers=(archive,), hub=hub)
        told = launcher, self._settings, self._workers_per_job, self._timeout
        self._events = client.subscribe(hub, ("events", self._fleet, told))
        self._events.stream._sock.setblocking(False)

    def signal(self, worker: int, number: int, group: bool) -> None:
        self._post("signal", worker, int(number), group)

    def probe(self, worker: int) -> None:
        self._post("probe", worker)

    def recall(self, worker: int, number: int) -> None:
        self._post("recall", worker, number)

    def _post(self, op: str, *args: object) -> None:
        if self._hub is not None and self._events is not None:
            try:
                client.post(self._hub, (op, self._fleet, args))
            except HubLost:
                if op == "launch":
                    raise  # else poll() sees it

    def peek(self, worker: int) -> Cell | None:
        return self._cells.get(worker)

    def look(self) -> None:
        """Let peek() know what workers do now. Any thread may ask, and waits for their answers."""
        if self._hub is not None and self._events is not None:
            try:
                found = client.call("look", self._fleet, hub=self._hub)
            except (HubLost, KeyError):
                return  # the fleet has been closed meanwhile
            self._cells.update((worker, Cell(*cell)) for worker, cell in found if worker in self._workers)

    def wakeup(self) -> float | None:
        for worker, since in self._starting.items():  # the first: what holds it up holds up the others
            times, of = self._asked
            if of != worker:
                times, self._asked = 0, (0, worker)
            return since + self._glances[times] if times < len(self._glances) else None
        return None

    def _ask(self) -> None:
        """Ask why a job is not there yet, if it is time to. The answer comes as an event."""
        due = self.wakeup()
        if due is not None and monotonic() >= due:
            times, worker = self._asked
            self._asked = times + 1, worker
            self._post("explain", worker)

    def fds(self) -> Sequence[int]:
        return () if self._events is None else (self._events.stream.fileno(),)

    def poll(self) -> list[JobEvent]:
        if self._events is not None:
            self._ask()
            try:
                while True:
                    for _, body, _ in self._events.stream.receive():
                        self._take(*messages.decode(body))
            except BlockingIOError:
                pass
            except (OSError, EOFError, ProtocolError) as error:
                self._hub_gone(error)
        found, self._found = self._found, []
        return found

    def _take(self, verb: str, *args: Any) -> None:
        if verb == "output":
            _write(*args)
            return
        worker, *rest = args
        if worker not in self._workers:
            return
        if verb == "explained":
            self._explained(worker, *rest)
            return
        if verb != "probed":
            self._starting.pop(worker, None)
        if verb == "started":
            pid, host, job, devices = rest
            assert self._hub is not None
            try:
                connection = client.attach(self._hub, ("attach", self._fleet, (worker,)))
            except HubLost:
                return  # its end is about to be read
            except OSError as error:  # no more descriptors: nobody can talk to this worker
                self._post("signal", worker, 9, True)
                self._refuse(worker, error, False)
                return
            self._workers[worker] = True
            # Not what it says that it has: that is less where its limit is no whole number of cores or pages, or its host is
            # smaller than this one, and tasks that were promised more would wait for ever.
            has = self.largest.capacity
            pool = Pool(job, has, tuple(devices.split(",") if devices else self.largest.devices)[: has.gpu])
            self._found.append(Started(worker, pid, host, connection, pool, job))
        elif verb == "refused":
            self._refuse(worker, LaunchError(rest[0], final=rest[1]), rest[1])
        elif verb == "ended":
            del self._workers[worker]
            self._cells.pop(worker, None)
            self._found.append(Ended(worker, Exit(*rest[0]), rest[1]))
        elif verb == "probed":
            self._cells[worker] = cell = Cell(*rest[0])
            self._found.append(Probed(worker, cell))
        elif verb == "leaving":
            self._found.append(Leaving(worker))
        elif verb == "recalled":
            self._found.append(Recalled(worker, *rest))

    def _explained(self, worker: int, text: str) -> None:
        """What is known of a job that is not there yet."""
        since = self._starting.get(worker)
        if since is None or worker != self._asked[1]:
            return
        waited = monotonic() - since
        said = f"there is no worker yet after {waited:.0f} s: {text or 'nobody knows why'}"
        if waited >= self._glances[-1]:
            self.signal(worker, 9, True)
            self._refuse(worker, LaunchError(f"{said} (startup_timeout is over)", final=True), True)
        else:
            import logging

            logging.getLogger("fiberexec").warning("%s: %s", self.name, said)

    def _refuse(self, worker: int, error: BaseException, final: bool) -> None:
        self._starting.pop(worker, None)
        if self._workers.pop(worker, None) is not None:
            self._found.append(Refused(worker, error, final))

    def _hub_gone(self, error: BaseException) -> None:
        """Nothing can be had any more, and what runs cannot be heard of."""
        text = "the hub of this program has gone, and with it the way to all workers"
        self._lost = HubLost(f"{text} ({error!r}); start the program again")
        self._close_events()
        for worker, started in list(self._workers.items()):
            if started:
                self._found.append(Ended(worker, Exit(None, "the hub died", infrastructure=True)))
                del self._workers[worker]
            else:
                self._refuse(worker, self._lost, True)

    def _close_events(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None

    def close(self) -> None:
        if self._events is None or self._hub is None:
            return
        try:
            pending = client.Pending(self._hub, ("close", self._fleet, ()))
            ready = select.poll()
            ready.register(pending.fileno(), select.POLLIN)
            if ready.poll(1000 * _CLOSE_TIMEOUT):
                pending.result()
            else:
                pending.cancel()
            self.poll()  # what workers have printed
            client.post(self._hub, ("drop", HUB, (self._fleet,)))
        except OSError:
            pass  # the hub has gone, and the launcher ends the jobs
        self._close_events()

    def forked(self) -> None:
        self._close_events()
        self._hub = None


def _write(fd: int, data: bytes) -> None:
    """What a worker has printed, where this process prints."""
    stream = sys.stdout if fd == 1 else sys.stderr
    try:
        stream.write(data.decode(errors="replace"))
        stream.flush()
    except Exception:
        pass  # it is closed, or something else


def plain(settings: _config.Settings) -> tuple[str, dict[str, Any]]:
    """Settings as they travel: a backend's name, and plain values. Raises ConfigError for options that are none."""
    values = settings._asdict()
    values.update(env=dict(settings.env), backend_options=dict(settings.backend_options), ship=list(settings.ship))
    for name in ("sources", "idle_timeout"):
        del values[name]
    import json

    try:
        json.dumps(values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"backend_options must consist of plain values (str, numbers, lists, dicts): {error}") from None
    return settings.backend, values


def restored(told: Sequence[Any]) -> tuple[str, _config.Settings]:
    """What plain() was told."""
    name, values = told
    return name, _config.Settings(**{**values, "ship": tuple(values["ship"])})
