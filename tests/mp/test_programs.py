"""Programs as they are written for multiprocessing: each runs unchanged but for its import, and says the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SPAWN = "import multiprocessing; multiprocessing.set_start_method('spawn')"
OURS = "from fiberexec import mp as multiprocessing"

POOL = """
import time

def add(a, b):
    return a + b

def slow(x):
    time.sleep(60)

def fail(x):
    raise KeyError(x)

def tell(text):
    print(text, flush=True)

if __name__ == "__main__":
    with multiprocessing.Pool(processes=3) as pool:
        print(pool.apply(add, (1, 2)))
        print(pool.map(abs, range(-3, 3)))
        print(sorted(pool.imap_unordered(abs, range(-3, 0))), list(pool.imap(abs, range(-3, 0), chunksize=2)))
        print(pool.starmap(add, [(1, 2), (3, 4)]))
        print(pool.apply_async(add, (5, 6), callback=lambda value: tell(f"called back with {value}")).get(timeout=30))
        waiting = pool.apply_async(slow, (1,))
        try:
            waiting.get(timeout=0.1)
        except multiprocessing.TimeoutError:
            print("not yet:", waiting.ready())
        try:
            pool.apply(fail, ("key",))
        except KeyError as error:
            print("raised", error)
        try:
            pool.map_async(fail, [1, 2]).get()
        except KeyError as error:
            print("raised", type(error).__name__)
        pool.terminate()
        pool.join()
    try:
        pool.map(abs, [1])
    except ValueError as error:
        print(error)
"""

QUEUES = """
import queue

STOP = "STOP"

def worker(tasks, done):
    for function, arguments in iter(tasks.get, STOP):
        name = multiprocessing.current_process().name
        done.put((function.__name__, arguments, function(*arguments), name.rsplit("-", 1)[0]))

def times(a, b):
    return a * b

def plus(a, b):
    return a + b

if __name__ == "__main__":
    tasks, done = multiprocessing.Queue(), multiprocessing.Queue()
    jobs = [(times, (i, 7)) for i in range(10)] + [(plus, (i, 8)) for i in range(5)]
    for job in jobs:
        tasks.put(job)
    processes = [multiprocessing.Process(target=worker, args=(tasks, done)) for _ in range(3)]
    for process in processes:
        process.start()
    for found in sorted(done.get() for _ in jobs):
        print(found)
    for _ in processes:
        tasks.put(STOP)
    for process in processes:
        process.join()
    print([process.exitcode for process in processes], tasks.empty())
    try:
        done.get(timeout=0.05)
    except queue.Empty:
        print("nothing more")
"""

MANAGER = """
from multiprocessing.managers import BaseManager as Standard

class Calculator:
    def add(self, a, b):
        return a + b

    def _hidden(self):
        return "never seen"

class Calculators(multiprocessing.managers.BaseManager):
    pass

Calculators.register("Calculator", Calculator)

def change(shared, items, names, lock):
    with lock:
        shared[1] = "one"
        shared["nested"] = items
        items.reverse()
        names.x = 10

if __name__ == "__main__":
    assert issubclass(Calculators, Standard)
    with Calculators() as manager:
        calculator = manager.Calculator()
        print(calculator.add(4, 3), hasattr(calculator, "_hidden"))
    with multiprocessing.Manager() as manager:
        shared, items = manager.dict(), manager.list(range(5))
        names, lock = manager.Namespace(), manager.Lock()
        process = multiprocessing.Process(target=change, args=(shared, items, names, lock))
        process.start()
        process.join()
        print(sorted(map(str, shared.keys())), list(shared["nested"]), items[1:3], names.x)
        try:
            items[99]
        except IndexError as error:
            print("raised", error)
"""

SYNC = """
import time

def tick(value, times):
    for _ in range(times):
        with value.get_lock():
            value.value += 1

def scale(array, by):
    for i in range(len(array)):
        array[i] *= by

def wait_for(event, condition, barrier, pipe):
    event.wait()
    with condition:
        condition.notify_all()
    place = barrier.wait()
    pipe.send(("passed", 0 <= place < 2))
    pipe.close()

if __name__ == "__main__":
    value, array = multiprocessing.Value("i", 0), multiprocessing.Array("d", [1.0, 2.5])
    processes = [multiprocessing.Process(target=tick, args=(value, 100)) for _ in range(3)]
    processes.append(multiprocessing.Process(target=scale, args=(array, 2)))
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    print(value.value, array[:])
    event, condition, barrier = multiprocessing.Event(), multiprocessing.Condition(), multiprocessing.Barrier(2)
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.Process(target=wait_for, args=(event, condition, barrier, theirs))
    process.start()
    theirs.close()
    with condition:
        event.set()
        print(condition.wait(timeout=60))
    barrier.wait(timeout=60)
    print(ours.recv())
    try:
        ours.recv()
    except EOFError:
        print("closed")
    process.join()
    semaphore = multiprocessing.BoundedSemaphore(2)
    print(semaphore.acquire(), semaphore.acquire(), semaphore.acquire(block=False))
    semaphore.release()
    semaphore.release()
    try:
        semaphore.release()
    except ValueError as error:
        print(error)
