"""Queue, JoinableQueue, SimpleQueue: multiprocessing's promises, and what fiberexec's add to them."""

from __future__ import annotations

import gc
import queue as standard
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from typing import Any

import pytest

from fiberexec import mp
from fiberexec._hub import client, wire
from fiberexec._messages import decode, encode
from fiberexec._serialize import loads
from fiberexec.mp import _consumer, _feeder, queues

from .helpers import LIMIT, SHORT, ended, process

KINDS = ["Queue", "JoinableQueue"]


def produce(queue: Any, numbers: range) -> None:
    for number in numbers:
        queue.put(number)


def echo(source: Any, target: Any) -> None:
    for item in iter(source.get, None):
        target.put(item)


# -- in and out


@pytest.mark.parametrize("kind", [*KINDS, "SimpleQueue"])
def test_what_one_process_puts_in_order_another_gets_in_order(kind: str) -> None:
    queue = getattr(mp, kind)()
    producer = process(produce, queue, range(3000))
    assert [queue.get() for _ in range(3000)] == list(range(3000))
    assert ended(producer) == [0]
    assert queue.empty()


@pytest.mark.parametrize("kind", [*KINDS, "SimpleQueue"])
def test_any_object_comes_back_equal(kind: str) -> None:
    there, back = getattr(mp, kind)(), getattr(mp, kind)()
    helper = process(echo, there, back)
    for item in [0, "", b"", b"x" * (1 << 20), bytearray(1 << 17), [b"y" * 70000, {"a": (1, 2.5)}], "z" * 100_000]:
        there.put(item)
        got = back.get()
        assert got == item and type(got) is type(item)
    there.put(lambda: 42)
    assert back.get()() == 42
    there.put(None)
    assert ended(helper) == [0]


def test_large_and_small_items_keep_their_order() -> None:
    queue = mp.Queue()
    sizes = [3, 1 << 17, 5, 70_000, 65_536, 65_535, 1, 3 << 20, 0]
    for size in sizes:
        queue.put(bytes(size))
    assert [len(queue.get(timeout=LIMIT)) for _ in sizes] == sizes


def test_all_that_many_put_many_get_once() -> None:
    queue, results = mp.Queue(), mp.Queue()
    helpers = [process(echo, queue, results) for _ in range(3)]
    producers = [process(produce, queue, range(k, 6000, 2)) for k in range(2)]
    assert sorted(results.get(timeout=LIMIT) for _ in range(6000)) == list(range(6000))
    for _ in helpers:
        queue.put(None)
    assert ended(*helpers, *producers) == [0] * 5


# -- waiting


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_queue_says_so_in_time(kind: str) -> None:
    queue = getattr(mp, kind)()
    for options in ({"block": False}, {"block": False, "timeout": 90}, {"timeout": 0}, {"timeout": -1}, {"timeout": SHORT}):
        began = time.monotonic()
        with pytest.raises(standard.Empty):
            queue.get(**options)
        assert time.monotonic() - began < 20
    with pytest.raises(standard.Empty):
        queue.get_nowait()


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_queue_says_so_in_time_and_lets_the_next_in_when_there_is_room(kind: str) -> None:
    queue = getattr(mp, kind)(2)
    queue.put(1)
    assert not queue.full()
    queue.put_nowait(2)
    assert queue.full() and queue.qsize() == 2
    for options in ({"block": False}, {"timeout": SHORT}, {"timeout": -1}):
        with pytest.raises(standard.Full):
            queue.put(3, **options)
    with pytest.raises(standard.Full):
        queue.put_nowait(3)
    helper = threading.Thread(target=queue.put, args=(3,))
    helper.start()
    assert [queue.get() for _ in range(3)] == [1, 2, 3]
    helper.join(LIMIT)
    assert queue.empty() and not queue.full()


def test_a_get_waits_no_longer_than_it_may_for_what_this_process_is_sending(monkeypatch: pytest.MonkeyPatch) -> None:
    go, send = threading.Event(), _feeder.send
    monkeypatch.setattr(_feeder, "send", lambda *args: go.wait(LIMIT) and send(*args))
    queue = mp.Queue()
    queue.put(1)
    try:
        with pytest.raises(standard.Empty):
            queue.get(timeout=SHORT)
        assert not _feeder.feeder.is_idle
    finally:
        go.set()
    assert queue.get(timeout=LIMIT) == 1


