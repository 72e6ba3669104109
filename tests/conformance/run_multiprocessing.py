"""Run CPython's tests of ``multiprocessing`` against ``fiberexec.mp``, each class in a process of its own, with time limits.

From the root of the checkout::

    python tests/conformance/run_multiprocessing.py                                  # everything
    python tests/conformance/run_multiprocessing.py WithProcessesTestQueue           # a class
    python tests/conformance/run_multiprocessing.py WithProcessesTestQueue.test_put  # a case
    python tests/conformance/run_multiprocessing.py TestLock TestEvent -v            # all classes with that in their name
    python tests/conformance/run_multiprocessing.py --spawn TestLock                 # multiprocessing itself, for comparison
    python tests/conformance/run_multiprocessing.py --list                           # what there is

Prints what did not pass, with its traceback (with -v also what was skipped, and why), and for a case that takes longer
than --limit seconds where its threads stand; the cases after it run in a fresh process. Ends with 1 if anything that is
not in EXCLUDED did not pass. --all runs what is in EXCLUDED too.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import faulthandler
import functools
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent

TRACKER = "of multiprocessing's resource tracker, for named semaphores and a child's shared memory, which is not used"
# class or class.case: (since which Python it exists, why it does not apply)
EXCLUDED: dict[str, tuple[tuple[int, ...], str]] = {
    "TestPoolNotLeakOnFailure": ((3, 10), "gives a pool a context with fake processes; here a backend launches its workers"),
    "TestResourceTracker.test_resource_tracker": ((3, 10), TRACKER),
    "TestResourceTracker.test_resource_tracker_reused": ((3, 10), TRACKER),
    "TestResourceTracker.test_resource_tracker_sigkill": ((3, 10), TRACKER),
    "TestSimpleQueue.test_closed": ((3, 10), "looks at the private ends of a queue's pipe; here a queue has none"),
    "TestStartMethod.test_mixed_startmethod": (
        (3, 11),
        "expects that a lock made for fork is refused by spawn; here each handle goes anywhere",
    ),
    "WithProcessesTestPoolWorkerErrors.test_unpickleable_result": ((3, 10), "its result is a lambda, which travels here"),
    "WithProcessesTestProcess.test_parent_process": (
        (3, 10),
        "a child reports that its parent was killed; here it dies with its parent",
    ),
    "_TestImportStar": (
        (3, 10),
        "lists the files of the package; fiberexec.mp's modules are tested in test_multiprocessing.py",
    ),
}

NOT_CLEAN = 3  # exit code: what comes before or after the cases went wrong


class Outcome(NamedTuple):
    case: str
    status: str  # passed, skipped, failed, excluded, ended (it hung, or the process died)
    seconds: float = 0.0
    text: str = ""


def excluded(case: str) -> str:
    """Why this class.case does not apply; empty if it does."""
    _, why = EXCLUDED.get(case) or EXCLUDED.get(case.partition(".")[0]) or ((), "")
    return why


@functools.cache
def cache() -> tempfile.TemporaryDirectory[str]:
    """Where the processes find the tests compiled."""
    return tempfile.TemporaryDirectory(prefix="conformance-")


def command(*arguments: str, spawn: bool = False) -> dict[str, Any]:
    installed = importlib.util.find_spec("fiberexec")
    package = Path(installed.origin).parents[1] if installed and installed.origin else HERE.parents[1]
    path = [str(HERE), str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    mode = "spawn" if spawn else "fiberexec"
    folder = {"FIBEREXEC_CONFORMANCE_CACHE": cache().name}
    return {
        "args": [sys.executable, __file__, *arguments],
        "env": {**os.environ, "PYTHONPATH": os.pathsep.join(path), "FIBEREXEC_CONFORMANCE": mode, **folder},
        "stdin": subprocess.DEVNULL,
    }


def cases(spawn: bool = False) -> dict[str, list[str]]:
    """The names of CPython's cases by class. Those of multiprocessing.dummy are left out: it is the standard's here."""
    return json.loads(subprocess.run(**command("--inside", "list", spawn=spawn), stdout=subprocess.PIPE, check=True).stdout)


def run(left: list[str], *, spawn: bool = False, limit: float = 60.0) -> list[Outcome]:
    """The outcomes of these cases (class.case) of one class. It ends, whatever they do."""
    outcomes = []
    while left:
        done, code, log = attempt(left, spawn, limit)
        outcomes += done
        left = left[len(done) :]
        if code == NOT_CLEAN:
            name = f"{(left or [done[-1].case])[0].partition('.')[0]}.{'setUp' if left else 'tearDown'}"
            return [*outcomes, Outcome(name, "failed", text=log)]
        if left:
            outcomes.append(Outcome(left.pop(0), "ended", text=log))
    return outcomes


def attempt(names: list[str], spawn: bool, limit: float) -> tuple[list[Outcome], int | None, str]:
    """The outcomes up to the first case that hangs or ends the process, the exit code, and what was printed."""
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/log", "w+b") as log:
        call = command("--inside", f"{folder}/report", "--limit", str(limit), *names, spawn=spawn)
        process = subprocess.Popen(**call, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(len(names) * limit + 60.0)
        except subprocess.TimeoutExpired:
            code = None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        with open(f"{folder}/report") as report:
            outcomes = [Outcome(*json.loads(line)) for line in report]
        log.seek(0)
        text = log.read().decode(errors="replace")[-8000:]
    return outcomes, code, f"{text}\nexit code {code}"


class Report(unittest.TestResult):
    """Writes each outcome at once: the process may not live to the end."""

    def __init__(self, path: str, limit: float) -> None:
        super().__init__()
        self.file = open(path, "w", buffering=1)
        self.limit = limit
        self.begin()

    def begin(self) -> None:
        self.status, self.text, self.since = "passed", "", time.monotonic()
        faulthandler.dump_traceback_later(self.limit, exit=True)

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self.begin()

    def stopTest(self, test: unittest.TestCase) -> None:
        super().stopTest(test)
        name = f"{type(test).__name__}.{test._testMethodName}"
        json.dump([name, self.status, round(time.monotonic() - self.since, 2), self.text], self.file)
        self.file.write("\n")
        self.begin()

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        self.status, self.text = "skipped", reason

    def _fail(self, test: Any, error: Any) -> None:
        super().addError(test, error)
        self.status, self.text = "failed", self.text + self.errors[-1][1]
        if not isinstance(test, unittest.TestCase):  # setUpClass and the like
            print(self.text, file=sys.stderr)

    addError = addFailure = _fail

    def addSubTest(self, test: unittest.TestCase, subtest: Any, error: Any) -> None:
        if error is not None:
            self._fail(test, error)


def start_what_stays() -> None:
    """The one thread that starts processes stays, as multiprocessing's resource tracker does: no test's fault."""
    process = importlib.import_module("fiberexec.mp").Process()
    process.start()
    process.join()


def inside(target: str, names: list[str], limit: float) -> int:
    """In a process of its own: run these cases, or list all."""
    module = importlib.import_module("cpython_multiprocessing")
    classes = {name: cls for name, cls in module.CASES.items() if isinstance(cls, type) and not name.startswith("WithThreads")}
    loader = unittest.TestLoader()
    if target == "list":
        known = {name: loader.getTestCaseNames(cls) for name, cls in sorted(classes.items())}
        json.dump({name: [f"{name}.{case}" for case in found] for name, found in known.items() if found}, sys.stdout)
        return 0
    if not module.STANDARD:
        start_what_stays()
    support = importlib.import_module("test.support")
    support.verbose = False
    report = Report(target, limit)
    suite = unittest.TestSuite(classes[name](case) for name, _, case in (each.partition(".") for each in names))
    loader.suiteClass([suite]).run(report)
    altered = support.environment_altered
    if altered:
        print("a process, a thread or an object of a manager is left", file=sys.stderr)
    wrong = any(not isinstance(test, unittest.TestCase) for test, _ in report.errors)
    return NOT_CLEAN if altered or wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of names of classes, or class.case")
    parser.add_argument("--spawn", action="store_true", help="test multiprocessing itself")
    parser.add_argument("--all", action="store_true", help="run what is in EXCLUDED too")
    parser.add_argument("--list", action="store_true", help="only say what there is")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for one case")
    parser.add_argument("--json", help="write the outcomes to this file")
    parser.add_argument("-v", "--verbose", action="store_true", help="say what passed and what was skipped, and why")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        return inside(options.inside, options.names, options.limit)
    outcomes: list[Outcome] = []
    for name, found in cases(options.spawn).items():
        wanted = [case for case in found if any(part in (name if "." not in part else case) for part in options.names or [""])]
        if options.list:
            print(*wanted, sep="\n")
            continue
        chosen = [case for case in wanted if options.all or options.spawn or not excluded(case)]
        for outcome in run(chosen, spawn=options.spawn, limit=options.limit):
            outcomes.append(outcome)
            if options.verbose or outcome.status in ("failed", "ended"):
                print(f"{outcome.status:8}{outcome.seconds:7.2f} s  {outcome.case}", outcome.text, flush=True)
        outcomes += [Outcome(case, "excluded", text=excluded(case)) for case in wanted if case not in chosen]
    counts = collections.Counter(outcome.status for outcome in outcomes)
    print(", ".join(f"{count} {status}" for status, count in counts.items()), f"in {sum(o.seconds for o in outcomes):.0f} s")
    if options.json:
        Path(options.json).write_text(json.dumps(outcomes))
    return int(any(outcome.status in ("failed", "ended") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
