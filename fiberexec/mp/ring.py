"""Ring: members that know each other, for programs of the all-reduce kind.

    ring.run() ──► N processes:  0 ──► 1 ──► 2 ──► ... ──► 0      each tells its address, and hears all of them;
        ▲                        then initializer(ring, *initargs), then func(rank, size)
        └── results by rank, or what ended the ring

A member that dies or raises ends the ring: the others are stopped, and ``run()`` raises the reason.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from fiberexec._errors import FiberError
from fiberexec._serialize import dump_exception, load_exception
from fiberexec.mp.connection import Connection, wait
from fiberexec.mp.context import FiberContext, default_context

__all__ = ["Ring", "RingBroken", "RingMember", "RingNode", "current_ring"]

_GRACE = 0.5  # seconds after the first failure in which the one that caused it may show
_STOP = 5.0  # seconds that a member has to end after SIGTERM


class RingBroken(FiberError, RuntimeError):
    """A member's process ended before its function had returned; the message says which, and why."""


class RingNode(NamedTuple):
    """Where a member is. Nobody else is given its port, on which it may listen: rank 0 for the others, as a rule."""

    rank: int
    ip: str  # the loopback's, if all members are on one host
    port: int


class RingMember:
    """The ring as a member sees it: the argument of ``initializer``, and what `current_ring()` returns."""

    rank: int  # 0 to size - 1
    size: int  # how many members there are
    members: list[RingNode]  # by rank
    previous: Connection  # to the member before this one, for both directions
    next: Connection  # to the member after this one

    def __init__(self, ring: Ring, rank: int, control: Connection, previous: Connection, next: Connection) -> None:
        self.rank, self.size, self.members = rank, ring.size, []
        self.previous, self.next = previous, next
        self._ring, self._control = ring, control
        if hasattr(ring.func, "__fiberexec_meta__"):
            self.__fiberexec_meta__ = ring.func.__fiberexec_meta__  # where Process looks for it

    def shift(self, value: Any) -> Any:
        """Give ``value`` to the next member and return what the previous one gives; every member has to call it.

        Raises EOFError or OSError when a neighbour has gone.
        """
        if self.size == 1:
            return value
        if self.rank % 2:  # somebody has to receive first, or all would wait until there is room for what they send
            received = self.previous.recv()
            self.next.send(value)
            return received
        self.next.send(value)
        return self.previous.recv()

    def __call__(self) -> None:
        """Be that member: what the process does."""
        global _current
        try:
            with socket.socket() as reserved:
                reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # who listens there does the same
                reserved.bind(("", 0))
                self._control.send(("address", _address(reserved)))
                self.members = self._control.recv()
                _current = self
                if self._ring.initializer is not None:
                    self._ring.initializer(self, *self._ring.initargs)
                result = self._ring.func(self.rank, self.size)
            self._control.send(("result", result))
        except Exception as error:
            self._control.send(("failure", dump_exception(error)))
            sys.exit(1)


def _address(sock: socket.socket) -> tuple[str, str, int]:
    """This host, an address of it for the others, and the socket's port."""
    host = socket.gethostname()
    try:
        ip = socket.gethostbyname(host)
    except OSError:
        ip = "127.0.0.1"
    return host, ip, sock.getsockname()[1]


_current: RingMember | None = None


def current_ring() -> RingMember:
    """The ring that this process is a member of. Raises RuntimeError where there is none."""
    if _current is None:
        raise RuntimeError("this process is no member of a ring: call current_ring() in the function that Ring.run() runs")
    return _current


