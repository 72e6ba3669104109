"""The first process of what ``fiberexec run`` starts, wherever that is: it runs the program and passes on how it ended.

    python -m fiberexec._cli.run_first FOLDER          FOLDER/run.json: what is to be run; FOLDER/exit: the exit code

In a container everything ends with its first process. So this one stays until the janitor of a program that was killed has
ended the program's jobs. Signals go to the program's process group, as a terminal's Ctrl-C does.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from typing import Any

SPEC = "run.json"
EXIT = "exit"
_OURS = b"fiberexec._"  # in the command lines of hubs and janitors
_UNTOLD = 600.0  # seconds that what is to be run may take to come
_LINGER = 30.0  # seconds that a janitor may take
_PASSED_ON = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")


def main(folder: str) -> int:
    """Run what the folder says; return the exit code as a shell gives it."""
    spec = _told(os.path.join(folder, SPEC))
    code = 127
    try:
        code = _run(spec)
    finally:
        if spec.get("note"):  # else it is the container's own
            with open(os.path.join(folder, EXIT), "w") as file:  # in place: who looks on has it open
                file.write(str(code))
    return code


def _told(path: str) -> dict[str, Any]:
    """What is to be run: it may be sent when this process is there. Its file is removed, since variables may be secret."""
    end = time.monotonic() + _UNTOLD
    while True:
        try:
            with open(path) as file:
                spec: dict[str, Any] = json.load(file)
            os.unlink(path)
            return spec
        except FileNotFoundError:
            if time.monotonic() > end:
                sys.exit("fiberexec run: nobody has sent the program")
            time.sleep(0.05)
        except OSError as error:
            sys.exit(f"fiberexec run: {error}")


def _run(spec: dict[str, Any]) -> int:
    command = spec["command"]
    alone = os.getpid() == 1
    # They are waited for, not handled: a handler would not run if its signal came just before this process began to wait.
    numbers = {signal.SIGCHLD, *(getattr(signal, name) for name in _PASSED_ON)}
    for number in numbers:
        signal.signal(number, lambda *_: None)  # the first process of a container gets none that it does not handle
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        if spec.get("folder"):
            os.chdir(spec["folder"])
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **spec["env"]},
            start_new_session=True,
            preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers),
        )
    except OSError as error:
        print(f"fiberexec run: {error.filename or command[0]}: {error.strerror}", file=sys.stderr)
        return 126 if isinstance(error, PermissionError) else 127
    status = _ended(process.pid, numbers)
    process.returncode = 0  # it has been waited for
    if alone:
        _linger()
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code


def _ended(child: int, numbers: Collection[int]) -> int:
    """The status of a child that has ended; until then signals are passed on.

    What others leave to the first process of a container is reaped meanwhile.
    """
    while True:
        number = signal.sigwait(numbers)
        if number != signal.SIGCHLD:
            try:
                os.killpg(child, number)
            except ProcessLookupError:
                pass
            continue
        pid = -1
        while pid:  # several may have ended, and this one always has children until it returns
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == child:
                return status


def _linger() -> None:
    """Wait for the hub and the janitor of the program, which end what it has elsewhere."""
    end = time.monotonic() + _LINGER
    while time.monotonic() < end and _any_of_ours():
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.05)


def _any_of_ours() -> bool:
    for name in os.listdir("/proc"):
        if name.isdecimal() and int(name) != os.getpid():
            try:
                with open(f"/proc/{name}/cmdline", "rb") as file:
                    if _OURS in file.read():
                        return True
            except OSError:
                continue
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
