"""Jobs as containers of a real Docker engine: what they are given, what they can do, how their ends are told."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import services

from fiberexec import FiberError
from fiberexec.backends.base import JobBackend

from .conftest import Place, docker, eventually

SLEEP = "import time; print('up', flush=True); time.sleep(600)"
STDIN = "import sys; print(len(sys.stdin.buffer.read()))"
SECRET = b"no-one-may-read-this"


def test_it_is_a_job_backend(place: Callable[..., Place]) -> None:
    assert isinstance(place().backend, JobBackend)


@pytest.mark.parametrize("size", [0, 1, 5_000, 300_000])
def test_credentials_reach_a_job_through_its_stdin(size: int, place: Callable[..., Place]) -> None:
    one = place()
    assert one.end(one.start(1, STDIN, b"x" * size)).log == f"{size}\n"


def test_credentials_and_settings_are_nowhere_to_be_read(place: Callable[..., Place]) -> None:
    one = place(env={"TOKEN": SECRET.decode()})
    job = one.start(1, SLEEP, SECRET)
    assert SECRET.decode() not in docker("inspect", job) + docker("top", job) + docker("logs", job)


def test_a_container_has_no_privileges(place: Callable[..., Place]) -> None:
    one = place()
    code = (
        "import os; print(os.getuid(), os.getgid()); print([line.split() for line in open('/proc/self/status') "
        "if line.startswith(('CapEff', 'CapBnd', 'NoNew'))]); print(open('/proc/1/comm').read().strip(), os.listdir('/run'))"
    )
    ids, status, first = one.end(one.start(1, code)).log.splitlines()
    assert "0" not in ids.split()
    assert status == "[['CapEff:', '0000000000000000'], ['CapBnd:', '0000000000000000'], ['NoNewPrivs:', '1']]"
    assert "init" in first  # it passes SIGTERM on, and reaps
    assert "docker.sock" not in first


def test_a_container_of_an_image_of_roots_works_for_somebody_else(place: Callable[..., Place]) -> None:
    one = place()
    code = "import getpass, pathlib, tempfile; print(getpass.getuser(), pathlib.Path.home()); open('x', 'w')"
    exit = one.end(one.start(1, code))
    assert (exit.code, exit.log) == (0, "fiberexec /tmp\n")


@pytest.fixture(scope="module")
def image_with_user() -> Iterator[str]:
    base = services.bare_image()
    import subprocess

    name = "fiberexec-test/with-user:1"
    text = f'FROM {base}\nUSER 1234:99\nWORKDIR /var\nENTRYPOINT ["echo"]\n'
    subprocess.run(
        ["docker", "build", "-q", "-t", name, "-"], input=text, text=True, check=True, timeout=100, capture_output=True
    )
    yield name
    docker("image", "rm", "-f", name)


IDS = "import os; print(os.getuid(), os.getgid(), os.getcwd())"


def test_an_images_own_user_and_folder_are_kept_and_its_entrypoint_is_not(
    image_with_user: str, place: Callable[..., Place]
) -> None:
    one = place(image=image_with_user)
    assert one.end(one.start(1, IDS)).log == "1234 99 /var\n"


@pytest.mark.parametrize(
    ("options", "log"),
    [
        ({"user": "root"}, "0 0 /var\n"),
        ({"user": "7:8", "working_dir": "/usr"}, "7 8 /usr\n"),
        ({"user": 7, "entrypoint": ["sh", "-c", 'cd /etc && exec "$@"', "-"]}, "7 0 /etc\n"),
        ({"entrypoint": None}, "python -c import os; print(os.getuid(), os.getgid(), os.getcwd())\n"),
        ({"python": "python3"}, "1234 99 /var\n"),
    ],
)
def test_options_beat_what_the_image_says(
    options: dict[str, object], log: str, image_with_user: str, place: Callable[..., Place]
) -> None:
    one = place(image=image_with_user, backend_options=options)
    assert one.end(one.start(1, IDS)).log == log


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("pass", 0),
        ("raise SystemExit(3)", 3),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", -11),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9),
    ],
)
def test_an_end_is_told_as_it_was(code: str, expected: int, place: Callable[..., Place]) -> None:
    one = place()
    exit = one.end(one.start(1, code))
    assert (exit.code, exit.reason, exit.infrastructure) == (expected, "", False)


def test_the_last_lines_are_told(place: Callable[..., Place]) -> None:
    one = place()
    exit = one.end(one.start(1, "import sys; [print(n, file=sys.stderr) for n in range(99)]; raise SystemExit('the end')"))
    assert exit.log.splitlines()[-2:] == ["98", "the end"]


def test_a_container_that_has_ended_is_gone(place: Callable[..., Place]) -> None:
    one = place()
    one.end(one.start(1, "pass"))
    eventually(lambda: [job for job in one.backend.list() if job["program"] == one.program] == [])


def test_a_closed_backend_leaves_no_container_that_has_ended(place: Callable[..., Place]) -> None:
    one, other = place(), place()
    one.end(one.start(1, "pass"))
    one.backend.close()
    assert [job for job in other.backend.list() if job["program"] == one.program] == []


def test_a_container_that_cannot_be_removed_holds_up_no_other(
    place: Callable[..., Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does the engine have to come back before what it did not answer for is removed."""
    from docker.errors import APIError
    from requests import ConnectionError, Response

    from fiberexec.backends import docker

    remove, failed = docker.remove, []

    def refuse(client: object, job: str) -> None:
        if job.endswith("-1"):
            response = Response()
            response.status_code = 500
            raise APIError("it is stuck", response)
        if job.endswith("-4") and not failed:
            failed.append(job)
            raise ConnectionError("no answer")
        remove(client, job)

    monkeypatch.setattr(docker, "remove", refuse)
    one = place()
    for job in [one.start(number, "pass") for number in (1, 2, 3)]:
        one.end(job)
    eventually(lambda: [job["id"] for job in one.backend.list() if job["program"] == one.program] == [f"{one.program}-1"])
    stays = one.start(4, SLEEP)
    one.backend.terminate([stays])
    one.end(stays)
    assert failed == [stays]
    monkeypatch.undo()
    one.backend.remove(one.program)


