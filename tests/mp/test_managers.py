"""Managers and their proxies, where they are more than multiprocessing's. The rest is in tests/conformance."""

from __future__ import annotations

import collections
import contextlib
import gc
import os
import pickle
import random
import socket
import struct
from pathlib import Path
from typing import Any

import pytest

from fiberexec import mp
from fiberexec.mp.managers import (
    BaseManager,
    BaseProxy,
    SyncManager,
)

from .counters import Counter, Counters

# Proxies travel.


def test_a_proxy_is_pickled_at_any_time(manager: SyncManager) -> None:
    shared = manager.list([1])
    again = pickle.loads(pickle.dumps(shared))
    again.append(2)
    assert list(shared) == [1, 2]
    assert type(again) is type(shared)


@pytest.mark.parametrize("typeid", ["Queue", "Event", "Lock", "Condition", "Barrier", "Namespace", "Value", "Array", "dict"])
def test_each_kind_of_proxy_travels(manager: SyncManager, typeid: str) -> None:
    arguments = {"Barrier": (1,), "Value": ("i", 3), "Array": ("i", [1, 2])}
    proxy = getattr(manager, typeid)(*arguments.get(typeid, ()))
    again = pickle.loads(pickle.dumps(proxy))
    assert str(again) == str(proxy)


def test_a_proxy_goes_into_a_process_and_comes_back_through_a_queue(manager: SyncManager) -> None:
    def work(shared: Any, queue: Any) -> None:
        shared["a"] = lambda: 7
        queue.put(shared)

    queue = manager.Queue()
    process = mp.Process(target=work, args=(manager.dict(), queue))
    process.start()
    process.join()
    assert queue.get()["a"]() == 7


def test_an_object_outlives_the_proxy_it_was_pickled_from(manager: SyncManager) -> None:
    shared = manager.list([1, 2])
    data = pickle.dumps(shared)
    del shared
    gc.collect()
    assert list(pickle.loads(data)) == [1, 2]


def test_an_object_outlives_the_process_that_made_it(manager: SyncManager) -> None:
    def make(queue: Any) -> None:
        with mp.Pool(1) as pool:
            assert pool.apply(len, ([1],)) == 1
        queue.put(queue._manager)  # a proxy that has travelled knows no manager
        inner = pickle.loads(pickle.dumps(queue))
        queue.put(inner)

    queue = manager.Queue()
    process = mp.Process(target=make, args=(queue,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert queue.get() is None
    queue.get().put(3)
    assert queue.get() == 3


def test_an_object_goes_with_its_last_proxy(manager: SyncManager) -> None:
    before = manager._number_of_objects()
    shared = manager.list([1])
    again = pickle.loads(pickle.dumps(shared))
    del shared
    gc.collect()
    assert manager._number_of_objects() == before + 1
    del again
    gc.collect()
    assert manager._number_of_objects() == before


def test_a_pickle_may_be_loaded_twice(manager: SyncManager) -> None:
    shared = manager.list([1])
    data = pickle.dumps(shared)
    one, two = pickle.loads(data), pickle.loads(data)
    del one
    gc.collect()
    two.append(2)
    assert list(shared) == [1, 2]


def test_proxies_nest_and_are_iterated_where_no_manager_is_known(manager: SyncManager) -> None:
    outer = manager.dict()
    outer["inner"] = manager.dict(a=1)
    inner = outer["inner"]
    assert inner._manager is None
    assert list(inner) == ["a"]
    outer["inner"]["b"] = 2
    assert inner.copy() == {"a": 1, "b": 2}


def test_what_is_registered_may_be_a_lambda_or_a_local_class() -> None:
    class Local:
        def name(self) -> str:
            return "local"

    class Manager(BaseManager):
        pass

    Manager.register("Local", Local)
    Manager.register("lucky", lambda: collections.Counter("aab"))
    with Manager() as manager:
        assert manager.Local().name() == "local"  # type: ignore[attr-defined]
        assert manager.lucky().most_common(1) == [("a", 2)]  # type: ignore[attr-defined]


def test_a_class_of_proxies_of_ones_own(manager: SyncManager) -> None:
    class Manager(BaseManager):
        pass

    Manager.register("Counter", Counter, Twice)
    with Manager() as own:
        counter = own.Counter(2)  # type: ignore[attr-defined]
        assert pickle.loads(pickle.dumps(counter)).add(3) == 10


class Twice(BaseProxy):
    _exposed_ = ("add",)

    def add(self, n: int) -> Any:
        return 2 * self._callmethod("add", (n,))


# Others knock.


def test_a_wrong_key_is_refused(manager: SyncManager) -> None:
    other = SyncManager(address=manager.address, authkey=b"wrong")
    with pytest.raises(mp.AuthenticationError):
        other.connect()
    assert list(manager.list([1])) == [1]


def test_nothing_is_unpickled_for_who_has_no_key(manager: SyncManager, tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "unpickled"),)

    generator = random.Random(4)
    payload = pickle.dumps((None, "dummy", (Touch(),), {}))
    for data in [payload, generator.randbytes(1000), generator.randbytes(10), b"\xff" * 8, b""]:
        with socket.socket(socket.AF_UNIX) as sock, contextlib.suppress(OSError):
            sock.connect(manager.address)
            sock.sendall(struct.pack("!i", len(data)) + data)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(4096):
                pass
    assert list(manager.list([1])) == [1]
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.one_host("the address is one of the host's own")
def test_a_manager_at_an_address_of_its_own_is_reached_by_who_has_the_key() -> None:
    with Counters(address=("127.0.0.1", 0), authkey=b"ours") as manager:
        other = Counters(address=manager.address, authkey=b"ours")
        other.connect()
        assert other.Counter(3).add(1) == 4  # type: ignore[attr-defined]
