"""A terminal and a program that runs elsewhere: its output, its exit code, and what Ctrl-C means.

a thread ── output, end ──► queue ◄── signals
                              │
                         this thread: prints, asks, returns the exit code
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from fiberexec._cli.run_base import Fate, Place
from fiberexec._cli.show import note
from fiberexec._errors import FiberError

_AHEAD = 64  # pieces of output that are read before they are printed
_GLANCE = 0.2  # seconds after which a signal is seen that came just before this thread began to wait
_HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def attached(place: Place, name: str) -> int | None:
    """Show what a program writes until it ends; return its exit code, None if it was left to itself. Raises FiberError."""
    session = _Session(place, name)
    with _handled(_HANDLED, session.signalled):
        return session.run()


@contextmanager
def stoppable() -> Iterator[None]:
    """What is being started ends by SIGTERM and SIGHUP as by Ctrl-C: with an exception, so that nothing of it is left.

    The exit code is a shell's for that signal.
    """

    def stop(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    with _handled((signal.SIGTERM, signal.SIGHUP), stop):
        try:
            yield
        except KeyboardInterrupt:
            raise SystemExit(128 + signal.SIGINT) from None


@contextmanager
def uninterrupted() -> Iterator[None]:
    """What comes meanwhile comes at the end."""
    came: list[int] = []
    try:
        with _handled(_HANDLED, lambda number, _frame: came.append(number)):
            yield
    finally:
        for number in came:
            os.kill(os.getpid(), number)


@contextmanager
def _handled(numbers: Iterable[signal.Signals], handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Handle signals but those that whoever started this wants ignored, as nohup does."""
    before = {number: signal.getsignal(number) for number in numbers}
    before = {number: old for number, old in before.items() if old != signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class _Left(Exception):
    """A signal has come while somebody is asked."""


class _Session:
    def __init__(self, place: Place, name: str) -> None:
        self._place = place
        self._name = name
        self._queue: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._room = threading.Semaphore(_AHEAD)
        self._interrupts = 0

    def signalled(self, number: int, _frame: object) -> None:
        self._queue.put(("signal", number))

    def run(self) -> int | None:
        threading.Thread(target=self._follow, name="fiberexec-follow", daemon=True).start()
        while True:
            try:
                what, value = self._queue.get(timeout=_GLANCE)
            except queue.Empty:
                continue
            if what == "output":
                self._room.release()
                self._write(*value)
            elif what == "signal":
                if self._on_signal(value):
                    return None
            elif what == "failed":
                raise value
            else:
                fate: Fate = value
                if fate.text:
                    note(f"fiberexec: {fate.text}")
                return fate.code

    def _follow(self) -> None:
        def put(descriptor: int, data: bytes) -> None:
            self._room.acquire()
            self._queue.put(("output", (descriptor, data)))

        try:
            self._queue.put(("ended", self._place.follow(self._name, put)))
        except BaseException as error:
            self._queue.put(("failed", error))

    def _write(self, descriptor: int, data: bytes) -> None:
        stream = sys.stdout if descriptor == 1 else sys.stderr
        try:
            stream.flush()
            stream.buffer.write(data)
            stream.buffer.flush()
        except BrokenPipeError:  # whoever reads has had enough: so it would be for a program of this host
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            self._pass_on(signal.SIGTERM)

    def _on_signal(self, number: int) -> bool:
        """Whether the program is left to itself."""
        if number == signal.SIGHUP:  # the terminal has gone, and the program's end will not be known
            raise SystemExit(128 + number)
        if number != signal.SIGINT:
            self._pass_on(number)
            return False
        self._interrupts += 1
        if self._interrupts > 1:
            note(f"\nfiberexec: {self._name} is killed")
            self._pass_on(signal.SIGKILL)
            return False
        answer = self._asked()
        if not answer:
            return False
        if answer == "d":
            note(f"fiberexec: {self._name} goes on: `fiberexec attach {self._place.where}{self._name}` shows it again")
            return True
        note(f"fiberexec: {self._name} is asked to stop (SIGINT); Ctrl-C again kills it")
        self._pass_on(signal.SIGINT)
        return False

    def _asked(self) -> str:
        """ "d" to leave the program alone, "s" to stop it, as where nobody can be asked; "" if another signal comes first."""
        if not sys.stdin.isatty() or not sys.stderr.isatty():
            return "s"

        def leave(number: int, frame: object) -> None:
            self.signalled(number, frame)
            raise _Left

        try:
            with _handled(_HANDLED, leave), _handled((signal.SIGINT,), signal.default_int_handler):
                return self._answer()
        except KeyboardInterrupt:
            print(file=sys.stderr)
            return "s"
        except _Left:
            print(file=sys.stderr)
            return ""

    def _answer(self) -> str:
        while True:
            question = f"\nfiberexec: (d)etach and leave {self._name} running, or (s)top it? [d/s] "
            print(question, end="", file=sys.stderr, flush=True)
            answer = sys.stdin.readline()
            if not answer:
                return "d"  # nobody is there any more
            if answer.strip().lower()[:1] in ("d", "s"):
                return answer.strip().lower()[0]

    def _pass_on(self, number: int) -> None:
        try:
            self._place.signal(self._name, number)
        except FiberError as error:
            note(f"fiberexec: {error}")
