"""Kubeconfigs as people have them: whatever kubectl takes is taken, and nobody asks as nobody."""

from __future__ import annotations

import base64
import datetime
import http.server
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fiberexec.backends import _kubernetes_api as api
from fiberexec.backends import _kubernetes_config as config
from fiberexec.backends._kubernetes_api import Api, ApiError
from fiberexec.backends._kubernetes_config import Setup
from fiberexec.backends._kubernetes_errors import explained

from .fake import NAMESPACE, Fake, failure

PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
TOKEN = '{"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": {"token": "t"}}'
ANONYMOUS = 'pods is forbidden: User "system:anonymous" cannot list resource "pods" in API group "" in the namespace'
Change = Callable[..., None]


@pytest.fixture
def change(fake: Fake, tmp_path: Path) -> Change:
    """Writes the kubeconfig anew, with these fields changed."""

    def write(user: dict[str, Any] | None = None, **fields: Any) -> None:
        found = {**json.loads(fake.config()), **fields}
        if user is not None:
            found["users"] = [{"name": "fake", "user": user}]
        (tmp_path / "config").write_text(json.dumps({name: value for name, value in found.items() if value is not None}))

    return write


@pytest.fixture
def plugin(tmp_path: Path, change: Change) -> Path:
    """A program that gives the credentials, and works."""
    made = tmp_path / "plugin"
    made.write_text(f"#!/bin/sh\ncat <<END\n{TOKEN}\nEND\n")
    made.chmod(0o755)
    run = {"apiVersion": "client.authentication.k8s.io/v1", "command": str(made), "interactiveMode": "Never"}
    change({"exec": run})
    return made


def test_a_program_that_gives_no_credentials_is_named(plugin: Path) -> None:
    plugin.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(Setup, match=f"program '{plugin}', which gives them, has failed. What to do: log in anew"):
        Api(None).call("GET", PODS)


@pytest.mark.parametrize("refusal", [failure(401), failure(403, "Forbidden", ANONYMOUS)])
def test_who_is_refused_while_the_program_fails_is_let_in_when_it_works_again(
    refusal: Any, fake: Fake, plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "_RENEWED", 0.0)
    asked = Api(None)
    asked.call("GET", PODS)
    works = plugin.read_text()
    plugin.write_text("#!/bin/sh\nexit 1\n")
    fake.before = lambda *_: refusal
    with pytest.raises(ApiError) as caught:
        asked.call("GET", PODS)
    assert "log in anew" in str(explained(caught.value, "this", NAMESPACE))
    plugin.write_text(works)
    left = [refusal]
    fake.before = lambda *_: left.pop() if left else None
    asked.call("GET", PODS)


def test_nobody_is_told_to_give_rights_to_everybody() -> None:
    error = str(explained(ApiError(403, "Forbidden", ANONYMOUS, "https://c"), "creating pod p", NAMESPACE))
    assert "does not accept this program's credentials" in error and "RoleBinding" not in error


def test_a_tokens_file_may_end_with_a_line(tmp_path: Path, change: Change) -> None:
    (tmp_path / "token").write_text("secret\n")
    change({"tokenFile": str(tmp_path / "token")})
    Api(None).call("GET", PODS)
    configuration, _ = config.load(None)
    assert configuration.auth_settings()["BearerToken"]["value"] == "Bearer secret"


@pytest.mark.parametrize("current", [None, "", "gone"])
def test_a_context_that_is_named_needs_no_current_one(current: str | None, change: Change) -> None:
    change(**{"current-context": current})
    asked = Api("fake")
    asked.call("GET", PODS)
    assert asked.namespace() == NAMESPACE
    with pytest.raises(Setup, match="has no context 'other'; its contexts are: fake"):
        Api("other").namespace()
    with pytest.raises(Setup, match="no Kubernetes configuration could be loaded"):
        Api(None).namespace()


def test_a_proxys_name_and_password_are_sent_to_it(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://me:p%40ss@127.0.0.1:9")
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    for name in ("http_proxy", "https_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    configuration, _ = config.load(None)
    sent = configuration.proxy_headers["proxy-authorization"]
    assert base64.b64decode(sent.partition(" ")[2]) == b"me:p@ss"


# -- certificates


@pytest.fixture
def old_server(tmp_path: Path) -> Iterator[tuple[str, bytes]]:
    """(URL, CA) of a server whose certificates say as little as those of older clusters."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    now = datetime.datetime.now(datetime.timezone.utc)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("ca", "server")]

    def certificate(number: int, extension: x509.ExtensionType) -> bytes:
        made = x509.CertificateBuilder().issuer_name(names[0]).subject_name(names[number]).serial_number(number + 1)
        made = made.public_key(keys[number].public_key()).add_extension(extension, critical=False)
        made = made.not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1))
        return made.sign(keys[0], hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    import ipaddress

    ca = certificate(0, x509.BasicConstraints(ca=True, path_length=None))
    own = certificate(1, x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]))
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (tmp_path / "server").write_bytes(own + keys[1].private_bytes(encoding, form, serialization.NoEncryption()))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"https://127.0.0.1:{server.server_port}", ca
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_cluster_whose_certificates_say_little_is_trusted_on_every_python(
    old_server: tuple[str, bytes], change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, ca = old_server
    cluster = {"server": url, "certificate-authority-data": base64.b64encode(ca).decode()}
    change(clusters=[{"name": "fake", "cluster": cluster}])
    usual = ssl.create_default_context

    def strict(*arguments: Any, **keywords: Any) -> ssl.SSLContext:  # as Python 3.13 makes them
        made = usual(*arguments, **keywords)
        made.verify_flags |= ssl.VERIFY_X509_STRICT
        return made

    monkeypatch.setattr(ssl, "create_default_context", strict)
    asked = Api(None)
    assert asked.call("GET", "/") == "ok"
    asked.close()
