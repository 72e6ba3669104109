"""``fiberexec run``: the same flags, output, exit codes and signals on this host, in a container and in a cluster."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import clusters
import pytest
from running import WAITS, Runner, Running, until
from services import cluster_image, require_docker, require_kubernetes, worker_image

from fiberexec import _platform

pytestmark = pytest.mark.timeout(400)  # the first one may have to make an image
_numbers = itertools.count(1)


@dataclass
class Place:
    """Where programs run."""

    backend: str
    fx: Runner
    python: str = "python3"
    names: list[str] = field(default_factory=list)  # of programs that may still run

    def run(self, *arguments: str, code: int) -> tuple[str, str]:
        """(stdout, stderr) of a program that has this exit code."""
        done = self.fx("run", "--backend", self.backend, *arguments, code=code)
        return done.stdout, done.stderr

    def begin(self, *arguments: str, terminal: bool = False) -> Running:
        """Start what waits, and wait until it does."""
        name = () if "--name" in arguments else ("--name", self.new_name())
        options = "--backend", self.backend, *name, *arguments
        command = self.fx.begin("run", *options, self.python, "waits.py", terminal=terminal)
        command.expect("up")
        return command

    def detach(self, *arguments: str) -> str:
        """Start it without staying; its name."""
        name = self.new_name()
        out, _ = self.run("--detach", "--name", name, *arguments, code=0)
        assert out == f"{name}\n"
        return name

    def new_name(self) -> str:
        self.names.append(f"place-{os.getpid()}-{next(_numbers)}")
        return self.names[-1]

    def ask(self, command: str, *arguments: str, code: int = 0) -> str:
        done = self.fx(command, "--backend", self.backend, *arguments, code=code)
        return done.stderr if code else done.stdout

    def states(self) -> dict[str, str]:
        """What ps says of programs."""
        rows = json.loads(self.ask("ps", "--json"))["jobs"]
        return {row["id"]: row["state"] for row in rows if row["role"] == "program"}


@pytest.fixture(scope="module")
def space() -> Iterator[str]:
    with clusters.namespace("privileged") as name:
        yield name


@pytest.fixture(params=["local", "docker", "kubernetes"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    found = Place(request.param, Runner(tmp_path))
    if found.backend == "local":
        found.python = sys.executable
    elif found.backend == "docker":
        require_docker()
        found.fx.env["FIBEREXEC_IMAGE"] = worker_image(None, "docker")
    else:
        found.fx.env["KUBECONFIG"] = require_kubernetes()
        found.fx.env["FIBEREXEC_IMAGE"] = cluster_image(worker_image(None, "kubernetes"))
        found.fx.env["FIBEREXEC_BACKEND"] = "kubernetes"
        found.fx.env["FIBEREXEC_BACKEND_OPTIONS"] = json.dumps({"namespace": request.getfixturevalue("space")})
    found.fx.program("waits.py", WAITS)
    yield found
    for name in set(found.states()).intersection(found.names) if found.names else ():
        found.fx("kill", "--backend", found.backend, name)


def test_output_and_exit_code_come_here_and_arguments_go_there(place: Place) -> None:
    place.fx.program("both.py", "import sys; print('out', *sys.argv[1:]); print('err', file=sys.stderr); sys.exit(7)")
    out, err = place.run(place.python, "both.py", "a", "--backend", code=7)
    if place.backend == "kubernetes":  # a pod's log is one
        assert sorted(out.splitlines()) == ["err", "out a --backend"]
    else:
        assert out == "out a --backend\n"
        assert err.endswith("err\n")


def test_long_lines_come_whole(place: Place) -> None:
    letter = "o" if place.backend == "docker" else "ö"  # an engine spoils letters at which it cuts lines: docs/run.md
    place.fx.program("long.py", f"a = '{letter}'\nprint(a * 20_000); print('a' + a * 20_000); print(a * 3_000_000, end='')")
    out, _ = place.run(place.python, "long.py", code=0)
    assert out == f"{letter * 20_000}\na{letter * 20_000}\n{letter * 3_000_000}"


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (("-c", "import os; os.kill(os.getpid(), 15)"), 128 + 15),
        (("-c", "1/0"), 1),
        (("nowhere.py",), 2),
    ],
)
def test_how_a_program_ends_is_told_as_a_shell_does(place: Place, command: tuple[str, ...], code: int) -> None:
    place.run(place.python, *command, code=code)


def test_a_program_that_is_not_there_is_127(place: Place) -> None:
    assert "nowhere: No such file" in "".join(place.run("./nowhere", code=127))


def test_variables_and_settings_reach_the_program(place: Place) -> None:
    place.fx.program("fiberexec.toml", "max_workers = 3\nmemory = '512Mi'\n")
    place.fx.program(
        "env.py",
        "import os\nfrom fiberexec import _config\ns = _config.load()\n"
        "print(os.environ['A'], os.environ['B'], s.backend, s.max_workers, s.memory, dict(s.env))",
    )
    place.fx.env["B"] = "here"
    out, _ = place.run("--env", "A=x=y", "--env", "B", place.python, "env.py", code=0)
    assert out == f"x=y here {place.backend} 3 {512 * 2**20} {{'A': 'x=y', 'B': 'here'}}\n"


def test_what_the_program_starts_and_what_that_starts_run_in_the_same_kind_of_place(place: Place) -> None:
    place.fx.program(
        "pool.py",
        "import platform, fiberexec\n"
        "def nodes(levels):\n"
        "    with fiberexec.FiberExecutor(1) as ex:\n"
        "        return [platform.node(), *(ex.submit(nodes, levels - 1).result() if levels else ())]\n"
        "print(len(set(nodes(2))))",
    )
    out, _ = place.run(place.python, "pool.py", code=0)
    assert out == f"{1 if place.backend == 'local' else 3}\n"


def test_without_a_terminal_ctrl_c_stops_the_program(place: Place) -> None:
    command = place.begin()
    command.interrupt()
    assert command.end(9) == "up\ninterrupted\n"


def test_a_signal_is_passed_on(place: Place) -> None:
    command = place.begin()
    command.process.send_signal(signal.SIGTERM)
    command.end(128 + 15)


def test_ctrl_c_asks_once_and_a_program_that_is_left_can_be_attached_again(place: Place) -> None:
    name = place.new_name()
    command = place.begin("--name", name, terminal=True)
    command.interrupt()
    command.expect(r"\[d/s\]", error=True)
    command.answer("d")
    command.expect(f"fiberexec attach {name}", error=True)
    command.end(0)
    again = place.fx.begin("attach", "--backend", place.backend, name, terminal=True)
    again.expect("up")  # from its beginning
    again.interrupt()
    again.expect(r"\[d/s\]", error=True)
    again.answer("s")
    assert again.end(9).endswith("interrupted\n")
    assert f"there is no program '{name}'" in place.ask("attach", name, code=1)


def test_the_second_ctrl_c_kills_a_program_that_does_not_stop(place: Place) -> None:
    deaf = "signal.signal(2, lambda *_: print('no', flush=True))"
    place.fx.program("waits.py", f"import signal, time\n{deaf}\nprint('up', flush=True)\nwhile True: time.sleep(1)")
    command = place.begin()
    command.interrupt()
    command.expect("no")
    command.interrupt()
    command.end(128 + 9)


def test_a_terminal_that_goes_leaves_the_program_running(place: Place) -> None:
    name = place.new_name()
    command = place.begin("--name", name)
    command.process.send_signal(signal.SIGHUP)
    command.end(128 + signal.SIGHUP)
    assert place.states()[name] == "running"


def test_detached_programs_are_seen_by_ps_and_logs_and_ended_by_kill(place: Place) -> None:
    name = place.detach(place.python, "waits.py")
    until(lambda: "up" in place.ask("logs", name))
    assert json.loads(place.ask("logs", "--json", name).splitlines()[0]) == {"job": name, "line": "up"}
    (line,) = [line for line in place.ask("ps").splitlines() if line.startswith(f"{name} ")]
    assert "running" in line and f" {_platform.user_name(os.getuid())} " in line
    follow = place.fx.begin("logs", "-f", "--backend", place.backend, name)
    follow.expect("up")
    place.ask("kill", name)
    follow.end(0, 1)  # 1: it was gone before its log had ended
    until(lambda: name not in place.states())


def test_the_end_of_a_detached_program_is_kept_until_it_is_seen(place: Place) -> None:
    name = place.detach(place.python, "-c", "print('done'); raise SystemExit(5)")
    until(lambda: place.states()[name] in ("exited", "failed"))
    assert place.fx("attach", name, code=5).stdout == "done\n"
    until(lambda: name not in place.states())


def test_a_name_that_is_taken_is_an_error(place: Place) -> None:
    name = place.detach(place.python, "waits.py")
    assert "already: give another --name" in place.run("--name", name, "true", code=1)[1]


def test_only_what_is_named_is_sent(place: Place) -> None:
    if place.backend == "local":
        pytest.skip("nothing is sent")
    place.fx.program("data/one.txt", "one")
    place.run("--ship", "", place.python, "waits.py", code=2)  # its folder, by default
    look = "import os; print(sorted(os.listdir()), open('data/one.txt').read())"
    assert place.run("--ship", "data", place.python, "-c", look, code=0)[0] == "['data'] one\n"
