"""The examples do what they say, each in a process of its own, and so do the benchmarks."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


def run(*arguments: object, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments, bounded in time, and check its exit code."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=90)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def test_hello_answers_from_another_process(tmp_path: Path) -> None:
    greeting, here = run(EXAMPLES / "hello.py", cwd=tmp_path).stdout.splitlines()
    assert greeting.startswith("Hello, fiberexec, from process ")
    assert re.findall(r"\d+", greeting) != re.findall(r"\d+", here)


def test_pi_is_estimated_the_same_in_every_run(tmp_path: Path) -> None:
    first, second = (run(EXAMPLES / "pi.py", 20_000, cwd=tmp_path).stdout for _ in range(2))
    assert first == second
    assert abs(float(first.split()[-1]) - 3.1416) < 0.05


def test_retry_repeats_what_the_policy_names_and_nothing_else(tmp_path: Path) -> None:
    lines = run(EXAMPLES / "retry.py", cwd=tmp_path).stdout.splitlines()
    attempts = [3 if page % 3 == 0 else 1 for page in range(6)]
    assert [line.split(",")[0] for line in lines[:6]] == [
        f"page {page}: attempt {attempt}" for page, attempt in enumerate(attempts)
    ]
    assert "Busy('page 3, attempt 2')" in lines[3] and lines[1].endswith("after None")
    assert lines[6:] == [
        "not retried: ValueError('page 7 does not exist')",
        "attempts that failed and were repeated: 4",
    ]


def test_time_limits_stop_running_tasks_and_the_pool_goes_on(tmp_path: Path) -> None:
    lines = run(EXAMPLES / "time_limits.py", cwd=tmp_path).stdout.splitlines()
    assert lines[0] == "quick: done after 0.01 s"
    assert lines[1].startswith("slow: ") and " 2 s" in lines[1]
    assert lines[2:] == ["terminated: True", "endless: cancelled", "afterwards: done after 0.01 s"]


def test_asyncio_awaits_tasks_while_its_loop_runs(tmp_path: Path) -> None:
    assert run(EXAMPLES / "asyncio_example.py", cwd=tmp_path).stdout.splitlines() == [
        "9,592 primes below 100,000",
        "168 of them below 1,000",
        "the event loop ran meanwhile: True",
    ]


# ---------------------------------------------------------------------------------------------- code_metrics

SOURCE = '''\
"""A module."""


def straight(x):
    return x


def winding(x, items):
    # one way, and: if, elif, and, for, comprehension, its if, except, conditional
    if x > 1 and items:
        pass
    elif x:
        pass
    for item in items:
        try:
            print([i for i in item if i])
        except ValueError:
            print(1 if x else 2)

    def inner():
        while True:
            pass
'''
BLOCK = "".join(f"    x{i} = {i}  # the same in two files\n" for i in range(8))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "package" / "site-packages").mkdir(parents=True)
    (root / "winding.py").write_text(SOURCE)
    (root / "package" / "one.py").write_text("def one():\n" + BLOCK)
    (root / "package" / "two.py").write_text("# elsewhere\n\nclass Two:\n" + BLOCK)
    (root / "package" / "broken.py").write_text("def broken(:\n")
    (root / "package" / "coding.py").write_text("# -*- coding: no-such-coding -*-\n")
    (root / "package" / "empty.py").write_text("")
    (root / "package" / "site-packages" / "not_measured.py").write_text("def not_measured(): pass\n")
    (root / "package" / "not_python.txt").write_text("def not_python(): pass\n")
    return root


def table(output: str) -> str:
    """The summary, without the lines that say how it came about."""
    return output.partition("\nparallel: ")[0]


def test_code_metrics_counts_what_is_there(tree: Path) -> None:
    measure: Any = runpy.run_path(str(EXAMPLES / "code_metrics.py"))["measure"]
    found = measure(str(tree / "winding.py"))
    assert (found.lines, found.code_lines, found.error) == (22, 16, "")
    assert {function.name: (function.line, function.complexity) for function in found.functions} == {
        "straight": (4, 1),
        "winding": (8, 9),
        "inner": (20, 2),
    }
    one, two = (measure(str(tree / "package" / name)) for name in ("one.py", "two.py"))
    assert [(block.line, block.lines) for block in one.blocks + two.blocks] == [(2, 8), (4, 8)]
    assert one.blocks[0].digest == two.blocks[0].digest != found.blocks[0].digest


def test_code_metrics_reports_broken_files_and_measures_the_others(tree: Path, tmp_path: Path) -> None:
    output = run(EXAMPLES / "code_metrics.py", "--path", tree, "--workers", 2, cwd=tmp_path).stdout
    counts = dict(re.findall(r"^(\w.*?) {2,}([\d.,]+)$", output, re.MULTILINE))
    assert counts["Python files"] == "6"
    assert counts["functions"] == "4"
    assert counts["repeated blocks"] == "1"
    assert counts["can't be parsed"] == "2"
    assert "8  2 x package/one.py:2, package/two.py:4" in output
    assert (
        "package/broken.py: line 1: " in output and "package/coding.py: unknown encoding: no-such" in output
    )
    assert output.endswith("the parallel and the serial answer are identical\n")


def test_code_metrics_under_chaos_ends_with_the_same_table(tmp_path: Path) -> None:
    common = (EXAMPLES / "code_metrics.py", "--workers", 2, "--limit", 120, "--no-serial")
    calm = run(*common, cwd=tmp_path).stdout
    wild = run(*common, "--chaos", "--every", 0.2, "--seed", 7, cwd=tmp_path).stdout
    killed, again = map(int, re.findall(r"killed (\d+) workers; (\d+) ", wild)[0])
    assert killed > 0 and again <= killed
    assert table(wild) == table(calm)


def test_code_metrics_says_when_there_is_nothing_to_measure(tmp_path: Path) -> None:
    done = run(EXAMPLES / "code_metrics.py", "--path", tmp_path, cwd=tmp_path, code=2)
    assert "no Python file" in done.stderr


# -------------------------------------------------------------------------------------------------- notebook


def notebook_cells() -> list[str]:
    notebook = json.loads((EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_notebook_is_valid() -> None:
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4))


PLAIN = """
import json, sys
for cell in json.load(sys.stdin):
    exec(compile(cell, "<cell>", "exec"), globals())
