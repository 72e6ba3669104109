"""The session: whatever becomes of its messages, everything arrives once, in order; what is none is refused."""

from __future__ import annotations

import os
import random
import tracemalloc

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fiberexec._session import CONTROL, DATA, MESSAGE_BYTES, Session, read_header
from fiberexec._stream import ProtocolError

KEY = b"k" * 16
FULL = os.environ.get("FIBEREXEC_CAMPAIGN") == "full"


def joined(session: Session) -> bytes:
    return b"".join(session.take())


class Conversation(RuleBasedStateMachine):
    """Two ends, and a network that loses, repeats and reorders what it carries."""

    def __init__(self) -> None:
        super().__init__()
        self.ends = Session(KEY), Session(KEY)
        self.pushed: tuple[list[bytes], list[bytes]] = [], []
        self.arrived: tuple[list[bytes], list[bytes]] = [], []  # at each end
        self.network: list[tuple[int, bytes]] = []  # (to whom, message)

    @rule(end=st.integers(0, 1), size=st.sampled_from([0, 1, 100, MESSAGE_BYTES - 1, MESSAGE_BYTES]))
    def push(self, end: int, size: int) -> None:
        data = len(self.pushed[end]).to_bytes(4, "big") + bytes(size)
        self.pushed[end].append(data)
        self.ends[end].push(DATA, 7, data)

    @rule(end=st.integers(0, 1))
    def send(self, end: int) -> None:
        self.network.append((1 - end, joined(self.ends[end])))

    @precondition(lambda self: self.network)
    @rule(data=st.data(), stays=st.booleans())
    def deliver(self, data: st.DataObject, stays: bool) -> None:
        index = data.draw(st.integers(0, len(self.network) - 1))
        end, message = self.network[index] if stays else self.network.pop(index)
        self.accept(end, message)

    @precondition(lambda self: self.network)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        self.network.pop(data.draw(st.integers(0, len(self.network) - 1)))

    @rule(end=st.integers(0, 1))
    def rewind(self, end: int) -> None:
        self.ends[end].rewind()

    @rule(end=st.integers(0, 1))
    def look_for_what_is_overdue(self, end: int) -> None:
        self.ends[end].overdue()

    def accept(self, end: int, message: bytes) -> None:
        for packet in self.ends[end].accept(message):
            assert (packet.kind, packet.channel) == (DATA, 7)
            self.arrived[end].append(bytes(packet.data))

    @invariant()
    def what_has_arrived_is_what_was_sent_first(self) -> None:
        for end in (0, 1):
            assert self.arrived[end] == self.pushed[1 - end][: len(self.arrived[end])]

    def teardown(self) -> None:
        """When the network works again, everything arrives, and nothing is kept."""
        for session in self.ends:
            session.rewind()
        for _ in range(3 + sum(map(len, self.pushed))):
            for end in (0, 1):
                self.accept(1 - end, joined(self.ends[end]))
        for end in (0, 1):
            assert self.arrived[end] == self.pushed[1 - end]
            assert not self.ends[end].backlog and not self.ends[end].has_output


TestConversation = Conversation.TestCase
TestConversation.settings = settings(max_examples=2000 if FULL else 60, stateful_step_count=40, deadline=None)


def test_a_late_acknowledgement_after_a_rewind_is_none_of_what_was_never_sent() -> None:
    ours, theirs = Session(KEY), Session(KEY)
    ours.push(DATA, 1, b"x")
    theirs.accept(joined(ours))
    late = joined(theirs)
    ours.rewind()
    assert ours.accept(late) == [] and not ours.backlog
    assert not ours.has_output  # it has arrived: there is nothing to be sent again


