"""The lifecycle tables: complete, closed, and strict."""

from __future__ import annotations

import pytest

from fiberexec._scheduler.records import Profile, Task, WorkerRecord
from fiberexec._states import DONE, GONE, QUEUED, STARTING, TASK, WORKER, IllegalEvent, step

TABLES = {"task": (TASK, QUEUED, DONE), "worker": (WORKER, STARTING, GONE)}


@pytest.mark.parametrize("name", TABLES)
def test_every_step_leads_to_a_state_of_the_table(name: str) -> None:
    table = TABLES[name][0]
    assert {target for steps in table.values() for target in steps.values()} <= set(table)


@pytest.mark.parametrize("name", TABLES)
def test_every_state_can_be_reached_and_every_life_can_end(name: str) -> None:
    table, first, last = TABLES[name]
    reached = {first}
    while (more := reached | {t for state in reached for t in table[state].values()}) != reached:
        reached = more
    assert reached == set(table)
    ends = {last}
    while (more := ends | {s for s in table if set(table[s].values()) & ends}) != ends:
        ends = more
    assert ends == set(table)


@pytest.mark.parametrize("name", TABLES)
def test_nothing_follows_the_last_state(name: str) -> None:
    table, _, last = TABLES[name]
    assert [state for state in table if not table[state]] == [last]


@pytest.mark.parametrize("name", TABLES)
def test_an_event_that_a_state_does_not_list_is_an_error(name: str) -> None:
    table = TABLES[name][0]
    events = {event for steps in table.values() for event in steps}
    for state in table:
        for event in events - set(table[state]):
            with pytest.raises(IllegalEvent, match=f"{event!r} cannot happen in state {state!r}"):
                step(table, state, event)


def test_an_illegal_event_changes_nothing() -> None:
    task, worker = Task(1, Profile()), WorkerRecord(1, 0.0, None)
    with pytest.raises(IllegalEvent):
        task.step("settle")
    with pytest.raises(IllegalEvent):
        worker.step("finish")
    assert (task.state, worker.state) == (QUEUED, STARTING)


def test_a_task_that_is_done_lets_its_payload_go() -> None:
    task = Task(1, Profile(), payload=object())
    task.error = b"the attempt before"
    task.step("cancel")
    assert task.payload is None and task.error is None
