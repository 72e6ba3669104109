"""Managers: multiprocessing's, with fiberexec's processes and pickling.

A manager's server runs in a process of its own, holds the objects and runs their methods; others hold proxies. Names,
defaults and errors are multiprocessing's. Besides, proxies can be pickled at any time, what is registered may be a lambda
or from ``__main__``, and a manager that has gone is `ManagerLost` for its callers at once.
"""

from __future__ import annotations

import contextlib
import multiprocessing.managers
import multiprocessing.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.context import ProcessError
from multiprocessing.managers import Namespace, RemoteError, Token
from typing import TYPE_CHECKING, Any, ClassVar

from fiberexec.mp import resource_tracker, shared_memory
from fiberexec.mp._proxies import SERIALIZER, AutoProxy, BaseProxy, ManagerLost, Server, proxy_type, reaching, standard

if TYPE_CHECKING:
    from fiberexec.mp._asyncmanager import AsyncManager

__all__ = [
    "AsyncManager",
    "BaseManager",
    "BaseProxy",
    "ManagerLost",
    "Namespace",
    "RemoteError",
    "SharedMemoryManager",
    "SyncManager",
    "Token",
]
util: Any = multiprocessing.util
_END = 5.0  # seconds that a process which will not serve has to end by itself


class BaseManager(multiprocessing.managers.BaseManager):
    """``multiprocessing.managers.BaseManager``, whose process is a job of the backend."""

    _registry: ClassVar[dict[str, tuple[Any, ...]]] = {}
    _Server: ClassVar[type[Server]] = Server
    _auto: ClassVar[Callable[..., Any]] = staticmethod(AutoProxy)
    _method: ClassVar[str | None] = None  # the start method of its process; None: the default context's
    _authkey: bytes
    _address: Any
    _serializer: str
    _state: Any
    _ctx: Any
    _Client: Any
    _process: Any

    def __init__(
        self, address: Any = None, authkey: bytes | None = None, serializer: str = "pickle", ctx: Any = None, **options: Any
    ) -> None:
        """The arguments are multiprocessing's, of the Python that runs; "pickle" is fiberexec's pickling."""
        if ctx is None:
            from fiberexec.mp.context import default_context

            ctx = default_context.get_context(self._method)
        super().__init__(address, authkey, SERIALIZER if serializer == "pickle" else serializer, ctx, **options)

    def get_server(self) -> Any:
        """The server, to be run in this process; raises ProcessError for a manager that has been started."""
        self._check_initial()
        return self._Server(self._registry, self._address, self._authkey, self._serializer)

    def start(self, initializer: Callable[..., object] | None = None, initargs: Iterable[Any] = ()) -> None:
        """Start the manager's process, which first calls ``initializer(*initargs)``.

        Raises ProcessError for a manager that has been started, ManagerLost when the process ends before it serves.
        """
        self._check_initial()
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        reader, writer = self._ctx.Pipe(duplex=False)
        key = bytes(self._authkey)
        args = (self._registry, self._address, key, self._serializer, writer, initializer, initargs)
        process = self._ctx.Process(target=type(self)._run_server, args=args)  # type: ignore[attr-defined]
        process.name = f"{type(self).__name__}-{':'.join(map(str, process._identity))}"
        with reader:
            with writer:
                process.start()
            try:
                self._address = reader.recv()
            except BaseException as error:
                process.join(_END if isinstance(error, EOFError) else 0.0)
                if process.is_alive():
                    process.terminate()
                    process.join()
                if not isinstance(error, EOFError):
                    raise
                lost = getattr(process, "lost", None)  # multiprocessing's own has none
                why = f"exit code {process.exitcode}" + (f": {lost}" if lost else "")
                raise ManagerLost(f"the manager's process ended before it served: {why}") from error
        self._process = process
        self._state.value = standard.State.STARTED
        waits = [self._shutdown_timeout] if hasattr(self, "_shutdown_timeout") else []  # from Python 3.11 on
        known = [process, self._address, self._authkey, self._state, self._Client, *waits]
        finalize = type(self)._finalize_manager  # type: ignore[attr-defined]
        self.shutdown = util.Finalize(self, finalize, args=known, exitpriority=0)

    def _create(self, typeid: str, /, *args: Any, **kwds: Any) -> Any:
        with reaching(self._address):
            return super()._create(typeid, *args, **kwds)  # type: ignore[misc]

    def _check_initial(self) -> None:
        if self._state.value != standard.State.INITIAL:
            started = self._state.value == standard.State.STARTED
            raise ProcessError("Already started server" if started else "Manager has shut down")

    @classmethod
    def register(
        cls,
        typeid: str,
        callable: Callable[..., object] | None = None,
        proxytype: Any = None,
        exposed: Sequence[str] | None = None,
        method_to_typeid: Mapping[str, str] | None = None,
        create_method: bool = True,
    ) -> None:
        """Register a type of objects, as multiprocessing's."""
        super().register(typeid, callable, proxytype or cls._auto, exposed, method_to_typeid, create_method)


