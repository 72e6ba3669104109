"""How a program ends: its work is finished first where the standard says so, and no process ever outlives it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

Script = Callable[..., Any]

HEAD = """
import atexit, gc, os, signal, subprocess, sys, threading, time
import fiberexec
from fiberexec import FiberExecutor
def say(text, after=0.2):
    time.sleep(after)
    print(text, flush=True)
def is_gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False
def wait_until_gone(pids, seconds=5):
    deadline = time.monotonic() + seconds
    while not all(map(is_gone, pids)):
        if time.monotonic() > deadline:
            return [pid for pid in pids if not is_gone(pid)]
        time.sleep(0.01)
    return []
"""

# name: (the program, exit code, stdout, what stderr ends with)
ENDINGS: dict[str, tuple[str, int, str, str]] = {}

ENDINGS["work that nobody waits for is finished at exit"] = (
    """
ex = FiberExecutor(1)
for n in range(3):
    ex.submit(say, n)
ex.map(say, ["mapped"])
print("end", flush=True)
""",
    0,
    "end\n0\n1\n2\nmapped\n",
    "",
)
ENDINGS["so is work whose executor was shut down without waiting"] = (
    "ex = FiberExecutor(2); ex.submit(say, 'done'); ex.shutdown(wait=False); print('end', flush=True)",
    0,
    "end\ndone\n",
    "",
)
ENDINGS["and work of an executor that nobody holds"] = (
    "FiberExecutor(1).submit(say, 'done'); gc.collect(); print('end', flush=True)",
    0,
    "end\ndone\n",
    "",
)
ENDINGS["pending work can be cancelled instead"] = (
    """
ex = FiberExecutor(1)
first = ex.submit(say, "done", 0.5)
while not first.running():
    time.sleep(0.01)
rest = [ex.submit(say, "never") for _ in range(20)]
ex.shutdown(wait=False, cancel_futures=True)
print("end", all(future.cancelled() for future in rest), flush=True)
""",
    0,
    "end True\ndone\n",
    "",
)
ENDINGS["an exception ends the program after the work, with its traceback"] = (
    "ex = FiberExecutor(1); ex.submit(say, 'done'); raise ValueError('mine')",
    1,
    "done\n",
    "ValueError: mine\n",
)
ENDINGS["an exception in the block waits for what was submitted"] = (
    "with FiberExecutor(1) as ex:\n    ex.submit(say, 'done')\n    raise ValueError('mine')",
    1,
    "done\n",
    "ValueError: mine\n",
)
ENDINGS["sys.exit keeps its code"] = ("ex = FiberExecutor(1); ex.submit(say, 'done'); sys.exit(3)", 3, "done\n", "")
ENDINGS["os._exit ends everything at once"] = (
    "ex = FiberExecutor(2); ex.submit(int).result(); ex.submit(time.sleep, 600); os._exit(5)",
    5,
    "",
    "",
)
ENDINGS["a program that becomes another one leaves its workers"] = (
    """
ex = FiberExecutor(2)
pids = [ex.submit(os.getpid).result()]
ex.submit(time.sleep, 600)
script = HEAD + f"print(wait_until_gone({pids}))"
os.execv(sys.executable, [sys.executable, "-c", script])
""",
    0,
    "[]\n",
    "",
)
ENDINGS["an executor that never worked costs nothing"] = ("ex = FiberExecutor(4); print('end')", 0, "end\n", "")
ENDINGS["a collected executor takes its workers along"] = (
    """
ex = FiberExecutor(2)
pids = {ex.submit(os.getpid).result() for _ in range(4)}
del ex
gc.collect()
print(len(pids) in (1, 2), wait_until_gone(pids))
""",
    0,
    "True []\n",
    "",
)
ENDINGS["a collected executor finishes its work first"] = (
    """
ex = FiberExecutor(1)
futures = [ex.submit(say, n, 0.05) for n in range(3)]
del ex
gc.collect()
for future in futures:
    future.result(10)
print("end")
""",
    0,
    "0\n1\n2\nend\n",
    "",
)
ENDINGS["a collected map iterator keeps the executor alive until it is read"] = (
    "results = FiberExecutor(2).map(abs, range(-3, 0)); gc.collect(); print(list(results))",
    0,
    "[3, 2, 1]\n",
    "",
)
ENDINGS["submit after shutdown is refused"] = (
    """
