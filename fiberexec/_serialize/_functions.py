"""Functions by value, in two steps: made from code and empty cells, then filled, so that they may refer to
themselves.

The globals of a function whose module can be imported are that module's own, wherever it lands. Those of
any other (`__main__`, a notebook, `exec`) land in one namespace per source and receiving process; only the
names that the code refers to travel. The process that a namespace comes from is its authority: a function
that comes back brings no globals, and what changes at the source is changed where it lands. But a value that
has not changed at the source leaves alone what an initializer or a task has made of it: see `_take_over`.
"""

from __future__ import annotations

import builtins
import marshal
import os
import sys
import weakref
from _thread import RLock
from collections import OrderedDict
from types import CellType, CodeType, FunctionType, ModuleType

from ._byname import by_name, home_of, module_by_name
from ._fast import PicklingError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Namespace = dict[str, Any]
    State = dict[str, Any]

_PYTHON = sys.version_info[:2]
_MOST_NAMESPACES = 1024  # what is pushed out is sent as a new namespace next time

# token -> (namespace, whether it is this process's own, what was received: name -> (digest, value)); the same, the
# other way. Strong, so an id is never reused.
_namespaces: OrderedDict[str, tuple[Namespace, bool, dict[str, tuple[int | None, Any]]]] = OrderedDict()
_tokens: dict[int, str] = {}
_lock = RLock()  # guards both; a finalizer may pickle while it is held


def _remember(token: str, namespace: Namespace, own: bool) -> None:
    _namespaces[token] = (namespace, own, {})
    _tokens[id(namespace)] = token
    while len(_namespaces) > _MOST_NAMESPACES:
        _, (old, _, _) = _namespaces.popitem(last=False)
        _tokens.pop(id(old), None)


def _token_of(namespace: Namespace) -> str:
    with _lock:
        token = _tokens.get(id(namespace))
        if token is None:
            token = os.urandom(12).hex()
            _remember(token, namespace, True)
        else:
            _namespaces.move_to_end(token)
        return token


def _namespace(name: str, token: str | None) -> Namespace:
    if token is None:
        __import__(name)
        return sys.modules[name].__dict__
    with _lock:
        known = _namespaces.get(token)
        if known is None:
            _remember(token, {"__name__": name, "__builtins__": builtins.__dict__}, False)
            known = _namespaces[token]
        return known[0]


# -- what code refers to -------------------------------------------------------------------------------------

_names_of: dict[int, tuple[weakref.ref[CodeType], tuple[str, ...], frozenset[str]]] = {}
_opcodes: tuple[dict[int, int], int] | None = None


