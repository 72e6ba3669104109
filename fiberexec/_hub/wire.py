"""What client and hub say to each other.

    client: hello (fixed size), then REQUEST, which is answered by REPLY or ERROR, and POST, which is not answered

The body of REQUEST and POST is (operation, id of the object, arguments), of REPLY the value, of ERROR (class, text).
"""

from __future__ import annotations

import struct
import threading

from fiberexec._errors import HubFull

REQUEST = 40
POST = 41
REPLY = 42
ERROR = 43
EVENT = 44  # from the hub, whenever it has one: on a connection on which events were asked for

HUB = 0  # the id of the hub itself, among its objects

# magic | token | key of the process | its pid | number of the connection in its process | number of the one it replaces,
# 0 if none | how many answers were seen on that one
HELLO = struct.Struct("<4s32s16sIQQQ")
MAGIC = b"FXH\x01"
TOKEN_SIZE = 32
KEY_SIZE = 16

# What a consumer of queues and the hub tell each other through shared memory, in words of 8 bytes. Items have numbers.
CLAIMED = 0  # the last that get() took to return it
RECALLED = 1  # the last that was taken back, 0: none since the last answer
DONE = 2  # how many its thread marked as done
OTHERS = 3  # how many of its items other threads marked as done
GOT = 4  # the last that get() has unpickled
CELL = 5  # words
CELLS = 8192  # at most, in one process

ERRORS: dict[str, type[Exception]] = {
    error.__name__: error for error in (ValueError, KeyError, OSError, RuntimeError, HubFull, threading.BrokenBarrierError)
}
