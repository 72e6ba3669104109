"""Resources: no more is promised than there is, each gpu task sees its own devices, and a big task gets its turn."""

from __future__ import annotations

import functools
import os
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest

import fiberexec
from fiberexec import FiberExecutor, ResourceError, _platform

pytestmark = pytest.mark.one_host("it has its own idea of the machine")
LIMIT = 30.0
GIB = 1 << 30
Make = Callable[..., FiberExecutor]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 4 cores, 8 GiB and 3 GPUs, whatever it is that runs the tests."""
    monkeypatch.setattr(_platform, "cpu_count", lambda: 4)
    monkeypatch.setattr(_platform, "memory_total", lambda: 8 * GIB)
    monkeypatch.setattr(_platform, "gpu_devices", lambda: ("0", "1", "2"))


def use(board: Any, *what: Any) -> str | None:
    """Say when it begins and when it ends to use something; returns the devices that it sees."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    board.post("use", [1, *what, devices])
    board.post("use", [-1, *what, devices])
    return devices


def peak(board: Any, place: int = 1) -> float:
    """The most that was in use at one moment, by the order in which the tasks spoke."""
    now = most = 0.0
    for event in board.read("use"):
        now += event[0] * event[place]
        most = max(most, now)
    assert abs(now) < 1e-6
    return most


@pytest.mark.parametrize(("demand", "at_once"), [({"cpu": 2}, 2), ({"memory": "3Gi"}, 2), ({"cpu": 0.8}, 5), ({"gpu": 1}, 3)])
def test_as_many_run_at_once_as_fit_and_no_more(
    make_executor: Make, board: Any, demand: dict[str, Any], at_once: int
) -> None:
    def work(i: int) -> None:
        board.post("use", [1, 1])
        board.meet(f"group {i // at_once}", at_once)  # only if that many run at once this ends
        board.post("use", [-1, 1])

    executor = make_executor(6)
    view = executor.options(**demand)
    futures = [view.submit(work, i) for i in range(3 * at_once)]
    for future in futures:
        future.result(LIMIT)
    assert peak(board) == at_once


def test_whatever_the_mixture_never_more_than_there_is(make_executor: Make, board: Any) -> None:
    seed = 20240229
    print("seed", seed)
    chance = random.Random(seed)
    executor = make_executor(8)
    futures = []
    for _ in range(80):
        cpu, gib, gpu = chance.choice([0.1, 0.5, 1, 2, 4]), chance.choice([0, 1, 3, 8]), chance.choice([0, 0, 0, 1, 2, 3])
        view = executor.options(cpu=cpu, memory=f"{gib}Gi", gpu=gpu, priority=chance.choice([0, 0, 1]))
        futures.append((gpu, view.submit(use, board, cpu, gib, gpu)))
    for gpu, future in futures:
        devices = future.result(LIMIT)
        if gpu:
            assert devices is not None and len(set(devices.split(","))) == gpu
    assert peak(board, 1) <= 4 + 1e-6 and peak(board, 2) <= 8 and peak(board, 3) <= 3


def test_map_is_admitted_item_by_item(make_executor: Make, board: Any) -> None:
    executor = make_executor(6)
    list(executor.options(cpu=2).map(lambda i: use(board, 2), range(30), chunksize=30))
    assert peak(board) <= 4


def test_gpu_tasks_at_the_same_time_see_different_devices(make_executor: Make, board: Any) -> None:
    def work() -> str:
        board.meet("all three", 3)
        return os.environ["CUDA_VISIBLE_DEVICES"]

    executor = make_executor(4)
    futures = [executor.options(gpu=1).submit(work) for _ in range(3)]
    assert sorted(future.result(LIMIT) for future in futures) == ["0", "1", "2"]


