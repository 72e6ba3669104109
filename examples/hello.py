"""The smallest program: one call in another process.

python examples/hello.py
"""

from __future__ import annotations

import os

from fiberexec import FiberExecutor


def greet(name: str) -> str:
    return f"Hello, {name}, from process {os.getpid()}!"


if __name__ == "__main__":
    with FiberExecutor() as ex:
        print(ex.submit(greet, "fiberexec").result())
    print(f"This is process {os.getpid()}.")
