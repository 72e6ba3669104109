"""Backends by name: the built-in ones, and those that other packages register as entry points ``fiberexec.backends``."""

from __future__ import annotations

import importlib
from typing import Any

from fiberexec._errors import ConfigError
from fiberexec._inherited import in_job
from fiberexec.backends.base import Backend, BackendFactory, JobBackend

GROUP = "fiberexec.backends"
_BUILT_IN = {
    "agents": "fiberexec.testing._agents:AgentBackend",
    "docker": "fiberexec.backends.docker:DockerBackend",
    "kubernetes": "fiberexec.backends.kubernetes:KubernetesBackend",
    "local": "fiberexec.backends.local:LocalBackend",
}


def names() -> list[str]:
    """Every backend that can be had here."""
    from importlib.metadata import entry_points

    return sorted({*_BUILT_IN, *(entry.name for entry in entry_points(group=GROUP))})


def create(name: str, settings: Any, max_workers: int | None) -> Backend:
    """Make the backend of this name. Raises ConfigError for an unknown one, and says which is nearest."""
    if in_job() and name in _BUILT_IN and name != "local":  # its SDK need not be in the image: who started this job has it
        from fiberexec._remote import Elsewhere, RemoteBackend

        return RemoteBackend(Elsewhere(name, settings), settings._replace(backend=name))
    backend = _factory(name)(settings, max_workers)
    if isinstance(backend, Backend):
        return backend
    from fiberexec._remote import RemoteBackend

    return RemoteBackend(backend, settings._replace(backend=name))


def create_jobs(name: str, settings: Any) -> JobBackend:
    """Make the backend of this name, to start jobs with."""
    backend = _factory(name)(settings, None)
    if isinstance(backend, Backend):
        raise ConfigError(f"backend {name!r} runs processes of this host: there are no jobs")
    return backend


def _factory(name: str) -> BackendFactory:
    target = _BUILT_IN.get(name)
    if target is not None:
        module, _, attribute = target.partition(":")
        factory: BackendFactory = getattr(importlib.import_module(module), attribute)
        return factory
    from importlib.metadata import entry_points

    for entry in entry_points(group=GROUP):
        if entry.name == name:
            loaded: BackendFactory = entry.load()
            return loaded
    if name == "slurm":
        raise ConfigError(
            "the slurm backend is not part of this version of fiberexec; inside an allocation, backend='local' "
            "(or FIBEREXEC_BACKEND=local) uses the processors of this node"
        )
    import difflib

    near = difflib.get_close_matches(name, names(), 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"there is no backend {name!r}, only {', '.join(names())}{hint}")
