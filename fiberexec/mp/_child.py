"""What runs in the child: it becomes like its parent, unpickles its process object, runs it, and leaves with its exit code."""

from __future__ import annotations

import atexit
import os
import signal
import traceback
from multiprocessing import process
from typing import Any, NoReturn

from fiberexec import _worker
from fiberexec._hub import client
from fiberexec._hub import launch as hub
from fiberexec._serialize import loads
from fiberexec.mp.context import default_context, util


def prepare(told: dict[str, Any]) -> None:
    """Take over what the parent said of itself. It is the worker's initializer: the child is ready after it."""
    for number in (signal.SIGTERM, signal.SIGURG):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler if told["interruptible"] else signal.SIG_IGN)
    for name, value in told["environ"].items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    hub.adopt(told["hub"])
    process.current_process().authkey = told["authkey"]
    if told["log_level"] is not None:
        util.get_logger().setLevel(told["log_level"])
    if told["log_to_stderr"]:
        util.log_to_stderr(told["log_level"])
    if told["method"] is not None:
        default_context.set_start_method(told["method"], force=True)


def run(data: bytes, *buffers: Any) -> NoReturn:
    """Run the process that ``data`` and ``buffers`` are the pickle of."""
    code = 1
    try:
        worker = _worker.current
        assert worker is not None
        worker.unit = None  # it executes no task of an executor
        found = loads(data, buffers)
        del data, buffers
        found._config["tempdir"] = os.path.dirname(hub.way(hub.address()))  # of managers' sockets: it goes with the program
        code = found._bootstrap(parent_sentinel=worker.fileno())
        atexit._run_exitfuncs()
        client.goodbye()  # its finalizer may have been forgotten when the process began
    except BaseException:
        traceback.print_exc()
    finally:
        util._flush_std_streams()
        os._exit(code & 255)
