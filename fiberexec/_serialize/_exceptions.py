"""Exceptions to bytes and back, whatever their shape; neither way raises.

An exception with its causes, contexts and, of a group, members is a graph. It becomes a flat list of nodes,
each with several ways to rebuild it, best first: what the class's own `__reduce__` says; its class, `args`
and attributes without calling `__init__`; a stand-in derived from the nearest base class that can be
imported.
"""

from __future__ import annotations

import pickle
import sys

from ._fast import PROTOCOL, Buffer, loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any

MOST_NODES = 500
_GROUP: Any = getattr(__import__("builtins"), "BaseExceptionGroup", None)
_OWN_STATE = ("__notes__",)


class RemoteTraceback(Exception):
    """The traceback of an exception in the process that raised it, as text; the ``__cause__`` of what
    arrives."""

    def __init__(self, tb: str) -> None:
        super().__init__(tb)
        self.tb = tb

    def __str__(self) -> str:
        return f'\n"""\n{self.tb}"""'


# -- sending -------------------------------------------------------------------------------------------------


def dump_exception(exc: BaseException, traceback_text: str | None = None) -> bytes:
    """See `fiberexec._serialize.dump_exception`."""
    try:
        if isinstance(exc, MemoryError):
            _clear_frames(exc.__traceback__)  # first: they hold what there was no memory for
        if traceback_text is None:
            traceback_text = _format(exc)
        return pickle.dumps((traceback_text, _nodes(exc)), PROTOCOL)
    except BaseException as error:
        text = f"{_name(type(exc))} (it could not be sent: {_safe(repr, error)})"
        return pickle.dumps((traceback_text or "", [_last_resort(exc, text)]), PROTOCOL)


def _format(exc: BaseException) -> str:
    try:
        import traceback

        return "".join(traceback.format_exception(type(exc), exc, exc.__traceback__))
    except BaseException as error:
        return f"{_name(type(exc))} (its traceback could not be formatted: {_safe(repr, error)})\n"


def _clear_frames(tb: TracebackType | None) -> None:
    """As traceback.clear_frames(), whose module there may be no memory to load."""
    while tb is not None:
        try:
            tb.tb_frame.clear()
        except RuntimeError:
            pass  # it is being executed
        tb = tb.tb_next


def _nodes(root: BaseException) -> list[dict[str, Any]]:
    """`root` first, then what it leads to; links between them are places in the list."""
    found = [root]
    places = {id(root): 0}

    def place(exc: BaseException | None) -> int | None:
        if exc is None:
            return None
        if id(exc) not in places:
            if len(found) >= MOST_NODES:
                return None
            places[id(exc)] = len(found)
            found.append(exc)
        return places[id(exc)]

    nodes = []
    for exc in found:  # grows as links are followed
        node = _describe(exc)
        node["cause"] = place(exc.__cause__)
        node["context"] = place(exc.__context__)
        node["suppress"] = exc.__suppress_context__
        if _is_group(exc):
            members = [place(member) for member in exc.exceptions]  # type: ignore[attr-defined]
            node["members"] = [member for member in members if member is not None]
        nodes.append(node)
    return nodes


def _is_group(exc: BaseException) -> bool:
    return _GROUP is not None and isinstance(exc, _GROUP)


def _describe(exc: BaseException) -> dict[str, Any]:
    from ._pickler import dump_in_band

    cls = type(exc)
    node: dict[str, Any] = {"name": cls.__name__, "qualname": cls.__qualname__, "module": cls.__module__}
    node["str"], node["repr"] = _safe(str, exc), _safe(repr, exc)
    node["bases"] = _importable_bases(cls)
    if _has_own_reduce(cls) and not _is_group(exc):
        node["own"] = _attempt(dump_in_band, exc)
    node["class"] = _attempt(dump_in_band, cls)
    args = exc.args
    if _is_group(exc):
        args = (exc.message,)  # type: ignore[attr-defined]
    else:
        try:  # a built-in base may know more than `args` says: OSError its file name
            reduced = _builtin_base(cls).__reduce__(exc)
            if isinstance(reduced, tuple) and isinstance(reduced[1], tuple):
                args = reduced[1]
        except Exception:
            pass
    node["args"] = [_value(arg) for arg in args]
    node["state"] = {key: _value(value) for key, value in vars(exc).items() if type(key) is str}
    for key in ("name", "path", "obj"):  # ImportError, NameError and AttributeError keep these in C
        if isinstance(exc, (ImportError, NameError, AttributeError)) and key not in node["state"]:
            value = getattr(exc, key, None) if key != "obj" else None
            if type(value) is str:
                node.setdefault("fields", {})[key] = value
    return node


def _value(value: Any) -> bytes:
    """`value` pickled; if it refuses, its repr."""
    from ._pickler import dump_in_band

    data = _attempt(dump_in_band, value)
    return pickle.dumps(_safe(repr, value), PROTOCOL) if data is None else data


def _attempt(function: Any, value: Any) -> Any:
    try:
        return function(value)
    except BaseException:
        return None


def _safe(function: Any, value: Any) -> str:
    try:
        text = function(value)
        return str.__str__(text) if isinstance(text, str) else f"<{_name(type(value))}>"
    except BaseException:
        return f"<{_name(type(value))}: its {function.__name__}() raises>"


def _name(cls: type) -> str:
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


def _builtin_base(cls: type) -> Any:
    return next(base for base in cls.__mro__ if base.__module__ == "builtins")


