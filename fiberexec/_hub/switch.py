"""The switch: the hub's ends of the links to all agents.

    owner of a worker ─ Unix socket ─► Relay ─► AgentLink ═ link ═► agent ─► worker
    agent ═ link ═► AgentLink ─► socketpair ─► the hub itself, for what processes of the job ask of it

Rules:
- An agent is known by the name on its certificate, which is its job's, and by the session that it began with; another
  that claims the same is refused.
- What arrives is a session's packets; nothing in a channel is looked at.
- An agent is given up when nothing has been heard of it for its ``driver_timeout`` and a margin: by then it has ended itself.
"""

from __future__ import annotations

import errno
import resource
import sys
from collections import deque
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from fiberexec import _platform
from fiberexec._hub.shared import Timer
from fiberexec._relay import IN, Relays
from fiberexec._session import CLOSE, CONTROL, PARKED, Session, decode, encode, read_header
from fiberexec._stream import Buffer, ProtocolError

if TYPE_CHECKING:
    from fiberexec._hub.server import Hub
    from fiberexec._link import Exchange, Listener

BEATS = 10  # answers in driver_timeout, whatever there is to say
LONGEST_PAUSE = 2.0  # seconds between them
MARGIN = 5.0  # seconds beyond driver_timeout
SILENCE = 10.0  # seconds after which, at most twice, a connection that has said nothing is closed
_UNHEARD = 1 << 18  # packets on the way to an agent, beyond which it cannot ask for more
_SHARE = 8  # a channel takes two descriptors: no job has more than a quarter of all


