"""Measure every Python file of this interpreter's own standard library, on all processors.

    python examples/code_metrics.py                      # all of it, in parallel, then serially to compare
    python examples/code_metrics.py --chaos              # the same, while random workers are killed
    python examples/code_metrics.py --path src --no-serial
    python examples/code_metrics.py --backend docker --image my-image

For each file: lines, functions, the cyclomatic complexity of each function (from the syntax tree), and a
hash of each block of code, by which blocks that occur more than once are found.  The files are of very
uneven cost, and some of them are broken on purpose (the test data of Python's own parser): a file that
can't be parsed is reported and costs nothing else.

What fiberexec does here: `measure` below is a function of the main program, and its results are instances
of a class of the main program. Both travel to the workers and back without a module to import. `ex.map`
hands out the files as the workers get through them, and a worker that dies costs the one file that it was
measuring a second try.

In containers (--backend docker) the folder is mounted, for reading only, and the functions travel in the
same way: the image needs Python and fiberexec, and nothing of this program.
"""

from __future__ import annotations

import argparse
import ast
import gc
import hashlib
import os
import random
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import tokenize
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

from fiberexec import FiberExecutor, WorkerInfo

BLOCK_LINES = 8  # shorter blocks are alike by accident

# ----------------------------------------------------------------------------------------- measuring one file


@dataclass(frozen=True)
class Function:
    """A function or method, and where it starts."""

    name: str
    line: int
    complexity: int


@dataclass(frozen=True)
class Block:
    """A body (of a function, a loop, ...) of at least BLOCK_LINES lines; equal code has equal digests."""

    digest: bytes
    line: int
    lines: int


@dataclass(frozen=True)
class FileMetrics:
    """What was found in one file. A file that can't be parsed has an ``error`` and nothing else."""

    path: str
    lines: int = 0
    code_lines: int = 0
    functions: tuple[Function, ...] = ()
    blocks: tuple[Block, ...] = ()
    error: str = ""


def measure(path: str, folder: str = "") -> FileMetrics:
    """Measure one file of a folder, which need not be at the same place wherever this runs."""
    place = os.path.join(folder, path)
    try:
        with tokenize.open(place) as file:  # honours the file's own coding line
            lines = file.readlines()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes and the like: not what is measured here
            tree = ast.parse("".join(lines), path)
    except SyntaxError as error:
        reason = str(error.msg).replace(f" for {place!r}", "")
        return FileMetrics(path, error=f"line {error.lineno}: {reason}" if error.lineno else reason)
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        return FileMetrics(path, error=f"{type(error).__name__}: {error}")
    text = [line.strip() for line in lines]
    functions, blocks = tuple(find_functions(tree)), tuple(find_blocks(tree, text))
    return FileMetrics(path, len(text), sum(map(is_code, text)), functions, blocks)


def is_code(line: str) -> bool:
    """Say whether a stripped line is more than a blank or a comment."""
    return bool(line) and not line.startswith("#")


def decisions(node: ast.AST) -> int:
    """How many ways of going on this node adds to those of the function around it."""
    if isinstance(node, ast.BoolOp):
        return len(node.values) - 1
    if isinstance(node, ast.comprehension):
        return 1 + len(node.ifs)
    branches = (
        ast.If,
        ast.IfExp,
        ast.For,
        ast.AsyncFor,
        ast.While,
        ast.ExceptHandler,
        ast.Assert,
        ast.match_case,
    )
    return isinstance(node, branches)


