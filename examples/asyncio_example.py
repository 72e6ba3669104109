"""From asyncio: await tasks in other processes.

    python examples/asyncio_example.py

FiberExecutor's futures are ordinary ones of concurrent.futures, so `run_in_executor` and `wrap_future` take
them.
"""

from __future__ import annotations

import asyncio
import math

from fiberexec import FiberExecutor


def count_primes(start: int, stop: int) -> int:
    """Count the primes from ``start`` up to ``stop``, the slow way: this would block the event loop."""
    return sum(all(n % d for d in range(2, math.isqrt(n) + 1)) for n in range(max(2, start), stop))


async def heartbeat(ticks: list[float]) -> None:
    """Show that the event loop is free while the workers count."""
    while True:
        ticks.append(asyncio.get_running_loop().time())
        await asyncio.sleep(0.005)


async def main() -> None:
    loop = asyncio.get_running_loop()
    ticks: list[float] = []
    beating = asyncio.create_task(heartbeat(ticks))
    with FiberExecutor() as ex:
        starts = range(0, 100_000, 10_000)
        counts = await asyncio.gather(
            *(loop.run_in_executor(ex, count_primes, n, n + 10_000) for n in starts)
        )
        print(f"{sum(counts):,} primes below 100,000")

        one = asyncio.wrap_future(ex.options(timeout=60).submit(count_primes, 0, 1000))
        print(f"{await one} of them below 1,000")
    beating.cancel()
    print("the event loop ran meanwhile:", len(ticks) > 1)


if __name__ == "__main__":
    asyncio.run(main())
