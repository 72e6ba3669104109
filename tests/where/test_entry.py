"""The same program gives the same answer however it is started; ``__main__`` is never run again: no guard."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Start = Callable[..., Any]

PROGRAM = """
import enum
from fiberexec import FiberExecutor

class Colour(enum.Enum):
    RED = 1

class Point:
    def __init__(self, x):
        self.x = x

offset = 1

def double(x):
    return offset + 2 * x

def paint(colour):
    return Point(colour is Colour.RED), colour

with FiberExecutor(2) as ex:
    point, colour = ex.submit(paint, Colour.RED).result()
    print(ex.submit(double, 20).result(), list(ex.map(lambda x: -x, range(4))))
    print(type(point) is Point and point.x, colour is Colour.RED)
"""
ANSWER = "41 [0, -1, -2, -3]\nTrue True\n"


def as_script(folder: Path) -> list[str]:
    (folder / "program.py").write_text(PROGRAM)
    return ["program.py"]


def as_command(folder: Path) -> list[str]:
    return ["-c", PROGRAM]


def as_module(folder: Path) -> list[str]:
    (folder / "program.py").write_text(PROGRAM)
    return ["-m", "program"]


def as_package(folder: Path) -> list[str]:
    (folder / "program").mkdir()
    (folder / "program" / "__init__.py").write_text("")
    (folder / "program" / "__main__.py").write_text(PROGRAM)
    return ["-m", "program"]


def as_folder(folder: Path) -> list[str]:
    (folder / "program").mkdir()
    (folder / "program" / "__main__.py").write_text(PROGRAM)
    return ["program"]


def as_zipapp(folder: Path) -> list[str]:
    with zipfile.ZipFile(folder / "program.pyz", "w") as archive:
        archive.writestr("__main__.py", PROGRAM)
    return ["program.pyz"]


def as_profiled(folder: Path) -> list[str]:
    (folder / "program.py").write_text(PROGRAM)
    return ["-m", "cProfile", "-o", "profile", "program.py"]


def as_run_path(folder: Path) -> list[str]:
    (folder / "program.py").write_text(PROGRAM)
    return ["-c", "import runpy; runpy.run_path('program.py', run_name='__main__')"]


@pytest.mark.parametrize(
    "entry", [as_script, as_command, as_module, as_package, as_folder, as_zipapp, as_profiled, as_run_path]
)
def test_a_program_without_a_guard_runs(entry: Callable[[Path], list[str]], start: Start, tmp_path: Path) -> None:
    program = start(*entry(tmp_path)).finish()
    assert (program.code, program.out, program.err) == (0, ANSWER, "")


def test_a_program_read_from_stdin_runs(start: Start) -> None:
    program = start("-", stdin=PROGRAM).finish()
    assert (program.code, program.out, program.err) == (0, ANSWER, "")


def test_the_package_works_from_inside_a_zipapp(start: Start, tmp_path: Path) -> None:
    import fiberexec

    package = Path(fiberexec.__file__).parent
    with zipfile.ZipFile(tmp_path / "whole.pyz", "w") as archive:
        archive.writestr("__main__.py", PROGRAM + "import fiberexec; print(fiberexec.__file__)\n")
        for path in package.rglob("*.py"):
            archive.write(path, Path("fiberexec") / path.relative_to(package))
    program = start("whole.pyz", PYTHONPATH="").finish()
    inside = os.path.join("whole.pyz", "fiberexec", "__init__.py")
    assert (program.code, program.err) == (0, "")
    assert program.out.startswith(ANSWER) and program.out.rstrip().endswith(inside)


# A compound statement at the prompt ends with an empty line, and an empty line inside one would end it early.
TYPED = """
from fiberexec import FiberExecutor
offset = 1
def double(x):
    return offset + 2 * x

