"""An engine that goes away under running containers, and comes back."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import services

from fiberexec import FiberExecutor, LaunchError

from .conftest import Engine, Place

SLEEP = "import time; print('up', flush=True); time.sleep(600)"

pytestmark = [
    pytest.mark.leaks("the engine is a child of the tests, and lives longer than one"),
    # Docker's SDK leaves the socket of a connection that is refused to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def there(own_engine: Engine, place: Callable[..., Place], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Place]]:
    monkeypatch.setenv("DOCKER_HOST", own_engine.url)
    if not own_engine.answers():
        own_engine.up()

    def make(**arguments: Any) -> Place:
        return place(**arguments)

    yield make
    if not own_engine.answers():
        own_engine.up()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_what_the_engine_ended_when_it_stopped_is_nobodys_fault(
    how: signal.Signals, own_engine: Engine, there: Callable[..., Place]
) -> None:
    place = there()
    job = place.start(1, SLEEP)
    place.says(job, "up")
    own_engine.down(how)
    assert place.ended == []  # nobody can know
    own_engine.up()
    exit = place.end(job, 60)
    assert exit.infrastructure and exit.reason == "EngineStopped"
    job = place.start(2, "raise SystemExit(3)")
    exit = place.end(job)
    assert not exit.infrastructure and exit.code == 3


def test_a_job_that_failed_while_the_engine_was_away_is_to_blame(own_engine: Engine, there: Callable[..., Place]) -> None:
    place = there()
    job = place.start(1, "import time; print('up', flush=True); time.sleep(1); raise SystemExit(5)")
    place.says(job, "up")
    own_engine.down(signal.SIGKILL)  # containers live on
    time.sleep(2)  # an end that nobody sees
    own_engine.up()
    exit = place.end(job, 60)
    assert exit.code == 5 and not exit.infrastructure


def test_a_start_while_the_engine_is_away_may_be_tried_again(own_engine: Engine, there: Callable[..., Place]) -> None:
    place = there()
    place.end(place.start(1, "pass"))
    own_engine.down()
    with pytest.raises(LaunchError, match="no engine answers at") as caught:
        place.start(2, "pass")
    assert not caught.value.final
    own_engine.up()
    assert place.end(place.start(3, "pass")).code == 0


def test_jobs_that_were_given_up_while_the_engine_was_away_are_gone_when_it_is_back(
    own_engine: Engine, there: Callable[..., Place]
) -> None:
    place = there()
    job = place.start(1, SLEEP)
    own_engine.down()
    place.backend.terminate([job])
    own_engine.up()
    place.end(job, 60)
    assert place.backend.list() == []


@pytest.fixture(scope="module")
def image_of_workers(own_engine: Engine) -> str:
    image = services.worker_image()
    own_engine.load(image)
    return image


@pytest.mark.timeout(180)
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_an_engine_that_restarts_under_an_executor_costs_no_task(
    how: signal.Signals, image_of_workers: str, own_engine: Engine, there: Callable[..., Place]
) -> None:
    image = image_of_workers
    with FiberExecutor(2, backend="docker", image=image, max_worker_losses=1) as ex:
        assert ex.submit(os.getenv, "USER").result() == "fiberexec"
        futures = [ex.submit(time.sleep, 3) for _ in range(4)]
        while not any(future.running() for future in futures):
            time.sleep(0.05)
        own_engine.down(how)
        own_engine.up()
        assert [future.result() for future in futures] == [None] * 4  # with one loss each at most: nobody was charged
