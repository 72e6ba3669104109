"""Tasks that spoil the interpreter that runs them, and results that do harm on arrival."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from fiberexec import FiberExecutor, TaskTimeout, WorkerLost


def kill_the_group() -> None:
    os.killpg(0, signal.SIGKILL)


def forget_all_modules() -> None:
    sys.modules.clear()
    os.environ.clear()
    sys.path.clear()


def close_all_sockets() -> None:
    import gc

    for thing in gc.get_objects():
        if type(thing).__name__ == "socket":
            thing.close()


def delete_the_builtins() -> None:
    import builtins

    for name in list(vars(builtins)):
        delattr(builtins, name)


def raise_stop_iteration() -> NoReturn:
    raise StopIteration(3)


def raise_generator_exit() -> NoReturn:
    raise GeneratorExit


def raise_keyboard_interrupt() -> NoReturn:
    raise KeyboardInterrupt


def leave_no_room_on_the_stack() -> None:
    sys.setrecursionlimit(60)


def leave_a_trace_function_that_raises() -> None:
    sys.settrace(lambda *_: 1 / 0)  # type: ignore[arg-type, return-value]


def exit_the_thread() -> None:
    import _thread

    _thread.exit()


def leave_a_signal_handler_that_raises() -> None:
    signal.signal(signal.SIGURG, lambda *_: 1 / 0)  # type: ignore[arg-type]


def let_the_alarm_ring() -> None:
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    time.sleep(60)


def end_by_sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


class ExitsWhenPickled(Exception):
    def __reduce__(self) -> NoReturn:
        os._exit(5)


class CannotBeShown(Exception):
    def __str__(self) -> NoReturn:
        raise ValueError

    __repr__ = __str__


def raise_what_exits_when_pickled() -> NoReturn:
    raise ExitsWhenPickled


def raise_what_cannot_be_shown() -> NoReturn:
    raise CannotBeShown


def raise_a_long_chain() -> NoReturn:
    error = None
    for number in range(5000):
        cause, error = error, ValueError(number)
        error.__cause__ = cause
    raise error  # type: ignore[misc]


def rename_everything() -> None:
    import _io
    import pickle

    pickle.dumps = pickle.loads = pickle.Pickler = None  # type: ignore[assignment, misc]
    _io.BytesIO = None  # type: ignore[misc, assignment]


OUTCOMES: dict[Callable[[], object], tuple[type[BaseException] | None, ...]] = {
    kill_the_group: (WorkerLost,),
    forget_all_modules: (None, WorkerLost),
    close_all_sockets: (None, WorkerLost),
    delete_the_builtins: (WorkerLost, NameError),
    raise_stop_iteration: (StopIteration,),
    raise_generator_exit: (GeneratorExit,),
    raise_keyboard_interrupt: (KeyboardInterrupt,),
    leave_no_room_on_the_stack: (None, RecursionError),
    leave_a_trace_function_that_raises: (None, ZeroDivisionError),
    exit_the_thread: (SystemExit,),
    leave_a_signal_handler_that_raises: (None,),
    let_the_alarm_ring: (WorkerLost,),
    end_by_sigterm: (WorkerLost,),
    raise_what_exits_when_pickled: (WorkerLost,),
    raise_what_cannot_be_shown: (CannotBeShown,),
    raise_a_long_chain: (ValueError,),
    rename_everything: (None, WorkerLost, TypeError),
}


@pytest.mark.parametrize("task", OUTCOMES, ids=lambda task: task.__name__)
def test_what_spoils_an_interpreter_ends_and_the_executor_goes_on(task: Callable[[], object]) -> None:
    with FiberExecutor(1) as ex:
        error = ex.submit(task).exception(30)
        found = None if error is None else type(error)
        assert any(found is kind or (kind and found and issubclass(found, kind)) for kind in OUTCOMES[task]), found
        # the interpreter may be spoilt for good: that is theirs who share it; but none hangs, and a new one is right
        for future in [ex.submit(abs, -number) for number in range(50)]:
            future.exception(30)
        for worker in ex.workers():
            if worker.pid:
                os.kill(worker.pid, signal.SIGKILL)
        assert list(ex.map(abs, range(-50, 0), timeout=30)) == list(range(50, 0, -1))


def explode(how: str, where: int) -> object:
    if how == "exit":
        sys.exit("on arrival")
    if how == "interrupt":
        raise KeyboardInterrupt("on arrival")
    if how == "raise":
        raise LookupError("on arrival")
    if how == "wait":
        time.sleep(0.2)
    return os.getpid() != where


class Parcel:
    def __init__(self, how: str) -> None:
        self.how = how

    def __reduce__(self) -> tuple[Any, ...]:
        return explode, (self.how, os.getpid())


def send(how: str) -> Parcel:
    return Parcel(how)


@pytest.mark.parametrize(
    ("how", "kind"), [("exit", SystemExit), ("interrupt", KeyboardInterrupt), ("raise", LookupError), ("wait", None)]
)
def test_a_result_that_does_harm_on_arrival_fails_its_own_future(how: str, kind: type[BaseException] | None) -> None:
    with FiberExecutor(2) as ex:
        neighbours = [ex.submit(abs, -number) for number in range(20)]
        bad = ex.submit(send, how)
        neighbours += [ex.submit(abs, -number) for number in range(20)]
        if kind is None:
            assert bad.result(30) is True
        else:
            assert isinstance(bad.exception(30), kind)
            with pytest.raises(kind):
                next(ex.map(send, [how]))
        assert [future.result(30) for future in neighbours] == [*range(20), *range(20)]


def die_while_the_result_is_sent(size: int) -> bytearray:
    """Another thread ends this process some time after the result begins to leave."""
    import threading

    pid = os.getpid()

    def end() -> None:
        time.sleep(0.004)
        os.kill(pid, signal.SIGKILL)

    threading.Thread(target=end, daemon=True).start()
    return bytearray(size)


def test_a_worker_that_dies_in_the_midst_of_a_large_result_is_lost_and_half_a_result_is_none() -> None:
    with FiberExecutor(2, max_worker_losses=2) as ex:
        for _ in range(5):
            large, small = ex.submit(die_while_the_result_is_sent, 1 << 26), ex.submit(abs, -4)
            error = large.exception(60)
            assert isinstance(error, WorkerLost) or (error is None and large.result() == bytearray(1 << 26))
            assert small.result(60) == 4


def test_a_worker_that_dies_in_the_midst_of_a_large_argument_costs_nothing() -> None:
    with FiberExecutor(2) as ex:
        pids = set(ex.map(lambda _: (time.sleep(0.2), os.getpid())[1], range(2)))
        large = [ex.submit(len, bytearray(1 << 27)) for _ in range(2)]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert [future.result(60) for future in large] == [1 << 27] * 2


def test_a_task_that_writes_where_nobody_reads_holds_up_nobody_else(tmp_path: Path, package_root: str) -> None:
    """The driver's stderr is a full pipe: who writes there waits, and can be stopped; all others go on."""
    program = tmp_path / "program.py"
    program.write_text("""
import os
from fiberexec import FiberExecutor, TaskTimeout, WorkerLost
def talk():
    os.write(2, b"x" * (1 << 20))
    os.write(2, b"x" * (1 << 20))
read, write = os.pipe()
os.dup2(write, 2)
with FiberExecutor(2) as ex:
    talking = ex.options(timeout=1).submit(talk)
    assert isinstance(ex.submit(os._exit, 3).exception(20), WorkerLost)
    assert talking.exception(20) is None or isinstance(talking.exception(), TaskTimeout)
    assert ex.submit(abs, -3).result(20) == 3
print("over")
""")
    done = subprocess.run(
        [sys.executable, str(program)],
        env={**os.environ, "PYTHONPATH": package_root},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "over\n", done.stderr


def test_a_task_that_is_stopped_while_it_unpickles_its_arguments_times_out() -> None:
    class Slow:
        def __reduce__(self) -> tuple[Any, ...]:
            return time.sleep, (60,)

    with FiberExecutor(1) as ex:
        with pytest.raises(TaskTimeout):
            ex.options(timeout=0.2).submit(print, Slow()).result(30)
        assert ex.submit(abs, -3).result(30) == 3
