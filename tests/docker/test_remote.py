"""An engine that is reached over TCP, with TLS on both sides, as one on another host is."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .conftest import Engine, Place, bare_engine, eventually

pytestmark = pytest.mark.leaks("the engine is a child of the tests, and lives longer than one")


def openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=60)


def certify(folder: Path) -> None:
    """Make ca.pem, cert.pem and key.pem, which serve for both sides."""
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n")
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl("req", "-x509", *curve, "-keyout", f"{folder}/ca-key.pem", "-out", f"{folder}/ca.pem", "-subj", "/CN=ca")
    openssl("req", *curve, "-keyout", f"{folder}/key.pem", "-out", f"{folder}/request", "-subj", "/CN=both")
    authority = ("-CA", f"{folder}/ca.pem", "-CAkey", f"{folder}/ca-key.pem", "-CAcreateserial")
    openssl(
        "x509", "-req", "-in", f"{folder}/request", *authority, "-extfile", f"{folder}/names", "-out", f"{folder}/cert.pem"
    )


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, str, Path]]:
    folder = tmp_path_factory.mktemp("keys")
    certify(folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    files = ("--tlscacert", f"{folder}/ca.pem", "--tlscert", f"{folder}/cert.pem", "--tlskey", f"{folder}/key.pem")
    with bare_engine("--host", url, "--tlsverify", *files) as one:
        yield one, url, folder


@pytest.fixture
def there(
    engine: tuple[Engine, str, Path], place: Callable[..., Place], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Place]:
    _, url, folder = engine
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DOCKER_HOST", url)
    monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
    monkeypatch.setenv("DOCKER_CERT_PATH", str(folder))
    return place


@pytest.mark.parametrize("size", [0, 5_000, 300_000])
def test_credentials_arrive_and_ends_are_told(size: int, there: Callable[..., Place]) -> None:
    one = there()
    assert one.end(one.start(1, "import sys; print(len(sys.stdin.buffer.read()))", b"x" * size)).log == f"{size}\n"


def test_logs_are_followed_and_jobs_terminated(there: Callable[..., Place]) -> None:
    one = there()
    job = one.start(1, "import time; print('up', flush=True); time.sleep(600)")
    one.says(job, "up")
    assert [each["id"] for each in one.backend.list()] == [job]
    one.backend.terminate([job])
    assert one.end(job).code == -9
    eventually(lambda: one.backend.list() == [])


def test_a_stranger_is_told_that_there_is_no_trust(
    there: Callable[..., Place], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from fiberexec import LaunchError

    certify(tmp_path)  # of another authority
    with monkeypatch.context() as stranger, pytest.raises(LaunchError, match="DOCKER_CERT_PATH") as caught:
        stranger.setenv("DOCKER_CERT_PATH", str(tmp_path))
        there().start(1, "pass")
    assert caught.value.final