def test_a_job_that_was_killed_for_its_memory_says_so_and_names_the_limit(place: Callable[..., Place]) -> None:
    one = place(memory="64Mi")
    exit = one.end(one.start(1, "x = bytearray(1 << 30)"))
    assert (exit.code, exit.reason, exit.infrastructure) == (-9, "OOMKilled", False)
    assert "its limit of 64 MiB" in exit.log


def test_a_child_that_was_killed_for_its_memory_is_not_its_jobs_end(place: Callable[..., Place]) -> None:
    one = place(memory="64Mi")
    code = (
        "import subprocess, sys; c = subprocess.run([sys.executable, '-c', 'bytearray(1 << 30)']).returncode; "
        "print(c); sys.exit(7)"
    )
    exit = one.end(one.start(1, code))
    assert (exit.code, exit.reason, exit.log) == (7, "", "-9\n")


def test_a_job_that_is_terminated_after_a_childs_death_is_not_called_oom_killed(place: Callable[..., Place]) -> None:
    one = place(memory="64Mi")
    code = "import subprocess, sys, time; subprocess.run([sys.executable, '-c', 'bytearray(1 << 30)']); print('x', flush=True)"
    job = one.start(1, f"{code}; time.sleep(600)")
    one.says(job, "x")
    one.backend.terminate([job])
    assert one.end(job).reason == ""


@pytest.mark.parametrize(("command", "code"), [(("kill",), -9), (("rm", "-f"), -9), (("stop", "-t", "1"), -15)])
def test_what_somebody_kills_is_told_once_and_not_excused(
    command: tuple[str, ...], code: int, place: Callable[..., Place]
) -> None:
    one = place()
    job = one.start(1, SLEEP)
    docker(*command, job)
    exit = one.end(job)
    assert exit.code == code and not exit.infrastructure
    one.end(one.start(2, "pass"))  # had the first been told twice, that would be by now
    assert [ended.job for ended in one.ended].count(job) == 1


