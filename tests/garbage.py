"""Bytes that are no frames of a stream, or are changed ones."""

from __future__ import annotations

import random

from fiberexec._stream import pack


def mutate(rng: random.Random, frame: bytes, bulk: int) -> bytes:
    """``frame`` with a change before its last ``bulk`` bytes. What is cut off is no change: the rest may come."""
    end = len(frame) - bulk
    place = rng.randrange(end)
    kind = rng.randrange(6)
    if kind == 0:  # flip a bit
        return frame[:place] + bytes([frame[place] ^ 1 << rng.randrange(8)]) + frame[place + 1 :]
    if kind == 1:  # bytes that are others
        size = min(rng.randint(1, 8), end - place)
        other = rng.randbytes(size)
        if other == frame[place : place + size]:
            other = bytes(255 - byte for byte in other)
        return frame[:place] + other + frame[place + size :]
    if kind == 2:  # bytes too many, of which the first differs from what was there
        return frame[:place] + bytes([255 - frame[place]]) + rng.randbytes(rng.randint(0, 8)) + frame[place:]
    if kind == 3:  # cut off
        return frame[:place]
    if kind == 4:  # bytes missing, replaced by noise at the end
        cut = rng.randint(1, 8)
        return frame[:place] + frame[place + cut :] + rng.randbytes(cut) if place else rng.randbytes(64)
    words = bytearray(frame)  # a length that is not right
    offset = rng.choice([4, 8])
    words[offset : offset + 4] = rng.choice([0, 1, 2**31 - 1, 2**32 - 1, rng.getrandbits(32)]).to_bytes(4, "little")
    return bytes(words) if bytes(words) != frame else frame[:3] + bytes([frame[3] ^ 255]) + frame[4:]


def any_frame(rng: random.Random) -> tuple[bytes, int]:
    body = rng.randbytes(rng.choice([0, 1, 20, 300]))
    buffers = [rng.randbytes(rng.choice([0, 3, 200, 70_000])) for _ in range(rng.choice([0, 0, 0, 1, 3]))]
    return b"".join(pack(rng.randrange(256), body, buffers)), sum(map(len, buffers))


def garbage(rng: random.Random, frame: bytes, bulk: int = 0) -> bytes:
    """Random bytes, random bytes that begin well, or a mutated frame."""
    kind = rng.randrange(8)
    if kind == 0:
        return rng.randbytes(rng.randint(1, 200))
    if kind == 1:
        return b"FX\x01" + rng.randbytes(rng.randint(0, 200))
    right = frame[: len(frame) - bulk]
    while (data := mutate(rng, frame, bulk)).startswith(right):
        pass  # noise that happens to be what was there
    return data
