"""Value and Array whose users are in jobs: bytes in the hub."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from fiberexec import mp

from .helpers import LIMIT, ended, process


class Body(ctypes.Structure):
    _fields_ = (("mass", ctypes.c_double), ("low", ctypes.c_int, 3), ("high", ctypes.c_int, 5), ("place", ctypes.c_int * 3))


def test_an_array_in_the_hub_has_what_a_ctypes_array_has() -> None:
    local = (ctypes.c_int * 6)(*range(6))
    array = mp.RawArray("i", range(6))
    for key in (0, -1, slice(None), slice(1, 4), slice(None, None, 2), slice(None, None, -1), slice(4, 1, -2), slice(3, 3)):
        assert array[key] == local[key], key
    array[1:3] = local[1:3] = [10, 20]
    array[-1] = local[-1] = 50
    assert list(array) == list(local) and len(array) == 6
    for wrong, error in ((lambda: array[6], IndexError), (lambda: array[-7], IndexError), (lambda: array["x"], TypeError)):
        with pytest.raises(error):
            wrong()
    with pytest.raises(ValueError):
        array[0:2] = [1, 2, 3]
    with pytest.raises(ValueError):
        array[::2] = [1, 2, 3]
    with pytest.raises(TypeError):
        array[0] = "x"
    text = mp.Array("c", 5)
    text.value = b"abc"
    assert text[0] == b"a" and text[1:3] == b"bc" and text.raw == b"abc\0\0"
    with pytest.raises(ValueError):
        text.raw = b"too long"


@pytest.mark.parametrize("code, of", [("c", lambda text: text.encode()), ("u", str)])
def test_a_string_in_the_hub_is_iterated_and_set_as_ctypes_does(code: str, of: Any) -> None:
    kind = {"c": ctypes.c_char, "u": ctypes.c_wchar}[code]
    local, shared = (kind * 5)(*of("abcd")), mp.RawArray(code, [of(letter) for letter in "abcd\0"])
    assert list(shared) == list(local) and of("b") in shared and of("x") not in shared
    for value in ("x", "", "wvxyz", "ab", "abcd"):
        local.value = shared.value = of(value)
        assert shared.value == local.value and list(shared) == list(local), value
    with pytest.raises(ValueError):
        shared.value = of("too long")
    with pytest.raises(TypeError):
        shared.value = 5
    assert list(shared) == list(local)


def test_structures_in_the_hub_are_written_field_by_field() -> None:
    bodies = mp.RawArray(Body, 2)
    bodies[1].mass = 2.5
    bodies[1].low, bodies[1].high = 2, -3
    bodies[1].place[2] = 7
    bodies[1].place[0:2] = [5, 6]
    assert (bodies[1].mass, bodies[1].low, bodies[1].high, bodies[1].place[:]) == (2.5, 2, -3, [5, 6, 7])
    assert (bodies[0].mass, bodies[0].low, bodies[0].place[:]) == (0, 0, [0, 0, 0])
    assert [body.mass for body in bodies] == [0, 2.5]
    with pytest.raises(AttributeError):
        bodies[0].weight = 1
    with pytest.raises(AttributeError):
        print(bodies[0].weight)


def test_large_arrays_are_read_and_written_in_parts() -> None:
    def double(array: Any) -> None:
        array[1000:200_000] = [2 * number for number in array[1000:200_000]]

    array = mp.RawArray("q", 300_000)
    array[:] = range(300_000)
    assert ended(process(double, array)) == [0]
    assert array[999] == 999 and array[1000] == 2000 and array[199_999] == 399_998 and array[200_000] == 200_000


def test_there_is_no_memory_to_look_into_and_that_is_said() -> None:
    value, array = mp.Value("i"), mp.Array("d", 3)
    for shared in (value, array):
        with pytest.raises(TypeError, match="other hosts"):
            shared.get_obj()
    numpy = pytest.importorskip("numpy")
    raw = mp.RawArray("d", 3)
    with pytest.raises(TypeError, match="other hosts"):
        numpy.asarray(raw)
    with pytest.raises(TypeError):
        numpy.frombuffer(raw)


def test_memory_of_a_jobs_own_host_is_had_from_the_local_context() -> None:
    def child(answer: Any) -> None:
        context = mp.get_context("local")
        array = context.Array("i", 3)

        def fill(array: Any) -> None:
            memoryview(array.get_obj()).cast("B").cast("i")[1] = 5

        helper = context.Process(target=fill, args=(array,))
        helper.start()
        helper.join()
        answer.put((helper.exitcode, array[:]))

    answer = mp.Queue()
    helper = process(child, answer)
    assert answer.get(timeout=LIMIT) == (0, [0, 5, 0])
    assert ended(helper) == [0]


def test_memory_goes_with_its_last_handle() -> None:
    from fiberexec._hub import client
    from fiberexec._hub.wire import HUB

    array = mp.RawArray("b", 100)
    id = array._memory._id
    del array
    with pytest.raises(KeyError):
        client.call("ping", HUB), client.call("read", id, 0, 1)
