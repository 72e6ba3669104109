"""The link between the hub and its agents: requests and answers over mutual TLS. pynng is used here, and nowhere else.

    agent: Dialer.send(message) ─► hub: Listener.received() ... Exchange.answer(message) ─► agent: Dialer.received()

Every request is answered, perhaps much later: that is how the hub reaches an agent. What was sent may have been lost when
the connection was; whoever needs to know numbers his messages (_session).

Rules:
- nng's own threads only put what is done into a deque and wake the loop. Nothing here blocks.
- A process that has a socket of nng must not fork: children of fork() abort.
- No bytes come through before the other end has shown a certificate of this program; its name is that of the exchange.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

import pynng  # type: ignore[import-untyped]
from pynng import ffi, lib

from fiberexec._stream import Buffer

MAX_MESSAGE = 4 << 20  # bytes: what is longer is refused before it is read
_RECEIVING = 4  # exchanges that wait for a request
_UNREAD = 64  # answers on the way by one connection: an agent has only a few requests at once
_RECONNECT = 100, 2000  # milliseconds between attempts, at first and at most

# nng hands every step of a connection to another of its threads. The more there are, the more often one wakes up for what
# another has done already: a message costs half as much with two of them (the fewest that nng takes) as with two a processor.
lib.nng_init_set_parameter(lib.NNG_INIT_NUM_TASK_THREADS, 2)
lib.nng_init_set_parameter(lib.NNG_INIT_NUM_EXPIRE_THREADS, 1)
lib.nng_init_set_parameter(lib.NNG_INIT_NUM_POLLER_THREADS, 1)


class Exchange:
    """One request and its answer. The agent's are used again and again; the hub's belong to whoever has the request."""

    def __init__(self, sock: Any, done: Callable[[Exchange], None]) -> None:
        self.peer = ""  # the name on the certificate
        self.pipe = 0  # which connection the request came by
        self.done = done
        self.step: Callable[[Exchange], None] | None = None  # what follows at once, on nng's thread
        self._self = ffi.new_handle(self)
        self._context = ffi.new("nng_ctx *")
        self._aio = ffi.new("nng_aio **")
        pynng.exceptions.check_err(lib.nng_ctx_open(self._context, sock.socket))
        pynng.exceptions.check_err(lib.nng_aio_alloc(self._aio, _completed, self._self))

    def send(self, parts: Sequence[Buffer]) -> None:
        size = sum(map(len, parts))
        message = ffi.new("nng_msg **")
        pynng.exceptions.check_err(lib.nng_msg_alloc(message, size))
        body = memoryview(ffi.buffer(lib.nng_msg_body(message[0]), size)) if size else b""
        position = 0
        for part in parts:
            end = position + len(part)
            body[position:end] = part  # type: ignore[index]
            position = end
        lib.nng_aio_set_msg(self._aio[0], message[0])
        lib.nng_ctx_send(self._context[0], self._aio[0])

    def receive(self) -> None:
        lib.nng_ctx_recv(self._context[0], self._aio[0])

    def failed(self) -> bool:
        """Whether the last step failed. What could not be sent is thrown away."""
        if not lib.nng_aio_result(self._aio[0]):
            return False
        message = lib.nng_aio_get_msg(self._aio[0])
        if message != ffi.NULL:
            lib.nng_msg_free(message)
            lib.nng_aio_set_msg(self._aio[0], ffi.NULL)
        return True

    def take(self) -> tuple[bytes, Any]:
        """The message that has been received, and nng's pipe that it came by."""
        message = lib.nng_aio_get_msg(self._aio[0])
        lib.nng_aio_set_msg(self._aio[0], ffi.NULL)
        data = ffi.buffer(lib.nng_msg_body(message), lib.nng_msg_len(message))[:]
        pipe = lib.nng_msg_get_pipe(message)
        lib.nng_msg_free(message)
        return data, pipe

    def close(self) -> None:
        lib.nng_ctx_close(self._context[0])
        lib.nng_aio_free(self._aio[0])


@ffi.callback("void(void *)")  # type: ignore[untyped-decorator]
def _completed(handle: Any) -> None:
    exchange = ffi.from_handle(handle)
    if exchange.step is not None:
        step, exchange.step = exchange.step, None
        if not lib.nng_aio_result(exchange._aio[0]):
            step(exchange)
            return
    exchange.done(exchange)


class _End:
    """What both ends have: finished exchanges, and a pipe that becomes readable when there are some."""

    def __init__(self) -> None:
        self._finished: deque[Exchange] = deque()
        self._wake, self._wakeup = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(self._wakeup, False)
        self._exchanges: list[Exchange] = []  # all of them: nng knows them by their address
        self._socket: Any = None

    def _exchange(self) -> Exchange:
        exchange = Exchange(self._socket, self._done)
        self._exchanges.append(exchange)
        return exchange

    def fileno(self) -> int:
        return self._wake

    def _done(self, exchange: Exchange) -> None:
        self._finished.append(exchange)
        try:
            os.write(self._wakeup, b"x")
        except OSError:
            pass  # it is full of such bytes, or closed

    def _clear(self) -> None:
        try:
            while len(os.read(self._wake, 4096)) == 4096:
                pass
        except BlockingIOError:
            pass


