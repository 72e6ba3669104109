"""Another interpreter that loads calls and dumps results back, as a worker does, over stdin and stdout."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from typing import Any, BinaryIO

from fiberexec._serialize import (
    FunctionTable,
    dump_exception,
    dumps_call,
    dumps_result,
    load_exception,
    loads,
)

TABLE = FunctionTable()


def write(file: BinaryIO, word: int, parts: list[Any]) -> None:
    file.write(struct.pack("<qq", word, len(parts)))
    for part in parts:
        view = memoryview(part).cast("B")
        file.write(struct.pack("<?q", type(part) is bytes, view.nbytes))
        file.write(view)
    file.flush()


def read(file: BinaryIO) -> tuple[int, list[Any]]:
    """A word and parts: `bytes` where bytes were sent, else a `bytearray`."""
    word, count = struct.unpack("<qq", exactly(file, 16))
    parts: list[Any] = []
    for _ in range(count):
        is_bytes, size = struct.unpack("<?q", exactly(file, 9))
        data = exactly(file, size)
        parts.append(data if is_bytes else bytearray(data))
    return word, parts


def exactly(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise EOFError("the peer has gone")
    return data


def serve() -> None:
    receive, send = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    sys.modules["__main__"] = type(sys)("__main__")
    functions: dict[int, Any] = {}
    while True:
        try:
            word, parts = read(receive)
        except EOFError:
            return
        try:
            if word:
                functions[word] = loads(parts[0], parts[1:])
                continue
            ident = loads(parts[0])
            args, kwargs = loads(parts[1], parts[2:])
            data, buffers = dumps_result(functions[ident](*args, **kwargs))
            reply = [data, *buffers]
        except BaseException as error:
            if word:
                functions[word] = _raiser(error)
                continue
            write(send, 1, [dump_exception(error)])
        else:
            write(send, 0, reply)


def _raiser(error: BaseException) -> Any:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail


class Peer:
    """The driver's side: `call` runs a function over there."""

    def __init__(self, path: list[str] | None = None, cwd: str | None = None) -> None:
        path = [os.path.dirname(__file__), *(sys.path if path is None else path)]
        code = f"import sys; sys.path[:0] = {path!r}; import peer; peer.serve()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=cwd
        )
        self.known: set[int] = set()

    def call(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        ref = TABLE.lookup(fn)
        if ref.id not in self.known:
            write(self.process.stdin, ref.id, [ref.data, *ref.buffers])
            self.known.add(ref.id)
        data, buffers = dumps_call(args, kwargs)
        write(self.process.stdin, 0, [dumps_result(ref.id)[0], data, *buffers])
        failed, parts = read(self.process.stdout)
        if failed:
            raise load_exception(parts[0])
        return loads(parts[0], parts[1:])

    def close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        self.process.wait(10)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