def test_devices_are_never_shared_whatever_the_sizes(make_executor: Make, board: Any) -> None:
    executor = make_executor(3)
    sizes = [1, 2, 3, 1, 1, 2, 3, 1, 2, 1, 3, 3, 2, 1, 1]
    futures = [executor.options(gpu=size).submit(use, board, size) for size in sizes]
    seen = [future.result(LIMIT).split(",") for future in futures]
    assert [len(devices) for devices in seen] == sizes
    busy: list[str] = []
    for change, _, devices in board.read("use"):
        for device in devices.split(","):
            assert device in ("0", "1", "2")
            if change > 0:
                assert device not in busy
                busy.append(device)
            else:
                busy.remove(device)


def test_a_gpu_task_whose_worker_was_lost_finds_its_device_again(make_executor: Make) -> None:
    def work() -> str:
        task = fiberexec.current_task()
        assert task is not None
        if task.attempt == 1:
            os._exit(1)
        return os.environ["CUDA_VISIBLE_DEVICES"]

    executor = make_executor(2)
    futures = [executor.options(gpu=3).submit(work) for _ in range(3)]
    assert [sorted(future.result(LIMIT).split(",")) for future in futures] == [["0", "1", "2"]] * 3


def test_the_devices_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, make_executor: Make) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-1234")
    executor = make_executor(2)
    seen = {executor.options(gpu=1).submit(os.getenv, "CUDA_VISIBLE_DEVICES").result(LIMIT) for _ in range(4)}
    assert seen <= {"5", "GPU-1234"}
    both = executor.options(gpu=2).submit(os.getenv, "CUDA_VISIBLE_DEVICES").result(LIMIT)
    assert sorted(both.split(",")) == ["5", "GPU-1234"]
    with pytest.raises(ResourceError):
        executor.options(gpu=3).submit(int)


