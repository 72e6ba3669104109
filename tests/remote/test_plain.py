"""Messages of those who may be anybody: read as they were written, or refused at the cost of their own size."""

from __future__ import annotations

import os
import pickle
import random
import time
import tracemalloc
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from fiberexec import _messages as messages
from fiberexec._hub import plain
from fiberexec._stream import ProtocolError

FULL = os.environ.get("FIBEREXEC_CAMPAIGN") == "full"
COUNT = 500_000 if FULL else 20_000

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
KEYS = st.none() | st.integers() | st.text() | st.binary()
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(KEYS, inner),
    max_leaves=20,
)
SAID: list[Any] = [
    ("hello", 1, "3.11", 1, "elsewhere", (1.0, 1 << 30, 0), ()),
    ("ended", 1, (0, "", "", False), 0),
    ("output", 1, b"x" * 300, bytearray(b"y"), b"z" * 70_000),
    [(number, -number, number << 40, f"text {number}") for number in range(20)],
    {"a": [1.5, None, True, False, "\udc80"], 3: {}, None: [(), []], b"": "x" * 400},
]

# What makes Python's unpickler take memory or time out of proportion, or end its process.
EMPTY_KEY, END = b"\x80\x05})", b"Ns."
BOMBS = {
    "a place far out in the memo": b"\x80\x05Nr" + (1 << 28).to_bytes(4, "little") + b".",
    "a key that is deep": EMPTY_KEY + b"\x85" * 900_000 + END,
    "a key of twice the same, and so on": EMPTY_KEY + b"2\x86" * 60 + END,
    "a key of twice the same by the memo": EMPTY_KEY + b"".join(b"\x94h%c\x86" % n for n in range(60)) + END,
    "a value of twice the same by the memo": b"\x80\x05)" + b"".join(b"\x94h%c\x86" % n for n in range(49)) + b".",
    "a value that is deep": b"\x80\x05)" + b"\x85" * 900_000 + b".",
    "lists that are deep": b"\x80\x05" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "a list in itself": b"\x80\x05]\x94h\0a.",
    "more bytes than there are": b"\x80\x05\x8e" + (1 << 40).to_bytes(8, "little") + b"x.",
    "a bytearray larger than there is": b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b"x.",
    "a text larger than there is": b"\x80\x05X\xff\xff\xff\xffx.",
    "a number of so many digits": b"\x80\x05L" + b"9" * 500_000 + b"L\n.",
    "a frame larger than there is": b"\x80\x05\x95" + b"\xff" * 8 + b"N.",
    "longer than any": b"\x80\x05B" + (2 << 20).to_bytes(4, "little") + bytes(2 << 20) + b".",
}


@given(VALUES)
@settings(max_examples=20_000 if FULL else 300, deadline=None)
def test_what_was_encoded_is_read_as_it_was(value: Any) -> None:
    assert plain.read(messages.encode(value)) == value


@pytest.mark.parametrize("value", SAID, ids=lambda value: str(value)[:20])
def test_what_is_said_is_read_with_the_same_types(value: Any) -> None:
    body = messages.encode(value)
    for given_as in (body, bytearray(body), memoryview(body)):
        found = plain.read(given_as)
        assert found == value and repr(found) == repr(value)


def test_the_same_tuple_in_two_places_is_read() -> None:
    shared = (1, "x", (2,))
    assert plain.read(messages.encode([shared, (shared, shared)])) == [shared, (shared, shared)]


@pytest.mark.parametrize("body", BOMBS.values(), ids=BOMBS)
def test_what_is_more_than_it_looks_is_refused_at_little_cost(body: bytes) -> None:
    tracemalloc.start()
    began = time.monotonic()
    try:
        with pytest.raises(ProtocolError):
            plain.read(body)
        assert tracemalloc.get_traced_memory()[1] < 100 * len(body) + (1 << 20)
    finally:
        tracemalloc.stop()
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("value", [os.system, ValueError("x"), random.Random, 1j, {(1, 2): 3}, {1, 2}, frozenset()], ids=repr)
def test_what_is_no_plain_value_is_refused(value: object) -> None:
    with pytest.raises(ProtocolError):
        plain.read(pickle.dumps(value, 5))


@pytest.mark.parametrize("protocol", range(4))
def test_other_ways_to_say_it_are_refused(protocol: int) -> None:
    with pytest.raises(ProtocolError):
        plain.read(pickle.dumps(("x", [b"y"]), protocol))


def test_mutated_messages_are_refused_or_plain() -> None:
    """Nothing but a ProtocolError, whatever the bytes are; what is read is plain values."""
    seed = int(time.time()) if FULL else 4
    print("seed", seed)
    chance = random.Random(seed)
    bodies = [messages.encode(value) for value in SAID]
    codes = bytes([0x94, 0x68, 0x6A, 0x28, 0x85, 0x86, 0x87, 0x74, 0x61, 0x65, 0x73, 0x75, 0x5D, 0x7D, 0x29, 0x2E, 0x4E, 0x32])
    read = 0
    for _ in range(COUNT):
        body = bytearray(chance.choice(bodies)[:2000])
        for _ in range(chance.randint(1, 6)):
            place = chance.randrange(len(body))
            how = chance.random()
            if how < 0.4:
                body[place] = chance.randrange(256)
            elif how < 0.6:
                del body[place : place + chance.randint(1, 4)]
                body += b"."
            else:
                body[place:place] = bytes(chance.choices(codes, k=chance.randint(1, 6)))
        try:
            value = plain.read(body)
        except ProtocolError:
            continue
        read += 1
        assert is_plain(value), body
    print(f"{COUNT} messages, {read} of them read")
    assert read > COUNT / 100


def is_plain(value: object) -> bool:
    if type(value) in (tuple, list):
        return all(map(is_plain, value))  # type: ignore[call-overload]
    if type(value) is dict:
        return all(map(is_plain, [*value.keys(), *value.values()]))  # type: ignore[attr-defined]
    return value is None or type(value) in (bool, int, float, str, bytes, bytearray)