def find_functions(tree: ast.Module) -> Iterator[Function]:
    """Yield every function with its cyclomatic complexity; what is nested in it counts for itself."""
    pending: list[ast.AST] = [tree]
    while pending:
        around = pending.pop()
        complexity = 1
        inside = list(ast.iter_child_nodes(around))
        while inside:
            node = inside.pop()
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                pending.append(node)
            else:
                complexity += decisions(node)
                inside.extend(ast.iter_child_nodes(node))
        if isinstance(around, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield Function(around.name, around.lineno, complexity)


def find_blocks(tree: ast.Module, text: Sequence[str]) -> Iterator[Block]:
    """Yield every block of code that is long enough to be worth sharing."""
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            body = getattr(node, field, None)
            if node is tree or not isinstance(body, list):
                continue
            if not body or body[-1].end_lineno - body[0].lineno + 1 < BLOCK_LINES:
                continue
            code = [line for line in text[body[0].lineno - 1 : body[-1].end_lineno] if is_code(line)]
            if len(code) >= BLOCK_LINES:
                digest = hashlib.blake2b("\n".join(code).encode("utf-8", "surrogatepass"), digest_size=12)
                yield Block(digest.digest(), body[0].lineno, len(code))


# ---------------------------------------------------------------------------------------- measuring all files


def find_files(root: Path, limit: int | None) -> list[str]:
    """Return the Python files, relative to ``root``, the largest first: no long one starts last."""
    installed = {"site-packages", "dist-packages", "__pycache__"}
    found: list[Path] = []
    for folder, below, names in os.walk(root):
        below[:] = sorted(set(below) - installed)
        found += [
            Path(folder, name) for name in names if name.endswith(".py") and Path(folder, name).is_file()
        ]
    found.sort(key=lambda path: (-path.stat().st_size, str(path)))
    step = max(1, len(found) // limit) if limit else 1  # a sample has large files and small ones
    return [str(path.relative_to(root)) for path in found[::step][:limit]]


def run_parallel(
    files: list[str], folder: Path, options: argparse.Namespace, chaos: Chaos | None
) -> list[FileMetrics]:
    """Measure the files on worker processes."""
    there, more = str(folder.resolve()), {}
    if options.backend == "docker":
        mount = {there: {"bind": "/source", "mode": "ro"}}
        there, more = "/source", {"backend_options": {"volumes": mount}}
    # No file deserves the blame for what Chaos does, so none is given up because its worker died too often.
    with FiberExecutor(
        options.workers,
        backend=options.backend,
        image=options.image,
        max_worker_losses=1000 if chaos else 3,
        **more,
    ) as ex:
        if chaos:
            chaos.start(ex)
        try:
            return list(with_progress(ex.map(measure, files, repeat(there)), len(files), "parallel"))
        finally:
            if chaos:
                chaos.stop()


def run_serial(files: list[str], folder: Path) -> list[FileMetrics]:
    """Measure the files here, one after the other."""
    gc.freeze()  # a fair race: the garbage collector looks at what the first run left no more
    return list(with_progress(map(measure, files, repeat(str(folder.resolve()))), len(files), "serial"))


class Chaos:
    """A thread that kills a random worker every now and then: its process, or its whole container."""

    def __init__(self, every: float, seed: int, backend: str | None) -> None:
        self.every, self.random, self.backend = every, random.Random(seed), backend
        self.killed = 0
        self.retried = 0
        self.over = threading.Event()

    def start(self, ex: FiberExecutor) -> None:
        """Start killing the workers of ``ex``."""
        self.ex = ex
        self.thread = threading.Thread(target=self.run, name="chaos", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Stop killing."""
        self.over.set()
        self.thread.join()
        self.retried = self.ex.stats().lost

    def run(self) -> None:
        while not self.over.wait(self.every):
            workers = [worker for worker in self.ex.workers() if worker.state in ("idle", "busy")]
            if workers and self.kill(self.random.choice(workers)):
                self.killed += 1

    def kill(self, worker: WorkerInfo) -> bool:
        if self.backend == "docker":  # a container's host name is its id
            return subprocess.run(["docker", "kill", worker.host], capture_output=True).returncode == 0
        try:
            os.kill(worker.pid, signal.SIGKILL)
        except ProcessLookupError:  # it had just ended
            return False
        return True


def with_progress(results: Iterable[FileMetrics], total: int, label: str) -> Iterable[FileMetrics]:
    """Pass the results on and show how far they are: with rich or tqdm if there, else as plain text."""
    if sys.stderr.isatty():
        try:
            from rich.console import Console
            from rich.progress import track

            return track(results, label, total, console=Console(stderr=True))
        except ImportError:
            pass
        try:
            from tqdm import tqdm

            bar: Iterable[FileMetrics] = tqdm(results, label, total, unit=" files")
            return bar
        except ImportError:
            pass
    return plain_progress(results, total, label)


def plain_progress(results: Iterable[FileMetrics], total: int, label: str) -> Iterator[FileMetrics]:
    """Pass the results on, with a line to stderr at every fifth of the way."""
    marks = {total * fifth // 5 for fifth in range(1, 6)}
    for done, result in enumerate(results, 1):
        if done in marks:
            print(f"{label}: {done} of {total} files", file=sys.stderr, flush=True)
        yield result


# ------------------------------------------------------------------------------------------------- the answer


def summary(results: list[FileMetrics], top: int) -> str:
    """Return the summary table. It depends on the results alone, not on how or how fast they were found."""
    parsed = [file for file in results if not file.error]
    functions = [(function, file) for file in parsed for function in file.functions]
    copies: defaultdict[tuple[bytes, int], list[str]] = defaultdict(list)
    for file in parsed:
        for block in file.blocks:
            copies[block.digest, block.lines].append(f"{file.path}:{block.line}")
    repeated = [(size, sorted(places)) for (_, size), places in copies.items() if len(places) > 1]
    complexity = sum(function.complexity for function, _ in functions)

    lines = [
        f"Python files          {len(results):>12,}",
        f"lines                 {sum(file.lines for file in parsed):>12,}",
        f"lines of code         {sum(file.code_lines for file in parsed):>12,}",
        f"functions             {len(functions):>12,}",
        f"mean complexity       {complexity / max(1, len(functions)):>12.2f}",
        f"repeated blocks       {len(repeated):>12,}",
        f"can't be parsed       {len(results) - len(parsed):>12,}",
    ]
    lines += ["", "most complex functions"]
    for function, file in sorted(
        functions, key=lambda pair: (-pair[0].complexity, pair[1].path, pair[0].line)
    )[:top]:
        lines.append(f"{function.complexity:>8}  {file.path}:{function.line} {function.name}()")
    lines += ["", "longest files (lines)"]
    for file in sorted(parsed, key=lambda file: (-file.lines, file.path))[:top]:
        lines.append(f"{file.lines:>8,}  {file.path}")
    lines += ["", "largest repeated blocks (lines of code, copies)"]
    for size, places in sorted(repeated, key=lambda pair: (-pair[0] * (len(pair[1]) - 1), pair[1]))[:top]:
        lines.append(
            f"{size:>8,}  {len(places)} x {places[0]}, {places[1]}{', ...' if len(places) > 2 else ''}"
        )
    if len(parsed) < len(results):
        lines += ["", "files that can't be parsed"]
        lines += [f"          {file.path}: {file.error}" for file in results if file.error]
    return "\n".join(lines)


def timed(function: Any, *arguments: Any) -> tuple[list[FileMetrics], float]:
    """Call the function and return what it returned and the seconds that it took."""
    start = time.perf_counter()
    return function(*arguments), time.perf_counter() - start


def parse() -> argparse.Namespace:
    def positive(text: str) -> int:
        if (number := int(text)) < 1:
            raise ValueError
        return number

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--path", type=Path, help="the folder to measure (default: the standard library)")
    parser.add_argument("--workers", type=positive, help="worker processes (default: one a processor)")
    parser.add_argument("--backend", help="where workers run: local, docker (default: as it is configured)")
    parser.add_argument("--image", help="with --backend docker: what the containers run")
    parser.add_argument("--limit", type=positive, help="only this many files, from large to small")
    parser.add_argument(
        "--top", type=positive, default=5, help="rows in each list of the summary (default 5)"
    )
    parser.add_argument("--no-serial", action="store_true", help="skip the serial run and the comparison")
    parser.add_argument(
        "--chaos", action="store_true", help="kill random workers while the files are measured"
    )
    parser.add_argument(
        "--every", type=float, default=0.2, help="with --chaos: seconds between kills (default 0.2)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="with --chaos: which workers are killed (default 0)"
    )
    return parser.parse_args()


def main() -> int:
    """Measure, compare, and print; return 1 if the parallel and the serial answer differ."""
    options = parse()
    root = options.path or Path(sysconfig.get_path("stdlib"))
    files = find_files(root, options.limit)
    if not files:
        print(f"there is no Python file under {root}", file=sys.stderr)
        return 2
    chaos = Chaos(options.every, options.seed, options.backend) if options.chaos else None
    results, parallel_time = timed(run_parallel, files, root, options, chaos)
    print(summary(results, options.top))
    print(f"\nparallel: {parallel_time:.2f} s")
    if chaos:
        print(
            f"chaos: killed {chaos.killed} workers; {chaos.retried} files were started again; none was lost"
        )
    if options.no_serial:
        return 0
    expected, serial_time = timed(run_serial, files, root)
    print(f"serial:   {serial_time:.2f} s, speed-up {serial_time / parallel_time:.2f}x")
    same = results == expected
    print("the parallel and the serial answer are", "identical" if same else "DIFFERENT")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