@pytest.mark.parametrize(
    ("visible", "devices"),
    [
        ("0, 2", ("0", "2")),
        ("MIG-1,GPU-2", ("MIG-1", "GPU-2")),
        ("0,-1,1", ("0",)),
        ("1,,2", ("1",)),
        ("0,1,0,2", ("0", "1")),
        ("NoDevFiles", ()),
        ("none", ()),
        ("void", ()),
        ("-1", ()),
        ("", ()),
    ],
)
def test_the_environment_s_devices_end_where_cuda_s_do(
    monkeypatch: pytest.MonkeyPatch, visible: str, devices: tuple[str, ...]
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert _platform.gpu_devices() == devices


# -- what can never fit


@pytest.mark.parametrize(
    ("demand", "has"), [({"cpu": 5}, "4"), ({"memory": "9Gi"}, "8"), ({"gpu": 4}, "3"), ({"cpu": 4.5, "gpu": 1}, "4")]
)
def test_what_can_never_fit_fails_at_submit_and_says_what_there_is(
    make_executor: Make, demand: dict[str, Any], has: str
) -> None:
    executor = make_executor(2)
    view = executor.options(**demand)
    for call in (lambda: view.submit(int), lambda: view.map(int, [1])):
        with pytest.raises(ResourceError, match="int") as caught:
            call()
        assert isinstance(caught.value, ValueError)
        text = str(caught.value)
        assert has in text
        assert all(str(value).rstrip("Gi") in text for value in demand.values())
    assert executor.workers() == []


def test_all_that_there_is_fits(make_executor: Make) -> None:
    assert make_executor(1).options(cpu=4, memory="8Gi", gpu=3).submit(int, "3").result(LIMIT) == 3


def test_the_executors_own_size_is_what_tasks_share(make_executor: Make, board: Any) -> None:
    executor = make_executor(4, cpu=2, memory="1Gi", gpu=1)
    for demand in ({"cpu": 3}, {"memory": "2Gi"}, {"gpu": 2}):
        with pytest.raises(ResourceError):
            executor.options(**demand).submit(int)
    futures = [executor.options(cpu=1).submit(use, board, 1) for _ in range(12)]
    for future in futures:
        future.result(LIMIT)
    assert peak(board) <= 2


def test_an_executor_larger_than_the_machine_is_refused(make_executor: Make) -> None:
    with pytest.raises(fiberexec.ConfigError, match="cpu"):
        make_executor(2, cpu=5)


# -- meta


@fiberexec.meta(cpu=2)
def needs_two(board: Any) -> None:
    use(board, 2)


def test_meta_gives_a_function_its_needs(make_executor: Make, board: Any) -> None:
    executor = make_executor(6)
    futures = [executor.submit(needs_two, board) for _ in range(15)]
    list(executor.map(needs_two, [board] * 15))
    for future in futures:
        future.result(LIMIT)
    assert peak(board) <= 4


def test_meta_counts_inside_a_partial_unless_that_has_its_own(make_executor: Make) -> None:
    executor = make_executor(1)
    nested = functools.partial(functools.partial(fiberexec.meta(cpu=5)(lambda: 1)))
    with pytest.raises(ResourceError, match="cpu=5"):
        executor.submit(nested)
    assert executor.submit(fiberexec.meta(cpu=1)(nested)).result(LIMIT) == 1


@pytest.mark.parametrize("function", [abs, "text".upper, pytest.MonkeyPatch().undo], ids=["builtin", "method", "bound"])
def test_meta_says_so_where_it_cannot_mark_a_function(function: Any) -> None:
    with pytest.raises(fiberexec.ConfigError, match="wrap it in a def"):
        fiberexec.meta(cpu=1)(function)


def test_meta_that_can_never_fit_fails_at_submit(make_executor: Make) -> None:
    @fiberexec.meta(memory="100Gi")
    def huge() -> None: ...

    executor = make_executor(1)
    with pytest.raises(ResourceError, match="huge"):
        executor.submit(huge)
    assert executor.options(memory="1Gi").submit(huge).result(LIMIT) is None


def test_meta_travels_with_the_function(make_executor: Make) -> None:
    """A task may pass a function on to an executor of its own."""

    @fiberexec.meta(cpu=3, memory=64, gpu=1)
    def needs() -> int:
        return 1

    def inspect(function: Any) -> Any:
        return function.__fiberexec_meta__, function()

    executor = make_executor(1)
    assert executor.submit(inspect, needs).result(LIMIT) == (needs.__fiberexec_meta__, 1)  # type: ignore[attr-defined]


@pytest.mark.parametrize("wrong", [{"cpu": -1}, {"memory": "lots"}, {"gpu": 0.5}, {"cpu": float("nan")}])
def test_meta_refuses_what_makes_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(fiberexec.ConfigError, match=next(iter(wrong))):
        fiberexec.meta(**wrong)


# -- everyone gets a turn


@pytest.mark.parametrize("small", [{"cpu": 1}, {}])
def test_a_big_task_is_not_starved_by_a_stream_of_small_ones(
    make_executor: Make, board: Any, small: dict[str, Any]
) -> None:
    executor = make_executor(4)
    view = executor.options(**small) if small else executor
    lock, budget, ended = threading.Lock(), [3000], threading.Event()

    def again(_: Any) -> None:
        with lock:
            budget[0] -= 1
            if big.done() or budget[0] < 0:
                ended.set()
                return
        view.submit(pow, 2, 5).add_done_callback(again)

    held = [view.submit(board.wait, "go") for _ in range(4)]
    big = executor.options(cpu=4).submit(int, "4")
    for _ in range(8):
        view.submit(pow, 2, 5).add_done_callback(again)
    board.post("go")
    assert big.result(LIMIT) == 4
    assert ended.wait(LIMIT)
    assert budget[0] > 0, "the big task ran only when the small ones had ended"
    for future in held:
        future.result(LIMIT)


def test_what_needs_nothing_passes_what_waits_for_resources(make_executor: Make, board: Any) -> None:
    executor = make_executor(3)
    held = executor.options(gpu=3).submit(board.wait, "go")
    waiting = executor.options(gpu=1).submit(int, "7")
    assert executor.submit(int, "5").result(LIMIT) == 5
    assert executor.options(cpu=2).submit(int, "6").result(LIMIT) == 6
    assert not waiting.done()
    board.post("go")
    assert waiting.result(LIMIT) == 7 and held.result(LIMIT)
