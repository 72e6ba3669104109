"""Keys, certificates and kubeconfigs of a cluster, made by the openssl command."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path

from .base import install, run

# Strict clients want to see which key signed a certificate.
_CONFIG = """
[req]
distinguished_name = subject
[subject]
[authority]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, digitalSignature
subjectKeyIdentifier = hash
[member]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth, clientAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = {names}
"""


class Authority:
    """Signs for one cluster; all its files are in one folder."""

    def __init__(self, folder: Path, addresses: Sequence[str], names: Sequence[str]) -> None:
        """Make a new one. Its certificates are valid for those IP addresses and host names."""
        install({"openssl": "openssl"})
        folder.mkdir(mode=0o700, parents=True)
        self.folder = folder
        listed = [*(f"IP:{each}" for each in addresses), *(f"DNS:{each}" for each in names)]
        self._config = folder / "openssl.cnf"
        self._config.write_text(_CONFIG.format(names=", ".join(listed)))
        self._make("ca", "/CN=fiberexec test cluster", "authority")

    def member(self, name: str, user: str, group: str = "") -> None:
        """NAME.crt and NAME.key, for a user that Kubernetes knows by its name or group."""
        subject = (f"/O={group}" if group else "") + f"/CN={user}"
        self._make(name, subject, "member", "-CA", self.folder / "ca.crt", "-CAkey", self.folder / "ca.key")

    def key(self, name: str) -> None:
        """NAME.key alone."""
        # In the form that says in clear which kind of key it is.
        run("openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", self.folder / f"{name}.key")

    def kubeconfig(self, name: str, server: str) -> Path:
        """A file by which a member reaches the cluster, complete in itself."""
        cluster = {"server": server, "certificate-authority-data": self._text("ca.crt")}
        user = {"client-certificate-data": self._text(f"{name}.crt"), "client-key-data": self._text(f"{name}.key")}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": name, "user": user}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": name, "namespace": "default"}}],
            "current-context": "test",
        }
        path = self.folder / f"{name}.kubeconfig"
        path.touch(mode=0o600)
        path.write_text(json.dumps(config, indent=1))  # all of JSON is YAML
        return path

    def _make(self, name: str, subject: str, kind: str, *signed: str | Path) -> None:
        files: list[str | Path] = ["-keyout", self.folder / f"{name}.key", "-out", self.folder / f"{name}.crt"]
        algorithm = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30"]
        options: list[str | Path] = ["-config", self._config, "-extensions", kind, "-subj", subject]
        run("openssl", "req", "-x509", *algorithm, *options, *files, *signed)

    def _text(self, name: str) -> str:
        return base64.b64encode((self.folder / name).read_bytes()).decode()
