"""Plain values to bytes and back: all that an idle worker needs. The rest of the package loads when it is
first used.

Rules
- An entry of type `bytes` in a list of buffers arrives as `bytes`, any other as a fresh writable `bytearray`.
- Large `bytes` at the top travel as a buffer, so that neither side copies them.
"""

from __future__ import annotations

import _pickle as pickle  # the same functions: the module around them costs a worker 3 ms

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

Buffer = bytes | bytearray | memoryview

PROTOCOL = 5
LARGE = 64 * 1024  # bytes: a top-level `bytes` of this size travels without a copy

# Types whose exact instances run no code of the user's when they are pickled, compared or dropped.
_SMALL: frozenset[type] = frozenset([int, float, complex, bool, type(None), str, type(Ellipsis), type(NotImplemented)])
PLAIN: frozenset[type] = _SMALL | {bytes}

_FLAT: frozenset[type] = frozenset([tuple, list, dict, bytes])
_FEW = 1000  # elements: to look at more of them costs more than the pickler that it saves

_only_small = _SMALL.issuperset
_only_plain = PLAIN.issuperset
_plain_dumps = pickle.dumps
_plain_loads = pickle.loads


class PicklingError(pickle.PicklingError):
    """A value cannot be sent to another process; the message says which, and where it is held.

    The exception that pickling met is the ``__cause__``. Remedy: leave the named attribute out
    (``__getstate__``), or make the object anew where it is needed: in an initializer, or in the task itself.
    """


def _first_dump(root: Any, what: str) -> tuple[bytes, list[Buffer]]:
    """Load the whole pickler, then stay out of the way."""
    global _dump
    from ._pickler import dump

    _dump = dump
    return dump(root, what)


_dump: Callable[[Any, str], tuple[bytes, list[Buffer]]] = _first_dump


def is_plain(values: list[Any]) -> bool:
    """Whether all `values` are exact plain atoms and none is a large `bytes`: safe to pickle in any thread,
    at once."""
    kinds = set(map(type, values))
    if not _only_plain(kinds):
        return False
    return bytes not in kinds or all(len(value) < LARGE for value in values if type(value) is bytes)


def dumps_plain(values: Any) -> bytes:
    """Pickle what `is_plain` has said yes to, columns of it too."""
    return _plain_dumps(values, PROTOCOL)


def dumps(obj: Any) -> tuple[bytes, list[Buffer]]:
    """Pickle `obj`: the stream, and the buffers that travel beside it. Raises `PicklingError`."""
    return _dump(obj, "object")


def dumps_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bytes, list[Buffer]]:
    """Pickle the arguments of a call; `loads` gives ``(args, kwargs)``. Raises `PicklingError`."""
    if _only_small(map(type, args)):
        if not kwargs or _only_small(map(type, kwargs.values())):
            return _plain_dumps((args, kwargs), PROTOCOL), []
    elif not kwargs:
        for arg in args:
            if type(arg) not in _SMALL and not _is_flat(arg):
                break
        else:
            return _plain_dumps((args, kwargs), PROTOCOL), []
    large = {id(arg): arg for arg in args if type(arg) is bytes and len(arg) >= LARGE}
    if large:
        wrapped = {key: pickle.PickleBuffer(value) for key, value in large.items()}
        args = tuple([wrapped.get(id(arg), arg) for arg in args])
    return _dump((args, kwargs), "call")


def _is_flat(value: Any) -> bool:
    """Whether `value` is an exact built-in container of atoms, or short `bytes`: then pickle needs none of
    our help."""
    kind = type(value)
    if kind is dict:
        return _only_small(map(type, value)) and _only_small(map(type, value.values()))
    if kind is tuple or kind is list:
        return _only_small(map(type, value))
    return kind is bytes and len(value) < LARGE


def dumps_result(value: Any) -> tuple[bytes, list[Buffer]]:
    """Pickle what a task returned. Raises `PicklingError`."""
    kind = type(value)
    if kind in _SMALL or _is_flat(value):
        return _plain_dumps(value, PROTOCOL), []
    if (kind is bytes or kind is bytearray) and len(value) >= LARGE:
        value = pickle.PickleBuffer(value)
    return _dump(value, "result")


def dumps_pieces(obj: Any, descriptors: list[int] | None = None) -> list[Buffer]:
    """Pickle `obj` into one stream, given as the pieces to be sent one after the other: large data is among
    them uncopied. Raises `PicklingError`.

    Copies of descriptors that have to be sent beside it are added to ``descriptors``; None: none can be."""
    kind = type(obj)
    if kind in _SMALL or (kind in _FLAT and (kind is bytes or len(obj) <= _FEW) and _is_flat(obj)):
        return [_plain_dumps(obj, PROTOCOL)]
    return _dump_pieces(obj, descriptors)


def _first_pieces(root: Any, descriptors: list[int] | None) -> list[Buffer]:
    global _dump_pieces
    from ._pickler import dump_pieces

    _dump_pieces = dump_pieces
    return dump_pieces(root, descriptors)


_dump_pieces: Callable[[Any, list[int] | None], list[Buffer]] = _first_pieces


def loads(data: Buffer, buffers: Sequence[Buffer] = ()) -> Any:
    """The object that `dumps`, `dumps_call` or `dumps_result` pickled; raises whatever its rebuilding
    raises."""
    return _plain_loads(data, buffers=buffers)
