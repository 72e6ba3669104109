"""A proxy between agents and their hub: connections through it are slow, or are reset, as a test wants it."""

from __future__ import annotations

import queue
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any


class Proxy:
    """Carries connections to an address, as slowly as one wants, and cuts them when it is told to."""

    def __init__(self, delay: Callable[[], float] = lambda: 0.0, host: str = "127.0.0.1") -> None:
        """``host``: the address of this machine that is called."""
        self.delay = delay
        self.target = ("", 0)
        self.closing = False
        self.cuts = 0
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server((host, 0))
        self.address: tuple[str, int] = self._listener.getsockname()
        self._run(self._accept)

    def _run(self, call: Callable[..., None], *args: Any) -> None:
        self._threads.append(threading.Thread(target=call, args=args))
        self._threads[-1].start()

    def rewrite(self, told: dict[str, Any]) -> None:
        """Let a job's agent come by here."""
        host, _, port = told["hub"][0].rpartition("//")[2].rpartition(":")
        self.target = host, int(port)
        told["hub"] = ["tls+tcp://{}:{}".format(*self.address)]

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self.closing:
                near.close()
                return
            far = socket.create_connection(self.target)
            for end in (near, far):  # only what it is told to delay is to be late
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._pairs.append((near, far))
            for source, sink in ((near, far), (far, near)):
                waiting: queue.Queue[tuple[float, bytes]] = queue.Queue(1000)
                self._run(self._read, source, waiting)
                self._run(self._write, sink, waiting)

    def _read(self, source: socket.socket, waiting: queue.Queue[tuple[float, bytes]]) -> None:
        data = b"begin"
        while data:
            try:
                data = source.recv(1 << 16)
            except OSError:
                data = b""
            waiting.put((time.monotonic() + self.delay(), data))

    def _write(self, sink: socket.socket, waiting: queue.Queue[tuple[float, bytes]]) -> None:
        while True:
            due, data = waiting.get()
            time.sleep(max(0.0, due - time.monotonic()))
            try:
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    return
                sink.sendall(data)
            except OSError:
                if not data:
                    return

    def cut(self) -> None:
        """Reset every connection."""
        pairs, self._pairs = self._pairs, []
        for pair in pairs:
            self.cuts += 1
            for end in pair:
                try:
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass
                end.close()

    def close(self) -> None:
        self.closing = True
        socket.create_connection(self.address).close()
        self.cut()
        for thread in self._threads:
            thread.join()
        self._listener.close()
