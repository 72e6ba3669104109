"""Process: multiprocessing's, each of them one job of a backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from multiprocessing.process import BaseProcess, active_children, current_process, parent_process
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fiberexec.mp._popen import Popen

__all__ = ["BaseProcess", "Process", "active_children", "current_process", "parent_process"]


class Process(BaseProcess):
    """A call of ``target(*args, **kwargs)`` in a process of its own; the same as ``multiprocessing.Process``, and besides:

    - ``cpu`` (cores), ``memory`` (MiB, or "4Gi"), ``gpu`` (devices): what the process needs. By default what `@meta` says of
      the target, then what the settings say. Raises ConfigError for values that make no sense.
    - ``host``, ``job_id``, ``lost``: where it runs, what the backend calls it, why it ended if that was not its own doing.

    ``target``, arguments and subclasses may be lambdas, closures and from ``__main__``, which is not run again. The process
    ends with its parent, daemon or not, however that ends, and what it has left in the background ends with it.

    ``start()`` raises PicklingError, ResourceError for more than there is, and LaunchError if the backend starts no process
    and says so within a second; later than that the exit code is 255, and ``lost`` says it.
    """

    _start_method = None  # multiprocessing's default context in the child stays as it is
    _context_name: str | None = None  # the start method of its context; None: the default context's
    _popen: Popen | None

    def __init__(
        self,
        group: None = None,
        target: Callable[..., object] | None = None,
        name: str | None = None,
        args: Iterable[Any] = (),
        kwargs: Mapping[str, Any] = {},  # as multiprocessing's; it is copied
        *,
        daemon: bool | None = None,
        cpu: float | str | None = None,
        memory: int | str | None = None,
        gpu: int | None = None,
    ) -> None:
        super().__init__(group, target, name, args, kwargs, daemon=daemon)
        given = getattr(self.run if target is None else target, "__fiberexec_meta__", (None, None, None))
        asked = _checked(cpu, memory, gpu)
        self._job_size: tuple[Any, ...] = tuple(default if value is None else value for value, default in zip(asked, given))

    def _Popen(self, process_obj: Process) -> Popen:
        from fiberexec.mp import _job, _popen
        from fiberexec.mp.context import backend_of, default_context

        method = self._context_name or default_context.get_context()._name
        return _popen.Popen(self, _job.Size(backend_of(method), *self._job_size), method)

    @staticmethod
    def _after_fork() -> None:
        pass  # the process is a new one: nothing of its parent's is in it

    @property
    def ident(self) -> int | None:
        """The process' id on its host, None before ``start()``. It may have to wait until the backend has launched it."""
        return super().ident if self._popen is None else self._popen.job.pid

    pid = ident

    @property
    def host(self) -> str | None:
        """The host that it runs on, None before ``start()``."""
        return None if self._popen is None else self._popen.job.host

    @property
    def job_id(self) -> str | None:
        """What the backend calls the job, None before ``start()``."""
        return None if self._popen is None else self._popen.job.id

    @property
    def lost(self) -> str | None:
        """Why the process ended, when neither it nor a signal of ours ended it ("OOMKilled", ...); None otherwise.

        Its exit code is 255 then, unless a better one is known.
        """
        exit = None if self._popen is None else self._popen.exit
        return None if exit is None else exit.reason or (None if exit.code is not None else "for a reason that is not known")


def _checked(cpu: float | str | None, memory: int | str | None, gpu: int | None) -> tuple[Any, Any, Any]:
    """Cores, bytes and devices, from what a user may write; None where nothing is asked for."""
    if cpu is memory is gpu is None:
        return None, None, None
    from fiberexec._options import check_int, sizes

    if gpu is not None:
        check_int("gpu", gpu, 0)
    found = sizes({"cpu": cpu, "memory": memory})
    return found["cpu"], found["memory"], gpu
