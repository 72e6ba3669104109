from __future__ import annotations

import array
import functools
import pickle
import subprocess
import sys
import types
import weakref
from typing import Any

import numpy as np
import pytest

from fiberexec._serialize import PLAIN, dumps, dumps_call, dumps_result, is_plain, loads

__spec__ = None  # as in a script: nothing here can be imported, so all of it travels by value

KB = 1024
MB = 1024 * KB


def same(value: Any) -> Any:
    return value


def arrive(parts: tuple[bytes, list[Any]]) -> Any:
    """As over a wire: bytes stay bytes, views come as new bytearrays."""
    return loads(parts[0], [b if type(b) is bytes else bytearray(b) for b in parts[1]])


ATOMS = [
    0,
    -1,
    1 << 80,
    1.5,
    float("inf"),
    2j,
    True,
    None,
    "",
    "ä\ud800",
    b"",
    b"x" * 100,
    Ellipsis,
    NotImplemented,
]


@pytest.mark.parametrize("value", [*ATOMS, *[[a] for a in ATOMS], {"a": {1, 2}}, (1, (2, [3]))], ids=repr)
def test_built_in_values_come_back_equal_and_of_the_same_type(peer: Any, value: Any) -> None:
    back = peer.call(same, value)
    assert back == value and type(back) is type(value)


def test_a_call_comes_back_as_args_and_kwargs() -> None:
    assert arrive(dumps_call((1, [2]), {"a": 3})) == ((1, [2]), {"a": 3})
    assert arrive(dumps_call((), {})) == ((), {})


def test_large_bytes_arguments_and_results_are_not_copied() -> None:
    data = b"x" * MB
    stream, buffers = dumps_call((1, data, "a"), {})
    assert len(stream) < 200 and buffers[0] is data
    assert loads(stream, buffers)[0][1] is data
    stream, buffers = dumps_result(data)
    assert len(stream) < 200 and loads(stream, buffers) is data


def test_large_bytearray_result_arrives_writable_without_copy() -> None:
    stream, buffers = dumps_result(bytearray(b"x" * MB))
    received = bytearray(buffers[0])
    assert len(stream) < 200 and loads(stream, [received]) is received


@pytest.mark.parametrize("value", [b"x" * MB, bytearray(b"x" * MB), {"in": b"x" * MB}, [b"x" * 70 * KB] * 3])
def test_large_bytes_come_back_as_they_were(peer: Any, value: Any) -> None:
    back = peer.call(same, value)
    assert back == value and type(back) is type(value)


@pytest.mark.parametrize("size", [0, 10, 16 * KB - 1, 16 * KB, MB])
def test_memoryviews_arrive_as_memoryviews(peer: Any, size: int) -> None:
    back = peer.call(same, memoryview(bytearray(b"ab" * size)))
    assert type(back) is memoryview and not back.readonly and back.tobytes() == b"ab" * size


def test_a_memoryview_keeps_format_shape_and_whether_it_is_readonly(peer: Any) -> None:
    view = memoryview(array.array("d", range(6))).cast("B").cast("d", (2, 3)).toreadonly()
    back = peer.call(same, view)
    assert (back.format, back.shape, back.readonly, back.tolist()) == ("d", (2, 3), True, view.tolist())
    assert peer.call(same, memoryview(b"abcdef")[::2]).tobytes() == b"ace"


def arrays() -> dict[str, Any]:
    big = np.arange(40_000.0).reshape(200, 200)
    locked = big.copy()
    locked.flags.writeable = False
    small = np.arange(3)
    small.flags.writeable = False
    return {
        "big": big,
        "fortran": np.asfortranarray(big),
        "strided": big[::2, ::-1],
        "transposed": big.T,
        "read-only": locked,
        "small read-only": small,
        "small": np.arange(3),
        "empty": np.empty((0, 3)),
        "scalar shape": np.array(3.5),
        "broadcast": np.broadcast_to(np.arange(3), (100_000, 3)),
        "objects": np.array([{"a": 1}, None, "x"], dtype=object),
        "structured": np.array([(1, 2.0, "a")] * 3000, dtype=[("i", "i4"), ("f", "f8"), ("s", "U5")]),
        "from bytes": np.frombuffer(b"abcd" * 10_000, dtype="u1"),
        "dates": np.array(["2020-01-01"] * 5000, dtype="M8[D]"),
    }