with FiberExecutor(1) as ex:
    pass
for use in (lambda: ex.submit(abs, 1), lambda: ex.map(abs, [1])):
    try:
        use()
    except RuntimeError as error:
        print(error)
ex.shutdown()
""",
    0,
    "cannot schedule new futures after shutdown\n" * 2,
    "",
)
ENDINGS["submit at interpreter exit is refused"] = (
    """
ex = FiberExecutor(1)
ex.submit(int).result()
@atexit.register
def last():
    try:
        ex.submit(abs, 1)
    except RuntimeError as error:
        print(str(error).startswith("cannot schedule new futures"))
    try:
        FiberExecutor(1).submit(abs, 1)
    except RuntimeError as error:
        print(str(error).startswith("cannot schedule new futures"))
""",
    0,
    "True\nTrue\n",
    "",
)
for _daemon in (True, False):
    ENDINGS[f"a {'daemon' if _daemon else 'plain'} thread that uses the executor doesn't stop the exit"] = (
        f"""
ex = FiberExecutor(2)
started = threading.Event()
def use():
    try:
        while True:
            ex.submit(abs, -1).result()
            started.set()
    except RuntimeError:
        pass
threading.Thread(target=use, daemon={_daemon}).start()
started.wait()
print("end")
""",
        0,
        "end\n",
        "",
    )
ENDINGS["terminate_workers and kill_workers end running work"] = (
    """
for name in ("terminate_workers", "kill_workers"):
    ex = FiberExecutor(2)
    pids = [ex.submit(os.getpid).result()]
    running = ex.submit(time.sleep, 600)
    while not running.running():
        time.sleep(0.01)
    getattr(ex, name)()
    try:
        running.result(10)
    except fiberexec.BrokenExecutor:
        print(wait_until_gone(pids))
""",
    0,
    "[]\n[]\n",
    "",
)


@pytest.mark.parametrize("name", ENDINGS)
def test_an_ending(name: str, script: Script) -> None:
    source, code, out, err = ENDINGS[name]
    program = script(HEAD + f"HEAD = {HEAD!r}\n" + source).finish()
    assert (program.code, program.out) == (code, out), program.err
    assert program.err.endswith(err) and bool(program.err) == bool(err), program.err


TASKS = """
def asleep():
    print("running", flush=True)
    time.sleep(600)
def deaf():
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    asleep()
def holding_the_gil():
    import collections, itertools
    print("running", flush=True)
    collections.deque(itertools.repeat(0), maxlen=0)
def parent_of_a_program():
    child = subprocess.Popen(["sleep", "600"])
    asleep()
def parent_of_a_fork():
    if os.fork() == 0:
        while True:
            time.sleep(600)
    asleep()
def nested():
    with FiberExecutor(1) as inner:
        inner.submit(asleep).result()
"""
TASK_NAMES = ["asleep", "deaf", "holding_the_gil", "parent_of_a_program", "parent_of_a_fork", "nested"]
BLOCK = """
with FiberExecutor(2) as ex:
    futures = [ex.submit({task}) for _ in range(4)]
    {wait}
"""


@pytest.mark.parametrize("task", TASK_NAMES)
def test_sigkill_of_the_driver_leaves_no_process(task: str, script: Script) -> None:
    program = script(HEAD + TASKS + BLOCK.format(task=task, wait="futures[0].result()"))
    program.expect("running", times=2)
    program.signal(signal.SIGKILL)
    program.finish()
    assert program.code == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGABRT, signal.SIGSEGV, signal.SIGQUIT])
def test_a_signal_that_ends_the_driver_leaves_no_process(number: signal.Signals, script: Script) -> None:
    default = f"import signal; signal.signal({int(number)}, signal.SIG_DFL)\n"  # nohup, say, has it ignored
    program = script(default + HEAD + TASKS + BLOCK.format(task="deaf", wait="futures[0].result()"))
    program.expect("running", times=2)
    program.signal(number)
    program.finish()
    assert program.code == -number


def test_a_driver_killed_while_its_forked_child_lives_on(script: Script) -> None:
    """The child holds every descriptor of the driver, so that no pipe tells the workers of the driver's death."""
    fork = "os.fork() == 0 and (print(f'child {os.getpid()}.', flush=True), time.sleep(600))"
    program = script(HEAD + TASKS + BLOCK.format(task="deaf", wait=f"{fork}\n    futures[0].result()"))
    program.expect("running", times=2)
    program.expect(".")
    child = int(program.out.split("child ")[1].split(".")[0])
    program.signal(signal.SIGKILL)
    program.finish(but=[child])
    os.kill(child, 0)  # it is unharmed