def test_what_was_put_here_is_counted_at_once() -> None:
    queue = mp.Queue()
    for count in range(100):
        assert queue.qsize() == count
        queue.put(count)
        assert not queue.empty()
    for count in range(100):
        assert queue.get_nowait() == count
        assert queue.qsize() == 99 - count


# -- closing


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_queue_refuses(kind: str) -> None:
    queue = getattr(mp, kind)()
    with pytest.raises(AssertionError, match="not closed"):
        queue.join_thread()
    queue.put(1)
    queue.close()
    for call in (lambda: queue.put(1), queue.get, queue.get_nowait, lambda: queue.put_nowait(1)):
        with pytest.raises(ValueError, match="is closed"):
            call()
    queue.join_thread()
    queue.close()
    with pytest.raises(OSError, match="is closed"):
        queue.empty()
    unused = getattr(mp, kind)()
    unused.close()
    assert unused.empty()


def test_a_closed_simple_queue_refuses() -> None:
    queue = mp.SimpleQueue()
    queue.close()
    with pytest.raises(OSError, match="closed"):
        queue.put(1)
    with pytest.raises(OSError, match="closed"):
        queue.get()
    with pytest.raises(OSError, match="closed"):
        queue.empty()


def test_what_was_put_is_sent_before_a_process_ends() -> None:
    queue = mp.Queue()
    assert ended(process(produce, queue, range(20000))) == [0]
    assert queue.qsize() == 20000


def test_a_process_that_cancelled_ends_without_sending(tmp_path: Any) -> None:
    def put_and_cancel(queue: Any) -> None:
        queue.cancel_join_thread()
        queue.put(1)

    assert ended(process(put_and_cancel, mp.Queue())) == [0]


