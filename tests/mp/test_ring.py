"""Ring: its members know each other, do an all-reduce, and end together."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

import fiberexec
from fiberexec import mp
from fiberexec.mp.ring import RingBroken, RingMember, current_ring

from .counters import Broken
from .helpers import deserted, stay

np = pytest.importorskip("numpy")


def all_reduce(ring: RingMember, array: Any) -> Any:
    """The sum of the members' arrays: each sends and receives 2 (size - 1) / size of one array."""
    parts = np.array_split(array.copy(), ring.size)
    for step in range(ring.size - 1):
        out = (ring.rank - step) % ring.size
        parts[(out - 1) % ring.size] += ring.shift(parts[out])
    for step in range(ring.size - 1):
        out = (ring.rank + 1 - step) % ring.size
        parts[(out - 1) % ring.size] = ring.shift(parts[out])
    return np.concatenate(parts)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_all_reduce(size: int) -> None:
    """With arrays larger than what any pipe holds."""

    def reduce(rank: int, size: int) -> Any:
        return all_reduce(current_ring(), np.arange(300_000) * (rank + 1))

    total = np.arange(300_000) * sum(range(1, size + 1))
    for result in mp.Ring(size, reduce).run():
        assert (result == total).all()


def test_results_come_by_rank_and_a_ring_runs_again() -> None:
    ring = mp.Ring(3, lambda rank, size: (rank, size))
    assert ring.run() == ring.run() == [(0, 3), (1, 3), (2, 3)]


def test_the_initializer_gets_the_ring_as_the_member_sees_it() -> None:
    seen: dict[str, Any] = {}

    def initialize(ring: RingMember, word: str) -> None:
        seen.update(rank=ring.rank, size=ring.size, word=word, ranks=[node.rank for node in ring.members])

    def look(rank: int, size: int) -> Any:
        return seen

    results = mp.Ring(2, look, initialize, ("hello",)).run()
    assert results == [{"rank": rank, "size": 2, "word": "hello", "ranks": [0, 1]} for rank in (0, 1)]


def test_members_reach_each_other_at_their_addresses() -> None:
    def talk(rank: int, size: int) -> bytes:
        ring = current_ring()
        if rank == 0:
            with socket.create_server((ring.members[0].ip, ring.members[0].port)) as server:
                ring.shift(None)
                connection, _ = server.accept()
        else:
            ring.shift(None)
            connection = socket.create_connection((ring.members[0].ip, ring.members[0].port))
        with connection:
            connection.sendall(b"%d" % rank)
            return connection.recv(1)

    assert mp.Ring(2, talk).run() == [b"1", b"0"]


def test_neighbours_have_a_connection_for_both_directions() -> None:
    def greet(rank: int, size: int) -> tuple[int, int]:
        ring = current_ring()
        ring.previous.send(rank)
        ring.next.send(rank)
        return ring.previous.recv(), ring.next.recv()

    assert mp.Ring(3, greet).run() == [(2, 1), (0, 2), (1, 0)]


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_member_that_is_killed_ends_the_ring_with_its_reason(victim: int) -> None:
    def work(rank: int, size: int) -> None:
        ring = current_ring()
        ring.shift(rank)
        if rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        ring.shift(rank)

    with pytest.raises(RingBroken, match=f"member {victim} of 3 was killed by SIGKILL"):
        mp.Ring(3, work).run()


def test_a_member_that_exits_ends_the_ring_with_its_code() -> None:
    def work(rank: int, size: int) -> None:
        if rank == 1:
            os._exit(7)
        current_ring().previous.recv()

    with pytest.raises(RingBroken, match="member 1 of 2 ended with exit code 7"):
        mp.Ring(2, work).run()


def test_what_a_member_raises_ends_the_ring_and_not_what_its_neighbours_make_of_it() -> None:
    def work(rank: int, size: int) -> None:
        if rank == 1:
            raise LookupError("the reason")
        current_ring().shift(rank)

    with pytest.raises(LookupError, match="the reason"):
        mp.Ring(3, work).run()


def test_a_result_that_cannot_be_unpickled_is_its_own_error() -> None:
    with pytest.raises(OSError, match="of unpickling") as caught:
        mp.Ring(2, lambda rank, size: Broken(OSError, b"")).run()
    assert not isinstance(caught.value, RingBroken)


def test_a_member_that_would_wait_for_ever_is_ended() -> None:
    def work(rank: int, size: int) -> None:
        if rank == 1:
            raise LookupError("the reason")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pause()

    with pytest.raises(LookupError):
        mp.Ring(2, work).run()


def test_a_ring_that_is_interrupted_ends_its_members(tmp_path: Path) -> None:
    def work(rank: int, size: int) -> None:
        stay(tmp_path / str(rank))
        signal.pause()

    def interrupt(*_: object) -> None:
        if all((tmp_path / str(rank)).exists() for rank in (0, 1)):
            signal.setitimer(signal.ITIMER_REAL, 0)  # one Ctrl-C
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    try:
        with pytest.raises(KeyboardInterrupt):
            mp.Ring(2, work).run()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    for rank in (0, 1):
        assert deserted(tmp_path / str(rank))


def test_a_failing_initializer_ends_the_ring() -> None:
    def initialize(ring: RingMember) -> None:
        raise ValueError(f"rank {ring.rank}")

    with pytest.raises(ValueError, match="rank"):
        mp.Ring(2, lambda rank, size: None, initialize).run()


@pytest.mark.one_host("other backends have other sizes")
def test_the_functions_meta_sizes_the_processes() -> None:
    @fiberexec.meta(cpu=10_000)
    def work(rank: int, size: int) -> None:
        raise AssertionError("it does not fit")

    with pytest.raises(fiberexec.ResourceError):
        mp.Ring(1, work).run()


def test_a_ring_has_members() -> None:
    with pytest.raises(ValueError, match="at least one"):
        mp.Ring(0, print)


def test_there_is_no_ring_outside_of_one() -> None:
    with pytest.raises(RuntimeError, match="no member"):
        current_ring()


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_torch_distributed() -> None:
    def initialize(ring: RingMember) -> None:
        from torch import distributed

        address = f"tcp://{ring.members[0].ip}:{ring.members[0].port}"
        distributed.init_process_group("gloo", address, rank=ring.rank, world_size=ring.size)

    def reduce(rank: int, size: int) -> list[float]:
        import torch
        from torch import distributed

        values = torch.ones(3) * (rank + 1)
        distributed.all_reduce(values)
        distributed.destroy_process_group()
        return values.tolist()  # type: ignore[no-any-return]

    assert mp.Ring(2, reduce, initialize).run() == [[3.0] * 3] * 2
