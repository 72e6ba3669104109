"""Lines of a stream that comes in pieces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def split(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The lines, with their ends; the last may have none. However long a line is, each of its bytes is joined once."""
    begun: list[bytes] = []  # of a line whose end is yet to come
    for piece in pieces:
        first, *others = piece.split(b"\n")
        begun.append(first)
        if others:
            yield b"".join([*begun, b"\n"])
            for line in others[:-1]:
                yield line + b"\n"
            begun = [others[-1]]
    if any(begun):
        yield b"".join(begun)
