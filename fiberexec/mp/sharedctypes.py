"""ctypes objects in memory that processes share: multiprocessing's, picklable at any time.

Where processes may be on several hosts there is no such memory, and the objects are the hub's: see `_hubmemory`.
"""

from __future__ import annotations

import ctypes
import weakref
from multiprocessing import sharedctypes as _standard
from multiprocessing.sharedctypes import make_property, typecode_to_type  # type: ignore[attr-defined]
from typing import Any

from fiberexec.mp.context import shares_host
from fiberexec.mp.heap import BufferWrapper

__all__ = ["Array", "RawArray", "RawValue", "Value", "copy", "synchronized"]


class _Wrapper:
    """Keeps the memory of a ctypes object; ``reduce_ctype`` is how the object is pickled."""

    def __init__(self, block: BufferWrapper) -> None:
        self.block = block

    def reduce_ctype(self, obj: Any) -> Any:
        # A copy of the object has the same attributes, but not the memory.
        if ctypes.addressof(obj) != ctypes.addressof(ctypes.c_char.from_buffer(self.block.create_memoryview())):
            return NotImplemented
        return _make, (type(obj), self.block)


def _make(type_: Any, block: BufferWrapper) -> Any:
    """The ctypes object of a type whose memory is ``block``."""
    obj = type_.from_buffer(block.create_memoryview())
    obj._wrapper = _Wrapper(block)
    return obj


def _new(type_: Any) -> Any:
    return _make(type_, BufferWrapper(max(1, ctypes.sizeof(type_))))  # even of no items it has an address


def _is_far(ctx: Any) -> bool:
    """Whether what is made in this context may be for processes of several hosts."""
    method = None if ctx is None else ctx.get_start_method(allow_none=True)
    return method != "local" and not shares_host(method)  # in a job as well, "local" means the job's host


def RawValue(typecode_or_type: Any, *args: Any, ctx: Any = None) -> Any:
    """A ctypes object in shared memory, without a lock; ``args`` initialize it, by default it is zero.

    ``ctx`` is the context whose processes are to share it, by default the default one.
    """
    type_ = typecode_to_type.get(typecode_or_type, typecode_or_type)
    if _is_far(ctx):
        return _hubmemory().copied(type_(*args)) if args else _hubmemory().new(type_)
    obj = _new(type_)
    ctypes.memset(ctypes.addressof(obj), 0, ctypes.sizeof(obj))
    obj.__init__(*args)
    return obj


def RawArray(typecode_or_type: Any, size_or_initializer: Any, *, ctx: Any = None) -> Any:
    """A ctypes array in shared memory, without a lock: of so many zeros, or of the items of a sequence; ``ctx`` as there."""
    type_ = typecode_to_type.get(typecode_or_type, typecode_or_type)
    if isinstance(size_or_initializer, int):
        size, items = size_or_initializer, ()
    else:
        size, items = len(size_or_initializer), size_or_initializer
    if _is_far(ctx):
        return _hubmemory().copied((type_ * size)(*items)) if len(items) else _hubmemory().new(type_ * size)
    obj = _new(type_ * size)
    ctypes.memset(ctypes.addressof(obj), 0, ctypes.sizeof(obj))
    obj.__init__(*items)
    return obj


def Value(typecode_or_type: Any, *args: Any, lock: Any = True, ctx: Any = None) -> Any:
    """A ``RawValue`` with a lock: ``value``, or the fields of a structure, are read and set while it is held.

    ``lock`` may be a lock of yours; False gives the ``RawValue`` itself.
    """
    return _locked(RawValue(typecode_or_type, *args, ctx=ctx), lock, ctx)


def Array(typecode_or_type: Any, size_or_initializer: Any, *, lock: Any = True, ctx: Any = None) -> Any:
    """A ``RawArray`` with a lock, which is held while items are read and set; ``lock`` as in ``Value``."""
    return _locked(RawArray(typecode_or_type, size_or_initializer, ctx=ctx), lock, ctx)


def _locked(obj: Any, lock: Any, ctx: Any) -> Any:
    if lock is False:
        return obj
    if lock is True:
        lock = None
    if lock is not None and not hasattr(lock, "acquire"):
        raise AttributeError(f"{lock!r} has no method 'acquire'")
    return synchronized(obj, lock, ctx)


def _hubmemory() -> Any:
    from fiberexec.mp import _hubmemory

    return _hubmemory


def _in_hub(obj: Any) -> bool:
    return hasattr(type(obj), "load")  # no ctypes object has that


def copy(obj: Any) -> Any:
    """A copy of a ctypes object, in shared memory."""
    if _in_hub(obj):
        return _hubmemory().copied(obj.load())
    made = _new(type(obj))
    ctypes.pointer(made)[0] = obj
    return made


def synchronized(obj: Any, lock: Any = None, ctx: Any = None) -> Any:
    """A wrapper of a ctypes object that holds ``lock``, by default a new RLock, while the object is read or set."""
    assert not isinstance(obj, _standard.SynchronizedBase), "object already synchronized"
    if lock is None:
        if ctx is None:
            from fiberexec import mp as ctx
        lock = ctx.RLock()
    cls: Any = obj._type if _in_hub(obj) else type(obj)
    if issubclass(cls, ctypes._SimpleCData):
        return Synchronized(obj, lock)
    if issubclass(cls, ctypes.Array):
        return (SynchronizedString if cls._type_ is ctypes.c_char else SynchronizedArray)(obj, lock)
    wrapper = _wrappers.get(cls)
    if wrapper is None:
        fields = {name: make_property(name) for name, *_ in cls._fields_}
        wrapper = _wrappers[cls] = type(f"Synchronized{cls.__name__}", (SynchronizedBase,), fields)
    return wrapper(obj, lock)


_wrappers: weakref.WeakKeyDictionary[type, Any] = weakref.WeakKeyDictionary()  # of structures and unions


class SynchronizedBase(_standard.SynchronizedBase):  # type: ignore[type-arg]
    """A ctypes object and its lock: ``get_obj()``, ``get_lock()``; in a ``with`` the lock is held."""

    _obj: Any
    _lock: Any

    def __reduce__(self) -> Any:
        return synchronized, (self._obj, self._lock)

    def get_obj(self) -> Any:
        """The ctypes object itself. Raises TypeError where it is the hub's, for processes of several hosts."""
        if _in_hub(self._obj):
            _hubmemory().no_memory()
        return self._obj


class Synchronized(SynchronizedBase, _standard.Synchronized):  # type: ignore[type-arg]
    """With ``value``."""


class SynchronizedArray(SynchronizedBase, _standard.SynchronizedArray):  # type: ignore[type-arg]
    """With items and slices."""


class SynchronizedString(SynchronizedArray, _standard.SynchronizedString):
    """With ``value`` and ``raw`` as well."""
