"""Stop one running task, by a time limit or by hand; the pool goes on.

python examples/time_limits.py
"""

from __future__ import annotations

import time
from concurrent.futures import CancelledError

from fiberexec import FiberExecutor, TaskTimeout


def simulate(seconds: float) -> str:
    time.sleep(seconds)
    return f"done after {seconds:g} s"


def main() -> None:
    with FiberExecutor(max_workers=2) as ex:
        # A limit on one attempt.  TaskTimeout is a TimeoutError.
        limited = ex.options(timeout=2)
        quick, slow = limited.submit(simulate, 0.01), limited.submit(simulate, 3600)
        print("quick:", quick.result())
        try:
            slow.result()
        except TaskTimeout as error:
            print("slow:", error)

        # By hand.  A running task of ProcessPoolExecutor can't be stopped at all.
        endless = ex.submit(simulate, 3600)
        while not endless.running():
            time.sleep(0.01)
        print("terminated:", endless.terminate())
        try:
            endless.result()
        except CancelledError:
            print("endless: cancelled")

        print("afterwards:", ex.submit(simulate, 0.01).result())


if __name__ == "__main__":
    main()
