"""CPython's own tests of ``multiprocessing``, of the interpreter that imports this, with ``fiberexec.mp`` in its place.

Nothing is copied. The source of ``test._test_multiprocessing`` is run as this very module, so that a child process which
imports a test's function finds the same module with the same exchange. What is exchanged is what an ``import`` of
``multiprocessing`` gives, in the tests and in the programs that they start; nothing, if FIBEREXEC_CONFORMANCE is "spawn".
"""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.util
import marshal
import os
import re
import types
from pathlib import Path
from typing import Any

import fiberexec

HERE = Path(__file__).parent
STANDARD = os.environ.get("FIBEREXEC_CONFORMANCE") == "spawn"


class Exchanged(types.ModuleType):
    """A module of fiberexec.mp as the tests see it.

    What the tests use of multiprocessing's inner life (private names, modules without public names) is the standard's.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._name = name
        spec = importlib.util.find_spec(f"fiberexec.mp{name}")
        self._ours = importlib.import_module(f"fiberexec.mp{name}") if spec else None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__all__":
            raise AttributeError(name)
        submodule = f"multiprocessing{self._name}.{name}"
        if f"{self._name}.{name}" in EXCHANGED or (not self._name and importlib.util.find_spec(submodule)):
            return exchanged(f"{self._name}.{name}")
        if self._ours is None or (name.startswith("_") and not hasattr(self._ours, name)):
            return getattr(importlib.import_module(f"multiprocessing{self._name}"), name)
        return getattr(self._ours, name)


EXCHANGED: dict[str, Any] = {}


def exchanged(name: str) -> Any:
    """The stand-in of multiprocessing + name, where name is empty or ".connection" and the like."""
    if name not in EXCHANGED:
        EXCHANGED[name] = Exchanged(name)
    return EXCHANGED[name]


def replacement(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
    """``__import__`` for the tests."""
    top, dot, rest = name.partition(".")
    if level or top != "multiprocessing":
        return builtins.__import__(name, globals, locals, fromlist, level)
    if dot:
        module = exchanged(dot + rest)
    return module if dot and fromlist else exchanged("")


class Programs(ast.NodeTransformer):
    """Exchanges the imports in the programs that the tests give to another interpreter, which knows no PYTHONPATH."""

    PATH = f"import sys; sys.path[:0] = {[str(HERE), str(Path(fiberexec.__file__).parents[1])]!r}; "
    IMPORTS = (
        (r"^(\s*)from multiprocessing ", r"\1{path}from fiberexec.mp "),
        (r"^(\s*)import multiprocessing as mp\b", r"\1{path}from fiberexec import mp"),
        (r"^(\s*)import multiprocessing$", r"\1{path}from fiberexec import mp as multiprocessing"),
        (r"^(\s*)import multiprocessing, ", r"\1{path}from fiberexec import mp as multiprocessing; import "),
        (r"^(\s*)from test\._test_multiprocessing ", rf"\1{{path}}from {__name__} "),
    )

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        if isinstance(node.value, str):
            for pattern, text in self.IMPORTS:
                node.value = re.sub(pattern, text.replace("{path}", self.PATH), node.value, flags=re.MULTILINE)
        return node


def compiled(path: str) -> types.CodeType:
    """The tests' code; the first process compiles it for those that follow."""
    cache = Path(os.environ["FIBEREXEC_CONFORMANCE_CACHE"], "spawn" if STANDARD else "fiberexec")
    if cache.exists():
        return marshal.loads(cache.read_bytes())
    tree = ast.parse(Path(path).read_bytes())
    code = compile(tree if STANDARD else Programs().visit(tree), path, "exec", dont_inherit=True)
    draft = cache.with_suffix(f".{os.getpid()}")
    draft.write_bytes(marshal.dumps(code))
    draft.replace(cache)
    return code


def run_source() -> None:
    spec = importlib.util.find_spec("test._test_multiprocessing")
    if spec is None or not spec.origin:
        raise ImportError("no test._test_multiprocessing")
    if not STANDARD:
        namespace["__builtins__"] = {**vars(builtins), "__import__": replacement}
    namespace["__file__"] = spec.origin  # beside it are programs that the tests start
    exec(compiled(spec.origin), namespace)


namespace = globals()
run_source()
if not STANDARD:
    # It looks at the semaphores that multiprocessing makes a condition of.
    namespace["_TestCondition"].check_invariant = lambda test, condition: None
CASES: dict[str, Any] = {"__name__": __name__}
namespace["install_tests_in_module_dict"](CASES, "spawn")
namespace.update(CASES)  # children find them by name