class SyncManager(BaseManager, multiprocessing.managers.SyncManager):
    """``multiprocessing.managers.SyncManager``: ``Manager()`` is a started one."""


def _pool(*args: Any, **options: Any) -> Any:
    from fiberexec.mp.pool import Pool

    return Pool(*args, **options)


def register_standard(manager: type[BaseManager], base: type[BaseProxy], names: dict[str, Any], prefix: str = "") -> None:
    """Register what multiprocessing's SyncManager has, its proxies derived from ``base``; ``names`` gets their classes."""
    for typeid, (make, exposed, returned, proxytype) in standard.SyncManager._registry.items():
        own = None
        if isinstance(proxytype, type):
            name = prefix + proxytype.__name__
            if name not in names:
                names[name] = type(name, (base, proxytype), {"__module__": names["__name__"], "__doc__": proxytype.__doc__})
            own = names[name]
        with_method = hasattr(standard.SyncManager, typeid)
        manager.register(typeid, _pool if typeid == "Pool" else make, own, exposed, returned, with_method)


register_standard(SyncManager, BaseProxy, globals())


class SharedMemoryServer(Server, standard.SharedMemoryServer):  # type: ignore[misc]
    """The server of a SharedMemoryManager."""

    public = [*{*Server.public, *standard.SharedMemoryServer.public}]  # noqa: RUF012


class SharedMemoryManager(BaseManager, multiprocessing.managers.SharedMemoryManager):
    """``multiprocessing.managers.SharedMemoryManager``: blocks of shared memory on one host, unlinked at its end.

    Its process runs on the host of the process that starts it, whatever the backend, since that makes the blocks.
    """

    _Server = SharedMemoryServer
    _method = "local"

    def SharedMemory(self, size: int) -> shared_memory.SharedMemory:
        """A new block of ``size`` bytes. Raises ManagerLost when the manager has gone."""
        return self._kept(shared_memory.SharedMemory(create=True, size=size))

    def ShareableList(self, sequence: Iterable[Any] | None) -> shared_memory.ShareableList:
        """A new list of these values. Raises ManagerLost when the manager has gone."""
        made = shared_memory.ShareableList(sequence)
        self._kept(made.shm)
        return made

    def _kept(self, block: shared_memory.SharedMemory) -> shared_memory.SharedMemory:
        """A block that the manager's process is to unlink."""
        try:
            with reaching(self._address), self._Client(self._address, authkey=self._authkey) as conn:
                standard.dispatch(conn, None, "track_segment", (block.name,))
        except BaseException:
            block.unlink()
            raise
        return block

    @staticmethod
    def _finalize_manager(process: Any, address: Any, authkey: bytes, state: Any, client: Any, *waits: float) -> None:
        """As the others'; and the tracker, which is to unlink what the manager has not, forgets what it has."""
        names = []
        with contextlib.suppress(Exception), client(address, authkey=authkey) as conn:  # it may have gone
            names = standard.dispatch(conn, None, "list_segments")
        standard.BaseManager._finalize_manager(process, address, authkey, state, client, *waits)
        for name in names:
            try:
                block = shared_memory.SharedMemory(name)
            except FileNotFoundError:
                resource_tracker.register(f"/{name}", "shared_memory")  # if its maker is another process
                resource_tracker.unregister(f"/{name}", "shared_memory")
            else:
                block.close()
                block.unlink()


def MakeProxyType(name: str, exposed: Sequence[str]) -> Any:
    """A class of proxies whose methods are those named in ``exposed``."""
    return proxy_type(BaseProxy, name, tuple(exposed))


def __getattr__(name: str) -> Any:
    if name == "AsyncManager":
        from fiberexec.mp._asyncmanager import AsyncManager

        return AsyncManager
    return getattr(standard, name)
