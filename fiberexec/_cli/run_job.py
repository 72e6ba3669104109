"""What ``fiberexec run`` makes in a cluster: an image in a registry, a service account with its Role, a Job."""

from __future__ import annotations

import os
import posixpath
import re
import time
from collections.abc import Callable
from typing import Any

from fiberexec import _platform
from fiberexec._cli import run_code, run_first
from fiberexec._cli.run_base import COMMAND, DRIVER, MARK, ROLE, Fate, Wanted, shown
from fiberexec._errors import ConfigError, FiberError
from fiberexec.backends import _kubernetes_errors as errors
from fiberexec.backends import _kubernetes_options as options
from fiberexec.backends import _kubernetes_pods as pods
from fiberexec.backends._kubernetes_api import Api, ApiError

ACCOUNT = "fiberexec"  # the service account where none is named
_KEPT = 3600  # seconds that a Job is kept whose end nobody has seen
_ROOT = f"/{run_code.HOME}"


def folder_of(wanted: Wanted) -> str:
    """Where the program starts; "" for where the image says."""
    return "" if wanted.code is None else posixpath.join(_ROOT, run_code.CODE, wanted.code.folder).rstrip("/")


# -- the image


def pushed(wanted: Wanted, said: Callable[[str], None]) -> str:
    """The name under which the cluster finds the image; it is built and pushed unless one is given."""
    if wanted.settings.image is not None:
        return wanted.settings.image
    if not wanted.registry:
        raise ConfigError(
            "the cluster needs an image: --registry says where one that is built here is pushed to (such as "
            "ghcr.io/me), or --image names one that is there"
        )
    try:
        from fiberexec._cli.run_docker import image_of
        from fiberexec.backends._docker_engine import Engine
    except ImportError as error:
        raise ConfigError(f'building an image needs Docker\'s SDK: pip install "fiberexec[docker]" ({error})') from None
    engine = Engine(4)
    try:
        tag = image_of(engine, wanted, "kubernetes", said)
        return _push(engine, tag, wanted.registry, said)
    finally:
        engine.drop()


def _push(engine: Any, tag: str, registry: str, said: Callable[[str], None]) -> str:
    repository, _, version = tag.partition(":")
    repository = f"{registry.rstrip('/')}/{repository}"
    name = f"{repository}:{version}"
    try:
        api = engine.client().api
        api.tag(tag, repository, version)
        said(f"pushing {name}")
        error = ""
        for answer in api.push(repository, version, stream=True, decode=True):
            error = error or str(answer.get("error", ""))
    except Exception as failure:
        raise engine.failed(failure, f"pushing {name}", name) from failure
    if error:
        raise FiberError(
            f"Docker: pushing {name} failed: {' '.join(error.split())}. What to do: log in to the registry (docker login "
            f"{registry.partition('/')[0]}), or correct --registry"
        )
    return name


# -- rights


def rights(namespace: str, account: str) -> str:
    """A service account, the smallest Role, and a RoleBinding: YAML."""
    user = f"system:serviceaccount:{namespace}:{account}"
    made = f"apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: {account}, namespace: {namespace}}}\n---\n"
    return made + errors.role(namespace, user)


def ensure_account(api: Api, namespace: str, account: str, said: Callable[[str], None]) -> None:
    """Create the service account and its rights if there is none. Raises FiberError if that is not allowed."""
    import yaml  # type: ignore[import-untyped]

    try:
        api.call("GET", f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}")
        return
    except ApiError as error:
        if error.status == 403:
            return  # the Job's own events tell if there is none
        if error.status != 404:
            raise
    kinds = {"ServiceAccount": "/api/v1/namespaces/{}/serviceaccounts"}
    for body in yaml.safe_load_all(rights(namespace, account)):
        kind = body["kind"]
        path = kinds.get(kind, f"/apis/rbac.authorization.k8s.io/v1/namespaces/{{}}/{kind.lower()}s").format(namespace)
        try:
            api.call("POST", path, body=body)
        except ApiError as error:
            if error.status == 409:
                continue
            if error.status in (401, 403):
                raise FiberError(
                    f"Kubernetes: there is no service account {account!r} in namespace {namespace}, and you may not make it "
                    f"({error}). What to do: let somebody who may do this: fiberexec rbac --namespace {namespace} "
                    f"--service-account {account} | kubectl apply -f -"
                ) from error
            raise
    said(f"service account {account} was made in namespace {namespace}, with the rights that `fiberexec rbac` shows")