class Listener(_End):
    """The hub's end. ``certificate``, ``key`` and ``ca`` are PEM; ``host`` is an address of this machine."""

    def __init__(self, host: str, ca: str, certificate: str, key: str) -> None:
        super().__init__()
        config = _secured(pynng.TLSConfig.MODE_SERVER, ca, certificate, key)
        self._socket = pynng.Rep0(recv_max_size=MAX_MESSAGE, tls_config=config)
        try:
            listener = self._socket.listen(f"tls+tcp://{_bracketed(host)}:0")
        except pynng.NNGException as error:
            raise OSError(f"the hub cannot listen on {host}: {error}") from None
        port = ffi.new("int *")
        pynng.exceptions.check_err(lib.nng_listener_get_int(listener.listener, b"tcp-bound-port", port))
        self.port = int(port[0])
        self._names: dict[int, str] = {}  # by the connection's id
        self._silent: set[int] = set()  # connections that had said nothing when it was looked
        self._spare: list[Exchange] = []
        self._sending: dict[Exchange, None] = {}
        self._unread: Counter[int] = Counter()  # of these, by connection
        self._receiving = 0
        self._listen()

    def received(self) -> list[tuple[Exchange, bytes]]:
        """The requests that have come."""
        self._clear()
        found = []
        while self._finished:
            exchange = self._finished.popleft()
            if exchange in self._sending:
                del self._sending[exchange]
                self._unread[exchange.pipe] -= 1
                if not self._unread[exchange.pipe]:
                    del self._unread[exchange.pipe]
                exchange.failed()
                self._spare.append(exchange)
                continue
            self._receiving -= 1
            if exchange.failed():
                self._spare.append(exchange)
                continue
            data, pipe = exchange.take()
            exchange.pipe = int(lib.nng_pipe_id(pipe))
            exchange.peer = self._name(exchange.pipe, pipe)
            found.append((exchange, data))
        self._listen()
        return found

    def answer(self, exchange: Exchange, parts: Sequence[Buffer]) -> None:
        """Answer a request; an exchange is answered once. Who asks and asks, and reads no answer, loses his connection."""
        self._sending[exchange] = None
        self._unread[exchange.pipe] += 1
        exchange.send(parts)
        if self._unread[exchange.pipe] > _UNREAD:
            self.drop(exchange.pipe)

    def refuse(self, exchange: Exchange) -> None:
        """Close the connection by which a request came."""
        self.drop(exchange.pipe)
        self.answer(exchange, ())

    def drop(self, pipe: int) -> None:
        """Close a connection, if it is open. nng does not notice that the peer has reset one, and keeps its descriptor."""
        which = ffi.new("nng_pipe *")
        which[0].id = pipe
        lib.nng_pipe_close(which[0])
        self._names.pop(pipe, None)

    def sweep(self) -> None:
        """Close the connections that have said nothing, now and at the last call of this: most of their peers have gone."""
        silent = set(self._socket._pipes) - self._names.keys()
        for pipe in silent & self._silent:
            self.drop(pipe)
        self._silent = silent

    def _listen(self) -> None:
        while self._receiving < _RECEIVING:
            exchange = self._spare.pop() if self._spare else self._exchange()
            self._receiving += 1
            exchange.receive()

    def _name(self, id: int, pipe: Any) -> str:
        name = self._names.get(id)
        if name is None:
            if len(self._names) > 10000:
                self._names.clear()
            out = ffi.new("char **")
            if lib.nng_pipe_get_string(pipe, b"tls-peer-cn", out) or not out[0]:
                return ""  # it has gone, or has no name
            name = self._names[id] = ffi.string(out[0]).decode(errors="replace")
            lib.nng_strfree(out[0])
        return name


class Dialer(_End):
    """The agent's end. It connects, and connects again, by itself."""

    def __init__(self, url: str, server: str, ca: str, certificate: str, key: str, exchanges: int) -> None:
        super().__init__()
        config = _secured(pynng.TLSConfig.MODE_CLIENT, ca, certificate, key, server)
        self._socket = pynng.Req0(
            recv_max_size=MAX_MESSAGE,
            tls_config=config,
            resend_time=-1,  # a lost connection is an error, and what was lost is sent again by whoever numbers it
            reconnect_time_min=_RECONNECT[0],
            reconnect_time_max=_RECONNECT[1],
        )
        self._socket.dial(url, block=False)
        self._free = [self._exchange() for _ in range(exchanges)]
        self.waiting = 0  # requests that are not answered yet

    @property
    def free(self) -> int:
        """How many more requests can be sent now."""
        return len(self._free)

    def send(self, parts: Sequence[Buffer]) -> None:
        """Send a request; there must be a free exchange."""
        exchange = self._free.pop()
        self.waiting += 1
        exchange.step = Exchange.receive
        exchange.send(parts)

    def received(self) -> list[bytes | None]:
        """The answers that have come; None for a request whose connection was lost."""
        self._clear()
        found: list[bytes | None] = []
        while self._finished:
            exchange = self._finished.popleft()
            self.waiting -= 1
            self._free.append(exchange)
            found.append(None if exchange.failed() else exchange.take()[0])
        return found

    def close(self) -> None:
        """Close the connection; what is under way is lost."""
        self._socket.close()
        for exchange in self._exchanges:
            exchange.close()  # when nng's threads are done with it: none wakes a descriptor that is somebody else's by now
        os.close(self._wake)
        os.close(self._wakeup)


def _secured(mode: int, ca: str, certificate: str, key: str, server: str | None = None) -> Any:
    """Mutual TLS for one end.

    Version 1.2 and no other: mbed TLS keeps the keys of 1.3 in tables that all connections share, and as pynng builds it
    nothing guards them from nng's threads. Two handshakes at once, or one beside the end of a connection, can damage the heap.
    """
    config = pynng.TLSConfig(
        mode,
        server_name=server,
        ca_string=ca,
        own_cert_string=certificate,
        own_key_string=key,
        auth_mode=pynng.TLSConfig.AUTH_MODE_REQUIRED,
    )
    version = lib.NNG_TLS_1_2
    pynng.exceptions.check_err(lib.nng_tls_config_version(config._tls_config, version, version))
    return config


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