WAITS = {
    "result": "futures[0].result()",
    "the end of the block": "pass",
    "iterating over map": "list(ex.map(abs, range(3)))",
    "as_completed": "import concurrent.futures; list(concurrent.futures.as_completed(futures))",
    "wait": "import concurrent.futures; concurrent.futures.wait(futures)",
    "an event": "threading.Event().wait()",
    "shutdown": "ex.shutdown()",
}


@pytest.mark.parametrize("wait", WAITS)
def test_ctrl_c_ends_the_program(wait: str, script: Script) -> None:
    """The whole foreground group gets SIGINT, as from a terminal; the tasks here would run for ten minutes."""
    program = script(HEAD + TASKS + BLOCK.format(task="asleep", wait=WAITS[wait]))
    program.expect("running", times=2)
    check_interrupt(program)


def test_ctrl_c_takes_two_seconds_at_most(script: Script) -> None:
    took = []
    for _ in range(3):  # the machine may be busy with something else
        program = script(HEAD + TASKS + BLOCK.format(task="asleep", wait="pass"))
        program.expect("running", times=2)
        took.append(check_interrupt(program))
    assert min(took) < 2.0, took


@pytest.mark.parametrize("task", TASK_NAMES[1:])
def test_ctrl_c_ends_tasks_that_take_no_notice(task: str, script: Script) -> None:
    program = script(HEAD + TASKS + BLOCK.format(task=task, wait="futures[0].result()"))
    program.expect("running", times=2)
    check_interrupt(program)  # SIGTERM, a grace, then SIGKILL


def test_ctrl_c_without_a_block(script: Script) -> None:
    program = script(HEAD + TASKS + "ex = FiberExecutor(1)\nex.submit(asleep).result()")
    program.expect("running")
    check_interrupt(program)


def test_ctrl_c_during_the_wait_at_exit(script: Script) -> None:
    program = script(HEAD + TASKS + "ex = FiberExecutor(1)\nex.submit(asleep)")
    program.expect("running")
    program.signal(signal.SIGINT, group=True)
    program.finish()


def test_ctrl_c_while_workers_start(script: Script) -> None:
    source = "print('running', flush=True)\nwith FiberExecutor(2) as ex:\n    list(ex.map(time.sleep, [600] * 9))"
    program = script(HEAD + source)
    program.expect("running")
    check_interrupt(program)


def test_a_program_that_catches_ctrl_c_goes_on(script: Script) -> None:
    source = """
try:
    with FiberExecutor(2) as ex:
        futures = [ex.submit(asleep) for _ in range(4)]
        print("submitted", flush=True)
        futures[0].result()
except KeyboardInterrupt:
    print([future.cancelled() for future in futures])
with FiberExecutor(2) as ex:
    print(ex.submit(pow, 2, 5).result())
"""
    program = script(HEAD + TASKS + source)
    program.expect("running", times=2)
    program.expect("submitted")
    program.signal(signal.SIGINT, group=True)
    program.finish()
    assert (program.code, program.err) == (0, "")
    assert program.out.endswith("[True, True, True, True]\n32\n")


def check_interrupt(program: Any) -> float:
    """Ctrl-C, and what the program is to do then; the seconds that it takes."""
    begin = time.monotonic()
    program.signal(signal.SIGINT, group=True)
    program.finish()
    took = time.monotonic() - begin
    assert program.code == -signal.SIGINT
    # More than one traceback is shown where the interrupt came while another exception was being handled.
    assert "fiberexec-manager" not in program.err and program.err.endswith("KeyboardInterrupt\n"), program.err
    assert took < 15.0
    return took