def _load_opcodes() -> tuple[dict[int, int], int]:
    """Opcodes that name a global, each with the shift that its argument needs; and the prefix for long
    arguments."""
    global _opcodes
    if _opcodes is None:
        from opcode import opmap

        shift = 1 if sys.version_info >= (3, 11) else 0
        table = {opmap["LOAD_GLOBAL"]: shift}
        for name in ("STORE_GLOBAL", "DELETE_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
            if name in opmap:
                table[opmap[name]] = 0
        _opcodes = table, opmap["EXTENDED_ARG"]
    return _opcodes


def references(code: CodeType) -> tuple[tuple[str, ...], frozenset[str]]:
    """The globals that `code` and the code nested in it name, and every name in it (attributes too)."""
    known = _names_of.get(id(code))
    if known is not None and known[0]() is code:
        return known[1], known[2]
    found: dict[str, None] = {}
    every: set[str] = set()
    waiting = [code]
    while waiting:
        one = waiting.pop()
        every.update(one.co_names)
        _scan(one, found)
        waiting.extend(const for const in one.co_consts if type(const) is CodeType)
    result = tuple(found), frozenset(every)
    key = id(code)
    _names_of[key] = (weakref.ref(code, lambda _: _names_of.pop(key, None)), *result)
    return result


def _scan(code: CodeType, found: dict[str, None]) -> None:
    table, extended = _load_opcodes()
    raw, names = code.co_code, code.co_names
    high = 0
    for opcode, low in zip(raw[::2], raw[1::2]):
        if opcode == extended:
            high = (high | low) << 8
            continue
        shift = table.get(opcode)
        if shift is not None:
            found[names[(high | low) >> shift]] = None
        high = 0


def captured_globals(fn: FunctionType) -> State:
    """The globals that `fn` refers to, as they are now."""
    namespace = fn.__globals__
    names, _ = references(fn.__code__)
    captured = {name: namespace[name] for name in names if name in namespace}
    for name in ("__builtins__", "__spec__", "__loader__"):
        captured.pop(name, None)
    executor = getattr(sys.modules.get("concurrent.futures"), "Executor", None)
    if executor is not None:
        for name, value in captured.items():
            if isinstance(value, executor):
                captured[name] = StayedBehind(name)
    return captured


class StayedBehind:
    """In place of an executor among a function's globals: methods of a class often name one that their task never uses."""

    def __init__(self, name: str) -> None:
        self.__dict__["name"] = name

    def __getattr__(self, attribute: str) -> Any:
        raise AttributeError(
            f"the executor {self.__dict__['name']!r} stayed in the process that made it; a task that needs one makes its own: "
            "FiberExecutor(backend='local')"
        )

    def __reduce__(self) -> Any:
        return StayedBehind, (self.__dict__["name"],)


def _submodules(values: list[Any], names: frozenset[str]) -> list[str]:
    """Modules that code reaches as attributes of a captured package: they must be imported where it runs."""
    found = []
    waiting = [value for value in values if isinstance(value, ModuleType) and hasattr(value, "__path__")]
    while waiting:
        package = waiting.pop()
        for name in names:
            full = f"{package.__name__}.{name}"
            module = sys.modules.get(full)
            if module is not None and full not in found and module_by_name(full) is not None:
                found.append(full)
                waiting.append(module)
    return sorted(found)


# -- sending -------------------------------------------------------------------------------------------------


def reduce_function(pickler: Any, fn: FunctionType) -> Any:
    if by_name(fn, fn.__module__, fn.__qualname__):
        return NotImplemented
    code = fn.__code__
    cells = fn.__closure__ or ()
    if cells:
        if pickler.shallow is None:
            pickler.shallow = set()
        pickler.shallow.update(map(id, cells))
    namespace = fn.__globals__
    home = home_of(namespace)
    token: str | None = None
    captured: State = {}
    if home is None:
        token, captured = _token_of(namespace), captured_globals(fn)
        home = namespace.get("__name__")
        if type(home) is not str:
            home = "__main__"
        if namespace.get("__package__"):
            captured["__package__"] = namespace["__package__"]
    digests = pickler.digests(namespace, captured)
    contents = [(cell, cell.cell_contents) for cell in cells if _filled(cell)]
    state: State = {"token": token, "module": fn.__module__, "qualname": fn.__qualname__, "doc": fn.__doc__}
    seen = [*captured.values(), *(value for _, value in contents)]
    for key, value in (
        ("globals", captured),
        ("digests", digests),
        ("cells", contents),
        ("defaults", fn.__defaults__),
        ("kwdefaults", fn.__kwdefaults__),
        ("dict", fn.__dict__),
        ("annotations", _annotations(fn)),
        ("type_params", getattr(fn, "__type_params__", None)),
        ("imports", _submodules(seen, references(code)[1]) if seen else None),
    ):
        if value:
            state[key] = value
    args = (dump_code(code), _PYTHON, home, token, fn.__name__, cells)
    return make_function, args, state, None, None, fill_function


def _filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _annotations(fn: FunctionType) -> dict[str, Any] | None:
    try:
        return fn.__annotations__
    except Exception:  # Python 3.14 evaluates them here
        return None


def dump_code(code: CodeType) -> bytes:
    try:
        return marshal.dumps(code, 2)  # later versions' bytes depend on reference counts: equal code would differ
    except ValueError:
        return marshal.dumps(code)


def reduce_code(pickler: Any, code: CodeType) -> Any:
    return load_code, (dump_code(code), _PYTHON)


def reduce_cell(pickler: Any, cell: CellType) -> Any:
    if (pickler.shallow is not None and id(cell) in pickler.shallow) or not _filled(cell):
        return CellType, ()
    return CellType, (), (cell.cell_contents,), None, None, fill_cell


# -- receiving -----------------------------------------------------------------------------------------------


def load_code(data: bytes, python: tuple[int, int]) -> CodeType:
    if tuple(python) != _PYTHON:
        raise PicklingError(
            "a function or class travels by value only between equal Python versions: it comes from "
            f"{python[0]}.{python[1]}, this process runs {_PYTHON[0]}.{_PYTHON[1]}. Put it into a module, or "
            "use an image with that Python."
        )
    code = marshal.loads(data)
    assert type(code) is CodeType
    return code


def make_function(
    data: bytes,
    python: tuple[int, int],
    module: str,
    token: str | None,
    name: str,
    cells: tuple[CellType, ...],
) -> FunctionType:
    return FunctionType(load_code(data, python), _namespace(module, token), name, None, cells or None)


def fill_function(fn: FunctionType, state: State) -> None:
    for name in state.get("imports", ()):
        __import__(name)
    token = state["token"]
    captured = state.get("globals")
    if captured:
        _take_over(fn.__globals__, token, captured, state.get("digests", {}))
    for cell, value in state.get("cells", ()):
        cell.cell_contents = value
    fn.__module__ = state["module"]
    fn.__qualname__ = state["qualname"]
    fn.__doc__ = state["doc"]
    fn.__defaults__ = state.get("defaults")
    fn.__kwdefaults__ = state.get("kwdefaults")
    if "annotations" in state:
        fn.__annotations__ = state["annotations"]
    if "type_params" in state:
        fn.__type_params__ = state["type_params"]  # type: ignore[attr-defined]
    fn.__dict__.update(state.get("dict", ()))


def _take_over(namespace: Namespace, token: str, captured: State, digests: dict[str, int]) -> None:
    """Set globals that have arrived, but for those that have changed here and not where they come from.

    A value is as it was there when its digest is. One without a digest (a function, a class, a module, a queue) is set
    as long as nobody here has bound the name to something else.
    """
    _, own, received = _namespaces.get(token, (None, False, {}))
    for name, value in captured.items():
        if own:
            namespace.setdefault(name, value)
            continue
        digest = digests.get(name)
        if name in namespace:
            known, before = received.setdefault(name, (digest, None))
            if digest == known and (digest is not None or namespace[name] is not before):
                continue
        received[name] = digest, value if digest is None else None
        namespace[name] = value


def fill_cell(cell: CellType, state: tuple[Any]) -> None:
    cell.cell_contents = state[0]
