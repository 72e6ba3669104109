"""Server and proxies of managers: multiprocessing's, with tickets, so that a proxy travels like any other object.

A *ticket* is a reference to an object in the manager's process that no proxy holds yet. Pickling a proxy takes one, and
who unpickles it, the first time, takes a reference of its own and then gives the ticket back. So the object is there for
the receiver even if the sender has gone. The pickle carries the manager's key too, and is to be kept like it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing.managers
import os
import pickle
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing.process import current_process
from typing import Any

from fiberexec._errors import FiberError, HubLost
from fiberexec._hub import launch
from fiberexec._serialize import PicklingError
from fiberexec.mp.connection import Client, Listener

standard: Any = multiprocessing.managers  # what it has is not all declared
SERIALIZER = "fiberexec"  # connections with fiberexec's pickling, by this name, for all that multiprocessing.managers does
standard.listener_client[SERIALIZER] = (Listener, Client)


class ManagerLost(FiberError, EOFError, ConnectionError):
    """The manager's process has ended or cannot be reached, and what it held is gone. Start another one."""


@contextlib.contextmanager
def reaching(address: Any) -> Iterator[None]:
    """What goes wrong on the way to a manager's process is ManagerLost."""
    try:
        yield
    except ManagerLost:
        raise
    except (EOFError, OSError) as error:
        raise lost(address, error) from error


def lost(address: Any, error: Exception) -> ManagerLost:
    why = str(error) or "its process has ended"
    if isinstance(error, FileNotFoundError) and launch.in_job():
        return ManagerLost(
            f"the manager at {address!r} is gone, or on another host, where only its own processes reach it: start it in the "
            "context of the backend that the processes run on, such as get_context('docker').Manager()"
        )
    return ManagerLost(f"the manager at {address!r} is gone with all that it held: {why}; start another one")


def received(conn: Any, address: Any) -> Any:
    """The reply that a manager's process sends; what unpickling it raises is no matter of the connection."""
    try:
        return conn.recv()
    except (EOFError, OSError) as error:
        if has_read(conn):
            raise
        raise lost(address, error) from error


def has_read(conn: Any) -> bool:
    """Whether the last reply was read to its end, so that the next one can be."""
    return getattr(conn, "whole", False)  # a connection of xmlrpclib's does not tell


def own_error(error: PicklingError) -> BaseException:
    """As multiprocessing has it: if pickling failed since an argument's own code raised something, that."""
    cause = error.__cause__
    return error if cause is None or isinstance(cause, (pickle.PickleError, TypeError, AttributeError)) else cause


class Server(multiprocessing.managers.Server):
    """The server in a manager's process: multiprocessing's, and the tickets of the proxies that travel."""

    public = [*standard.Server.public, "issue", "redeem", "get_proxytype"]  # noqa: RUF012

    listener: Any
    registry: dict[str, tuple[Any, ...]]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.mutex = threading.RLock()  # held while an object is made, whose code may pickle proxies
        self._tickets: dict[int, str] = {}
        self._numbers = itertools.count()

    def serve_client(self, conn: Any) -> None:
        """Answer the calls of one connection. What would end the thread is an answer too, when a method raises it."""
        while True:
            try:
                super().serve_client(conn)
            except BaseException as error:
                if _is_end(conn, error):
                    raise
                try:
                    conn.send(("#TRACEBACK", traceback.format_exc()))
                except OSError:
                    return
            else:  # the server ends; a return would be sent as a reply, which the next call took for its own
                sys.exit()

    def accepter(self) -> None:
        """Let each connection have a thread, as the standard's; not for ever when there is nothing more to come."""
        while True:
            try:
                conn = self.listener.accept()
            except HubLost:
                return
            except OSError:
                continue
            threading.Thread(target=self.handle_request, args=(conn,), daemon=True).start()

    def create(self, c: Any, typeid: str, /, *args: Any, **kwds: Any) -> Any:
        """Make an object, as the standard's; what ends a thread does not end it here."""
        try:
            return super().create(c, typeid, *args, **kwds)
        except Exception:
            raise
        except BaseException as error:
            raise RuntimeError(f"making a {typeid!r} raised {error!r}") from error

    def issue(self, c: Any, ident: str) -> int:
        """A reference to an object, for who is not there yet."""
        self.incref(c, ident)
        ticket = next(self._numbers)
        self._tickets[ticket] = ident
        return ticket

    def redeem(self, c: Any, ticket: int) -> None:
        """Give the reference back; nothing if that has been done: a pickle may be loaded twice."""
        ident = self._tickets.pop(ticket, None)
        if ident is not None:
            self.decref(c, ident)

    def get_proxytype(self, c: Any, typeid: str) -> Any:
        """What makes a proxy of this type, for a process that knows no manager, only a proxy."""
        return self.registry[typeid][-1]


