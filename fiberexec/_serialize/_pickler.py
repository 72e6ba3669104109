"""The whole pickler: C pickle, protocol 5, and ours for what must travel by value.

    obj ──► Pickler (C) ──► stream of bytes        what `reducer_override` sees, by type:
                 │              + buffers            functions, classes       by name, or by value
                 │                                   arrays, views, cells ... _reducers
                 │                                   everything else          pickle's own way
                 └─ refused? once more, with dill for what pickle refuses
                        └─ again? _diagnose finds the path to the culprit, for the message

Rule: whatever user code raises while it is being pickled comes out as `PicklingError`, but for
`KeyboardInterrupt`.
"""

from __future__ import annotations

import io
import os
import pickle
import types
from zlib import crc32

from . import _reducers
from ._fast import PROTOCOL, Buffer, PicklingError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

IN_BAND = 16 * 1024  # bytes: below this a copy costs less than one more entry in the frame

_REDUCERS = _reducers.REDUCERS
_reduce_other = _reducers.reduce_other
_learn = _reducers.learn
_NO_DATA = (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type)
_SHARED = frozenset(["fiberexec", "multiprocessing", "socket", "_socket"])  # modules of objects that are more than data
_LATE = frozenset(["numpy", "typing", "dataclasses"])


class Pickler(pickle.Pickler):
    """One dump."""

    # ids of the cells whose contents come with a function's state and not with the cell itself
    shallow: set[int] | None = None
    # copies of descriptors that go beside the stream; None: nothing can
    descriptors: list[int] | None = None
    # what undoes the other things that were made for this dump, should it fail
    undo: tuple[Callable[[], None], ...] = ()
    # digests of globals, by the namespace's id and the name
    _digests: dict[tuple[int, str], int | None] | None = None

    def digests(self, namespace: dict[str, Any], captured: dict[str, Any]) -> dict[str, int]:
        """Of captured globals that are data: a number that stays the same as long as the content does."""
        if self._digests is None:
            self._digests = {}
        found = {}
        for name, value in captured.items():
            if not isinstance(value, _NO_DATA):
                key = id(namespace), name
                if key not in self._digests:
                    self._digests[key] = _digest(value)
                digest = self._digests[key]
                if digest is not None:
                    found[name] = digest
        return found

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        reduce = _REDUCERS.get(kind)
        if reduce is not None:
            return reduce(self, obj)
        if kind.__module__ in _LATE and _learn(kind):
            return _REDUCERS[kind](self, obj)
        if type(kind) is type and not issubclass(kind, type):
            return NotImplemented  # an ordinary instance: its class comes by here in its turn
        return _reduce_other(self, obj)


class _Digester(Pickler):
    """Pickles to see whether something has changed. Not what does more than to describe itself when it is pickled."""

    def digests(self, namespace: dict[str, Any], captured: dict[str, Any]) -> dict[str, int]:
        return {}

    def reducer_override(self, obj: Any) -> Any:
        if type(obj).__module__.partition(".")[0] in _SHARED:
            raise PicklingError
        return super().reducer_override(obj)


def _digest(value: Any) -> int | None:
    buffers: list[Buffer] = []
    file = io.BytesIO()
    try:
        _Digester(file, PROTOCOL, buffer_callback=_collector(buffers)).dump(value)
    except (Exception, SystemExit, GeneratorExit):
        return None
    digest = 0
    for buffer in buffers:
        digest = crc32(buffer, digest)
    return hash((file.getvalue(), digest))


class FallbackPickler(Pickler):
    """The second attempt: what pickle refuses, dill may know."""

    def reducer_override(self, obj: Any) -> Any:
        from ._fallback import reduce_with_dill

        reduced = Pickler.reducer_override(self, obj)
        return reduce_with_dill(obj) if reduced is NotImplemented else reduced


def _collector(buffers: list[Buffer]) -> Any:
    def collect(buffer: pickle.PickleBuffer) -> bool:
        """Keep a large buffer out of the stream: False says so to pickle."""
        view = buffer.raw()
        if view.nbytes < IN_BAND:
            return True
        owner = view.obj
        buffers.append(owner if type(owner) is bytes else view)
        return False

    return collect


def dump(root: Any, what: str = "object", in_band: bool = False) -> tuple[bytes, list[Buffer]]:
    """Pickle `root`; `what` ("call", "result", "function", "object") names it in an error's message."""
    buffers: list[Buffer] = []
    file = io.BytesIO()
    pickler = Pickler(file, PROTOCOL, buffer_callback=None if in_band else _collector(buffers))
    try:
        pickler.dump(root)
    except (Exception, SystemExit, GeneratorExit) as error:  # others are no answer of the object's: an interrupt, a stop
        for undo in pickler.undo:
            undo()
        return _second_attempt(root, what, in_band, error)
    return file.getvalue(), buffers


class _Pieces:
    """A file that keeps what the pickler writes as it comes: large data is handed to it as it is."""

    def __init__(self, pieces: list[Any]) -> None:
        self.write = pieces.append


def dump_pieces(root: Any, descriptors: list[int] | None = None) -> list[Buffer]:
    """Pickle `root` into one stream without buffers: its pieces, in their order. What needs a descriptor where it
    arrives adds a copy of its own to `descriptors`."""
    pieces: list[Any] = []
    pickler = Pickler(_Pieces(pieces), PROTOCOL)
    pickler.descriptors = descriptors
    try:
        pickler.dump(root)
    except (Exception, SystemExit, GeneratorExit) as error:
        for undo in pickler.undo:
            undo()
        while descriptors:
            os.close(descriptors.pop())
        return [_second_attempt(root, "object", True, error)[0]]
    return [piece.raw() if type(piece) is pickle.PickleBuffer else piece for piece in pieces]


def _second_attempt(root: Any, what: str, in_band: bool, error: BaseException) -> tuple[bytes, list[Buffer]]:
    refused = isinstance(error, (TypeError, pickle.PicklingError, AttributeError))
    if refused and not isinstance(error, PicklingError):
        buffers: list[Buffer] = []
        file = io.BytesIO()
        pickler = FallbackPickler(file, PROTOCOL, buffer_callback=None if in_band else _collector(buffers))
        try:
            pickler.dump(root)
        except (Exception, SystemExit, GeneratorExit):
            for undo in pickler.undo:  # the first error is the one to tell: the second may only be dill's
                undo()
        else:
            return file.getvalue(), buffers
    from ._diagnose import explain

    raise explain(root, what, error) from error


def dump_in_band(obj: Any) -> bytes:
    """Pickle `obj` into one stream without buffers."""
    return dump(obj, in_band=True)[0]
