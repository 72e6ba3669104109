"""Value, Array and what they stand on: one memory in all processes, whatever way its handle took."""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fiberexec import FiberExecutor, _platform, mp
from fiberexec._errors import HubLost
from fiberexec._hub import launch
from fiberexec._serialize import dumps, loads
from fiberexec.mp import heap, sharedctypes

memory = pytest.mark.one_host("the memory itself is shared")
NUMBERS = [("i", 4343, 24234), ("d", 3.625, -4.25), ("h", -232, 234), ("q", 2**33, 2**34), ("c", b"x", b"y"), ("u", "a", "b")]


@pytest.fixture(autouse=True)
def no_heap_left(nothing_left_behind: None) -> Iterator[None]:
    """Small blocks that were pickled stay mapped."""
    yield
    heap.forget()


class Point(ctypes.Structure):
    _fields_ = (("x", ctypes.c_double), ("y", ctypes.c_double))


def files() -> list[Path]:
    return sorted(Path(launch.address().path).parent.glob("memory-*"))


def travelled(obj: Any) -> Any:
    return loads(*dumps(obj))


def fill(values: Any, contents: Any) -> None:
    for shared, content in zip(values, contents):
        shared.value = content


@pytest.mark.parametrize("raw", [True, False])
def test_a_child_and_its_parent_see_one_value(raw: bool) -> None:
    make = mp.RawValue if raw else mp.Value
    values = [make(code, first) for code, first, _ in NUMBERS]
    assert [value.value for value in values] == [first for _, first, _ in NUMBERS]
    process = mp.Process(target=fill, args=(values, [last for _, _, last in NUMBERS]))
    process.start()
    process.join(60)
    assert [value.value for value in values] == [last for _, _, last in NUMBERS]


@pytest.mark.parametrize("raw", [True, False])
def test_a_task_and_its_driver_see_one_array(raw: bool) -> None:
    array = (mp.RawArray if raw else mp.Array)("i", [3, 1, 2])

    def work(array: Any) -> Any:
        array[0] += 10
        array[1:] = [7, 8]
        return array

    with FiberExecutor(1) as executor:
        back = executor.submit(work, array).result(60)
        assert list(array) == [13, 7, 8]
        back[2] = -1
        assert array[:] == [13, 7, -1] and len(array) == 3


@memory
def test_it_is_the_same_memory_again_where_it_came_from() -> None:
    array = mp.RawArray("d", 3)
    again = travelled(travelled(array))
    again[1] = 2.5
    assert array[:] == [0, 2.5, 0]
    assert again._wrapper.block._arena is array._wrapper.block._arena


def test_structures_and_arrays_of_them_are_shared() -> None:
    points = mp.Array(Point, [(1, 2), (3, 4)])
    point = mp.Value(Point, 5, 6)
    other_points, other = travelled((points, point))
    with other.get_lock():
        other_points[1].x = 30
    other.y = 60
    assert points[1].x == 30 and (point.x, point.y) == (5, 60)


def test_strings_have_value_and_raw() -> None:
    text = mp.Array("c", 20)
    text.value = b"hello"
    other = travelled(text)
    assert other.value == b"hello" and other.raw == b"hello" + bytes(15)
    other.raw = b"x" * 20
    assert text.value == b"x" * 20


def test_arrays_of_nothing_travel() -> None:
    for array in (mp.Array("i", 0), mp.RawArray("d", []), mp.RawArray(Point, 0)):
        other = travelled(array)
        assert len(other) == 0 and other[:] == [] and list(other) == []


def test_memory_used_before_arrives_as_zeros() -> None:
    for _ in range(3):
        array = mp.RawArray("i", 1000)
        assert list(array) == [0] * 1000
        array[:] = range(1000)
        del array
    assert mp.RawArray("i", 0)[:] == []


@memory
def test_numpy_sees_the_memory_itself() -> None:
    array = mp.RawArray("d", 1000)
    view = np.frombuffer(array)
    travelled(array)[7] = 1.5
    assert view[7] == 1.5
    del array
    gc.collect()
    assert view.sum() == 1.5


def test_locks_are_made_taken_over_or_left_out() -> None:
    value = mp.Value("i", 5)
    with value, value.get_lock():  # held twice by its holder
        value.value += 1
    assert value.value == 6
    assert mp.Value("i", 5, lock=None).get_lock() is not None
    lock = mp.Lock()
    assert mp.Value("i", 5, lock=lock).get_lock() is lock
    for unlocked in (mp.Value("i", 5, lock=False), mp.Array("i", 2, lock=False), mp.RawValue("i")):
        assert not hasattr(unlocked, "get_lock") and not hasattr(unlocked, "get_obj")
    for make, what in ((mp.Value, 5), (mp.Array, range(3))):
        with pytest.raises(AttributeError, match="acquire"):
            make("i", what, lock="no")
    with pytest.raises(AssertionError, match="already"):
        sharedctypes.synchronized(value)
    assert "wrapper for" in repr(value)


