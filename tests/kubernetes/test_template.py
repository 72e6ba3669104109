"""``fiberexec template``: the user's pod, what the settings say, and what must be, as a real cluster judges it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import services
from click.testing import CliRunner

from fiberexec.cli import main

yaml: Any = pytest.importorskip("yaml")
MINE = """
metadata: {labels: {team: red}}
spec:
  activeDeadlineSeconds: 500
  containers:
  - {name: worker, env: [{name: TEAM, value: red}]}
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("KUBECONFIG", services.require_kubernetes())
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(main, ["template", *arguments])


def test_the_pod_is_printed_and_the_cluster_has_taken_it_on_trial(
    run: Any, space: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.yaml").write_text(MINE)
    monkeypatch.setenv("FIBEREXEC_MEMORY", "1Gi")
    result = run("--image", "some/image:1", "--pod-template", "mine.yaml", "--namespace", space)
    assert result.exit_code == 0, result.output
    assert "the cluster takes it" in result.stderr
    pod = yaml.safe_load(result.stdout)
    assert pod["metadata"]["labels"]["team"] == "red" and pod["metadata"]["labels"]["fiberexec.job"]
    spec, [worker] = pod["spec"], pod["spec"]["containers"]
    assert (spec["restartPolicy"], spec["activeDeadlineSeconds"]) == ("Never", 500)
    assert (spec["enableServiceLinks"], spec["automountServiceAccountToken"]) == (False, False)
    assert worker["image"] == "some/image:1" and {"name": "TEAM", "value": "red"} in worker["env"]
    assert worker["resources"]["limits"] == {"memory": str(1 << 30)}


def test_what_the_cluster_refuses_is_said_with_what_to_do(run: Any, space: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("spec: {hostNetwork: true}")
    arguments = ["--image", "x", "--pod-template", "mine.yaml", "--namespace", space]
    result = run(*arguments)
    assert result.exit_code == 1
    assert "violates PodSecurity" in result.stderr and "leave out of pod_template" in result.stderr
    assert run(*arguments, "--no-check").exit_code == 0


def test_a_field_that_there_is_not_is_found_without_a_cluster_or_with_it(run: Any, space: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("kind: Deployment")
    assert "must be a Pod, not a Deployment" in run("--image", "x", "--pod-template", "mine.yaml").stderr
    (tmp_path / "mine.yaml").write_text("spec: {containers: [{name: worker, ports: x}]}")
    result = run("--image", "x", "--pod-template", "mine.yaml", "--namespace", space)
    assert result.exit_code == 1 and "correct what it names in pod_template=" in result.stderr
