"""What a program writes comes whole, though the way to it breaks: its container's or its pod's log, scripted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from fiberexec._cli import run_docker, run_kubernetes
from fiberexec._cli.run_base import Fate
from fiberexec._cli.run_docker import DockerPlace
from fiberexec._cli.run_kubernetes import KubernetesPlace
from fiberexec._errors import FiberError
from fiberexec.backends._docker_engine import Engine
from fiberexec.backends._kubernetes_api import ApiError

# -- a pod's log

RUNS: dict[str, Any] = {"running": {}}
ENDED: dict[str, Any] = {"terminated": {"exitCode": 3, "reason": "Error"}}


def stamped(second: int, text: str, zone: str = "Z") -> bytes:
    return f"2026-01-01T00:00:0{second}.00000000{second}{zone} {text}".encode()


class Cluster:
    """The API server's answers: states of the program's only container (the last one stays), and what each reading gives."""

    def __init__(self, states: list[dict[str, Any]], readings: list[Any]) -> None:
        self.states, self.readings = states, readings
        self.asked: list[tuple[str | None, float]] = []

    def pods(self, selector: str) -> list[dict[str, Any]]:
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        return [{"metadata": {"name": "p"}, "status": {"containerStatuses": [{"name": "worker", "state": state}]}}]

    def path(self, kind: str, name: str) -> str:
        return name

    def namespace(self) -> str:
        return "ns"

    def stream(self, path: str, query: dict[str, str], read: float, patience: float) -> Any:
        self.asked.append((query.get("sinceTime"), read))
        pieces = self.readings.pop(0)
        if isinstance(pieces, Exception):
            raise pieces
        if pieces == ["mute"]:
            raise ApiError(0, "", "ReadTimeoutError: Read timed out.", "") from silent()

        def stream(size: int, decode_content: bool) -> Iterator[bytes]:
            for piece in pieces:
                if isinstance(piece, Exception):
                    raise piece
                yield piece

        return SimpleNamespace(stream=stream, connection=None)


@pytest.fixture
def follow(monkeypatch: pytest.MonkeyPatch) -> Callable[[Cluster], tuple[Fate, bytes]]:
    monkeypatch.setattr(run_kubernetes, "_PAUSE", 0.0)

    def follow(cluster: Cluster) -> tuple[Fate, bytes]:
        place: Any = KubernetesPlace("ns")
        place.close()
        place._api = place._reader = cluster
        out: list[bytes] = []
        fate = place.follow("name", lambda descriptor, data: out.append(data))
        return fate, b"".join(out)

    return follow


def broken() -> Exception:
    import urllib3

    return urllib3.exceptions.ProtocolError("IncompleteRead")


def silent() -> Exception:
    import urllib3

    return urllib3.exceptions.ReadTimeoutError(None, "", "Read timed out.")  # type: ignore[arg-type]


@pytest.mark.parametrize("zone, since", [("Z", "2026-01-01T00:00:03Z"), ("+02:00", "2025-12-31T22:00:03Z")])
def test_a_node_may_be_in_any_zone(follow: Any, zone: str, since: str) -> None:
    one, two = stamped(8, "one\n", zone), stamped(9, "two\n", zone)
    cluster = Cluster([RUNS, ENDED], [[one], [one, two]])
    assert follow(cluster) == (Fate(3), b"one\ntwo\n")
    assert [asked for asked, _ in cluster.asked] == [None, since]  # some seconds earlier: see the next


def test_lines_that_stand_in_another_order_than_that_of_their_times_come_once(follow: Any) -> None:
    err, out, same = stamped(1, "err\n"), stamped(2, "out\n"), stamped(2, "same\n")
    assert follow(Cluster([RUNS, ENDED], [[out, err], [out, err]])) == (Fate(3), b"out\nerr\n")
    assert follow(Cluster([RUNS, ENDED], [[out], [out, err, same]])) == (Fate(3), b"out\nerr\nsame\n")
    long, late = [stamped(second, f"{second}\n") for second in range(1, 9)], stamped(7, "late\n")
    assert follow(Cluster([RUNS, ENDED], [long, [*long[3:], late]])) == (Fate(3), b"1\n2\n3\n4\n5\n6\n7\n8\nlate\n")


def test_a_log_that_breaks_off_when_the_program_has_ended_is_read_on(follow: Any) -> None:
    one, two = stamped(1, "one\n"), stamped(2, "two\n")
    assert follow(Cluster([ENDED], [[one, broken()], [broken()], [one, two]])) == (Fate(3), b"one\ntwo\n")


def test_a_log_that_stays_broken_is_a_failure_and_no_end(follow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_kubernetes, "_AWAY", 0.0)
    with pytest.raises(FiberError, match="reading the log of name"):
        follow(Cluster([ENDED], [[broken()] for _ in range(1000)]))


@pytest.mark.parametrize("code", [400, 404])
def test_a_program_whose_log_has_gone_has_an_end_all_the_same(follow: Any, code: int) -> None:
    evicted = {"terminated": {"exitCode": 137, "reason": "ContainerStatusUnknown", "message": "the container was not found"}}
    fate, out = follow(Cluster([evicted], [ApiError(code, "BadRequest", 'container "worker" is terminated', "")]))
    assert fate.code == 137 and "ContainerStatusUnknown: the container was not found" in fate.text and not out
    assert 'what else it wrote has gone with its container (container "worker" is terminated)' in fate.text


def test_who_may_not_read_a_log_is_told_so(follow: Any) -> None:
    with pytest.raises(FiberError, match="may not get pods/log"):
        refusal = 'pods "p" is forbidden: User "u" cannot get resource "pods/log"'
        follow(Cluster([ENDED], [ApiError(403, "Forbidden", refusal, "")]))


def test_a_line_that_is_cut_off_while_the_program_runs_comes_whole(follow: Any) -> None:
    one, two = stamped(1, "one\n"), stamped(2, "twenty-two\n")
    assert follow(Cluster([RUNS, ENDED], [[one, two[:-5]], [one, two]])) == (Fate(3), b"one\ntwenty-two\n")


def test_the_last_line_gets_no_end_that_it_does_not_have(follow: Any) -> None:
    assert follow(Cluster([ENDED], [[stamped(1, "one\n"), stamped(2, "two")]])) == (Fate(3), b"one\ntwo")


def test_a_program_that_says_nothing_for_long_has_not_failed_and_nothing_comes_twice(
    follow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = stamped(1, "one\n")
    cluster = Cluster([*[RUNS] * 19, ENDED], [["mute"]] * 10 + [[one, silent()] for _ in range(9)] + [[one]])
    monkeypatch.setattr(run_kubernetes, "_AWAY", -1.0)  # a failure that counts ends it
    assert follow(cluster) == (Fate(3), b"one\n")
    assert {read for _, read in cluster.asked} == {60.0}


# -- a container's log


class Docker:
    """The engine: what the readings of stdout give, each of which breaks if that ends with an exception."""

    def __init__(self, *readings: list[Any]) -> None:
        self.readings = list(readings)
        self.api = self

    def logs(self, name: str, stdout: bool, **_: Any) -> Iterator[bytes]:
        for piece in self.readings.pop(0) if stdout else ():
            if isinstance(piece, float):
                time.sleep(piece)
            elif isinstance(piece, Exception):
                raise piece
            else:
                yield piece

    def inspect_container(self, name: str) -> dict[str, Any]:
        return {"State": {"Running": False, "ExitCode": 3}}

    def wait(self, name: str, timeout: None) -> None:
        pass


def followed(monkeypatch: pytest.MonkeyPatch, docker: Docker) -> tuple[Fate, bytes]:
    place: Any = DockerPlace()
    place._engine = Engine(1)
    monkeypatch.setattr(place._engine, "client", lambda: docker)
    monkeypatch.setattr(run_docker, "_AGAIN", 0.01)
    out: list[bytes] = []
    fate = place.follow("name", lambda descriptor, data: out.append(data))
    return fate, b"".join(out)


def cut() -> Exception:
    return broken()  # as the SDK raises it


def test_an_engine_that_goes_after_long_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_docker, "_PATIENCE", 0.3)
    # Twice, each time for longer than it is waited for in vain: what came meanwhile counts.
    docker = Docker([b"one\n", 0.4, cut()], [b"one\ntwo\n", 0.4, cut()], [b"one\ntwo\nthree\n"])
    assert followed(monkeypatch, docker) == (Fate(3), b"one\ntwo\nthree\n")


def test_an_engine_that_stays_away_is_a_failure_and_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_docker, "_PATIENCE", 0.1)
    with pytest.raises(FiberError, match="no engine answers"):
        followed(monkeypatch, Docker(*[[cut()] for _ in range(1000)]))
