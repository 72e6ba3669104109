"""``fiberexec run --backend local``: programs as processes of this host, attached and detached."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from running import DEADLINE, WAITS, Runner

from fiberexec import _config
from fiberexec._cli.run_attach import attached, stoppable
from fiberexec._cli.run_base import Fate, Wanted
from fiberexec._cli.run_local import LocalPlace

PYTHON = sys.executable


@pytest.fixture
def fx(tmp_path: Path) -> Iterator[Runner]:
    runner = Runner(tmp_path)
    runner.program("waits.py", WAITS)
    yield runner
    for line in runner("ps", "--backend", "local").stdout.splitlines()[1:]:
        if not line.startswith("local-"):
            runner("kill", "--backend", "local", line.split()[0])


def run(*options: str) -> tuple[str, ...]:
    return "run", "--backend", "local", *options


def test_output_stays_on_its_streams_and_the_exit_code_is_passed_on(fx: Runner) -> None:
    fx.program("both.py", "import sys; print('out', *sys.argv[1:]); print('err', file=sys.stderr); sys.exit(7)")
    done = fx(*run(), PYTHON, "both.py", "a", "--backend", code=7)
    assert done.stdout == "out a --backend\n"
    assert done.stderr.endswith("err\n")


def test_what_is_for_programs_in_containers_is_said_to_be_left_out(fx: Runner) -> None:
    done = fx(*run("--cpu", "2", "--namespace", "x"), PYTHON, "-c", "print(1)", code=0)
    assert done.stdout == "1\n"
    assert "--cpu, --namespace: not for a program on this host" in done.stderr


def test_all_that_a_program_writes_comes_whole(fx: Runner) -> None:
    fx.program("much.py", "import sys\nfor n in range(200000): print(n, file=sys.stderr if n % 2 else sys.stdout)")
    done = fx(*run(), PYTHON, "much.py", code=0)
    assert done.stdout.splitlines() == [str(n) for n in range(0, 200000, 2)]
    assert done.stderr.splitlines()[1:] == [str(n) for n in range(1, 200000, 2)]


@pytest.mark.parametrize(
    "program, code",
    [
        ("import os; os.kill(os.getpid(), 9)", 128 + 9),
        ("import os; os.kill(os.getpid(), 15)", 128 + 15),
        ("raise SystemExit(0)", 0),
        ("1/0", 1),
    ],
)
def test_how_a_program_ends_is_told_as_a_shell_does(fx: Runner, program: str, code: int) -> None:
    fx(*run(), PYTHON, "-c", program, code=code)


def test_a_program_that_is_not_there_is_127_and_one_that_cannot_be_run_126(fx: Runner) -> None:
    assert "nowhere: No such file" in fx(*run(), "./nowhere", code=127).stderr
    fx.program("text", "")
    assert "text: Permission denied" in fx(*run(), "./text", code=126).stderr


def test_variables_and_settings_reach_the_program(fx: Runner) -> None:
    fx.program("fiberexec.toml", "max_workers = 3\nmemory = '512Mi'\n")
    fx.program(
        "env.py",
        "import os\nfrom fiberexec import _config\ns = _config.load()\n"
        "print(os.environ['A'], os.environ['B'], s.backend, s.max_workers, s.memory, dict(s.env))",
    )
    fx.env["B"] = "here"
    out = fx(*run("--env", "A=x=y", "--env", "B"), PYTHON, "env.py", code=0).stdout
    assert out == f"x=y here local 3 {512 * 2**20} {{'A': 'x=y', 'B': 'here'}}\n"


def test_executors_of_the_program_work(fx: Runner) -> None:
    fx.program("pool.py", "import fiberexec\nwith fiberexec.FiberExecutor(2) as ex: print(sum(ex.map(abs, range(-9, 9))))")
    assert fx(*run(), PYTHON, "pool.py", code=0).stdout == "81\n"


def test_options_that_are_meant_for_another_backend_do_not_reach_a_program_on_this_host(fx: Runner) -> None:
    fx.env |= {"FIBEREXEC_BACKEND": "kubernetes", "FIBEREXEC_BACKEND_OPTIONS": '{"namespace": "there"}'}
    fx.program("works.py", "from fiberexec import FiberExecutor as E\nwith E(1) as ex: print(ex.submit(abs, -1).result())")
    assert fx(*run(), PYTHON, "works.py", code=0).stdout == "1\n"


def test_without_a_terminal_ctrl_c_stops_the_program(fx: Runner) -> None:
    command = fx.begin(*run(), PYTHON, "waits.py")
    command.expect("up")
    command.interrupt()
    assert command.end(9) == "up\ninterrupted\n"


def test_a_signal_is_passed_on(fx: Runner) -> None:
    command = fx.begin(*run(), PYTHON, "waits.py")
    command.expect("up")
    command.process.send_signal(signal.SIGTERM)
    command.end(128 + 15)


class Waiting:
    """A program that ends when it gets a signal."""

    def __init__(self) -> None:
        self.followed, self.signals = threading.Event(), queue.SimpleQueue[int]()

    def follow(self, name: str, put: Any) -> Fate:
        self.followed.set()
        return Fate(128 + self.signals.get(timeout=DEADLINE))

    def signal(self, name: str, number: int) -> None:
        self.signals.put(number)


def test_a_signal_that_wakes_nobody_is_passed_on() -> None:
    """So it is with one that comes just before this thread begins to wait; here another thread takes it."""
    place: Any = Waiting()

    this = threading.get_ident()

    def send() -> None:
        place.followed.wait(DEADLINE)
        same, last = 0, 0
        while same < 20:  # it waits
            time.sleep(0.005)
            now = sys._current_frames()[this].f_lasti
            same, last = (same + 1 if now == last else 0), now
        os.kill(os.getpid(), signal.SIGTERM)

    other = threading.Thread(target=send)
    other.start()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        assert attached(place, "waits") == 128 + signal.SIGTERM
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        other.join()


def test_ctrl_c_asks_and_detaching_leaves_the_program_to_be_attached_again(fx: Runner) -> None:
    command = fx.begin(*run("--name", "lasting"), PYTHON, "waits.py", terminal=True)
    command.expect("up")
    command.interrupt()
    command.expect(r"\[d/s\]", error=True)
    command.answer("what?")
    command.expect(r"(?s)\[d/s\].*\[d/s\]", error=True)
    command.answer("d")
    command.expect("fiberexec attach lasting", error=True)
    command.end(0)
    again = fx.begin("attach", "lasting")
    again.expect("up")  # from its beginning
    again.interrupt()
    again.end(9)
    assert "there is no program 'lasting'" in fx("attach", "--backend", "local", "lasting", code=1).stderr


def test_ctrl_c_asks_and_stopping_interrupts_the_program(fx: Runner) -> None:
    command = fx.begin(*run(), PYTHON, "waits.py", terminal=True)
    command.expect("up")
    command.interrupt()
    command.expect(r"\[d/s\]", error=True)
    command.answer("s")
    assert command.end(9).endswith("interrupted\n")


def test_ctrl_c_instead_of_an_answer_stops_the_program(fx: Runner) -> None:
    command = fx.begin(*run(), PYTHON, "waits.py", terminal=True)
    command.expect("up")
    command.interrupt()
    command.expect(r"\[d/s\]", error=True)
    command.interrupt()
    assert command.end(9).endswith("interrupted\n")


def test_a_signal_instead_of_an_answer_is_passed_on(fx: Runner) -> None:
    command = fx.begin(*run(), PYTHON, "waits.py", terminal=True)
    command.expect("up")
    command.interrupt()
    command.expect(r"\[d/s\]", error=True)
    command.process.send_signal(signal.SIGTERM)
    command.end(128 + 15)


def test_the_second_ctrl_c_kills_a_program_that_does_not_stop(fx: Runner) -> None:
    deaf = "signal.signal(2, lambda *_: print('no', flush=True))"
    fx.program("deaf.py", f"import signal, time\n{deaf}\nprint('up', flush=True)\nwhile True: time.sleep(1)")
    command = fx.begin(*run(), PYTHON, "deaf.py")
    command.expect("up")
    command.interrupt()
    command.expect("no")
    command.interrupt()
    command.end(128 + 9)


def test_who_looks_on_gets_the_exit_code_too_though_another_was_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    place, other = LocalPlace(), LocalPlace()
    settings = _config.load(backend="local")
    place.start(Wanted("local", (PYTHON, "-c", "print(1); exit(3)"), "seen", {}, None, settings, settings), lambda text: None)

    def put(descriptor: int, data: bytes) -> None:
        until(lambda: not any(runs for _, runs, *_ in place.list()))
        other.remove("seen")

    assert place.follow("seen", put) == Fate(3)
    place.remove("seen")  # is done already


def test_a_terminal_that_goes_leaves_the_program_running(fx: Runner) -> None:
    command = fx.begin(*run("--name", "stays"), PYTHON, "waits.py")
    command.expect("up")
    command.process.send_signal(signal.SIGHUP)
    command.end(128 + signal.SIGHUP)
    assert "running" in fx("ps", "--backend", "local").stdout


def test_a_signal_while_a_program_starts_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    made: list[Any] = []

    class Popen(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            made.append(self)

    write = Path.write_text

    def interrupted(path: Path, text: str) -> int:
        if path.name == "pid":
            os.kill(os.getpid(), signal.SIGTERM)
        return write(path, text)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    monkeypatch.setattr(Path, "write_text", interrupted)
    settings = _config.load(backend="local")
    wanted = Wanted("local", (PYTHON, "-c", WAITS), "cut", {"SECRET": "x"}, None, settings, settings)
    with pytest.raises(SystemExit), stoppable():
        LocalPlace().start(wanted, print)
    assert not LocalPlace().has("cut") and not list((tmp_path / "fiberexec" / "run").iterdir())
    assert os.waitstatus_to_exitcode(os.waitpid(made[0].pid, 0)[1]) == 128 + signal.SIGKILL  # of the program


def test_detached_programs_are_seen_by_ps_logs_and_kill(fx: Runner) -> None:
    assert fx(*run("--detach", "--name", "apart"), PYTHON, "waits.py", code=0).stdout == "apart\n"
    until(lambda: "up" in fx("logs", "apart", "--backend", "local", code=0).stdout)
    (line,) = [line for line in fx("ps", "--backend", "local").stdout.splitlines() if line.startswith("apart ")]
    assert "running" in line and "waits.py" in line
    fx("kill", "--backend", "local", "apart", code=0)
    assert "apart" not in fx("ps", "--backend", "local").stdout


def test_the_end_of_a_detached_program_is_kept_until_it_is_seen(fx: Runner) -> None:
    fx(*run("--detach", "--name", "over"), PYTHON, "-c", "print('done'); raise SystemExit(5)", code=0)
    until(lambda: "exited" in fx("ps", "--backend", "local").stdout)
    assert fx("attach", "over", code=5).stdout == "done\n"
    assert "over" not in fx("ps", "--backend", "local").stdout


def test_killing_a_program_takes_its_workers_along(fx: Runner) -> None:
    fx.program(
        "workers.py",
        "import os, time, fiberexec\nex = fiberexec.FiberExecutor(2)\n"
        "print(*{f.result() for f in [ex.submit(os.getpid) for _ in range(9)]}, flush=True)\ntime.sleep(1000)",
    )
    command = fx.begin(*run("--name", "crew"), PYTHON, "workers.py")
    command.expect(r"\d\n")
    pids = [int(word) for word in command.out.split()]
    fx("kill", "--backend", "local", "crew", code=0)
    command.process.wait(DEADLINE)
    command.close()
    until(lambda: not any(map(exists, pids)))


def test_what_is_wrong_with_the_command_line_is_said(fx: Runner) -> None:
    for options, text in [
        (("--name", "No_Name"), "--name must be of a-z"),
        (("--env", "NOWHERE_TO_BE_FOUND"), "there is no such variable"),
        (("--env", "=x"), "--env must be NAME=VALUE"),
        (("--volume", "here"), "--volume must be SOURCE:FOLDER"),
        (("--volume", "/data:/data"), "--volume: a program on this host sees its folders where they are"),
        (("--memory", "much"), "memory must be an int"),
        (("--attach", "--detach"), "exclude each other"),
    ]:
        assert text in fx(*run(*options), "true").stderr
    fx(*run("--detach", "--name", "twice"), PYTHON, "waits.py", code=0)
    assert "already: give another --name" in fx(*run("--name", "twice"), "true", code=1).stderr


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def until(holds: object) -> None:
    assert callable(holds)
    end = time.monotonic() + DEADLINE
    while not holds():
        assert time.monotonic() < end, "it never came to hold"
        time.sleep(0.05)