"""
IPYTHON = """
import json, sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
for cell in json.load(sys.stdin):
    shell.run_cell(cell).raise_error()
"""


@pytest.mark.parametrize("runner", [PLAIN, IPYTHON], ids=["plain", "ipython"])
def test_every_cell_of_the_notebook_runs(runner: str, tmp_path: Path) -> None:
    if runner is IPYTHON:
        pytest.importorskip("IPython")
    command = [sys.executable, "-c", runner]
    cells = json.dumps(notebook_cells())
    env = {**os.environ, "IPYTHONDIR": str(tmp_path)}
    done = subprocess.run(
        command, cwd=tmp_path, env=env, input=cells, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Orbit(start=6171, steps=261, highest=975400)" in done.stdout
    assert "27 is enough" in done.stdout
    assert "ZeroDivisionError('division by zero')" in done.stdout


# ------------------------------------------------------------------------------------------------ benchmarks


def test_benchmarks_measure_and_judge_a_row() -> None:
    arguments = ("-m", "benchmarks", "--quick", "--peer", "fiberexec", "--row", "latency", "--row", "startup")
    output = run(*arguments, cwd=ROOT).stdout
    for row in ("latency", "startup"):
        assert re.search(rf"^\| {row} .*\d\.\d\dx \|.*\| (met|\*\*missed\*\*) \|$", output, re.MULTILINE), (
            output
        )
    assert "without a result" not in output


def test_benchmarks_name_an_unknown_row() -> None:
    assert "no row 'nonsense'" in run("-m", "benchmarks", "--row", "nonsense", cwd=ROOT, code=2).stderr


# -- fiberexec.mp


def run_mp(name: str, *arguments: object, cwd: Path) -> list[str]:
    return run(EXAMPLES / "mp" / name, *arguments, cwd=cwd).stdout.splitlines()


def test_a_process_prints(tmp_path: Path) -> None:
    assert run_mp("hello.py", cwd=tmp_path) == ["Hello, fiberexec!"]


def test_a_pool_estimates_pi(tmp_path: Path) -> None:
    (line,) = run_mp("pi.py", 50_000, cwd=tmp_path)
    assert abs(float(line.split()[-1]) - 3.1416) < 0.1


def test_workers_share_queues(tmp_path: Path) -> None:
    assert run_mp("jobs.py", 200, cwd=tmp_path) == ["200 squares, the last of them 39601"]


def test_two_processes_talk_over_a_pipe(tmp_path: Path) -> None:
    assert run_mp("pipe.py", cwd=tmp_path) == ["HELLO", "PIPE", "exit code 0"]


def test_managers_share_objects_and_let_them_work_at_once(tmp_path: Path) -> None:
    counted, walks = run_mp("managers.py", cwd=tmp_path)
    assert counted == "'be' was counted 3 times"
    ends = json.loads(walks.removeprefix("the walks end at "))
    assert len(ends) == 2 and all(end % 2 == 0 and abs(end) < 100_000 for end in ends)


def test_a_ring_sums_up_arrays(tmp_path: Path) -> None:
    assert run_mp("ring.py", 4, cwd=tmp_path) == ["each member has the sum [6.0, 6.0, 6.0, 6.0]"]


def test_evolution_learns_to_balance_the_pole(tmp_path: Path) -> None:
    pytest.importorskip("gymnasium", reason="needs gymnasium: pip install gymnasium")
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    last = run_mp("evolution.py", 15, "--plot", "curve.png", cwd=tmp_path)[-1]
    first, end = map(int, re.findall(r"\d+", last))
    assert first < 100 and end >= 300, last
    assert (tmp_path / "curve.png").stat().st_size > 1000
