"""The command: ``doctor``, on this host and with jobs that are processes of this host."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import fiberexec
from fiberexec import _config
from fiberexec import _messages as messages
from fiberexec._cli import doctor, job_checks, probe
from fiberexec._cli.listener import Listening
from fiberexec.cli import main
from fiberexec.testing._agents import AgentBackend

URLS = ["tls+tcp://10.0.0.1:4711", "tls+tcp://host.example:4711"]
HOSTS = ("10.0.0.1", "host.example")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def examine(*arguments: str, exit_code: int = 0) -> dict[str, dict[str, str]]:
    result = CliRunner().invoke(main, ["doctor", "--json", *arguments])
    assert "Traceback" not in result.output
    answer = json.loads(result.stdout)
    assert result.exit_code == exit_code, answer
    assert set(answer) == {"ok", "findings"} and answer["ok"] is (exit_code == 0)
    for finding in answer["findings"]:
        assert list(finding) == ["check", "status", "found", "remedy"]
        assert finding["status"] in ("ok", "warning", "broken", "skipped")
    return {finding["check"]: finding for finding in answer["findings"]}


def test_this_host_is_examined() -> None:
    found = examine()
    for check in ("python", "settings", "temporary files", "local workers", "encryption", "dill", "pynng", "cryptography"):
        assert found[check]["status"] == "ok", found[check]
    assert sys.executable in found["python"]["found"]


def test_the_report_is_for_people_too() -> None:
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 0, result.output
    assert "ok       encryption: " in result.stdout


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def without_dill(name: str) -> str:
        if name == "dill":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_dill)
    found = examine(exit_code=1)
    assert found["dill"]["status"] == "broken"
    assert found["dill"]["remedy"].startswith(f'{sys.executable} -m pip install "dill')
    assert found["encryption"]["status"] == "skipped"


def test_a_package_that_is_too_old_or_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._package("dill>=0.3.8").status == "ok"
    assert doctor._package("dill >= 999, <1000").status == "broken"
    assert "--upgrade" in doctor._package("dill>=999").remedy
    monkeypatch.setitem(sys.modules, "dill", None)
    finding = doctor._package("dill>=0.3.8")
    assert finding.status == "broken" and "cannot be imported" in finding.found


@pytest.mark.parametrize(("backend", "status"), [("docker", "broken"), ("local", "skipped")])
def test_an_extra_is_needed_by_its_backend_alone(backend: str, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_any(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", without_any)
    found = {finding.check: finding for finding in doctor._extras(backend)}
    assert found["docker"].status == status
    assert found["docker"].remedy.endswith('pip install "fiberexec[docker]"')
    assert found["kubernetes"].status == "skipped"


def test_wrong_settings_are_a_finding_among_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIBEREXEC_CPU", "many")
    found = examine(exit_code=1)
    assert found["settings"]["status"] == "broken" and "FIBEREXEC_CPU" in found["settings"]["found"]
    assert found["encryption"]["status"] == "ok"


def test_a_handshake_that_fails_is_broken_encryption(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Listening.told

    def with_keys_of_another(self: Listening, *arguments: Any, **named: Any) -> bytes:
        credentials = json.loads(told(self, *arguments, **named))
        certificate, key = doctor_authority.certificate("doctor")
        return json.dumps({**credentials, "certificate": certificate, "key": key}).encode()

    from fiberexec._tls import Authority

    doctor_authority = Authority()
    monkeypatch.setattr(Listening, "told", with_keys_of_another)
    finding = doctor._handshake()
    assert finding.status == "broken"
    assert finding.remedy


def test_a_probe_that_says_nothing_is_reported_with_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "source", lambda: "raise SystemExit('no such luck')")
    finding = doctor._handshake()
    assert finding.status == "broken" and "no such luck" in finding.found


def test_a_task_that_never_ends_is_a_finding() -> None:
    executor = fiberexec.FiberExecutor(1, backend="local")
    executor.submit(time.sleep, 1000)
    with pytest.raises(fiberexec.FiberError, match=r"no result after 0\.2 seconds"):
        doctor.run_task(executor, 0.2)


def test_what_cannot_be_listened_on_is_an_error_that_says_so() -> None:
    with pytest.raises(OSError, match=r"192\.0\.2\.7"):
        Listening("192.0.2.7")


def test_a_report_is_found_among_other_lines() -> None:
    line = f'{probe.MARK}{{"time": 1}}'
    assert doctor.reported(f"warning: x\n2026-01-01T00:00:00 {line}\nbye") == {"time": 1}
    assert doctor.reported(line[:-3]) is None
    assert doctor.reported("") is None


# -- jobs elsewhere


def test_jobs_are_examined_through_the_protocol_alone() -> None:
    found = examine("--backend", "agents")
    for check in ("agents", "image", "image's fiberexec", "route", "clock", "link", "task"):
        assert found[check]["status"] == "ok", found[check]


def test_a_backend_that_is_unknown_is_a_finding() -> None:
    found = examine("--backend", "dockr", exit_code=1)
    assert found["dockr"]["status"] == "broken" and "docker" in found["dockr"]["found"]


def test_a_job_that_cannot_reach_this_host_is_told_what_to_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AgentBackend, "reach", lambda self, port, program: ("127.0.0.1:1",))
    found = examine("--backend", "agents", exit_code=1)
    assert found["route"]["status"] == "broken"
    assert "127.0.0.1:1" in found["route"]["found"] and "firewall" in found["route"]["remedy"]
    assert found["link"]["status"] == found["task"]["status"] == "skipped"


def test_a_job_that_ends_at_once_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIBEREXEC_BACKEND", "agents")
    monkeypatch.setenv("FIBEREXEC_BACKEND_OPTIONS", '{"python": "/bin/false"}')
    found = examine(exit_code=1)
    assert found["job"]["status"] == "broken" and "exit code 1" in found["job"]["found"]


def test_a_backend_that_cannot_be_reached_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(self: AgentBackend) -> Any:
        raise fiberexec.LaunchError("nobody there: knock louder")

    monkeypatch.setattr(AgentBackend, "list", away)
    found = examine("--backend", "agents", exit_code=1)
    assert found["agents"]["found"] == "nobody there: knock louder"
    assert found["job"]["status"] == "skipped"


def test_a_defect_of_a_backend_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def defect(self: AgentBackend) -> Any:
        raise KeyError("unexpected")

    monkeypatch.setattr(AgentBackend, "__init__", lambda self, settings, max_workers=None: defect(self))
    found = examine("--backend", "agents", exit_code=1)
    assert "KeyError" in found["agents"]["found"]


def judged(**changes: Any) -> dict[str, doctor.Finding]:
    now = time.time()
    report = {
        "time": now, "python": list(sys.version_info[:3]), "user": 1000, "fiberexec": fiberexec.__version__,
        "protocol": messages.VERSION, "routes": dict.fromkeys(URLS, ""), "tls": "", **changes,
    }  # fmt: skip
    settings = _config.Settings(backend="docker", image="lab:3")
    return {finding.check: finding for finding in job_checks._judged(report, now - 1, now + 1, URLS, settings, HOSTS)}


def test_a_good_report_has_nothing_to_say() -> None:
    assert {finding.status for finding in judged().values()} == {"ok"}


@pytest.mark.parametrize(("seconds", "status"), [(30, "ok"), (-120, "warning"), (3600, "warning"), (-90000, "broken")])
def test_clocks_may_differ_by_less_than_a_day(seconds: float, status: str) -> None:
    finding = judged(time=time.time() + seconds)["clock"]
    assert finding.status == status
    assert (finding.remedy == "") is (status == "ok")


def test_versions_must_fit() -> None:
    assert judged(python=[3, 9, 1])["image"].status == "broken"
    assert "lab:3" in judged(python=[3, 9, 1])["image"].found
    assert judged(fiberexec="0.0.1")["image's fiberexec"].status == "warning"
    assert judged(protocol=messages.VERSION + 1)["image's fiberexec"].status == "broken"


def test_one_route_is_enough() -> None:
    found = judged(routes={URLS[0]: "no route to host", URLS[1]: ""})
    assert found["route"].status == "ok" and "host.example" in found["route"].found
    found = judged(routes=dict.fromkeys(URLS, "no route to host"))
    assert found["route"].status == "broken" and "10.0.0.1" in found["route"].found


def test_the_way_to_this_host_is_named() -> None:
    assert "directly: 10.0.0.1" in judged()["route"].found
    by_way = "tls+tcp://10.244.0.9:4711"
    found = {
        finding.check: finding
        for finding in job_checks._judged(
            {
                "time": 0.0, "python": list(sys.version_info[:3]), "fiberexec": fiberexec.__version__,
                "protocol": messages.VERSION, "routes": {by_way: ""}, "tls": "",
            },
            0.0, 0.0, [by_way], _config.Settings(backend="kubernetes"), ("127.0.0.1",),
        )
    }  # fmt: skip
    assert "by an outpost" in found["route"].found and "10.244.0.9" in found["route"].found


def test_a_link_that_fails_is_broken() -> None:
    assert judged(tls="no handshake within 5 seconds")["link"].status == "broken"
