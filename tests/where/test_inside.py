"""Programs that use executors in unusual places: threads, callbacks, workers, forked children, several at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

# name: (the program, what it must print). It must also exit with 0, write nothing to stderr and leave no process.
PROGRAMS: dict[str, tuple[str, str]] = {}

PROGRAMS["made, used and shut down in a thread"] = (
    """
import threading
from fiberexec import FiberExecutor
def work():
    with FiberExecutor(2) as ex:
        print(list(ex.map(lambda x: x * x, range(4))))
thread = threading.Thread(target=work)
thread.start()
thread.join()
""",
    "[0, 1, 4, 9]\n",
)

PROGRAMS["used after the thread that made it has ended"] = (
    """
import os, threading
from fiberexec import FiberExecutor
made = []
def make():
    made.append(FiberExecutor(2))
    made.append(made[0].submit(os.getpid).result())
thread = threading.Thread(target=make)
thread.start()
thread.join()
ex, pid = made
os.kill(pid, 0)
print(ex.submit(pow, 2, 6).result(), ex.submit(os.getpid).result() == pid)
ex.shutdown()
""",
    "64 True\n",
)

PROGRAMS["submitted to by a done-callback, which may also shut it down"] = (
    """
import queue
from fiberexec import FiberExecutor
ex = FiberExecutor(2)
answers = queue.Queue()
def step(future):
    n = future.result()
    if n < 20:
        ex.submit(lambda: n + 1).add_done_callback(step)
    else:
        ex.shutdown(wait=False)
        answers.put(n)
ex.submit(int).add_done_callback(step)
print(answers.get(timeout=20))
""",
    "20\n",
)

PROGRAMS["nested in workers, two levels deep"] = (
    """
from fiberexec import FiberExecutor
def leaf(x):
    return x * x
def middle(n):
    with FiberExecutor(2) as ex:
        return sum(ex.map(leaf, range(n)))
def top(n):
    with FiberExecutor(2) as ex:
        return list(ex.map(middle, range(n)))
with FiberExecutor(2) as ex:
    print(ex.submit(top, 4).result())
""",
    "[0, 0, 1, 5]\n",
)

PROGRAMS["nested and never shut down"] = (
    """
from fiberexec import FiberExecutor
def top():
    global inner
    inner = FiberExecutor(1)
    return inner.submit(pow, 2, 5).result()
with FiberExecutor(1) as ex:
    print(ex.submit(top).result())
""",
    "32\n",
)

FORK = """
import gc, multiprocessing, os, sys, time, warnings
import fiberexec
from fiberexec import FiberExecutor
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: forking a process that has threads
ex = FiberExecutor(2)
ex.submit(int).result()
slow = ex.submit(time.sleep, 0.5)
def refused(use):
    try:
        use()
    except fiberexec.ForkedError as error:
        print(isinstance(error, RuntimeError), "fork" in str(error), flush=True)
def child():
    {child}
{fork}
print("child", code, flush=True)
print(slow.result(), ex.submit(pow, 2, 4).result(), list(ex.map(abs, [-1, -2])))
ex.shutdown()
"""
OS_FORK = """
pid = os.fork()
if pid == 0:
    child()
    {leave}
code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""
MP_FORK = """
process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join()
code = process.exitcode
"""
CHILDREN = {
    "nothing": ("pass", ""),
    "submit": ("refused(lambda: ex.submit(pow, 2, 3))", "True True\n"),
    "map": ("refused(lambda: list(ex.map(abs, [1])))", "True True\n"),
    "shutdown": ("ex.shutdown()", ""),
    "leaving the block": ("ex.__exit__(None, None, None)", ""),
    "terminate_workers": ("ex.terminate_workers()", ""),
    "collecting it": ("globals().pop('ex'); gc.collect()", ""),
    "a new executor": ("with FiberExecutor(1) as new: print(new.submit(pow, 3, 3).result(), flush=True)", "27\n"),
    "a new executor that is left": ("print(FiberExecutor(1).submit(pow, 3, 3).result(), flush=True)", "27\n"),
}
for _name, (_child, _shown) in CHILDREN.items():
    _rest = "child 0\nNone 16 [1, 2]\n"
    _ways = {"os.fork": OS_FORK.format(leave="sys.exit(0)"), "multiprocessing's fork": MP_FORK}
    if _name in ("nothing", "a new executor"):
        _ways["os.fork and os._exit"] = OS_FORK.format(leave="os._exit(0)")
    for _way, _fork in _ways.items():
        PROGRAMS[f"{_way}: {_name} in the child"] = (FORK.format(child=_child, fork=_fork), _shown + _rest)

PROGRAMS["os.fork while other threads submit"] = (
    """
import gc, os, sys, threading, warnings
from fiberexec import FiberExecutor
warnings.simplefilter("ignore", DeprecationWarning)
ex = FiberExecutor(2)
ex.submit(int).result()  # what is imported at the first use is: Python's own import locks are not safe with fork
stop = threading.Event()
def submit():
    while not stop.is_set():
        ex.submit(abs, -1).result()
threads = [threading.Thread(target=submit) for _ in range(3)]
for thread in threads: thread.start()
codes = set()
for _ in range(10):
    pid = os.fork()
    if pid == 0:
        ex.shutdown()
        ex = None
        gc.collect()
        os._exit(FiberExecutor(1).submit(abs, -7).result())
    codes.add(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
stop.set()
for thread in threads: thread.join()
print(codes, ex.submit(pow, 2, 4).result())
ex.shutdown()
""",
    "{7} 16\n",
)