def _has_own_reduce(cls: type) -> bool:
    """Whether the user's class says itself how it is pickled."""
    own = (
        "__reduce__",
        "__reduce_ex__",
        "__getstate__",
        "__setstate__",
        "__getnewargs__",
        "__getnewargs_ex__",
    )
    builtin = _builtin_base(cls)
    return any(getattr(cls, name, None) is not getattr(builtin, name, None) for name in own)


def _importable_bases(cls: type) -> list[tuple[str, str]]:
    """The classes to catch `cls` by, nearest first; not all of them need exist where it arrives."""
    from ._byname import by_name

    return [
        (base.__module__, base.__qualname__)
        for base in cls.__mro__
        if by_name(base, base.__module__, base.__qualname__) and issubclass(base, BaseException)
    ]


def _last_resort(exc: BaseException, text: str) -> dict[str, Any]:
    cls = type(exc)
    base = "Exception" if isinstance(exc, Exception) else "BaseException"
    return {
        "name": cls.__name__,
        "qualname": cls.__qualname__,
        "module": str(cls.__module__),
        "str": text,
        "repr": text,
        "bases": [("builtins", base)],
        "class": None,
        "args": [],
        "state": {},
        "cause": None,
        "context": None,
        "suppress": False,
    }


# -- receiving -----------------------------------------------------------------------------------------------


def load_exception(data: Buffer) -> BaseException:
    """See `fiberexec._serialize.load_exception`."""
    try:
        text, nodes = pickle.loads(data)
        made = _rebuild(nodes)
        exc = made[0]
        if text:
            remote = RemoteTraceback(text)
            remote.__cause__ = exc.__cause__
            exc.__cause__ = remote
        return exc
    except BaseException as error:
        return RuntimeError(f"an exception arrived that cannot be read: {_safe(repr, error)}")


def _rebuild(nodes: list[dict[str, Any]]) -> list[BaseException]:
    made: dict[int, BaseException] = {}
    begun: set[int] = set()

    def make(place: int) -> None:
        """Members first; one that would contain itself is left out."""
        begun.add(place)
        members = nodes[place].get("members", ())
        for member in members:
            if member not in begun:
                make(member)
        made[place] = _make(nodes[place], [made[member] for member in members if member in made])

    for place in range(len(nodes)):
        if place not in begun:
            make(place)
    for place, node in enumerate(nodes):
        exc = made[place]
        if node["cause"] is not None:
            exc.__cause__ = made[node["cause"]]
        if node["context"] is not None:
            exc.__context__ = made[node["context"]]
        exc.__suppress_context__ = node["suppress"]
    return [made[place] for place in range(len(nodes))]


def _make(node: dict[str, Any], members: list[BaseException]) -> BaseException:
    for way in (_make_as_told, _make_without_init):
        try:
            exc = way(node, members)
        except BaseException:
            continue
        if exc is not None:
            return exc
    return _make_stand_in(node, members)


def _make_as_told(node: dict[str, Any], members: list[BaseException]) -> BaseException | None:
    own = node.get("own")
    exc = loads(own) if own is not None else None
    return exc if isinstance(exc, BaseException) else None


def _make_without_init(node: dict[str, Any], members: list[BaseException]) -> BaseException | None:
    if node["class"] is None:
        return None
    cls = loads(node["class"])
    args = tuple([loads(arg) for arg in node["args"]])
    if "members" in node:
        exc = _GROUP.__new__(cls, *args, members)
    else:
        builtin = _builtin_base(cls)
        exc = builtin.__new__(cls, *args)
        builtin.__init__(exc, *args)
    for key, value in node.get("fields", {}).items():
        setattr(exc, key, value)
    _restore(exc, node)
    return exc if isinstance(exc, BaseException) else None


def _restore(exc: BaseException, node: dict[str, Any]) -> None:
    for key, value in node["state"].items():
        try:
            vars(exc)[key] = loads(value)
        except BaseException:
            vars(exc)[key] = "<an attribute that cannot be rebuilt here>"


def _make_stand_in(node: dict[str, Any], members: list[BaseException]) -> BaseException:
    """An exception of a class that looks like the original and is caught by its nearest importable base."""
    text, shown = node["str"], node["repr"]
    space = {
        "__module__": node["module"],
        "__qualname__": node["qualname"],
        "__str__": lambda self: text,
        "__repr__": lambda self: shown,
        "__reduce__": _reduce_stand_in,
        "__doc__": "Stands in for an exception whose class cannot be rebuilt in this process.",
        "_fiberexec_node": {**node, "class": None, "own": None},
    }
    for module, qualname in node["bases"]:
        try:
            __import__(module)
            base: Any = sys.modules[module]
            for part in qualname.split("."):
                base = getattr(base, part)
            cls: Any = type(node["name"], (base,), space)
            exc: BaseException
            if _GROUP is not None and issubclass(cls, _GROUP) and members:
                exc = _GROUP.__new__(cls, text, members)
            else:
                exc = _builtin_base(cls).__new__(cls)
                exc.args = (text,)
            _restore(exc, node)
            return exc
        except BaseException:
            continue
    return RuntimeError(shown)


def _reduce_stand_in(self: BaseException) -> Any:
    return _make_stand_in, (type(self)._fiberexec_node, list(getattr(self, "exceptions", ())))  # type: ignore[attr-defined]