@pytest.mark.parametrize("name", arrays())
def test_arrays_arrive_equal_and_writable(peer: Any, name: str) -> None:
    value = arrays()[name]
    there = peer.call(lambda a: (a.flags.writeable, a.dtype == value.dtype, np.array_equal(a, value)), value)
    assert there == (True, True, True)
    back = peer.call(same, value)
    assert back.flags.writeable and back.dtype == value.dtype and back.shape == value.shape
    assert np.array_equal(back, value)


@pytest.mark.parametrize("name", ["big", "fortran", "strided", "read-only", "structured", "from bytes"])
def test_large_arrays_travel_out_of_band(name: str) -> None:
    value = arrays()[name]
    stream, buffers = dumps(value)
    assert len(stream) < 2000 and sum(memoryview(b).nbytes for b in buffers) == value.nbytes


def test_an_array_that_occurs_twice_arrives_as_one() -> None:
    value = np.arange(10_000)
    one, two = arrive(dumps([value, value]))
    assert one is two


def test_small_buffers_stay_in_the_stream() -> None:
    assert dumps(np.arange(100))[1] == []


def test_frames_arrive_equal_and_can_be_changed(peer: Any) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": range(20_000), "b": np.linspace(0, 1, 20_000), "c": ["x", "y"] * 10_000})

    def change(given: Any) -> Any:
        given.loc[0, "a"] = 7
        return given

    back = peer.call(change, frame)
    assert back.loc[0, "a"] == 7
    back.loc[0, "a"] = 0
    pandas.testing.assert_frame_equal(back, frame)


def test_partials_methods_and_modules_travel(peer: Any) -> None:
    import os.path

    assert peer.call(functools.partial(int, base=2), "101") == 5
    assert peer.call("a-b".split, "-") == ["a", "b"]
    assert peer.call(same, os.path) is os.path
    assert peer.call(lambda: os.path.join("a", "b")) == os.path.join("a", "b")


def test_weak_references_caches_and_proxies_travel(peer: Any) -> None:
    @functools.lru_cache(maxsize=7)
    def cached(x: int) -> int:
        return x + 1

    assert peer.call(cached, 1) == 2
    assert arrive(dumps(cached)).cache_parameters()["maxsize"] == 7

    class Node:
        pass

    node = Node()
    held, ref = arrive(dumps((node, weakref.ref(node))))
    assert ref() is held
    assert arrive(dumps(types.MappingProxyType({1: 2}))) == {1: 2}


def test_what_only_dill_knows_travels(peer: Any) -> None:
    keys = {"a": 1, "b": 2}.keys()
    assert sorted(peer.call(lambda: sorted(keys))) == ["a", "b"]


def test_is_plain_says_what_can_be_pickled_anywhere() -> None:
    class Text(str):
        pass

    assert is_plain([]) and is_plain([1, "a", None, b"x", 2.0, True, 1j])
    assert not is_plain([1, []]) and not is_plain([Text("a")]) and not is_plain([b"x" * 64 * KB])
    assert {int, str, bytes, type(None)} <= PLAIN and list not in PLAIN


def test_a_subclass_of_an_atom_is_pickled_as_its_class_says(peer: Any) -> None:
    class Text(str):
        def __reduce__(self) -> Any:
            return Text, ("changed",)

    assert peer.call(same, Text("a")) == "changed"


def test_loading_needs_nothing_heavy() -> None:
    data = dumps_call((1, {"a": 2}), {})[0]
    code = (
        "import sys, fiberexec; before = set(sys.modules);"
        f"from fiberexec._serialize import loads; loads({data!r});"
        "print(*sorted(set(sys.modules) - before))"
    )
    env = {"PYTHONPATH": ":".join(sys.path)}
    out = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, env=env, timeout=60)
    loaded = out.stdout.split()
    assert "fiberexec._serialize._fast" in loaded, out.stderr
    assert len([name for name in loaded if name.startswith("fiberexec.")]) == 2
    for heavy in (
        "typing",
        "dill",
        "logging",
        "inspect",
        "dataclasses",
        "threading",
        "numpy",
        "dis",
        "traceback",
    ):
        assert heavy not in loaded


def test_streams_are_pickles_of_protocol_5() -> None:
    assert pickle.loads(dumps([1, "a"])[0]) == [1, "a"] and dumps(1)[0][:2] == b"\x80\x05"