"""

PROCESSES = """
import os
import signal
import sys
import time

class Counting(multiprocessing.Process):
    def __init__(self, until):
        super().__init__(name="counting")
        self.until = until

    def run(self):
        print(self.name, list(range(self.until)), multiprocessing.parent_process() is not None, flush=True)
        sys.exit(self.until)

def fail():
    sys.stderr = open(os.devnull, "w")
    raise ValueError("no luck")

def sleep(ready):
    ready.set()
    time.sleep(600)

if __name__ == "__main__":
    process = Counting(3)
    print(process.is_alive(), process.exitcode, process.daemon)
    process.start()
    process.join()
    print(process.is_alive(), process.exitcode)
    failing = multiprocessing.Process(target=fail)
    failing.start()
    failing.join()
    print(failing.exitcode)
    ready = multiprocessing.Event()
    sleeping = multiprocessing.Process(target=sleep, args=(ready,), daemon=True)
    sleeping.start()
    ready.wait()
    print(sleeping in multiprocessing.active_children(), sleeping.join(timeout=0.05), sleeping.is_alive())
    sleeping.terminate()
    sleeping.join()
    print(sleeping.exitcode == -signal.SIGTERM, multiprocessing.connection.wait([sleeping.sentinel]) == [sleeping.sentinel])
    sleeping.close()
    try:
        sleeping.is_alive()
    except ValueError as error:
        print(error)
"""

CONNECTIONS = """
from array import array

def serve(address, ready):
    with multiprocessing.connection.Listener(address, authkey=b"secret") as listener:
        ready.set()
        with listener.accept() as connection:
            connection.send([2.25, None, "junk", float])
            connection.send_bytes(b"hello")
            connection.send_bytes(array("i", [42, 1729]))

if __name__ == "__main__":
    import os
    import tempfile

    address = os.path.join(tempfile.mkdtemp(), "socket")
    ready = multiprocessing.Event()
    process = multiprocessing.Process(target=serve, args=(address, ready))
    process.start()
    ready.wait()
    with multiprocessing.connection.Client(address, authkey=b"secret") as connection:
        print(connection.recv(), connection.recv_bytes(), connection.poll(60))
        found = array("i", [0] * 5)
        print(connection.recv_bytes_into(found), found.tolist())
    process.join()
    print(process.exitcode)
"""

PROGRAMS = {
    "pool": POOL,
    "queues": QUEUES,
    "manager": MANAGER,
    "sync": SYNC,
    "processes": PROCESSES,
    "connections": CONNECTIONS,
}


def run(program: str, import_: str, folder: Path) -> list[str]:
    # A spawned child imports the program again, and must not set the start method then.
    guarded = import_.replace("; ", "\nif __name__ == '__main__':\n    ")
    path = folder / "program.py"
    more = "import multiprocessing.connection, multiprocessing.managers" if import_ is SPAWN else ""
    path.write_text(f"{guarded}\n{more}\n{program}")
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=90, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_says_what_it_says_with_multiprocessing(name: str, tmp_path: Path) -> None:
    expected = run(PROGRAMS[name], SPAWN, tmp_path)
    assert len(expected) >= 3
    assert run(PROGRAMS[name], OURS, tmp_path) == expected


WAITS = {
    "queue": "queue.get()",
    "again": "ask_again()",
    "full": "full.put(1)",
    "puts": "put_again()",
    "lock": "lock.acquire()",
    "event": "multiprocessing.Event().wait()",
    "condition": "wait_for_a_notification()",
    "barrier": "multiprocessing.Barrier(2).wait()",
}

WAITER = """
import atexit
import queue as standard
import threading
import time

def late():
    try:
        queue.put("late")
        queue.get(timeout=60)
    except Exception as error:
        print(isinstance(error, (OSError, RuntimeError)))  # no thread can be started any more

atexit.register(late)
{imports}

def ask_again():
    while True:
        try:
            queue.get(timeout=0.001)
        except standard.Empty:
            pass

def put_again():
    while True:
        other.put(1)
        time.sleep(0.0005)

def wait_for_a_notification():
    with condition:
        condition.wait()

def wait():
    started.set()
    try:
        {wait}
    finally:
        print("not reached")

queue, full, other = multiprocessing.Queue(), multiprocessing.Queue(1), multiprocessing.Queue()
lock, condition = multiprocessing.Lock(), multiprocessing.Condition()
full.put(0)
lock.acquire()
started = threading.Event()
threading.Thread(target=wait, daemon=True).start()
started.wait()
time.sleep(0.2)  # it may wait by then
print("end")
"""


@pytest.mark.parametrize("wait", WAITS)
def test_a_program_ends_in_silence_while_daemon_threads_wait(wait: str, tmp_path: Path) -> None:
    assert run(WAITER.format(imports=OURS, wait=WAITS[wait]), "", tmp_path) == ["end", "True"]