class AgentLink:
    """One agent. ``obey`` takes what it says, ``lost`` is called with the reason when it is given up."""

    def __init__(self, switch: Switch, timeout: float, obey: Callable[..., None], lost: Callable[[str], None]) -> None:
        self._switch = switch
        self._timeout = timeout
        self._obey = obey
        self._lost = lost
        self._session: Session | None = None  # from its first message on
        self._parked: deque[tuple[Listener, Exchange]] = deque()  # requests that wait for an answer
        self._pipe = 0  # the connection that it uses
        self._listener: Listener | None = None  # by which that came
        self._old_pipes: set[int] = set()
        self._heard = 0.0
        self._beaten = 0.0
        self._looked = 0.0  # for what is overdue
        self._closed = False
        self.job: Any = None  # whose agent it is
        self.relays = Relays(self._push, switch.hub, self._opened)

    def hear(self, listener: Listener, exchange: Exchange, data: bytes) -> None:
        """A request has come. Raises ProtocolError."""
        if self._session is None:
            self._session = Session(read_header(data)[0])
            self._beat()
        packets = self._session.accept(data)
        self._heard = monotonic()
        self._session.stamp = self._session.heard  # that is what the agent's life depends on
        if exchange.pipe != self._pipe and exchange.pipe not in self._old_pipes:
            self._drop()
            self._old_pipes.add(self._pipe)
            self._pipe, self._listener = exchange.pipe, listener
            while self._parked:
                old, waiting = self._parked.popleft()
                old.answer(waiting, ())
            self._session.rewind()
        try:
            for packet in packets:
                if self._closed:
                    break  # what was said before has ended the job
                if packet.kind == CONTROL:
                    self._obey(*decode(packet.data))
                else:
                    self.relays.handle(packet)
        except (ProtocolError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            self._lost(f"its agent said what nobody understands, as of another version of fiberexec: {error!r}")
            raise ProtocolError("no agent of this version") from error
        if self._closed or exchange.pipe != self._pipe:
            listener.answer(exchange, ())
            return
        self._parked.append((listener, exchange))
        self._switch.speaking[self] = None

    def say(self, *message: object) -> None:
        """Tell the agent something."""
        self._push(CONTROL, 0, encode(*message))

    def speak(self) -> None:
        """Send what there is to be sent, as far as requests are waiting for it."""
        session = self._session
        if session is None:
            return
        while self._parked and (session.has_output or len(self._parked) > PARKED):
            listener, exchange = self._parked.popleft()
            listener.answer(exchange, session.take())

    def retire(self) -> None:
        """The agent has gone: nothing of it is accepted any more, and what has come is passed on."""
        self._closed = True
        for relay in list(self.relays.channels.values()):
            relay.end()
        while self._parked:
            listener, exchange = self._parked.popleft()
            listener.answer(exchange, ())
        self._switch.hub.at(monotonic() + MARGIN, Timer(self._drop))  # when it has heard that

    def _drop(self) -> None:
        """Close the connection that is in use no more."""
        if self._listener is not None:
            self._listener.drop(self._pipe)

    def _push(self, kind: int, channel: int, data: Buffer = b"") -> None:
        if self._session is not None:
            self._session.push(kind, channel, data)
            self._switch.speaking[self] = None

    def _opened(self, channel: int) -> None:
        """A process of the job wants to talk to the hub."""
        assert self._session is not None
        if channel % 2 == 0 or channel in self.relays.channels:
            raise ProtocolError(f"channel {channel} is the hub's, or open")
        if self._session.unheard > _UNHEARD:
            raise ProtocolError("an agent that asks and does not listen")
        try:
            if len(self.relays.channels) >= self._switch.channels:
                raise OSError(errno.EMFILE, "this job's share of the hub's descriptors is used up")
            ours, theirs = _platform.stream_pair()
        except OSError:  # out of descriptors: as if the hub did not listen
            self._push(CLOSE, channel)
            return
        self.relays.add(channel, theirs)
        self._switch.hub.welcome(ours, self)

    def _beat(self) -> None:
        """Answer one request from time to time, so that the agent knows of the hub, and the hub of the agent."""
        if self._closed:
            return
        now = monotonic()
        pause = min(self._timeout / BEATS, LONGEST_PAUSE)
        if self._heard and now > self._heard + self._timeout + MARGIN:
            self._lost("its agent has not been heard of")
            return
        if self._parked and self._heard >= self._beaten:  # no more than one answer to an agent that says nothing
            assert self._session is not None
            self._beaten = now
            if now > self._looked + self._timeout / BEATS:
                self._looked = now
                if self._session.overdue():
                    self._session.rewind()
            listener, exchange = self._parked.popleft()
            listener.answer(exchange, self._session.take())
        self._switch.hub.at(now + pause, Timer(self._beat))


class Switch:
    """All links, and the listeners that they come by."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.links: dict[str, AgentLink] = {}  # by the job's id
        self.speaking: dict[AgentLink, None] = {}  # those that may have something to send
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.channels = sys.maxsize if descriptors == resource.RLIM_INFINITY else descriptors // _SHARE  # that a job may have
        self._listeners: dict[tuple[str, str], Listener] = {}  # by address and authority: a forked process has its own

    def listen(self, host: str, ca: str, certificate: str, key: str) -> int:
        """Listen for agents on an address of this host; returns the port. Raises OSError."""
        listener = self._listeners.get((host, ca))
        if listener is None:
            from fiberexec._link import Listener

            listener = self._listeners[host, ca] = Listener(host, ca, certificate, key)
            self.hub.follow(listener.fileno(), IN, lambda events: self._hear(listener))
            self._sweep(listener)
        return listener.port

    def _sweep(self, listener: Listener) -> None:
        """Again and again: nng does not notice all that have gone. An agent speaks as soon as it is connected."""
        listener.sweep()
        self.hub.at(monotonic() + SILENCE, Timer(partial(self._sweep, listener)))

    def _hear(self, listener: Any) -> None:
        for exchange, data in listener.received():
            link = self.links.get(exchange.peer)
            try:
                if link is None:
                    raise ProtocolError("no agent of a living job")
                link.hear(listener, exchange, data)
            except (ProtocolError, TypeError, ValueError, LookupError):
                listener.refuse(exchange)

    def speak(self) -> None:
        """Send what there is to be sent."""
        while self.speaking:
            self.speaking.popitem()[0].speak()