def test_terminated_jobs_end_and_are_gone(place: Callable[..., Place]) -> None:
    one = place()
    jobs = [one.start(number, SLEEP) for number in range(2)]
    one.backend.terminate(jobs)
    for job in jobs:
        assert one.end(job).code == -9
    assert [job for job in one.backend.list() if job["program"] == one.program] == []


def test_a_job_that_is_terminated_while_it_starts_ends(place: Callable[..., Place]) -> None:
    one = place()
    job = one.job(1, SLEEP)
    one.backend.start(one.job(0, "pass"))  # the image is ready now: only the start itself takes time
    starting = threading.Thread(target=one.backend.start, args=(job,))
    starting.start()
    eventually(lambda: job.id in one.backend._jobs)
    one.backend.terminate([job.id])
    starting.join()
    one.end(job.id)


def test_a_program_is_removed_whole_and_no_other_is_touched(place: Callable[..., Place]) -> None:
    one, other = place(), place()
    for number in range(3):
        one.start(number, SLEEP)
    kept = other.start(1, SLEEP)
    assert one.backend.remove(one.program) == 3
    assert one.backend.remove(one.program) == 0
    for number in range(3):
        one.end(f"{one.program}-{number}")
    assert kept in [job["id"] for job in one.backend.list()] and not other.ended


def test_jobs_are_listed_with_what_is_known_of_them(place: Callable[..., Place]) -> None:
    one = place(backend_options={"labels": {"team": "blue"}})
    job = one.start(1, SLEEP)
    [found] = [each for each in one.backend.list() if each["id"] == job]
    assert found["program"] == one.program and found["state"] == "running" and found["image"] == services.bare_image()
    assert found["started"] > 1e9 and found["labels"]["team"] == "blue" and "@" in found["labels"]["fiberexec.driver"]


def test_logs_are_followed_until_the_job_ends(place: Callable[..., Place]) -> None:
    one = place()
    job = one.start(1, "import sys; print('ä', flush=True); sys.stdin.read(); print('b\\nc')", b"x")
    assert list(one.backend.logs(job, follow=True)) == ["ä", "b", "c"]
    with pytest.raises(FiberError, match="there is no job 'no-such'"):
        next(one.backend.logs("no-such"))


def test_a_job_that_says_nothing_is_explained(place: Callable[..., Place]) -> None:
    one = place()
    job = one.start(1, "import time; time.sleep(600)")
    assert "running and has said nothing" in one.backend.explain(job)
    job = one.start(2, SLEEP)
    one.says(job, "up")
    assert "its last lines:\n    up" in one.backend.explain(job)
    job = one.start(3, "raise SystemExit('bad luck')")
    one.end(job)
    assert "bad luck" in one.backend.explain(job)
    assert "No such container" in one.backend.explain("no-such")


# -- what a container is given


def test_a_size_is_a_limit(place: Callable[..., Place]) -> None:
    one = place(cpu=0.5, memory=100)
    host = json.loads(docker("inspect", one.start(1, SLEEP)))[0]["HostConfig"]
    assert (host["NanoCpus"], host["Memory"], host["MemorySwap"]) == (500_000_000, 100 << 20, 100 << 20)
    assert one.backend.largest.capacity.cpu == 0.5 and one.backend.largest.capacity.memory == 100 << 20


def test_folders_of_the_host_are_mounted(place: Callable[..., Place], tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "in").write_text("hello")
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(0o777)
    volumes = {str(tmp_path / "in"): {"bind": "/in", "mode": "ro"}, str(tmp_path / "out"): "/out"}
    one = place(backend_options={"volumes": volumes})
    code = (
        "open('/out/copy', 'w').write(open('/in').read())\ntry: open('/in', 'w')\nexcept OSError as error: print(error.errno)"
    )
    exit = one.end(one.start(1, code))
    assert (exit.code, exit.log) == (0, "30\n")  # read-only
    assert (tmp_path / "out" / "copy").read_text() == "hello"


