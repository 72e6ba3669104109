"""``fiberexec run --backend docker``, with a real engine: a program in a container, its workers in others."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from running import DEADLINE, EXAMPLES, PI, PI_PATH, WORKS, Runner, until
from services import bare_image, require_docker, worker_image

from fiberexec import ConfigError, _config
from fiberexec._cli.run_base import Wanted
from fiberexec._cli.run_docker import DockerPlace

pytestmark = pytest.mark.timeout(400)  # the first one may have to make an image


@pytest.fixture(scope="module")
def image() -> str:
    require_docker()
    return worker_image(None, "docker")


@pytest.fixture
def fx(tmp_path: Path, image: str) -> Iterator[Runner]:
    runner = Runner(tmp_path, FIBEREXEC_IMAGE=image)
    runner.program("works.py", WORKS)
    yield runner
    for one in docker("ps", "-aq", "--filter", "label=fiberexec.role=driver", "--filter", "name=run-test-").split():
        docker("rm", "-f", one)


def run(*options: str) -> tuple[str, ...]:
    return "run", "--backend", "docker", *options


def docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def family(name: str) -> list[str]:
    """The containers of a program and of its workers."""
    rows = docker("ps", "-a", "--format", '{{.Names}} {{.Label "fiberexec.driver"}}').splitlines()
    return [row.split()[0] for row in rows if row.endswith(f"@{name}")]


def test_the_program_runs_with_its_code_and_its_exit_code_comes_back(fx: Runner) -> None:
    fx.program(
        "sub/main.py", "import sys, helper; print(helper.text(), *sys.argv[1:]); print('err', file=sys.stderr); sys.exit(7)"
    )
    fx.program("sub/helper.py", "def text(): return open('sub/data.txt').read()")
    fx.program("sub/data.txt", "data")
    done = fx(*run("--name", "run-test-code", "--env", "A=1"), "python3", "sub/main.py", "x", code=7)
    assert done.stdout == "data x\n"
    assert "err\n" in done.stderr
    assert not family("run-test-code")


def test_the_same_table_as_locally(fx: Runner) -> None:
    fx.program("code_metrics.py", (EXAMPLES / "code_metrics.py").read_text())
    fx.program("subject/a.py", "def f(x):\n    return x if x else [y for y in x]\n" * 20)
    fx.program("subject/b.py", (EXAMPLES / "code_metrics.py").read_text())
    options = ("code_metrics.py", "--no-serial", "--workers", "2", "--path")
    volume = ("--volume", "./subject:/subject:ro")  # of the program and of its workers
    there = fx(*run("--name", "run-test-table", *volume), "python3", *options, "/subject", code=0).stdout
    here = fx("run", "--backend", "local", sys.executable, *options, "subject", code=0).stdout
    assert there.splitlines()[:-1] == here.splitlines()[:-1]
    assert not family("run-test-table")


def test_the_ancestors_command_works_with_a_dockerfile_like_the_ancestors(fx: Runner) -> None:
    image = fx.env.pop("FIBEREXEC_IMAGE")
    fx.program("examples/pi_estimation.py", PI)
    fx.program("Dockerfile", f"FROM {image}\nADD examples/pi_estimation.py {PI_PATH}\n")
    fx.env["FIBEREXEC_BACKEND"] = "docker"
    assert fx("run", "-a", "python3", PI_PATH, code=0).stdout.startswith("Pi is roughly 3.1")


KILLS = """
import os
for pid in filter(str.isdecimal, os.listdir("/proc")):
    if open(f"/proc/{pid}/cmdline").read().startswith("python3\\0works.py"):
        os.kill(int(pid), 9)