@memory
def test_the_object_behind_the_lock_can_be_had() -> None:
    value = mp.Value("i", 5)
    value.get_obj().value += 1
    assert value.value == 6


def test_increments_under_the_lock_are_not_lost() -> None:
    counter = mp.Value("i")

    def count(counter: Any) -> None:
        for _ in range(300):
            with counter.get_lock():
                counter.value += 1

    processes = [mp.Process(target=count, args=(counter,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert counter.value == 900


def test_copy_is_memory_of_its_own() -> None:
    point = Point(2, 5)
    shared = sharedctypes.copy(point)
    point.x = 0
    assert (shared.x, shared.y) == (2, 5)
    travelled(shared).x = 7
    assert shared.x == 7


def test_a_plain_copy_of_a_shared_object_travels_as_the_copy() -> None:
    value = mp.RawValue("i", 1)
    plain = copy.copy(value)
    value.value = 2
    assert plain.value == 1 and travelled(plain).value == 1
    travelled(plain).value = 3
    assert value.value == 2


def test_objects_of_ctypes_that_are_not_shared_travel_by_value() -> None:
    point = Point(1, 2)
    travelled(point).x = 9
    assert point.x == 1
    points = mp.RawArray(Point, [(1, 2)])
    travelled(points[0]).x = 9
    assert points[0].x == 1


@memory
def test_small_objects_share_files_and_what_was_never_pickled_gives_its_memory_back() -> None:
    values = [mp.RawValue("i", number) for number in range(100)]
    assert len(files()) == 1
    large = mp.RawArray("b", 5 << 20)
    assert len(files()) == 2
    del large
    assert len(files()) == 1
    del values


def test_what_was_pickled_stays_when_its_object_goes() -> None:
    array = mp.RawArray("b", 5 << 20)
    array[5] = 55
    pickled = dumps(array)
    del array
    gc.collect()
    assert not any(any(mp.RawArray("b", 5 << 20)[:9]) for _ in range(3))
    assert loads(*pickled)[5] == 55


def test_a_fork_leaves_both_sides_their_memory() -> None:
    value = mp.RawValue("i", 1)
    reader, writer = mp.Pipe(duplex=False)
    with reader, writer:
        gate, opener = mp.Pipe(duplex=False)
        with gate, opener:
            pid = os.fork()
            if not pid:
                gate.recv()
                writer.send(value.value)
                os._exit(0)
            del value
            others = [mp.RawValue("i", 2) for _ in range(10)]
            opener.send(None)
            assert reader.recv() == 1
            os.waitpid(pid, 0)
            del others


@memory
def test_memory_that_is_not_there_is_refused_when_it_is_made() -> None:
    with pytest.raises(OSError, match="shared memory"):
        mp.RawArray("b", 1 << 50)
    assert files() == []
    with pytest.raises(ValueError):
        mp.RawArray("b", -1)


@memory
def test_an_object_of_another_host_or_program_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    array = mp.RawArray("i", 3)
    pickled = dumps(array)
    del array
    launch.close()
    heap.forget()
    gc.collect()
    with pytest.raises(FileNotFoundError, match="has ended"):
        loads(*pickled)
    monkeypatch.setattr(_platform, "host_name", lambda: "elsewhere")
    with pytest.raises(FileNotFoundError, match="on one host"):
        loads(*pickled)


@memory
def test_without_the_hubs_folder_the_error_says_so() -> None:
    address = launch.address()
    launch.close()
    launch.adopt(address)  # as a child whose parent has ended
    with pytest.raises(HubLost, match="has gone"):
        mp.RawValue("i")


@memory
def test_files_are_for_this_user_alone() -> None:
    array = mp.RawArray("i", 3)
    assert [file.stat().st_mode & 0o777 for file in files()] == [0o600]
    assert files()[0].parent.stat().st_mode & 0o777 == 0o700
    del array


@memory
def test_nothing_is_left_of_a_killed_program() -> None:
    program = (
        "from fiberexec import mp; from fiberexec._hub import launch; array = mp.Array('i', 5)\n"
        "print(launch.address().path, flush=True); import time; time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip()).parent
        assert list(folder.glob("memory-*"))
        process.send_signal(signal.SIGKILL)
        process.wait()
        gone = threading.Event()
        for _ in range(500):
            if not folder.exists():
                gone.set()
                break
            gone.wait(0.02)
        assert gone.is_set()


def test_threads_make_and_drop_at_once() -> None:
    errors: list[BaseException] = []

    def churn(number: int) -> None:
        try:
            for size in range(1, 200):
                array = mp.RawArray("i", [number] * size)
                assert set(array) == {number}
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=churn, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