def test_relative_folders_and_volumes_with_names_are_mounted(
    place: Callable[..., Place], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    name = f"{tmp_path.name}-volume"
    one = place(backend_options={"volumes": ["./data:/data:ro", f"{name}:/volume"]})
    try:
        assert (
            one.end(one.start(1, "import os; print(os.path.ismount('/data'), os.path.ismount('/volume'))")).log
            == "True True\n"
        )
    finally:
        one.backend.remove(one.program)
        docker("volume", "rm", "-f", name)


def test_hosts_labels_and_dockers_own_options_are_passed_on(place: Callable[..., Place]) -> None:
    options = {
        "extra_hosts": {"far.away": "192.0.2.7"},
        "labels": ["mine"],
        "ulimits": [{"name": "nofile", "soft": 77, "hard": 77}],
        "shm_size": "80m",
        "hostname": "here",
        "mounts": [{"type": "tmpfs", "target": "/scratch", "source": None}],
        "stop_signal": "SIGINT",
    }
    one = place(backend_options=options)
    code = (
        "import os, resource, socket; s = os.statvfs('/dev/shm'); print(socket.gethostbyname('far.away'), "
        "resource.getrlimit(resource.RLIMIT_NOFILE), s.f_blocks * s.f_frsize >> 20, socket.gethostname(), "
        "os.path.ismount('/scratch'))"
    )
    assert one.end(one.start(1, code)).log == "192.0.2.7 (77, 77) 80 here True\n"


def test_there_is_room_for_large_arrays_in_shared_memory(place: Callable[..., Place]) -> None:
    one = place()
    code = "import os; s = os.statvfs('/dev/shm'); print(s.f_blocks * s.f_frsize >> 20)"
    assert int(one.end(one.start(1, code)).log) >= 1024


# -- the way back


@pytest.fixture
def own_network(request: pytest.FixtureRequest) -> Iterator[str]:
    name = f"fiberexec-test-{request.node.name[:20].strip('[]')}"
    docker("network", "create", name)
    yield name
    docker("network", "rm", name)


def reaches(one: Place) -> None:
    """Check that a container of this backend can reach a listener on the first of its addresses."""
    first, *_ = one.backend.advertise()
    with socket.create_server((first, 0)) as server:
        server.settimeout(30)
        port = server.getsockname()[1]
        job = one.start(1, f"import socket; socket.create_connection(({first!r}, {port}), 20).sendall(b'hello')")
        connection, _ = server.accept()
        with connection:
            assert connection.recv(5) == b"hello"
        assert one.end(job).code == 0


def test_a_container_reaches_the_driver(place: Callable[..., Place]) -> None:
    reaches(place())


def test_a_container_of_another_network_reaches_the_driver(place: Callable[..., Place], own_network: str) -> None:
    one = place(backend_options={"network": own_network})
    reaches(one)
    assert one.backend.advertise() != place().backend.advertise()


def test_a_container_of_the_hosts_network_reaches_the_driver(place: Callable[..., Place]) -> None:
    reaches(place(backend_options={"network": "host"}))


def test_the_address_can_be_set(place: Callable[..., Place]) -> None:
    assert place(backend_options={"advertise_address": "driver.example"}).backend.advertise() == ("driver.example",)
    assert place(backend_options={"advertise_address": ["a", "10.0.0.1"]}).backend.advertise() == ("a", "10.0.0.1")


# -- many


def test_twenty_containers_come_up_at_once_and_each_end_is_told_once(place: Callable[..., Place]) -> None:
    one = place()
    numbers = range(20)
    with ThreadPoolExecutor(20) as pool:
        jobs = list(pool.map(lambda number: one.start(number, SLEEP), numbers))
    assert sum(job["program"] == one.program and job["state"] == "running" for job in one.backend.list()) == 20
    assert one.backend.remove(one.program) == 20
    for job in jobs:
        one.end(job)
    assert sorted(ended.job for ended in one.ended) == sorted(jobs)


def test_a_backend_that_was_closed_is_quiet(place: Callable[..., Place]) -> None:
    one = place()
    one.close()
    assert one.ended == []