"""


def test_only_the_program_has_the_engines_socket_and_nothing_secret_is_to_be_seen(fx: Runner) -> None:
    command = fx.begin(*run("--name", "run-test-secret", "--env", "TOKEN=hush-hush"), "python3", "works.py")
    command.expect("up")
    told = json.loads(docker("inspect", *family("run-test-secret")))
    assert len(told) == 3
    assert "hush-hush" not in json.dumps(told)
    sockets = {each["Name"]: [m["Destination"] for m in each["Mounts"]] for each in told}
    assert sockets.pop("/run-test-secret") == ["/var/run/docker.sock"]
    assert set(map(tuple, sockets.values())) == {()}
    for each in told:
        assert each["HostConfig"]["CapDrop"] == ["ALL"]
        assert "no-new-privileges" in each["HostConfig"]["SecurityOpt"]
    command.interrupt()
    assert command.process.wait(DEADLINE) == 130
    command.close()
    assert not family("run-test-secret")


def test_a_program_that_is_killed_takes_its_workers_along(fx: Runner) -> None:
    command = fx.begin(*run("--name", "run-test-killed"), "python3", "works.py")
    command.expect("up")
    docker("exec", "run-test-killed", "python3", "-c", KILLS)
    command.end(137)
    assert not family("run-test-killed")


def test_detach_attach_and_files(fx: Runner, tmp_path: Path) -> None:
    assert fx(*run("--detach", "--name", "run-test-apart"), "python3", "works.py", code=0).stdout == "run-test-apart\n"
    until(lambda: "up" in fx("logs", "--backend", "docker", "run-test-apart", code=0).stdout)
    (tmp_path / "in.txt").write_text("in")
    fx("cp", "in.txt", "run-test-apart:", code=0)
    fx("cp", "run-test-apart:in.txt", "out.txt", code=0)
    assert (tmp_path / "out.txt").read_text() == "in"
    fx("cp", "run-test-apart:.", "folder", code=0)
    assert (tmp_path / "folder" / "works.py").read_text() == WORKS
    (tmp_path / "out.txt").unlink()
    fx("cp", "in.txt", "run-test-apart:new/folder/", code=0)
    fx("cp", "run-test-apart:new/folder/in.txt", "out.txt", code=0)
    assert (tmp_path / "out.txt").read_text() == "in"
    assert "no file or folder /fiberexec-run/code/nowhere" in fx("cp", "run-test-apart:nowhere", ".", code=1).stderr
    assert "run-test-apart" in fx("ps", "--backend", "docker").stdout
    again = fx.begin("attach", "--backend", "docker", "run-test-apart")
    again.expect("up")
    again.interrupt()
    again.end(130)
    assert not family("run-test-apart")


def test_a_link_is_copied_as_what_it_means(fx: Runner, tmp_path: Path) -> None:
    fx.program("links.py", f"import os\nopen('file', 'w').write('text')\nos.symlink(os.path.abspath('file'), 'link')\n{WORKS}")
    fx(*run("--detach", "--name", "run-test-link"), "python3", "links.py", code=0)
    until(lambda: "up" in fx("logs", "--backend", "docker", "run-test-link", code=0).stdout)
    fx("cp", "run-test-link:link", ".", code=0)
    assert not (tmp_path / "link").is_symlink() and (tmp_path / "link").read_text() == "text"
    fx("kill", "--backend", "docker", "run-test-link", code=0)
    until(lambda: not family("run-test-link"))


def test_a_signal_while_a_container_is_made_leaves_nothing_but_anothers(
    fx: Runner, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from docker.api.container import ContainerApiMixin  # type: ignore[import-untyped]

    create = ContainerApiMixin.create_container

    def interrupted(*arguments: Any, **named: Any) -> Any:
        threading.Timer(0.5, create, arguments, named).start()
        raise SystemExit(143)  # before the engine has made it

    settings = _config.load(backend="docker", image=image)
    wanted = Wanted("docker", ("true",), "run-test-cut", {}, None, settings, settings)
    place = DockerPlace()
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(ContainerApiMixin, "create_container", interrupted)
        place.start(wanted, print)
    assert not family("run-test-cut")
    docker("create", "--name", "run-test-cut", "--label", "fiberexec.role=driver", image)
    with pytest.raises(ConfigError, match="already: give another --name"):
        place.start(wanted, print)
    assert docker("ps", "-aq", "--filter", "name=run-test-cut")
    place.close()


def test_kill_ends_program_and_workers(fx: Runner) -> None:
    command = fx.begin(*run("--name", "run-test-kill"), "python3", "works.py")
    command.expect("up")
    fx("kill", "--backend", "docker", "run-test-kill", code=0)
    until(lambda: not family("run-test-kill"))
    command.process.wait(DEADLINE)
    command.close()


def test_more_memory_than_allowed_is_told(fx: Runner) -> None:
    fx.program("hungry.py", "x = bytearray(400 << 20)")
    done = fx(*run("--memory", "100", "--name", "run-test-memory"), "python3", "hungry.py", code=137)
    assert "took more memory than it may" in done.stderr


def test_what_an_image_lacks_is_said(fx: Runner) -> None:
    fx.env["FIBEREXEC_IMAGE"] = bare_image()
    done = fx(*run("--name", "run-test-bare"), "python3", "works.py")
    assert done.returncode == 1
    assert "has no fiberexec" in done.stderr and "pip install" in done.stderr
