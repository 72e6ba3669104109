"""An image registry at an address that every Docker engine trusts without TLS."""

from __future__ import annotations

import http.client
import shutil

from .base import STATE, Daemon, install, locked, need_root, say

ADDRESS = "127.0.0.1:5000"
_registry = Daemon("registry")


def answers() -> bool:
    connection = http.client.HTTPConnection(ADDRESS, timeout=5)
    try:
        connection.request("GET", "/v2/")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def up() -> None:
    """Return when a registry answers: the one that is there, or a new and empty one."""
    if answers():
        return
    need_root("starting a registry")
    with locked("registry"):
        if answers():
            return
        install({"docker-registry": "docker-registry"})
        config = STATE / "registry.yaml"
        config.write_text(
            'version: "0.1"\n'
            "log: {level: warn}\n"
            f"http: {{addr: '{ADDRESS}'}}\n"
            f"storage: {{filesystem: {{rootdirectory: {STATE}/registry}}, delete: {{enabled: true}}}}\n"
        )
        _registry.start("docker-registry", "serve", config)
        _registry.wait(answers, 20)
        say(f"the registry answers at {ADDRESS}")


def down() -> None:
    """End the registry that `up` started, and forget what was pushed to it."""
    if _registry.pid() is None:
        return
    need_root("stopping the registry")
    with locked("registry"):
        _registry.stop()
        shutil.rmtree(STATE / "registry", ignore_errors=True)