def test_a_script_that_ends_has_sent_what_it_put() -> None:
    program = """
        from fiberexec import mp
        def take(queue):
            print(sum(queue.get() for _ in range(1000)), flush=True)
        queue = mp.Queue()
        taker = mp.Process(target=take, args=(queue,))
        taker.start()
        for number in range(1000):
            queue.put(number)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("499500\n", "")


# -- what cannot be pickled


class Refuses:
    def __reduce__(self) -> Any:
        raise AttributeError("no")


def test_what_cannot_be_pickled_is_reported_and_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    for queue in (mp.Queue(), mp.Queue(1)):
        queue.put(Refuses())
        assert "AttributeError" in capsys.readouterr().err
        queue.put(True)
        assert queue.qsize() == 1
        assert queue.get(timeout=LIMIT) is True
        assert queue.empty()
    with pytest.raises(Exception, match="Refuses"):
        mp.SimpleQueue().put(Refuses())


def test_a_subclass_hears_what_could_not_be_pickled() -> None:
    heard = []

    class Listens(queues.Queue):
        @staticmethod
        def _on_queue_feeder_error(e: BaseException, obj: Any) -> None:
            heard.append((e, obj))

    queue: Any = Listens(ctx=mp.get_context())
    item = Refuses()
    queue.put(item)
    assert heard[0][1] is item
    assert "AttributeError" in "".join(traceback.format_exception(heard[0][0]))


# -- joinable


def work(queue: Any, done: Any) -> None:
    for number in iter(queue.get, None):
        if number > 1:
            queue.put(number // 2)  # put because of another: it counts before that one is done
        done.put(number)
        queue.task_done()
    queue.task_done()


def test_join_returns_when_all_is_done() -> None:
    queue, done = mp.JoinableQueue(), mp.Queue()
    workers = [process(work, queue, done) for _ in range(2)]
    for _ in range(20):
        queue.put(64)
    queue.join()
    assert done.qsize() == 20 * 7
    for _ in workers:
        queue.put(None)
    queue.join()
    assert ended(*workers) == [0, 0]


def test_done_is_counted_whoever_says_it() -> None:
    queue = mp.JoinableQueue()
    with pytest.raises(ValueError, match="too many times"):
        queue.task_done()
    for number in range(3):
        queue.put(number)
    for _ in range(3):
        queue.get(timeout=LIMIT)
    helper = threading.Thread(target=lambda: [queue.task_done(), queue.task_done()])
    helper.start()
    helper.join()
    queue.task_done()
    queue.join()
    with pytest.raises(ValueError, match="too many times"):
        queue.task_done()


def test_join_waits_while_something_is_not_done() -> None:
    queue = mp.JoinableQueue()
    joined = threading.Event()
    queue.put(1)
    helper = threading.Thread(target=lambda: (queue.join(), joined.set()))
    helper.start()
    assert queue.get(timeout=LIMIT) == 1
    assert not joined.wait(SHORT)
    queue.task_done()
    assert joined.wait(LIMIT)
    helper.join()


# -- what is taken ahead


def test_what_a_fast_consumer_took_ahead_goes_to_those_who_wait() -> None:
    queue = mp.Queue()
    produce(queue, range(2000))
    for number in range(1000):
        assert queue.get(timeout=LIMIT) == number
    assert queue.qsize() == 1000
    rest: list[int] = []
    helper = threading.Thread(target=lambda: rest.extend(queue.get(timeout=LIMIT) for _ in range(1000)))
    helper.start()
    helper.join(LIMIT)
    assert sorted(rest) == list(range(1000, 2000))
    with pytest.raises(standard.Empty):
        queue.get_nowait()


def test_what_another_took_ahead_is_there_for_a_get_that_does_not_wait() -> None:
    queue = mp.Queue()
    produce(queue, range(100))
    while not getattr(getattr(queue._local, "consumer", None), "items", None):
        queue.get(timeout=LIMIT)
    left = queue.qsize()
    got: list[Any] = []

    def drain() -> None:
        while not queue.empty():
            got.append(queue.get_nowait())

    helper = threading.Thread(target=drain)
    helper.start()
    helper.join(LIMIT)
    assert len(got) == left > 0
    assert queue.empty()


def test_a_consumer_keeps_what_it_claimed_while_others_take_the_rest() -> None:
    """Two consumers that are fast and slow by turns: nothing is lost, nothing comes twice."""
    queue, seen = mp.JoinableQueue(), mp.Queue()

    def consume(k: int) -> None:
        for count, item in enumerate(iter(queue.get, None)):
            seen.put(item)
            queue.task_done()
            if count % 500 == 250 * k:
                time.sleep(0.02)
        queue.task_done()

    helpers = [process(consume, k) for k in range(2)]
    produce(queue, range(5000))
    queue.join()
    assert sorted(seen.get(timeout=LIMIT) for _ in range(5000)) == list(range(5000))
    for _ in helpers:
        queue.put(None)
    assert ended(*helpers) == [0, 0]


def test_an_answer_is_not_taken_back_however_late_it_is_read() -> None:
    queue = mp.Queue()
    queue.put("mine")
    assert queue.get(timeout=LIMIT) == "mine"  # now there are cells
    late = client._Channel(queue._hub)
    late.stream.send(wire.REQUEST, encode(("get", queue._id, (wire.CELLS - 1, 0, 1, None))))
    assert queue.qsize() == 0  # it waits
    queue.put("late")
    assert queue.qsize() == 0  # it is promised
    with pytest.raises(standard.Empty):
        queue.get(timeout=SHORT)
    kind, body, _ = late.stream.receive_one()
    number, items = decode(body)
    assert (kind, number, [loads(item) for item in items]) == (wire.REPLY, 1, ["late"])
    late.close()


def test_a_slow_consumer_takes_nothing_ahead() -> None:
    queue = mp.Queue()
    produce(queue, range(8))
    for _ in range(5):
        queue.get(timeout=LIMIT)
        assert not queue._local.consumer.items
        time.sleep(0.005)


def test_threads_that_end_leave_nothing_behind() -> None:
    queue = mp.Queue()
    produce(queue, range(100))
    for number in range(100):
        got: list[int] = []
        helper = threading.Thread(target=lambda: got.append(queue.get(timeout=LIMIT)))  # noqa: B023
        helper.start()
        helper.join()
        assert got == [number]
    cells = next(iter(_consumer._all_cells.values()))
    assert next(cells.unused) < 10


def test_a_queue_goes_with_its_last_reference() -> None:
    queue = mp.Queue()
    queue.put(1)
    queue.get(timeout=LIMIT)
    before = len(queues._live)
    del queue
    gc.collect()
    assert len(queues._live) == before - 1
