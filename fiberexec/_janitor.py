"""The janitor: removes what a program has left in a backend, when the program itself cannot do it any more.

It is a process of its own, so that no backend's SDK is loaded in the hub, and it outlives the hub.
"""

from __future__ import annotations

import json
import sys
import time

_PATIENCE = 120.0  # seconds that a backend may be out of reach
_AGAIN = 2.0  # seconds after which it looks once more: something may have been on its way


def main() -> None:
    """The janitor's program."""
    from fiberexec._remote import restored
    from fiberexec.backends import registry

    program, remains = json.load(sys.stdin)
    for told in remains:
        deadline = time.monotonic() + _PATIENCE
        again = False
        said = ""
        while time.monotonic() < deadline:
            try:
                registry.create_jobs(*restored(told)).remove(program)
                if again:
                    break
                again = True
            except Exception as error:  # it cannot be reached, or is busy
                text = f"fiberexec: what is left of program {program} in {told[0]} cannot be removed now: {error!r}"
                if text != said:
                    print(text, file=sys.stderr)
                said = text
            time.sleep(_AGAIN)
        else:
            print(f"fiberexec: program {program} has left jobs in {told[0]}: call `fiberexec clean`", file=sys.stderr)
