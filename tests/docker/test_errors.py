"""What goes wrong with Docker, and what is said: on a real engine, and by a script where none can be brought to it."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import services

from fiberexec import LaunchError, __version__
from fiberexec.backends.base import Job

from .conftest import Place, docker, settings

pytest.importorskip("docker")
import docker.errors as sdk
import requests.exceptions
import urllib3.exceptions

URL = "unix:///var/run/docker.sock"
LINE = f"RUN pip install fiberexec=={__version__}"


def refused(one: Place, number: int = 1, code: str = "pass") -> LaunchError:
    """The error of a start that fails, which must come quickly."""
    start = time.monotonic()
    with pytest.raises(LaunchError) as caught:
        one.start(number, code)
    assert time.monotonic() - start < 30
    return caught.value


# -- on a real engine


def test_an_image_that_is_missing_and_must_not_be_pulled(place: Callable[..., Place]) -> None:
    error = refused(place(image="no-such/image:7", backend_options={"pull": "never"}))
    assert error.final and "docker pull no-such/image:7" in str(error)


@pytest.mark.parametrize(
    ("name", "said", "final"),
    [
        ("registry.invalid/some/image:1", "correct image='registry.invalid/some/image:1', or the engine's DNS", True),
        ("127.0.0.1:9/some/image:1", "cannot reach the registry of image='127.0.0.1:9/some/image:1'", False),
        ("UPPER/case", "is no name of an image", True),
    ],
)
def test_an_image_that_cannot_be_pulled(name: str, said: str, final: bool, place: Callable[..., Place]) -> None:
    error = refused(place(image=name))
    assert said in str(error) and error.final == final


def test_images_are_pulled_when_they_are_missing_or_always(place: Callable[..., Place]) -> None:
    registry = services.require_registry()
    name = f"{registry}/fiberexec-test/pulled:{os.getpid()}"
    docker("tag", services.bare_image(), name)
    docker("push", "-q", name)
    docker("image", "rm", name)
    one = place(image=name)
    assert one.end(one.start(1, "pass")).code == 0
    assert "pulled" in docker("image", "ls", name)
    error = refused(place(image=f"{registry}/fiberexec-test/never-pushed:1"))
    assert error.final and "its registry has no such image" in str(error)
    one = place(image=name, backend_options={"pull": "always"})
    assert one.end(one.start(1, "pass")).code == 0
    docker("image", "rm", name)
    assert one.backend._images._image is not None
    error = refused(one, 2)  # it was there when it was looked for; the next start fetches it again
    assert "No such image" in str(error)
    assert one.end(one.start(3, "pass")).code == 0
    docker("image", "rm", name)


def test_a_folder_that_the_host_does_not_have_is_not_made(place: Callable[..., Place], tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    error = refused(place(backend_options={"volumes": {str(missing): "/data"}}))
    assert error.final and f"bind source path does not exist: {missing}" in str(error) and "volumes=" in str(error)
    assert not missing.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"cpu": 5000}, "a container of cpu=5000 fits nowhere: the engine at"),
        ({"memory": "900Ti", "cpu": 0.5}, "a container of cpu=0.5, memory=943718400 MiB fits nowhere: the engine at"),
        ({"gpu": 1}, "NVIDIA Container Toolkit"),
        ({"backend_options": {"network": "no-such-network"}}, "docker network create"),
        ({"backend_options": {"user": "nobody-knows-me"}}, "a uid works in every image"),
        ({"backend_options": {"runtime": "no-such-runtime"}}, "correct runtime="),
        ({"backend_options": {"devices": ["/dev/no-such:/dev/x:rwm"]}}, "correct devices="),
        ({"backend_options": {"working_dir": "relative"}}, "absolute path"),
        ({"backend_options": {"init": "yes"}}, "cannot unmarshal"),
        ({"backend_options": {"sysctls": {"a": "b"}}}, "backend_options"),
        ({"memory": "1Gi", "backend_options": {"memswap_limit": "10m"}}, "correct memory="),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_the_engine_refuses_is_final_and_says_what_to_correct(
    arguments: dict[str, Any], said: str, place: Callable[..., Place]
) -> None:
    one = place(**arguments)
    error = refused(one)
    assert error.final and said in str(error), error
    assert [job for job in one.backend.list() if job["program"] == one.program] == []  # not even a container that was made


def test_a_name_that_is_taken(place: Callable[..., Place]) -> None:
    one = place()
    job = one.start(1, "import time; time.sleep(600)")
    error = refused(one, 1)
    assert f"docker rm -f {job}" in str(error) and not error.final


def test_an_image_without_fiberexec_says_the_line_to_add(place: Callable[..., Place]) -> None:
    one = place()
    job = Job(f"{one.program}-1", one.program, ("python", "-m", "fiberexec._agent", "-"), b"{}")
    one.backend.start(job)
    assert LINE in one.end(job.id).log and LINE in one.backend.explain(job.id)
    [ended] = one.ended
    assert LINE in ended.final and "No module named 'fiberexec'" in ended.final  # nobody has to start a second one for that
    error = refused(one, 2)
    assert error.final and LINE in str(error) and "No module named 'fiberexec'" in str(error)


def test_an_image_without_python_says_what_to_do(place: Callable[..., Place]) -> None:
    one = place(backend_options={"python": "/no/such/python"})
    exit = one.end(one.start(1, "pass"))
    assert exit.code == 127
    error = refused(one, 2)
    assert error.final and "FROM python:" in str(error) and 'backend_options={"python": ...}' in str(error)


def test_without_init_an_image_without_python_is_refused_at_once(place: Callable[..., Place]) -> None:
    error = refused(place(backend_options={"python": "/no/such/python", "init": False}))
    assert error.final and "FROM python:" in str(error)


def test_containers_that_all_end_at_once_prove_that_the_image_is_no_good(place: Callable[..., Place]) -> None:
    one = place()
    for number in range(3):
        one.end(one.start(number, "raise SystemExit('cannot read /etc/something')"))
    assert [bool(ended.final) for ended in one.ended] == [False, False, True]
    error = refused(one, 4)
    assert error.final and "end at once" in str(error) and "cannot read /etc/something" in str(error)


def test_containers_that_are_killed_or_end_well_prove_nothing(place: Callable[..., Place]) -> None:
    one = place()
    for number, code in enumerate(["pass", "import os; os.kill(os.getpid(), 9)"] * 3):
        one.end(one.start(number, code))
    assert one.end(one.start(9, "pass")).code == 0


def test_no_engine_at_a_socket(place: Callable[..., Place], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "docker.sock"
    monkeypatch.setenv("DOCKER_HOST", f"unix://{path}")
    one = silent()
    with pytest.raises(LaunchError, match=r"there is no such socket.*systemctl start docker.*DOCKER_HOST") as caught:
        one.start(JOB)
    assert caught.value.final and f"unix://{path} (from DOCKER_HOST)" in str(caught.value)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        with pytest.raises(LaunchError, match="connection refused"):
            one.start(JOB)
        with pytest.raises(LaunchError, match="connection refused"):
            one.advertise()
        with pytest.raises(LaunchError, match="connection refused"):
            one.list()
        with pytest.raises(LaunchError, match="connection refused"):
            one.remove("program")
        assert "connection refused" in one.explain("job")
    one.close()


JOB = Job("program-1", "program", ("python",), b"")


@pytest.mark.parametrize(
    "url", ["nonsense", "/var/run/docker.sock", "ftp://host:1", "tcp://host", "tcp://host:99999", "host:x"]
)
def test_what_is_no_address_of_an_engine_is_told_to_be_none(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", url)
    one = silent()
    for call in (one.advertise, one.list, lambda: one.start(JOB)):
        with pytest.raises(LaunchError, match=r"is no address of an engine.*unix:///var/run/docker.sock, tcp://") as caught:
            call()
        assert caught.value.final and f"{url!r} (from DOCKER_HOST)" in str(caught.value)
    one.close()


def silent(**arguments: Any) -> Any:
    """A backend that nobody watches."""
    from fiberexec.backends.docker import DockerBackend

    return DockerBackend(settings(**{"image": "some:image", **arguments}))


@pytest.mark.parametrize("url", ["tcp://192.0.2.1:2375", "ssh://me@far.example", "https://192.0.2.1:2376"])
def test_an_engine_elsewhere_needs_an_address_to_call_back(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", url)
    with pytest.raises(LaunchError, match="advertise_address") as caught:
        silent().advertise()
    assert caught.value.final and url in str(caught.value)
    assert silent(backend_options={"advertise_address": "10.0.0.1"}).advertise() == ("10.0.0.1",)


def test_a_project_without_an_image_says_so_when_a_job_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    services.require_docker()
    (tmp_path / ".git").mkdir()
    monkeypatch.chdir(tmp_path)
    one = silent(image=None)
    try:
        with pytest.raises(LaunchError, match="FROM python:") as caught:
            one.start(JOB)
        assert caught.value.final
        assert isinstance(one.list(), list)  # what needs no image goes without
    finally:
        one.close()


# -- from a script


def answer(status: int, text: str) -> sdk.APIError:
    response = requests.Response()
    response.status_code = status
    kind = sdk.APIError if status != 404 else sdk.NotFound
    return kind("error", response=response, explanation=text)


def unreachable(cause: OSError) -> Exception:
    return requests.exceptions.ConnectionError(urllib3.exceptions.ProtocolError("Connection aborted.", cause))


@pytest.mark.parametrize(
    ("error", "said", "final"),
    [
        (answer(500, "write /var/lib/docker/x: no space left on device"), "docker system prune", True),
        (
            answer(404, "pull access denied for x, repository does not exist or may require 'docker login'"),
            "docker login",
            True,
        ),
        (answer(500, "unauthorized: authentication required"), "docker login", True),
        (answer(500, "toomanyrequests: You have reached your pull rate limit"), "limits how often", False),
        (answer(500, "Get https://r/v2/: x509: certificate signed by unknown authority"), "certs.d", True),
        (answer(500, "Get http://r/v2/: net/http: TLS handshake timeout"), "cannot reach the registry", False),
        (answer(404, "no matching manifest for linux/arm64/v8 in the manifest list entries"), "kind of processor", True),
        (answer(500, "could not find an available, non-overlapping IPv4 address pool"), "docker network prune", True),
        (answer(500, "OCI runtime create failed: fork/exec: resource temporarily unavailable"), "short of memory", False),
        (answer(400, "something new that is wrong with the arguments"), "something new", True),
        (answer(500, "something new that is wrong with the engine"), "something new", False),
        (unreachable(PermissionError(errno.EACCES, "Permission denied")), "usermod -aG docker", True),
        (unreachable(FileNotFoundError(errno.ENOENT, "No such file")), "systemctl start docker", True),
        (requests.exceptions.ReadTimeout("read timed out"), "does not answer in time", True),
        (requests.exceptions.SSLError("certificate verify failed"), "DOCKER_CERT_PATH", True),
        (sdk.DockerException("Error while fetching server API version: strange"), "strange", True),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_each_error_says_what_to_do(error: Exception, said: str, final: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from fiberexec.backends._docker_errors import explained

    found = explained(error, "starting container x", url=URL, image="some:image", name="x")
    assert said in str(found) and found.final == final


def test_an_engine_that_has_answered_before_is_waited_for() -> None:
    from fiberexec.backends._docker_errors import explained

    error = unreachable(ConnectionRefusedError(errno.ECONNREFUSED, "refused"))
    assert explained(error, "", url=URL, new=True).final
    assert not explained(error, "", url=URL, new=False).final


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("ModuleNotFoundError: No module named 'pynng'", "has a fiberexec without pynng"),
        ("ModuleNotFoundError: No module named 'fiberexec._agent'", LINE),
        ("exec /usr/bin/python: exec format error", "another kind of processor"),
        ("ModuleNotFoundError: No module named 'numpy'", ""),
        ("", ""),
    ],
)
def test_the_last_lines_say_what_an_image_lacks(log: str, said: str) -> None:
    from fiberexec.backends._image_errors import verdict

    found = verdict("some:image", log, "")
    assert said in found and bool(said) == bool(found)


def test_another_python_is_named_where_the_image_says_so() -> None:
    from fiberexec.backends._image_errors import verdict

    assert "it has Python 3.8.1" in verdict("some:image", "No module named fiberexec", "3.8.1")


pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"),
]