def _is_end(conn: Any, error: BaseException) -> bool:
    """Whether serve_client() itself has ended the thread: the client has gone."""
    below = error.__traceback__ and error.__traceback__.tb_next
    own = below is not None and below.tb_next is None  # raised in its frame
    return isinstance(error, SystemExit) and own and (conn.closed or isinstance(error.__context__, EOFError))


class BaseProxy(multiprocessing.managers.BaseProxy):
    """Base class of proxies: multiprocessing's, which can be pickled at any time, with the key to its manager.

    A call raises what the method raises, and ManagerLost when the manager has gone.
    """

    _token: Any
    _authkey: Any
    _manager: Any
    _Client: Any
    _tls: Any
    _owned_by_manager: bool
    _serializer: str
    _exposed_: tuple[str, ...]
    _isauto = False
    _holder = 0  # the process that holds the reference of this proxy

    def _incref(self) -> None:
        with reaching(self._token.address):
            super()._incref()  # type: ignore[misc]
        self._holder = os.getpid()

    def _callmethod(self, methodname: str, args: Iterable[Any] = (), kwds: Mapping[str, Any] = {}) -> Any:
        """Call a method of the object; return a copy of its result."""
        return self._outcome(*self._reply((self._token.id, methodname, args, kwds)))  # no frame keeps an exception

    def _reply(self, request: tuple[Any, ...]) -> Any:
        """What the manager's process answers, over the connection of this thread."""
        try:
            with reaching(self._token.address):
                if not hasattr(self._tls, "connection"):
                    self._connect()  # type: ignore[attr-defined]
                self._tls.connection.whole = False
                self._tls.connection.send(request)
            return received(self._tls.connection, self._token.address)
        except PicklingError as error:  # nothing has been sent
            raise (reason := own_error(error)) from reason.__cause__
        except BaseException:  # a reply that is still to come must not be taken for the next call's
            if hasattr(self._tls, "connection") and not has_read(self._tls.connection):
                self._tls.connection.close()
                del self._tls.connection
            raise

    def _outcome(self, kind: str, result: Any) -> Any:
        """What a reply says: a value, a proxy of it, or an exception."""
        if kind == "#RETURN":
            return result
        if kind == "#PROXY":
            exposed, token = result
            token.address = self._token.address
            known = self._manager is not None
            make = self._manager._registry[token.typeid][-1] if known else self._request("get_proxytype", token.typeid)
            proxy = make(token, self._serializer, manager=self._manager, authkey=self._authkey, exposed=exposed)
            self._request("decref", token.id)
            return proxy
        try:
            raise standard.convert_to_error(kind, result)
        finally:
            del result  # it refers to this frame

    def _request(self, function: str, *args: Any) -> Any:
        """Call a function of the manager's server."""
        server = getattr(current_process(), "_manager_server", None)
        if server is not None and server.address == self._token.address:
            return getattr(server, function)(None, *args)
        with reaching(self._token.address), self._Client(self._token.address, authkey=self._authkey) as conn:
            return standard.dispatch(conn, None, function, args)

    def __reduce__(self) -> Any:
        ticket = None
        with contextlib.suppress(ManagerLost):  # who unpickles it will hear
            ticket = self._request("issue", self._token.id)
        kwds = {"authkey": bytes(self._authkey)}
        if not self._isauto:
            return rebuild, (type(self), self._token, self._serializer, kwds, ticket)
        return rebuild, (self._auto(), self._token, self._serializer, {**kwds, "exposed": self._exposed_}, ticket)

    @classmethod
    def _auto(cls) -> Callable[..., Any]:
        """What makes such a proxy when its class has no name."""
        return AutoProxy


def rebuild(make: Callable[..., Any], token: Any, serializer: str, kwds: dict[str, Any], ticket: int | None) -> Any:
    """Unpickle a proxy."""
    proxy = standard.RebuildProxy(make, token, serializer, kwds)
    if not (proxy._holder or proxy._owned_by_manager):
        proxy._incref()  # a child of multiprocessing's would do it later
    if ticket is not None:
        proxy._request("redeem", ticket)
    return proxy


@functools.cache
def proxy_type(base: Any, name: str, exposed: tuple[str, ...]) -> Any:
    """A class of proxies with these methods."""
    return type(name, (base, standard.MakeProxyType(name, exposed)), {"_isauto": True})


def AutoProxy(token: Any, serializer: str, *args: Any, base: Any = BaseProxy, **options: Any) -> Any:
    """A proxy with a method for each that the object exposes; the arguments are BaseProxy's."""
    if options.get("exposed") is None:
        probe = base(token, serializer, *args, **options)
        options["exposed"] = probe._request("get_methods", token)
    make = proxy_type(base, f"AutoProxy[{token.typeid}]", tuple(options["exposed"]))
    return make(token, serializer, *args, **options)