# -- the Job


def job(wanted: Wanted, checked: options.Options, image: str, account: str) -> dict[str, Any]:
    """The Job that runs a program: its pod waits until it is told what."""
    labels = {
        **checked.labels,
        ROLE: DRIVER,
        "fiberexec.program": wanted.name,
        "fiberexec.job": wanted.name,
        "fiberexec.user": str(os.getuid()),
        "fiberexec.started": str(int(time.time())),
    }
    annotations = {
        **checked.annotations,
        "fiberexec.driver": f"1@{wanted.name}",
        "fiberexec.user": _platform.user_name(os.getuid()),
        "fiberexec.folder": folder_of(wanted),
        COMMAND: shown(wanted.command),
    }
    container: dict[str, Any] = {
        "name": pods.WORKER,
        "image": image,
        "command": [checked.python or "python", "-m", run_first.__name__, _ROOT],
        "volumeMounts": [{"name": "fiberexec-run", "mountPath": _ROOT}, {"name": "fiberexec-shm", "mountPath": "/dev/shm"}],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "resources": checked.resources,
    }
    person: dict[str, Any] = {}
    if checked.user not in (None, options.NOBODY):  # else the image says who
        person = {"runAsUser": checked.user, "runAsGroup": checked.user, "runAsNonRoot": checked.user != 0}
    base = {
        "restartPolicy": "Never",
        "enableServiceLinks": False,
        "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}, **person},
        "containers": [container],
        "volumes": [{"name": "fiberexec-run", "emptyDir": {}}, {"name": "fiberexec-shm", "emptyDir": {"medium": "Memory"}}],
    }
    spec = {**options.merged(base, checked.spec), "serviceAccountName": account}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": wanted.name,
            "labels": labels,
            "annotations": {**annotations, MARK: os.urandom(8).hex()},
        },
        "spec": {
            "backoffLimit": 0,
            "ttlSecondsAfterFinished": _KEPT,
            "template": {"metadata": {"labels": labels, "annotations": annotations}, "spec": spec},
        },
    }


def refused(name: str, message: str, namespace: str) -> str:
    """Why the cluster makes no pod for the Job."""
    said = " ".join(message.split())
    if "violates PodSecurity" in said and re.search(r"runAsNonRoot|runAsUser=0", said):
        return (
            f"Kubernetes: {name} does not start: {said}. What to do: namespace {namespace} enforces the restricted Pod "
            "Security Standard, and a program runs as its image's user: give the image a user that is a number (USER 1000 in "
            "its Dockerfile) and say so here, backend_options = {user = 1000} in fiberexec.toml, or use another namespace"
        )
    return str(errors.explained(ApiError(403, "", said, ""), f"starting {name}", namespace))


def fate(name: str, pod: dict[str, Any], more: str = "") -> Fate:
    """How a pod's program ended. ``more`` is worth knowing too."""
    exit = pods.exit_of(pod)
    code = 137 if exit.code is None else 128 - exit.code if exit.code < 0 else exit.code
    if exit.reason == "OOMKilled":
        text = f"{name} took more memory than it may: give it more (--memory)"
    else:
        text = f"{name}: {exit.reason}: {exit.log.strip()}" if exit.reason else ""
    return Fate(code, "; ".join(filter(None, (text, more))))
