"""Try again: tasks that fail at random, and a retry policy for each kind of work.

    python examples/retry.py

The policies are tenacity's.  They are evaluated in the driver and put no thread to sleep, so thousands of
tasks may wait for their next attempt at once.  Without a policy, an exception is simply the task's result.
"""

from __future__ import annotations

import tenacity

import fiberexec
from fiberexec import FiberExecutor


class Busy(Exception):
    """The service says: come back later."""


def fetch(page: int) -> str:
    """Stand in for a service that is busy twice for every third page."""
    task = fiberexec.current_task()
    assert task is not None  # it is None only outside of a task
    if page % 3 == 0 and task.attempt < 3:
        raise Busy(f"page {page}, attempt {task.attempt}")
    return f"page {page}: attempt {task.attempt}, after {task.last_exception!r}"


def broken(page: int) -> str:
    raise ValueError(f"page {page} does not exist")


def main() -> None:
    patient = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(5),
        wait=tenacity.wait_exponential_jitter(initial=0.02, max=1),
        retry=tenacity.retry_if_exception_type(Busy),
        reraise=True,
    )
    with FiberExecutor() as ex:
        with_retries = ex.options(retry=patient)
        for line in with_retries.map(fetch, range(6)):
            print(line)
        # A ValueError doesn't get better by waiting, and the policy names only Busy.
        print("not retried:", repr(with_retries.submit(broken, 7).exception()))
        print("attempts that failed and were repeated:", ex.stats().retried)


if __name__ == "__main__":
    main()
