"""The executors and pools that are compared, each behind the same five calls.

The start-up row imports this module in a fresh interpreter, so it imports next to nothing: a library when
its peer is opened, and ``typing`` never.
"""

from __future__ import annotations

import time

from . import tasks

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any

BASE = "stdlib-fork"


class Peer:
    """A ``concurrent.futures`` executor; subclasses say how theirs is opened and what differs."""

    name = ""
    needs = ""  # the module that must be installed; empty for the standard library
    optional = False  # measured only when it is named on the command line
    pool: Any

    def open(self, workers: int) -> None:
        raise NotImplementedError

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self.pool.submit(function, *arguments)

    def wait(self, handles: Sequence[Any]) -> list[Any]:
        return [handle.result() for handle in handles]

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        return list(self.pool.map(function, items))

    def close(self) -> None:
        self.pool.shutdown(wait=True)

    def warm(self, workers: int, limit: float = 60.0) -> None:
        """Run tasks until every worker has answered; raise TimeoutError after ``limit`` seconds."""
        seen: set[tuple[str, int]] = set()
        pause, end = 0.02, time.monotonic() + limit
        while len(seen) < workers:
            if time.monotonic() > end:
                raise TimeoutError(f"{len(seen)} of {workers} workers answered within {limit:g} s")
            seen.update(self.wait([self.submit(tasks.whoami, pause) for _ in range(2 * workers)]))
            pause = min(0.3, 2 * pause)


class StdlibFork(Peer):
    name = BASE
    method = "fork"

    def open(self, workers: int) -> None:
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor

        self.pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context(self.method))


class StdlibSpawn(StdlibFork):
    name = "stdlib-spawn"
    method = "spawn"


class MpPool(Peer):
    name = "mp.Pool"

    def open(self, workers: int) -> None:
        import multiprocessing

        self.pool = multiprocessing.get_context("fork").Pool(workers)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self.pool.apply_async(function, arguments)

    def wait(self, handles: Sequence[Any]) -> list[Any]:
        return [handle.get() for handle in handles]

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        result: list[Any] = self.pool.map(function, items)
        return result

    def close(self) -> None:
        self.pool.close()
        self.pool.join()


class MpSpawn(Peer):
    """``multiprocessing`` with spawn: for the rows of ``fiberexec.mp`` alone, see the module mp."""

    name = "mp-spawn"


class Loky(Peer):
    name = "loky"
    needs = "loky"

    def open(self, workers: int) -> None:
        from importlib import import_module

        self.pool = import_module("loky").ProcessPoolExecutor(workers)


class Pebble(Peer):
    name = "pebble"
    needs = "pebble"

    def open(self, workers: int) -> None:
        import pebble

        self.pool = pebble.ProcessPool(max_workers=workers)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self.pool.schedule(function, args=arguments)

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        return list(self.pool.map(function, items).result())

    def close(self) -> None:
        self.pool.close()
        self.pool.join()


class Fiberexec(Peer):
    name = "fiberexec"
    needs = "fiberexec"

    def open(self, workers: int) -> None:
        from fiberexec import FiberExecutor

        self.pool = FiberExecutor(workers)


class FiberexecLink(Peer):
    """Workers under agents, as on other hosts: hub, mutual TLS, agent. For the rows of the link alone."""

    name = "fiberexec-link"
    needs = "fiberexec"

    def open(self, workers: int) -> None:
        from fiberexec import FiberExecutor

        self.pool = FiberExecutor(workers, backend="agents")


class DaskExecutor(Peer):
    name = "dask"
    needs = "distributed"
    optional = True

    def open(self, workers: int) -> None:
        from importlib import import_module

        distributed = import_module("distributed")
        self.cluster = distributed.LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None)
        self.client = distributed.Client(self.cluster)
        self.pool = self.client.get_executor(pure=False)

    def close(self) -> None:
        super().close()
        self.client.close()
        self.cluster.close()


class Threads(Peer):
    """No process boundary: the floor that Future objects themselves set."""

    name = "threads"
    optional = True

    def open(self, workers: int) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self.pool = ThreadPoolExecutor(workers)

    def warm(self, workers: int, limit: float = 60.0) -> None:
        self.wait([self.submit(tasks.whoami, 0.02) for _ in range(2 * workers)])


class DaskLink(DaskExecutor):
    """With TLS, and keys of its own for each program: for the rows of the link alone."""

    name = "dask-link"

    def open(self, workers: int) -> None:
        from importlib import import_module

        distributed = import_module("distributed")
        security = import_module("distributed.security").Security.temporary()
        self.cluster = distributed.LocalCluster(
            n_workers=workers, threads_per_worker=1, dashboard_address=None, security=security, protocol="tls://"
        )
        self.client = distributed.Client(self.cluster, security=security)
        self.pool = self.client.get_executor(pure=False)


class Agents(FiberexecLink):
    """Against this, containers are measured."""

    name = "agents"
    optional = True


class FiberexecDocker(Peer):
    """Workers in containers. FIBEREXEC_IMAGE names their image."""

    name = "fiberexec-docker"

    def open(self, workers: int) -> None:
        from fiberexec import FiberExecutor

        self.pool = FiberExecutor(workers, backend="docker")


class FiberexecPods(Peer):
    """Workers in pods; the driver is in one: see the module cluster."""

    name = "fiberexec-pods"

    def open(self, workers: int) -> None:
        from fiberexec import FiberExecutor

        self.pool = FiberExecutor(workers, backend="kubernetes")


class DaskPods(DaskExecutor):
    """A scheduler and workers in pods, where BENCHMARK_DASK says; without TLS, as Dask does it."""

    name = "dask-pods"

    def open(self, workers: int) -> None:
        import os
        from importlib import import_module

        self.client = import_module("distributed").Client(os.environ["BENCHMARK_DASK"])
        self.client.wait_for_workers(workers, timeout=60)
        self.pool = self.client.get_executor(pure=False)

    def close(self) -> None:
        self.pool.shutdown(wait=True)
        self.client.close()


# What stands for whom in workloads whose names begin so.
STAND_INS: dict[str, dict[str, type[Peer]]] = {
    "link": {Fiberexec.name: FiberexecLink, DaskExecutor.name: DaskLink},
    "docker": {Fiberexec.name: FiberexecDocker},
    "pods": {Fiberexec.name: FiberexecPods, DaskExecutor.name: DaskPods},
}
PEERS: dict[str, type[Peer]] = {
    peer.name: peer
    for peer in (StdlibFork, StdlibSpawn, MpPool, MpSpawn, Loky, Pebble, Agents, Fiberexec, DaskExecutor, Threads)
}


def is_installed(name: str) -> bool:
    """Say whether the library behind this peer can be imported."""
    from importlib.util import find_spec

    return not PEERS[name].needs or find_spec(PEERS[name].needs) is not None
