"""The worker: one process that receives units of work, runs one item after the other, and replies.

    TASKS frame ─► units ─► items: load arguments, call, dump the result ─► outbox ─► RESULTS frame

Rules:
- Before each item its number is written to the cell, so whoever reaps this process knows what was executing. The whole
  attempt is covered: unpickling the arguments, the call, pickling the result.
- What was claimed is run, what was recalled before it was claimed is not: the cell decides, see _claim().
- Results leave at the end of a frame, after FLUSH seconds, or when the driver nudges (SIGURG).
- Nothing is imported here but pickle and what a task needs.
"""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]
import faulthandler
import os
import sys
from _socket import gethostname, socket
from _thread import get_ident
from time import monotonic, monotonic_ns

from fiberexec import _messages as messages
from fiberexec._outbox import Outbox, flush_output
from fiberexec._platform import hold_while_forking, repeat_when_ignored
from fiberexec._serialize import dump_exception, dumps_plain, dumps_result, is_plain, loads
from fiberexec._stream import Stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import Any, NoReturn

# Words of the cell.
RUNNING, STARTED, CLAIMED, RECALLED = range(4)  # item's number | monotonic ns | last item claimed | last item recalled

FLUSH = 0.003  # seconds that a result may wait for company
SHIPPING = 5_000_000_000  # nanoseconds beyond its time limit that a task may wait for code
SLICE = 2048  # items at most, and
SLICE_SECONDS = 0.001  # seconds about, that run between two looks at the clock


class Stopped(BaseException):
    """Raised inside a task that is being stopped, so that its ``finally`` blocks run."""


class _Slice:
    """Plain items that run in one loop; ``columns`` may be cut short, and ``results`` be taken out, while it runs."""

    def __init__(self, first: int, columns: list[list[Any]]) -> None:
        self.first = self.number = first  # numbers of the first item, and of the first of the results
        self.columns = columns
        self.results: list[Any] = []
        self.began = monotonic()