ex = FiberExecutor(2)
print("answer", ex.submit(double, 20).result())
offset = 2
print("again", ex.submit(double, 20).result(), list(ex.map(lambda x: -x, range(4))))
ex.shutdown()
""".lstrip()


def test_the_interactive_interpreter_fed_by_a_pipe(start: Start) -> None:
    program = start("-i", "-q", stdin=TYPED).finish()
    assert (program.code, program.out) == (0, "answer 41\nagain 42 [0, -1, -2, -3]\n")
    assert "Traceback" not in program.err


def test_the_interactive_interpreter_on_a_terminal(start: Start, tmp_path: Path) -> None:
    """The program here is a small terminal that types into the interpreter and shows what it prints."""
    (tmp_path / "terminal.py").write_text(
        "import os, pty, sys\n"
        "pid, terminal = pty.fork()\n"
        "if pid == 0:\n"
        "    os.execv(sys.executable, [sys.executable, '-q'])\n"
        f"os.write(terminal, {TYPED + 'exit(3)' + chr(10)!r}.encode())\n"
        "seen = b''\n"
        "try:\n"
        "    while data := os.read(terminal, 4096):\n"
        "        seen += data\n"
        "except OSError:\n"
        "    pass  # how Linux says that the other side of a terminal is closed\n"
        "print(seen.decode())\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    program = start("terminal.py", TERM="dumb", PYTHON_BASIC_REPL="1").finish()
    assert program.code == 3, program.err
    assert "answer 41\r\n" in program.out and "again 42 [0, -1, -2, -3]\r\n" in program.out
    assert "Traceback" not in program.out


def test_ipython_runs_a_program(start: Start, tmp_path: Path) -> None:
    pytest.importorskip("IPython")
    (tmp_path / "cells.ipy").write_text(PROGRAM)
    for arguments in (["-c", PROGRAM], ["cells.ipy"]):
        program = start("-m", "IPython", "--quick", *arguments, IPYTHONDIR=str(tmp_path / "ipython")).finish()
        assert (program.code, program.out) == (0, ANSWER), program.err


CELLS = """
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
def cell(source):
    shell.run_cell(source).raise_error()
cell("from fiberexec import FiberExecutor")
cell("ex = FiberExecutor(2)")
cell("def f(x): return x + 1")
cell("print(ex.submit(f, 1).result())")
cell("def f(x): return x + 10")
cell("print(list(ex.map(f, [1, 2])))")
cell("class A: pass")
cell("print(type(ex.submit(A).result()) is A)")
cell("class A: y = 2")
cell("print(ex.submit(lambda: A.y).result(), type(ex.submit(A).result()) is A)")
cell("ex.shutdown()")
"""


def test_notebook_cells_that_define_a_name_anew(script: Start, tmp_path: Path) -> None:
    """Each cell's own function and class is used, not an earlier one of the same name."""
    pytest.importorskip("IPython")
    program = script(CELLS, IPYTHONDIR=str(tmp_path / "ipython")).finish()
    assert (program.code, program.out) == (0, "2\n[11, 12]\nTrue\n2 True\n"), program.err


KERNEL = """
from jupyter_client.manager import start_new_kernel
manager, client = start_new_kernel()
try:
    for source in {cells!r}:
        client.execute_interactive(source, timeout=20, output_hook=lambda message: print(
            message["content"].get("text") or message["content"].get("traceback") or "", end=""))
finally:
    client.stop_channels()
    manager.shutdown_kernel()
"""


def test_a_jupyter_kernel(script: Start, tmp_path: Path) -> None:
    pytest.importorskip("ipykernel")
    pytest.importorskip("jupyter_client")
    cells = ["from fiberexec import FiberExecutor\nex = FiberExecutor(2)", "def f(x): return x + 1"]
    cells += ["print(list(ex.map(f, range(3))))", "print(ex.submit(lambda: f(1)).result())", "ex.shutdown()"]
    program = script(KERNEL.format(cells=cells), IPYTHONDIR=str(tmp_path / "ipython")).finish()
    assert (program.code, program.out) == (0, "[1, 2, 3]\n2\n"), program.err


