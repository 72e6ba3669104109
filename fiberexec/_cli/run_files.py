"""What is run inside a pod on behalf of ``fiberexec run`` and ``cp``, where Docker has calls of its own.

python -m fiberexec._cli.run_files receive FOLDER SIZE    an archive of so many bytes comes on stdin: unpack it
python -m fiberexec._cli.run_files give PATH              an archive of what is there, in base64 and with an end mark
python -m fiberexec._cli.run_files kind PATH              "folder", "file" or "nothing"
python -m fiberexec._cli.run_files signal NUMBER          to the first process
"""

from __future__ import annotations

import base64
import io
import os
import select
import sys
import tarfile
from collections.abc import Callable
from typing import Any

from fiberexec._cli.run_first import SPEC

END = b"."  # no base64: what went before is complete
KINDS = b"folder", b"file", b"nothing"
_PIECE = 3 << 16  # bytes that become whole lines
_TAKEN = 600.0  # seconds in which the last of an archive is taken


def main(verb: str, *arguments: str) -> int:
    """Do what is asked; return the exit code."""
    try:
        _VERBS[verb](*arguments)
    except (OSError, tarfile.TarError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


class _Part(io.RawIOBase):
    """So many bytes of a stream: its other end cannot be closed."""

    def __init__(self, size: int) -> None:
        self._left = size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = os.read(0, min(len(buffer), self._left)) if self._left else b""
        self._left -= len(data)
        buffer[: len(data)] = data
        return len(data)


def _receive(folder: str, size: str) -> None:
    spec = ""
    stream = io.BufferedReader(_Part(int(size)))
    with tarfile.open(mode="r|", fileobj=stream) as tar:
        for entry in tar:
            if os.path.basename(entry.name) == SPEC and not spec and os.path.dirname(entry.name).count("/") == 0:
                spec = os.path.join(folder, entry.name)
                entry.name += ".new"
            tar.extract(entry, folder)  # it comes from whoever may run anything here
            if entry.isreg():
                os.chmod(os.path.join(folder, entry.name), entry.mode)  # whatever the umask
    while stream.read(1 << 16):
        pass
    if spec:
        os.rename(f"{spec}.new", spec)  # the first process waits for it, and all else is there


def _give(path: str) -> None:
    class Out(io.RawIOBase):
        left = b""

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            self.left += bytes(data)
            whole = len(self.left) // _PIECE * _PIECE
            if whole:
                _say(base64.b64encode(self.left[:whole]) + b"\n")
                self.left = self.left[whole:]
            return len(data)

    name = os.path.basename(os.path.abspath(path))
    path = os.path.realpath(path)
    os.stat(path)
    out = Out()
    with tarfile.open(mode="w|", fileobj=out) as tar:
        tar.add(path, name)
    _say(base64.b64encode(out.left) + b"\n" + END)
    select.select([0], [], [], _TAKEN)  # a line, or its end: what the node has not passed on when this ends is lost


def _say(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _kind(path: str) -> None:
    _say(KINDS[0] if os.path.isdir(path) else KINDS[1] if os.path.exists(path) else KINDS[2])


def _signal(number: str) -> None:
    os.kill(1, int(number))


_VERBS: dict[str, Callable[..., None]] = {"receive": _receive, "give": _give, "kind": _kind, "signal": _signal}

if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