class Worker:
    """See the module's description."""

    def __init__(self, sock: socket, cell: memoryview) -> None:
        self._stream = Stream(sock)
        self._cell = cell
        self._functions: dict[int, Any] = {}  # by id: the function, or (data, buffers) until its first task
        self._paces: dict[int, int] = {}  # by function: items in the next slice
        self._outbox = Outbox(self._stream)
        self._stopping = False
        self._logging = False
        self._is_child = False
        self._slice: _Slice | None = None
        self._log_levels: dict[str, int] = {}
        self._thread = get_ident()
        self._began = 0  # when the running item started, while it waits for code
        self.unit: tuple[Any, ...] | None = None  # the unit that is being run

    def fileno(self) -> int:
        """The stream's descriptor: readable when the driver has gone."""
        return self._stream.fileno()

    # -- life

    def main(self) -> NoReturn:
        global current
        current = self
        code = 1
        try:
            signal.signal(signal.SIGTERM, self._stop)
            signal.signal(signal.SIGURG, self._nudged)
            signal.siginterrupt(signal.SIGURG, False)
            faulthandler.enable(2)
            hold_while_forking(signal.SIGTERM, self._forked)
            repeat_when_ignored(signal.SIGTERM, Stopped)
            sys.modules["__main__"] = type(sys)("__main__")
            self._serve()
            self._leave()
            code = 0
        except Stopped:
            code = 128 + signal.SIGTERM
        except (EOFError, OSError):
            os.killpg(0, signal.SIGKILL)  # the driver has gone
        finally:
            flush_output()
            os._exit(code)

    def _serve(self) -> None:
        while True:
            kind, body, buffers = self._stream.receive_one()
            if kind == messages.TASKS:
                self._run(messages.decode(body), buffers)
            elif kind == messages.SETUP:
                self._setup(messages.decode(body), buffers)
            elif kind == messages.DRAIN:
                return

    def _setup(self, setup: dict[str, Any], buffers: list[Any]) -> None:
        self._adapt(setup)
        sys.argv[:] = setup["argv"]
        os.environ.update(setup["env"])
        if setup["cwd"] is None:
            from fiberexec._bundle import _job

            _job.enter(os.environ["FIBEREXEC_JOB"], self._excuse)
        else:
            try:
                os.chdir(setup["cwd"])
            except OSError:
                pass  # it has gone
        self._log_levels = setup["log_levels"]
        if setup["prefix"]:
            from fiberexec._output import prefix_output

            prefix_output(task_id)
        error = None
        if setup["initializer"] is not None:
            try:
                initializer, initargs = loads(setup["initializer"], buffers)
                self._hook_logging()
                initializer(*initargs)
            except Stopped:
                raise
            except BaseException as reason:
                error = dump_exception(reason)
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        ready = (messages.VERSION, version, os.getpid(), gethostname(), error)
        self._stream.send(messages.READY, messages.encode(ready))

    def _adapt(self, changes: dict[str, Any]) -> None:
        """Follow the driver in what may change while a worker lives."""
        if "path" in changes:
            sys.path[:] = changes["path"]
        if "authkey" in changes:  # the driver uses multiprocessing's managers: let their proxies connect from here
            import multiprocessing

            multiprocessing.current_process().authkey = changes["authkey"]
        if "hub" in changes:
            from fiberexec import _inherited

            _inherited.hub = changes["hub"]

    def _excuse(self, seconds: float | None) -> None:
        """A task waits for its code (None), or has waited so long: that is not its own time."""
        if get_ident() != self._thread:
            return  # a thread of the task's waits, not the task
        if seconds is None:
            self._began = self._cell[STARTED]
            self._cell[STARTED] = monotonic_ns() + SHIPPING
        else:
            self._cell[STARTED] = self._began + int(seconds * 1e9)

    def _leave(self) -> None:
        """What a process does when it ends in order: other threads, then functions registered by tasks."""
        import atexit

        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
        atexit._run_exitfuncs()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True
        raise Stopped

    # -- running

    def _run(self, message: tuple[Any, ...], buffers: list[Any]) -> None:
        functions, forget, units, changes = message
        if changes is not None:
            self._adapt(changes)
        position = 0
        for function_id, data, taken in functions:
            self._functions[function_id] = data, buffers[position : position + taken]
            position += taken
        self._outbox.flushed = monotonic()
        for unit in units:
            taken = unit[8]
            self.unit = unit
            owned: Any = buffers[position : position + taken] if taken else ()
            self._run_unit(unit, owned.pop(0) if unit[7] is None else unit[7], owned)
            position += taken
        self.unit = None
        self._cell[RUNNING] = 0
        for function_id in forget:
            self._functions.pop(function_id, None)
            self._paces.pop(function_id, None)
        self._outbox.flush()

    def _run_unit(self, unit: tuple[Any, ...], data: bytes, buffers: Any) -> None:
        number, _, _, function_id, start, stop, kind, _, _, extra = unit
        if extra is not None and "devices" in extra:
            os.environ["CUDA_VISIBLE_DEVICES"] = extra["devices"]
        timed = extra is not None and "timed" in extra
        if kind == messages.CALL:
            if self._claim(number, 1):
                self._run_item(number, function_id, lambda index: loads(data, buffers), 0, timed)
        elif kind == messages.COLUMNS and not timed:
            self._run_columns(number, function_id, loads(data, buffers), start, stop)
        else:
            items = loads(data, buffers)

            def load(index: int) -> Any:
                return loads(items[index]) if kind == messages.ITEMS else (tuple(column[index] for column in items), {})

            for index in range(start, stop):
                if not self._claim(number, 1, stop - index):
                    return
                self._run_item(number, function_id, load, index, timed)
                number += 1

    def _claim(self, number: int, size: int, rest: int = 0) -> bool:
        """Claim items; False, and a record that says so, when they (and the rest of their unit) were recalled before."""
        cell = self._cell
        before, cell[CLAIMED] = cell[CLAIMED], number + size - 1
        if cell[RECALLED] < number:
            return True
        cell[CLAIMED] = before
        self._outbox.reply(number, rest or size, messages.RECALLED, b"", (), 0.0)
        return False

    def _load_function(self, function_id: int) -> Any:
        function = self._functions[function_id] = loads(*self._functions[function_id])
        self._hook_logging()
        return function

    def _run_item(self, number: int, function_id: int, load: Callable[[int], Any], index: int, timed: bool) -> None:
        cell = self._cell
        started = monotonic()
        if timed:
            cell[STARTED] = monotonic_ns()
        cell[RUNNING] = number
        buffers: Any = ()
        try:
            function = self._functions[function_id]
            if type(function) is tuple:
                function = self._load_function(function_id)
            args, kwargs = load(index)
            value = function(*args, **kwargs)
            args = kwargs = None
            data, buffers = dumps_result(value)
            value = None
            status = messages.VALUE
        except BaseException as error:
            if self._stopping:
                raise Stopped from None
            self._check_forked(error)
            status, data = messages.ERROR, dump_exception(error)
            args = kwargs = value = None
        self._check_forked(None)
        now = monotonic()
        self._outbox.reply(number, 1, status, data, buffers, now - started)
        if now - self._outbox.flushed > FLUSH:
            self._outbox.flush()

    def _run_columns(self, number: int, function_id: int, columns: tuple[list[Any], ...], start: int, stop: int) -> None:
        """Run plain items in slices, with as little as possible between two calls: the loop's own target is the cell.

        A slice is limited by the time measured so far, so that results and recalls are never far from the clock.
        """
        cell = self._cell
        pace = self._paces.get(function_id, 1)
        while start < stop:
            size = min(pace, stop - start)
            if not self._claim(number, size, stop - start):
                return
            self._slice = part = _Slice(number, [column[start : start + size] for column in columns])
            append, began = part.results.append, part.began
            error: BaseException | None = None
            cell[RUNNING] = number
            try:
                function = self._functions[function_id]
                if type(function) is tuple:
                    function = self._load_function(function_id)
                numbers = range(number, number + size)
                if len(columns) == 1:
                    for cell[RUNNING], item in zip(numbers, part.columns[0]):
                        append(function(item))
                else:
                    for cell[RUNNING], items in zip(numbers, zip(*part.columns)):
                        append(function(*items))
            except BaseException as reason:
                if self._stopping:
                    raise Stopped from None
                self._check_forked(reason)
                error = reason
            self._check_forked(None)
            self._slice = None
            now = monotonic()
            alone = now - began if not part.results else 0.0  # seconds of an item that raised before any other was done
            self._reply_values(part, now)
            done = part.number - number
            if error is not None:
                cell[RUNNING] = part.number
                self._outbox.reply(part.number, 1, messages.ERROR, dump_exception(error), (), alone)
                done += 1
            elif done < size:  # the rest was recalled meanwhile
                self._outbox.reply(part.number, stop - start - done, messages.RECALLED, b"", (), 0.0)
                return
            number += done
            start += done
            if now - self._outbox.flushed > FLUSH:
                self._outbox.flush()
            pace = max(1, min(SLICE, 2 * pace, int(SLICE_SECONDS * size / max(now - began, 1e-7))))
        self._paces[function_id] = pace

    def _reply_values(self, part: _Slice, now: float) -> None:
        """Reply what a slice has got so far."""
        results = part.results[:]
        if not results:
            return
        number, part.number = part.number, part.number + len(results)  # first: a nudge may come in between
        del part.results[: len(results)]
        seconds, part.began = now - part.began, now
        if len(results) > 1 and is_plain(results):
            self._outbox.reply(number, len(results), messages.VALUES, dumps_plain(results), (), seconds)
            return
        running = self._cell[RUNNING]
        for result in results:  # pickling runs the user's code: each on its own account
            self._cell[RUNNING] = number
            try:
                data, buffers = dumps_result(result)
                self._outbox.reply(number, 1, messages.VALUE, data, buffers, seconds / len(results))
            except BaseException as error:
                if self._stopping:
                    raise Stopped from None
                self._outbox.reply(number, 1, messages.ERROR, dump_exception(error), (), 0.0)
            number += 1
        self._cell[RUNNING] = running

    def _check_forked(self, error: BaseException | None) -> None:
        """A child that a task forked, and that comes back from the task, is no worker: it ends as a script would."""
        if not self._is_child:
            return
        code: Any = 0
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        elif error is not None:
            sys.excepthook(type(error), error, error.__traceback__)
            code = 1
        flush_output()
        os._exit(code)

    def _forked(self) -> None:
        """In a child that the task has forked: what is the worker's own does not apply to it."""
        self._is_child = True
        if signal.getsignal(signal.SIGTERM) == self._stop:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGURG, signal.SIG_DFL)

    def _nudged(self, number: int, frame: FrameType | None) -> None:
        """A task takes longer than was thought: hand over what is done, let go of what was recalled.

        Python calls this between two steps of the task, or of the loop around it: never between a result and its place.
        """
        part, cell = self._slice, self._cell
        if part is not None:
            if is_plain(part.results):  # pickling others runs the user's code: not in the middle of the user's code
                self._reply_values(part, monotonic())
            running = part.number + len(part.results)  # or about to run
            if running < cell[RECALLED] and running < part.first + len(part.columns[0]):
                cell[CLAIMED] = running
                for column in part.columns:  # the loop ends there
                    del column[running - part.first + 1 :]
        self._outbox.flush()

    # -- logging

    def _hook_logging(self) -> None:
        if not self._logging and "logging" in sys.modules:
            self._logging = True
            from fiberexec._output import forward_logging

            forward_logging(self._log_levels, lambda record: self._outbox.log((task_id(), *record)))


current: Worker | None = None  # this process' worker, None in every other process


def task_id() -> int:
    """The id of the task that this process is executing, 0 if none."""
    worker = current
    if worker is None or worker.unit is None:
        return 0
    return int(worker.unit[1] + worker._cell[RUNNING] - worker.unit[0])
