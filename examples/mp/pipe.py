"""Two processes talk over a pipe.

    python examples/mp/pipe.py
"""

from __future__ import annotations

from typing import Any

from fiberexec import mp


def shout(connection: Any) -> None:
    """Answer in capitals until the other end closes."""
    while True:
        try:
            connection.send(connection.recv().upper())
        except EOFError:
            return


def main() -> None:
    here, there = mp.Pipe()
    process = mp.Process(target=shout, args=(there,))
    process.start()
    there.close()
    for word in ("hello", "pipe"):
        here.send(word)
        print(here.recv())
    here.close()
    process.join()
    print(f"exit code {process.exitcode}")


if __name__ == "__main__":
    main()
