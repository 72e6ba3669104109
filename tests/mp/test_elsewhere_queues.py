"""Queues whose consumers are in jobs: what these have taken ahead, and what is got when they go."""

from __future__ import annotations

import gc
import queue as standard
import signal
import threading
import time
from typing import Any

import pytest

from fiberexec import mp

from .helpers import LIMIT, LONG, ended, process


@pytest.mark.parametrize("kind", ["Queue", "JoinableQueue"])
def test_what_a_consumer_took_ahead_and_sits_on_goes_to_others(kind: str) -> None:
    def consume(source: Any, told: Any, go_on: Any) -> None:
        for _ in range(400):  # fast, so that it takes some ahead
            source.get()
        told.put("sits")
        go_on.wait()

    source, told, go_on = getattr(mp, kind)(), mp.Queue(), mp.Event()
    for number in range(1000):
        source.put(number)
    helper = process(consume, source, told, go_on)
    assert told.get(timeout=LIMIT) == "sits"
    assert sorted(source.get(timeout=LIMIT) for _ in range(600)) == list(range(400, 1000))
    with pytest.raises(standard.Empty):
        source.get_nowait()
    assert source.empty()
    go_on.set()
    assert ended(helper) == [0]


def test_who_does_not_want_to_wait_gets_what_a_consumer_does_not_need() -> None:
    def consume(source: Any, told: Any, go_on: Any) -> None:
        for _ in range(300):
            source.get()
        told.set()
        go_on.wait()

    source, told, go_on = mp.Queue(), mp.Event(), mp.Event()
    for number in range(500):
        source.put(number)
    helper = process(consume, source, told, go_on)
    assert told.wait(LIMIT)
    assert sorted(source.get_nowait() for _ in range(200)) == list(range(300, 500))
    go_on.set()
    assert ended(helper) == [0]


def test_several_consumers_get_every_item_once_and_fast() -> None:
    def consume(source: Any, results: Any) -> None:
        for item in iter(source.get, None):
            results.put(item)

    source, results = mp.Queue(), mp.Queue()
    helpers = [process(consume, source, results) for _ in range(3)]
    for number in range(5000):
        source.put(number)
    assert sorted(results.get(timeout=LIMIT) for _ in range(5000)) == list(range(5000))
    for _ in helpers:
        source.put(None)
    assert ended(*helpers) == [0] * 3


@pytest.mark.parametrize("kind", ["Queue", "JoinableQueue"])
def test_what_a_killed_consumer_had_got_stays_got_and_the_rest_comes_back_in_order(kind: str) -> None:
    def consume(source: Any, told: Any) -> None:
        for _ in range(300):
            source.get()
            if kind == "JoinableQueue":
                source.task_done()
        told.set()
        time.sleep(LONG)

    source, told = getattr(mp, kind)(), mp.Event()
    for number in range(700):
        source.put(number)
    victim = process(consume, source, told)
    assert told.wait(LIMIT)
    victim.kill()
    assert ended(victim) == [-signal.SIGKILL]
    assert [source.get(timeout=LIMIT) for _ in range(400)] == list(range(300, 700))
    assert source.empty()


def test_threads_of_a_job_that_end_give_back_what_they_took_ahead() -> None:
    def consume(source: Any, results: Any) -> None:
        def some() -> None:
            for _ in range(200):
                results.put(source.get())

        for _ in range(3):
            thread = threading.Thread(target=some)
            thread.start()
            thread.join()
            gc.collect()
        results.put(sorted(source.get() for _ in range(400)))

    source, results = mp.Queue(), mp.Queue()
    for number in range(1000):
        source.put(number)
    helper = process(consume, source, results)
    got = [results.get(timeout=LIMIT) for _ in range(600)]
    assert sorted(got + results.get(timeout=LIMIT)) == list(range(1000))
    assert ended(helper) == [0]