@pytest.mark.parametrize("mode", ["prepend", "importlib"])
def test_functions_of_a_test_module(mode: str, start: Start, tmp_path: Path) -> None:
    """Under pytest's importlib mode a worker cannot import the test module by name."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_inner.py").write_text(
        "import pytest\n"
        "from fiberexec import FiberExecutor\n"
        "class Point:\n    x = 3\n"
        "def point():\n    return Point()\n"
        "@pytest.fixture\n"
        "def ex():\n"
        "    with FiberExecutor(2) as executor:\n"
        "        yield executor\n"
        "def test_inner(ex):\n"
        "    def local(x):\n        return x + Point.x\n"
        "    assert list(ex.map(local, [1, 2])) == [4, 5]\n"
        "    assert type(ex.submit(point).result()) is Point\n"
    )
    arguments = ["-q", "-p", "no:cacheprovider", "-W", "error", f"--import-mode={mode}", "test_inner.py"]
    program = start("-m", "pytest", *arguments, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1").finish()
    assert (program.code, "1 passed" in program.out) == (0, True), program.out + program.err


FLAGS = """
import os, sys
sys.path.insert(0, {root!r})
from fiberexec import FiberExecutor
def flags():
    import sys
    names = "optimize dont_write_bytecode utf8_mode isolated ignore_environment no_user_site dev_mode bytes_warning"
    return {{name: getattr(sys.flags, name) for name in names.split()}}, sys.warnoptions, sys._xoptions, __debug__
with FiberExecutor(1) as ex:
    assert ex.submit(flags).result() == flags(), (ex.submit(flags).result(), flags())
    print(flags()[0][{name!r}], sys.warnoptions)
"""


@pytest.mark.parametrize(
    ("flags", "name", "shown"),
    [
        (["-O"], "optimize", "1 []"),
        (["-OO"], "optimize", "2 []"),
        (["-B"], "dont_write_bytecode", "1 []"),
        (["-X", "utf8"], "utf8_mode", "1 []"),
        (["-W", "error"], "optimize", "0 ['error']"),
        (["-I"], "isolated", "1 []"),
        (["-X", "dev"], "dev_mode", "True ['default']"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, list) else None,
)
def test_the_interpreters_flags_reach_the_workers(
    flags: list[str], name: str, shown: str, script: Start, tmp_path: Path
) -> None:
    import fiberexec

    root = str(Path(fiberexec.__file__).resolve().parent.parent)
    program = script(FLAGS.format(root=root, name=name), flags=flags).finish()
    assert (program.code, program.out, program.err) == (0, shown + "\n", "")


MODULES = """
import os, sys
from fiberexec import FiberExecutor
os.mkdir("early"), os.mkdir("late")
for name in ("early", "late"):
    with open(f"{name}/{name}_module.py", "w") as file:
        file.write("import os\\nwhere = os.getcwd\\ndef folder(): return os.path.basename(where())")
os.chdir("early")
sys.path.insert(0, os.getcwd())
import early_module
with FiberExecutor(1) as ex:
    print(ex.submit(early_module.folder).result())
    sys.path.insert(0, os.path.abspath("../late"))
    import late_module
    print(ex.submit(late_module.folder).result())
"""


def test_the_working_folder_and_sys_path_of_the_driver_are_those_of_the_workers(script: Start) -> None:
    """What is put on ``sys.path`` after the workers have started counts too."""
    program = script(MODULES).finish()
    assert (program.code, program.out, program.err) == (0, "early\nearly\n", "")


def test_an_interpreter_that_was_started_through_a_link(script: Start, tmp_path: Path) -> None:
    """A virtual environment is such a link: its workers must be of the same environment."""
    program = script(
        "import sys\n"
        "from fiberexec import FiberExecutor\n"
        "def prefix():\n    import sys\n    return sys.prefix, sys.executable\n"
        "with FiberExecutor(1) as ex:\n"
        "    print(ex.submit(prefix).result() == prefix())\n"
    ).finish()
    assert (program.code, program.out, program.err) == (0, "True\n", "")