class Ring:
    """``processes`` members, each a `Process`, which all run ``func(rank, size)``.

    ``initializer(ring, *initargs)`` is called before that in each member, with its `RingMember`: to set up
    ``torch.distributed`` and the like, with the address of ``ring.members[0]``. `@meta` of ``func`` sizes the processes.
    Raises ValueError for less than one process.
    """

    def __init__(
        self,
        processes: int,
        func: Callable[[int, int], Any],
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        *,
        context: FiberContext | None = None,
    ) -> None:
        if processes < 1:
            raise ValueError(f"a ring has at least one process, not {processes}")
        self.size = processes
        self.func = func
        self.initializer = initializer
        self.initargs = tuple(initargs)
        self._context = context

    def __reduce__(self) -> Any:
        return Ring, (self.size, self.func, self.initializer, self.initargs)  # a context stays where it is

    def run(self) -> list[Any]:
        """Start the members, wait for all, and return what their functions returned, by rank.

        Raises what a member raised, or RingBroken when one died; the others have ended by then.
        """
        context = self._context or default_context.get_context()
        controls = [context.Pipe() for _ in range(self.size)]
        links = [context.Pipe() for _ in range(self.size)]  # from each to the next
        processes: list[Any] = []
        with contextlib.ExitStack() as stack:
            for pair in [*controls, *links]:
                for end in pair:
                    stack.callback(end.close)
            stack.callback(_stop, processes)
            for rank, (_, control) in enumerate(controls):
                member = RingMember(self, rank, control, links[rank - 1][1], links[rank][0])
                process = context.Process(target=member, name=f"Ring-{rank}")
                process.start()
                processes.append(process)
            for end in [*(control for _, control in controls), *(end for link in links for end in link)]:
                end.close()  # so that a member that has gone is heard by its neighbours
            results = _Hearing([control for control, _ in controls], processes).wait()
            for process in processes:
                process.join()
        return results


class _Hearing:
    """What has been heard of a ring's members."""

    def __init__(self, controls: list[Connection], processes: list[Any]) -> None:
        self._controls = controls
        self._processes = processes
        self._addresses: dict[int, tuple[str, str, int]] = {}
        self._results: dict[int, Any] = {}
        self._failures: dict[int, BaseException] = {}

    def wait(self) -> list[Any]:
        """The results by rank; raises the failure that the others came from."""
        deadline: float | None = None
        while left := self._left():
            timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
            ranks = {thing: rank for rank in left for thing in (self._controls[rank], self._processes[rank].sentinel)}
            ready = wait(list(ranks), timeout)
            for rank in {ranks[thing] for thing in ready}:
                self._hear(rank)
            if self._failures and deadline is None:
                deadline = time.monotonic() + _GRACE
            elif timeout is not None and not ready:
                break
        if self._failures:
            raise min(self._failures.values(), key=_distance)
        return [self._results[rank] for rank in range(len(self._processes))]

    def _left(self) -> list[int]:
        return [rank for rank in range(len(self._processes)) if rank not in self._results and rank not in self._failures]

    def _hear(self, rank: int) -> None:
        """A member has said something, or has ended."""
        control, process = self._controls[rank], self._processes[rank]
        control.whole = False
        try:
            if not control.poll():
                raise EOFError
            kind, value = control.recv()
        except Exception as error:
            if isinstance(error, (EOFError, OSError)) and not control.whole:
                process.join(_STOP)
                error = RingBroken(f"member {rank} of {len(self._processes)} {_reason(process)}")
            self._failures[rank] = error
        else:
            if kind == "address":
                self._addresses[rank] = value
                if len(self._addresses) == len(self._processes):
                    self._introduce()
            elif kind == "result":
                self._results[rank] = value
            else:
                self._failures[rank] = load_exception(value)

    def _introduce(self) -> None:
        """Tell every member where all are."""
        one_host = len({host for host, _, _ in self._addresses.values()}) == 1
        known = sorted(self._addresses.items())
        members = [RingNode(rank, "127.0.0.1" if one_host else ip, port) for rank, (_, ip, port) in known]
        for control in self._controls:
            with contextlib.suppress(OSError):  # it has ended, which is heard next
                control.send(members)


def _distance(failure: BaseException) -> int:
    """How likely a failure is the consequence of another one: neighbours of a member that has gone read EOF."""
    if isinstance(failure, RingBroken):
        return 0
    return 2 if isinstance(failure, (EOFError, OSError)) else 1


def _reason(process: Any) -> str:
    code = process.exitcode
    if process.lost:
        return f"was lost: {process.lost}"
    if code is None:
        return "closed its connection, and goes on"
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code} before its function had returned"


def _stop(processes: list[Any]) -> None:
    """End the members that are left."""
    for process in processes:
        if process.is_alive():
            process.terminate()
    deadline = time.monotonic() + _STOP
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
