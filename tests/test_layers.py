"""The package's structure: layers import downward only, pynng stays in its modules, modules stay small."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fiberexec

ROOT = Path(fiberexec.__file__).parent
MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
MAX_LINES = 440  # about 400
PYNNG = {"fiberexec._link"}  # the only modules that may import pynng

# A row may import itself and what stands below it. A module that is not named belongs to its package's row.
LAYERS = [
    {"fiberexec.__main__"},
    {"fiberexec.cli"},
    {"fiberexec._cli"},
    {"fiberexec.testing"},
    {"fiberexec.mp"},
    {"fiberexec.executor"},
    {"fiberexec._map", "fiberexec._options", "fiberexec._stats"},
    {"fiberexec._manager"},
    {"fiberexec._switchboard"},
    {
        "fiberexec._connection",
        "fiberexec._futures",
        "fiberexec._initargs",
        "fiberexec._lifetime",
        "fiberexec._outcomes",
        "fiberexec._retry",
        "fiberexec._waiting",
        "fiberexec._waker",
    },
    {"fiberexec.backends.registry", "fiberexec._remote", "fiberexec._launcher", "fiberexec._janitor"},
    {"fiberexec.backends", "fiberexec._agent"},
    {"fiberexec._forkserver"},
    {"fiberexec._task"},
    {"fiberexec._worker"},
    {"fiberexec._bundle"},
    {"fiberexec._scheduler", "fiberexec._outbox"},
    {"fiberexec._hub"},
    {"fiberexec._link", "fiberexec._relay", "fiberexec._session", "fiberexec._tunnel"},
    {"fiberexec.backends.base", "fiberexec._states"},
    {"fiberexec._messages", "fiberexec._serialize", "fiberexec._output", "fiberexec._config"},
    {"fiberexec._stream", "fiberexec._platform", "fiberexec._tls"},
    {"fiberexec._errors", "fiberexec._inherited"},
    {"fiberexec"},
]
LEVEL = {name: level for level, row in enumerate(LAYERS) for name in row}


def level(module: str) -> int:
    """The layer of a module: its own, or that of the nearest package around it that is named."""
    while module not in LEVEL or module == "fiberexec":
        if module == "fiberexec":
            return LEVEL[module]
        module = module.rpartition(".")[0]
    return LEVEL[module]


def is_typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(node: ast.AST, module: str, is_package: bool) -> Iterator[tuple[str, int]]:
    """(module, line) of what a module imports, inside functions too; what only type checkers see is left out."""
    for child in ast.iter_child_nodes(node):
        if is_typing_only(child):
            continue
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield alias.name, child.lineno
        elif isinstance(child, ast.ImportFrom):
            source = child.module or ""
            if child.level:
                parts = module.split(".")[: None if is_package and child.level == 1 else -child.level + is_package]
                source = ".".join(filter(None, [*parts, source]))
            for alias in child.names:
                full = f"{source}.{alias.name}"
                yield (full if full in MODULES else source), child.lineno
        yield from imports(child, module, is_package)


def imported(module: str) -> list[tuple[str, int]]:
    path = MODULES[module]
    return list(imports(ast.parse(path.read_text()), module, path.name == "__init__.py"))


def test_every_module_has_a_layer() -> None:
    unnamed = [name for name in MODULES if name != "fiberexec" and level(name) == LEVEL["fiberexec"]]
    assert not unnamed, f"give these a place in LAYERS: {unnamed}"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_downward_only(module: str) -> None:
    upward = [
        f"line {line}: {target}"
        for target, line in imported(module)
        if target.split(".")[0] == "fiberexec" and target != "fiberexec" and level(target) < level(module)
    ]
    assert not upward, f"{module} imports from a layer above its own: {upward}"


@pytest.mark.parametrize("module", MODULES)
def test_a_concrete_backend_imports_no_other_and_nothing_of_the_core(module: str) -> None:
    if not module.startswith("fiberexec.backends.") or module in (
        "fiberexec.backends.base",
        "fiberexec.backends.registry",
    ):
        return
    core = ("fiberexec.executor", "fiberexec._manager", "fiberexec._scheduler", "fiberexec.backends.registry")
    wrong = [target for target, _ in imported(module) if target.startswith(core)]
    public = ("fiberexec.backends.base", "fiberexec.backends._")  # modules with a _ belong to those without
    others = [t for t, _ in imported(module) if t.startswith("fiberexec.backends.") and not t.startswith(public)]
    assert not wrong + others


@pytest.mark.parametrize("module", MODULES)
def test_pynng_is_imported_by_the_link_alone(module: str) -> None:
    if module not in PYNNG:
        assert not [line for target, line in imported(module) if target.split(".")[0] == "pynng"]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_not_too_long(module: str) -> None:
    lines = len(MODULES[module].read_text().splitlines())
    assert lines <= MAX_LINES


@pytest.mark.parametrize("module", MODULES)
def test_a_module_says_what_it_is_for(module: str) -> None:
    assert ast.get_docstring(ast.parse(MODULES[module].read_text()))


def test_the_scheduler_has_no_clock_no_thread_and_no_socket() -> None:
    effects = {"time", "threading", "socket", "select", "selectors", "os", "subprocess", "random", "asyncio"}
    for module in MODULES:
        if module.startswith("fiberexec._scheduler"):
            assert not effects & {target.split(".")[0] for target, _ in imported(module)}, module
