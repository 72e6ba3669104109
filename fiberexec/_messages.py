"""What the frames between driver, fork server and worker say.

Bodies are pickles of plain builtins (numbers, strings, bytes, tuples, lists, dicts), read by an unpickler that refuses
to look up any name: a frame can carry no code. Functions, arguments and results travel inside as bytes that only the
worker, or the driver's result path, unpickles.
"""

from __future__ import annotations

from _io import BytesIO
from _pickle import Unpickler, dumps

from fiberexec._stream import ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

VERSION = 1

# driver -> worker
SETUP = 1  # dict, see Worker._setup
TASKS = 2  # (functions, forget, units, changes of the setup | None)
DRAIN = 3  # finish what is there, then exit
# worker -> driver
READY = 10  # (version, python version, pid, host, None | exception of the initializer)
RESULTS = 11  # list of Record
LOG = 12  # (task id | 0, logger, level, message, pathname, lineno, function, exception text, created)
# driver -> fork server
FORK = 20  # (worker id, slot of its cell); its descriptor travels beside the frame
SIGNAL = 21  # (worker id, signal number, whole group)
PRELOAD = 22  # names of modules to be loaded before the next worker is forked
REMOVE = 23  # a folder that goes when the fork server does
# fork server -> driver
FORKED = 30  # (worker id, pid)
REFUSED = 31  # (worker id, errno, text)
EXITED = 32  # (worker id, wait status, last lines of stderr, killed for memory)

BULK = 1 << 16  # bytes: data of this size travels as the first of its own buffers, neither summed nor copied; it is None then

# A unit of TASKS: (number, task id, attempt, function id, start, stop, kind, data, buffers, extra).
#   Its items have the numbers number .. number + stop - start - 1, in the worker's own count; items of one unit share the
#   payload. kind is one of the payload kinds, buffers how many of the frame's buffers belong to it, and extra is None
#   or a dict: {"timed": True, "error": bytes, "devices": str}.
# Payload kinds:
CALL = 0  # data: pickle of (args, kwargs); one item
COLUMNS = 1  # data: pickle of a tuple of lists, one list a parameter, of plain values
ITEMS = 2  # data: pickle of a list of pickles, each of one item's (args, kwargs)

# A Record of RESULTS: (number, count, status, data, buffers, seconds), in the order of the numbers.
VALUE = 0  # data: pickle of the one item's result
VALUES = 1  # data: pickle of a list of count results, all plain
ERROR = 2  # data: dump_exception() of the one item's exception
RECALLED = 3  # the items were not run, they had been recalled


class _PlainUnpickler(Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise ProtocolError(f"a frame names {module}.{name}")


def encode(message: object) -> bytes:
    """The body that says ``message``."""
    return dumps(message, 5)


def decode(body: bytes | bytearray) -> Any:
    """What ``body`` says. Raises ProtocolError for anything that encode() does not make."""
    try:
        return _PlainUnpickler(BytesIO(body)).load()
    except ProtocolError:
        raise
    except Exception as error:
        raise ProtocolError(f"a frame's body cannot be read: {error!r}") from error