def test_what_is_large_travels_in_messages_of_a_bounded_size() -> None:
    session = Session(KEY)
    for _ in range(100):
        session.push(DATA, 1, bytes(MESSAGE_BYTES // 10))
    while session.has_output:
        assert len(joined(session)) <= 1.2 * MESSAGE_BYTES


def test_what_arrives_is_kept_no_longer_than_until_it_is_acknowledged() -> None:
    ours, theirs = Session(KEY), Session(KEY)
    for _ in range(1000):
        ours.push(DATA, 1, bytes(1000))
        theirs.accept(joined(ours))
        ours.accept(joined(theirs))
        assert ours.backlog == 0 and not ours._kept and not theirs._early


def test_overdue_is_what_had_been_sent_when_it_was_asked_for_the_last_time() -> None:
    ours, theirs = Session(KEY), Session(KEY)
    ours.push(DATA, 1, b"x")
    assert not ours.overdue()
    message = joined(ours)
    assert not ours.overdue()
    assert ours.overdue()
    theirs.accept(message)
    ours.accept(joined(theirs))
    assert not ours.overdue()


def examples() -> list[bytes]:
    """Messages as they are in the middle of a conversation."""
    ours, theirs = Session(KEY), Session(KEY)
    found = [joined(ours)]
    for number in range(4):
        ours.push(CONTROL, 0, b"control %d" % number)
        ours.push(DATA, 2, bytes(50))
        found.append(joined(ours))
        theirs.accept(found[-1])
        ours.accept(joined(theirs))
    return found


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    message = bytearray(draw(st.sampled_from(examples())))
    for _ in range(draw(st.integers(1, 4))):
        how = draw(st.sampled_from(["flip", "cut", "insert", "fill", "repeat"]))
        place = draw(st.integers(0, max(0, len(message) - 1)))
        if how == "flip" and message:
            message[place] ^= draw(st.integers(1, 255))
        elif how == "cut":
            del message[place:]
        elif how == "insert":
            message[place:place] = draw(st.binary(min_size=1, max_size=20))
        elif how == "fill":
            message[place : place + 8] = draw(st.sampled_from([b"\xff" * 8, bytes(8)]))
        else:
            message += message[place:]
    return bytes(message)


def offer(message: bytes) -> None:
    """What is no message of this session is a ProtocolError, changes nothing, and costs no more than its own size."""
    session = Session(KEY)
    session.push(DATA, 1, b"mine")
    session.take()
    state = session._received, session.backlog, session._next, session.stamp, session.heard
    try:
        session.accept(message)
    except ProtocolError:
        assert state == (session._received, session.backlog, session._next, session.stamp, session.heard)
        assert not session._early
    assert sum(len(packet.data) for packet in session._early.values()) <= len(message)


@given(st.binary(max_size=200))
@settings(max_examples=200_000 if FULL else 300, deadline=None)
def test_bytes_at_random_are_refused(message: bytes) -> None:
    offer(message)
    with pytest.raises(ProtocolError):
        Session(KEY).accept(message)


@given(mutated())
@settings(max_examples=200_000 if FULL else 500, deadline=None)
def test_a_mutated_message_is_accepted_or_refused_whole(message: bytes) -> None:
    offer(message)


@given(mutated())
@settings(max_examples=1000 if FULL else 100, deadline=None)
def test_a_mutated_message_has_a_header_or_is_a_protocol_error(message: bytes) -> None:
    try:
        key, *_ = read_header(message)
        assert len(key) == 16
    except ProtocolError:
        pass


def test_a_message_of_another_session_is_refused() -> None:
    with pytest.raises(ProtocolError, match="another session"):
        Session(KEY).accept(joined(Session(b"o" * 16)))


def test_an_acknowledgement_of_what_was_never_sent_is_refused() -> None:
    ours, theirs, strangers = Session(KEY), Session(KEY), Session(KEY)
    theirs.push(DATA, 1, b"x")
    ours.accept(joined(theirs))
    with pytest.raises(ProtocolError, match="never sent"):
        strangers.accept(joined(ours))


def test_what_comes_too_long_before_its_turn_is_refused() -> None:
    theirs = Session(KEY)
    for _ in range(100_000):
        theirs.push(DATA, 1)
    while theirs.has_output:
        last = joined(theirs)
    with pytest.raises(ProtocolError, match="future"):
        Session(KEY).accept(last)


def test_what_comes_before_its_turn_is_kept_within_bounds_and_comes_again() -> None:
    """However much it is: the first packet is missing, and what follows is large, or a little of a large message."""
    ours, theirs = Session(KEY), Session(KEY)
    pushed = [bytes([number % 256]) * (1 if number % 2 else MESSAGE_BYTES) for number in range(400)]
    for data in pushed:
        ours.push(DATA, 1, data)
    tracemalloc.start()
    try:
        joined(ours)  # is lost
        early = 0
        while ours.has_output:
            message = joined(ours)
            early += len(message)
            assert theirs.accept(message) == []
        del message
        assert early > 40 << 20 > 4 * tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    arrived: list[bytes] = []
    for _ in range(20):
        ours.rewind()
        while ours.has_output:
            arrived += (bytes(packet.data) for packet in theirs.accept(joined(ours)))
        ours.accept(joined(theirs))
    assert arrived == pushed and not ours.backlog and not theirs._early and not theirs._early_bytes


def test_more_than_is_kept_before_its_turn_arrives_through_a_network_that_reorders() -> None:
    """What is dropped is sent again: each time, at least what comes first gets through."""
    chance = random.Random(5)
    ours, theirs = Session(KEY), Session(KEY)
    pushed = [chance.randbytes(4) + bytes(MESSAGE_BYTES) for _ in range(60)]
    for data in pushed:
        ours.push(DATA, 1, data)
    arrived: list[bytes] = []
    rounds = 0
    while len(arrived) < len(pushed):
        rounds += 1
        assert rounds <= len(pushed), "nothing gets through"
        ours.rewind()
        network = []
        while ours.has_output:
            network.append(joined(ours))
        chance.shuffle(network)
        for message in network:
            arrived += (bytes(packet.data) for packet in theirs.accept(message))
        ours.accept(joined(theirs))
    assert arrived == pushed and not ours.backlog and not theirs._early_bytes