PROGRAMS["fork inside a task"] = (
    """
import os
from fiberexec import FiberExecutor
def task(x):
    pid = os.fork()
    if pid == 0:
        os._exit(x)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
def leaving(x):
    pid = os.fork()
    if pid == 0:
        raise SystemExit(x)  # a child that unwinds the worker's own stack
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
with FiberExecutor(2) as ex:
    print(list(ex.map(task, range(5))), ex.submit(leaving, 3).result(), ex.submit(pow, 2, 2).result())
""",
    "[0, 1, 2, 3, 4] 3 4\n",
)

PROGRAMS["multiprocessing inside a task"] = (
    """
import multiprocessing
from fiberexec import FiberExecutor
def task(n):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return sum(pool.map(abs, range(-n, 0)))
with FiberExecutor(1) as ex:
    print(ex.submit(task, 4).result())
""",
    "10\n",
)

PROGRAMS["several at once, one shut down while the others work"] = (
    """
from fiberexec import FiberExecutor
executors = [FiberExecutor(2) for _ in range(3)]
futures = [ex.submit(pow, 2, n) for n in range(4) for ex in executors]
executors[1].shutdown()
futures += [executors[0].submit(pow, 3, 2), executors[2].submit(pow, 3, 3)]
print([future.result() for future in futures])
for ex in executors:
    ex.shutdown()
""",
    "[1, 1, 1, 2, 2, 2, 4, 4, 4, 8, 8, 8, 9, 27]\n",
)

PROGRAMS["one executor used from 8 threads"] = (
    """
import threading
from fiberexec import FiberExecutor
ex = FiberExecutor(2)
sums = {}
def use(k):
    ones = sum(ex.submit(abs, -i).result() for i in range(25))
    futures = [ex.submit(abs, -i) for i in range(25)]
    sums[k] = ones + sum(f.result() for f in futures) + sum(ex.map(abs, range(100)))
threads = [threading.Thread(target=use, args=[k]) for k in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(sums), set(sums.values()))
ex.shutdown()
""",
    "8 {5550}\n",
)

PROGRAMS["shut down by several threads at once"] = (
    """
import threading
from fiberexec import FiberExecutor
ex = FiberExecutor(2)
futures = [ex.submit(abs, -i) for i in range(50)]
threads = [threading.Thread(target=ex.shutdown) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(sum(future.result(0) for future in futures))
""",
    "1225\n",
)

PROGRAMS["a driver that blocks signals"] = (
    """
import signal, time
from concurrent.futures import wait
from fiberexec import FiberExecutor
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, signal.SIGTERM, signal.SIGURG})
def blocked():
    return signal.pthread_sigmask(signal.SIG_BLOCK, ())
with FiberExecutor(1) as ex:
    print(ex.submit(blocked).result())
    future = ex.submit(time.sleep, 600)
    while not future.running():
        time.sleep(0.01)
    future.terminate()
    wait([future], 20)
    print(future.cancelled())
""",
    "set()\nTrue\n",
)

PROGRAMS["forked while callbacks wait"] = (
    """
import os, time, warnings
from fiberexec import FiberExecutor
warnings.simplefilter("ignore", DeprecationWarning)
ex = FiberExecutor(1)
future = ex.submit(time.sleep, 3)
future.add_done_callback(lambda f: print("done in the", "parent" if os.getpid() == parent else "child", flush=True))
parent = os.getpid()
if (pid := os.fork()) == 0:
    print(type(future.exception(20)).__name__, flush=True)
    os._exit(0)
os.waitpid(pid, 0)
ex.shutdown()
""",
    "ForkedError\ndone in the parent\n",
)

PROGRAMS["forked after gc.freeze()"] = (
    """
import gc, os, time, warnings
from concurrent.futures import TimeoutError
from fiberexec import FiberExecutor, ForkedError
warnings.simplefilter("ignore", DeprecationWarning)
ex = FiberExecutor(1)
future, results = ex.submit(time.sleep, 3), ex.map(time.sleep, [0.1], timeout=20)
gc.freeze()
if (pid := os.fork()) == 0:
    for wait in (lambda: future.result(20), lambda: next(results)):
        try:
            wait()
        except (ForkedError, TimeoutError) as error:
            print(type(error).__name__, flush=True)
    os._exit(0)
os.waitpid(pid, 0)
print(future.result(), list(results))
ex.shutdown()
""",
    "ForkedError\nForkedError\nNone [None]\n",
)

PROGRAMS["read from stdin by a task, whose stdin is empty"] = (
    """
import sys, os
from fiberexec import FiberExecutor
def read():
    return sys.stdin.read(), os.path.samestat(os.fstat(0), os.stat(os.devnull))
with FiberExecutor(1) as ex:
    print(ex.submit(read).result(), repr(input()))
""",
    "('', True) 'for the driver'\n",
)

PROGRAMS["a global that methods of a class use"] = (
    """
from fiberexec import FiberExecutor
ex = FiberExecutor(2)
class Model:
    def __init__(self, k):
        self.k = k
    def score(self, x):
        return self.k * x
    def scores(self, xs):
        return list(ex.map(self.score, xs))
print(Model(3).scores(range(4)))
""",
    "[0, 3, 6, 9]\n",
)


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_program_prints_its_answer_and_leaves_nothing(name: str, script: Callable[..., Any]) -> None:
    source, answer = PROGRAMS[name]
    program = script(source, stdin="for the driver\n").finish()
    assert (program.code, program.out, program.err) == (0, answer, "")
