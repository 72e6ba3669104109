"""The kubernetes backend's options, checked, and the pod that follows from them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple

from fiberexec._errors import ConfigError
from fiberexec.backends._kubernetes_pods import WORKER

LABEL = "fiberexec."  # how the labels begin that are ours
CREDENTIALS = "/var/run/fiberexec/credentials"
CREDENTIALS_VOLUME = "fiberexec-credentials"
NOBODY = 65534
_GRACE = 30  # seconds that Kubernetes gives a pod which is to go, where the pod does not say
_MARGIN = 5.0  # seconds of these that are left to the cluster
_DNS = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?\Z")
_NAME = re.compile(r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?\Z")
_KEY = re.compile(r"([a-z0-9]([-.a-z0-9]*[a-z0-9])?/)?[A-Za-z0-9]([-_.A-Za-z0-9]{0,61}[A-Za-z0-9])?\Z")
_VALUE = re.compile(r"([A-Za-z0-9]([-_.A-Za-z0-9]{0,61}[A-Za-z0-9])?)?\Z")
_MOUNT = {"read_only": "readOnly", "sub_path": "subPath"}
_SOURCES = ("persistentVolumeClaim", "configMap", "secret", "hostPath", "emptyDir")


class Options(NamedTuple):
    """What a pod is made with."""

    image: str | None  # None: that of the pod in which the driver is
    context: str | None
    namespace: str | None
    advertise: tuple[str, ...]  # none: found out
    python: str  # the interpreter in the container, "" for the one that the job's command names
    labels: dict[str, str]
    annotations: dict[str, str]
    spec: dict[str, Any]  # of a pod: what options say
    template: Any  # the user's own pod, a dict, or the path of a file that has it
    resources: dict[str, Any]
    user: int | None  # None: the image's own


def check(settings: Any) -> Options:
    """Check an executor's settings. Raises ConfigError; contacts nobody."""
    spec = find_spec("kubernetes")
    if spec is None or spec.origin is None:  # a folder of that name is none
        raise ConfigError("backend 'kubernetes' needs Kubernetes' SDK: pip install \"fiberexec[kubernetes]\"")
    given = dict(settings.backend_options)
    for name in given:
        if name not in _CHECKS:
            from difflib import get_close_matches

            near = get_close_matches(name, _CHECKS, 1)
            hint = f": did you mean {near[0]!r}?" if near else f"; it has {', '.join(_CHECKS)}"
            raise ConfigError(f"backend 'kubernetes' has no option {name!r}{hint}")
    checked: dict[str, Any] = {name: _checked(name, given[name]) for name in given if given[name] is not None}
    user = checked.get("user", NOBODY)
    volumes, mounts = checked.get("volumes", ([], []))
    wanted: dict[str, Any] = {
        "serviceAccountName": checked.get("service_account"),
        "nodeSelector": checked.get("node_selector"),
        "tolerations": checked.get("tolerations"),
        "affinity": checked.get("affinity"),
        "priorityClassName": checked.get("priority_class"),
        "imagePullSecrets": [{"name": name} for name in checked.get("image_pull_secrets", ())],
        "volumes": volumes,
        "containers": [{"name": WORKER, "volumeMounts": mounts, "workingDir": checked.get("working_dir")}],
    }
    return Options(
        image=settings.image,
        context=checked.get("context"),
        namespace=checked.get("namespace"),
        advertise=checked.get("advertise_address", ()),
        python=checked.get("python", ""),
        labels=checked.get("labels", {}),
        annotations=checked.get("annotations", {}),
        spec=_without_empty(wanted),
        template=checked.get("pod_template", {}),
        resources=_resources(settings, checked.get("gpu_resource", "nvidia.com/gpu")),
        user=None if user == "image" else user,
    )


def _resources(settings: Any, gpu: str) -> dict[str, Any]:
    amounts: dict[str, str] = {}
    if settings.cpu is not None:
        amounts["cpu"] = f"{max(1, round(settings.cpu * 1000))}m"
    if settings.memory is not None:
        amounts["memory"] = str(settings.memory)
    if settings.gpu:
        amounts[gpu] = str(settings.gpu)
    return {"requests": dict(amounts), "limits": dict(amounts)} if amounts else {}


# -- the pod


def pod(
    options: Options, image: str, name: str, command: list[str], labels: dict[str, str], annotations: dict[str, str]
) -> dict[str, Any]:
    """The pod of one job: defaults, then the user's template, then options, then what must be.

    Raises OSError and ValueError for a template in a file that cannot be read.
    """
    template = _load(options.template) if isinstance(options.template, str) else options.template
    made = merged(_defaults(options), template)
    made = merged(made, {"metadata": {"labels": options.labels, "annotations": options.annotations}, "spec": options.spec})
    container: dict[str, Any] = {
        "name": WORKER,
        "command": command,
        "args": None,
        "volumeMounts": [{"name": CREDENTIALS_VOLUME, "mountPath": os.path.dirname(CREDENTIALS), "readOnly": True}],
    }
    container["env"] = [{"name": "FIBEREXEC_GRACE", "value": f"{_grace(made):g}"}]
    if image:
        container["image"] = image
        container["env"].append({"name": "FIBEREXEC_IMAGE", "value": image})
    if options.resources:
        container["resources"] = options.resources
    result: dict[str, Any] = merged(
        made,
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "generateName": None, "namespace": None, "labels": labels, "annotations": annotations},
            "spec": {
                "restartPolicy": "Never",
                "containers": [container],
                # Only this container sees it, and whoever it runs as must be able to read it.
                "volumes": [{"name": CREDENTIALS_VOLUME, "secret": {"secretName": name, "defaultMode": 0o444}}],
            },
        },
    )
    return result


def _grace(pod: dict[str, Any]) -> float:
    """Seconds that what runs in a pod has when that is to go."""
    given = pod["spec"].get("terminationGracePeriodSeconds", _GRACE)
    seconds = given if isinstance(given, int) else _GRACE  # the API server refuses anything else
    return max(0.0, seconds - min(_MARGIN, seconds / 6))


def _defaults(options: Options) -> dict[str, Any]:
    """What passes the restricted Pod Security Standard."""
    person = {} if options.user is None else {"runAsUser": options.user, "runAsGroup": options.user}
    root = options.user == 0
    home = [{"name": "HOME", "value": "/tmp"}, {"name": "USER", "value": "fiberexec"}]
    return {
        "spec": {
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": {"runAsNonRoot": not root, "seccompProfile": {"type": "RuntimeDefault"}, **person},
            "containers": [
                {
                    "name": WORKER,
                    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                    "env": home if options.user == NOBODY else [],
                    "volumeMounts": [{"name": "fiberexec-shm", "mountPath": "/dev/shm"}],
                }
            ],
            "volumes": [{"name": "fiberexec-shm", "emptyDir": {"medium": "Memory"}}],  # the usual 64 MiB fail large arrays
        }
    }


_BY = {"containers": "name", "initContainers": "name", "volumes": "name", "env": "name", "volumeMounts": "mountPath"}


def merged(base: Any, over: Any, key: str = "") -> Any:
    """``over`` on top of ``base``: dicts by key, lists of named things by name; None removes."""
    if isinstance(base, Mapping) and isinstance(over, Mapping):
        result = dict(base)
        for name, value in over.items():
            if value is None:
                result.pop(name, None)
            else:
                result[name] = merged(result.get(name), value, name)
        return result
    if isinstance(base, list) and isinstance(over, list):
        by = _BY.get(key)
        if by is not None:
            found = {one[by]: one for one in base}
            for one in over:
                before = found.get(one[by], {})
                found[one[by]] = _volume_merged(before, one) if key == "volumes" else merged(before, one)
            return list(found.values())
        if key in ("tolerations", "imagePullSecrets"):
            return [*base, *(one for one in over if one not in base)]
    return merged({}, over) if isinstance(over, Mapping) else over


def _volume_merged(base: Any, over: Any) -> Any:
    """A volume has one source: another one replaces it."""
    return merged(base, over) if set(base) == set(over) else dict(over)


def _load(text: str) -> Any:
    if "\n" in text or ":" in text:
        return _yaml(text)
    with open(os.path.expanduser(text), encoding="utf-8") as file:
        return _yaml(file.read())


def _yaml(text: str) -> Any:
    import yaml  # type: ignore[import-untyped]

    try:
        return _template(yaml.safe_load(text))
    except (yaml.YAMLError, TypeError) as error:
        raise ValueError(f"is no YAML of a pod: {error}") from None


# -- checks: return the value as it is used, or raise TypeError or ValueError that says what it must be


def _checked(name: str, value: Any) -> Any:
    try:
        return _CHECKS[name](value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"backend_options: {name} {error}, got {value!r}") from None


def _text(value: object) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise TypeError("must be a str that is not empty")
    return value


def _named(pattern: re.Pattern[str]) -> Callable[[object], str]:
    def check_name(value: object) -> str:
        text = _text(value)
        if not pattern.match(text) or len(text) > 253 or (pattern is _DNS and len(text) > 63):
            raise ValueError("must be a name as Kubernetes takes it: of a-z, 0-9 and '-'")
        return text

    return check_name


def _names(value: object) -> tuple[str, ...]:
    words = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (None,)
    return tuple(_named(_NAME)(word) for word in words)


def _pairs(value: object) -> dict[str, str]:
    if not isinstance(value, Mapping) or not all(isinstance(text, str) for pair in value.items() for text in pair):
        raise TypeError("must map str to str")
    for name in value:
        if not _KEY.match(name):
            raise ValueError(f"must not have the name {name!r}: Kubernetes does not take it")
        if name.startswith(LABEL):
            raise ValueError(f"must not have names that begin with {LABEL!r}")
    return dict(value)


def _labels(value: object) -> dict[str, str]:
    labels = _pairs(value)
    for text in labels.values():
        if not _VALUE.match(text):
            raise ValueError(f"must not have the value {text!r}: Kubernetes takes up to 63 letters, digits, '-', '_' and '.'")
    return labels


def _selector(value: object) -> dict[str, str]:
    if not isinstance(value, Mapping) or not all(isinstance(text, str) for pair in value.items() for text in pair):
        raise TypeError("must map names of labels of nodes to str")
    return dict(value)


def _mapping(value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError("must be a dict as in a pod's YAML")
    return dict(value)


def _mappings(value: object) -> list[dict[str, Any]]:
    if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
        raise TypeError("must be a list of dicts as in a pod's YAML")
    return [_mapping(one) for one in value]


def _folder(value: object) -> str:
    if not _text(value).startswith("/"):
        raise ValueError("must be an absolute path in the container")
    return str(value)


def _addresses(value: object) -> tuple[str, ...]:
    addresses = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else ()
    for address in addresses:
        if not isinstance(address, str) or not re.fullmatch(r"[\w.-]+|[0-9a-fA-F:.]*:[0-9a-fA-F:.]*:[0-9a-fA-F:.]*", address):
            raise ValueError("must be a host name or an IP address, without a port, or several of them")
    if not addresses:
        raise ValueError("must be a host name or an IP address, without a port, or several of them")
    return addresses


def _user(value: object) -> int | str:
    if value == "image" or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    raise TypeError("must be a uid, or 'image' for whom the image names")


def _template(value: object) -> Any:
    if isinstance(value, str):
        return value if "\n" not in value and ":" not in value else _yaml(_text(value))
    if not isinstance(value, Mapping) or not set(value) <= {"apiVersion", "kind", "metadata", "spec"}:
        raise TypeError("must be a pod: a dict with 'metadata' or 'spec', its YAML, or the path of a file that has it")
    if value.get("kind", "Pod") != "Pod":
        raise ValueError(f"must be a Pod, not a {value['kind']}")
    for name in ("metadata", "spec"):
        if not isinstance(value.get(name), (Mapping, type(None))):
            raise TypeError(f"must have a dict as its {name}")
    for name in ("labels", "annotations"):
        if not isinstance((value.get("metadata") or {}).get(name), (Mapping, type(None))):
            raise TypeError(f"must have a dict as its {name}")
    _check_named(value.get("spec") or {})
    return dict(value)


def _check_named(holder: Mapping[str, Any]) -> None:
    """What merged() asks of the lists of a pod, or of one of its containers."""
    for name, by in _BY.items():
        things = holder.get(name)
        if not isinstance(things, (list, type(None))):
            raise TypeError(f"must have a list of dicts as its {name}")
        for one in things or ():
            if not isinstance(one, Mapping) or by not in one:
                raise ValueError(f"must have a {by} for each of its {name}; fiberexec's own container is {WORKER!r}")
            _check_named(one)


def _volumes(value: object) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """{folder: "claim"} or {folder: {"secret": "name", "read_only": True, ...}} as a pod's volumes and mounts."""
    if not isinstance(value, Mapping):
        raise TypeError("must map folders of the container to claims, or to one of " + ", ".join(_SOURCES))
    volumes, mounts = [], []
    for number, (folder, what) in enumerate(value.items()):
        if not isinstance(folder, str) or not folder.startswith("/"):
            raise ValueError(f"must have absolute folders of the container as keys, not {folder!r}")
        told = {"persistentVolumeClaim": _text(what)} if isinstance(what, str) else dict(_mapping(what))
        mount = {"mountPath": folder, "name": f"volume-{number}"}
        mount.update({theirs: told.pop(ours) for ours, theirs in _MOUNT.items() if ours in told})
        if len(told) != 1 or next(iter(told)) not in _SOURCES:
            raise ValueError(f"must have one of {', '.join(_SOURCES)} for {folder}, and perhaps read_only and sub_path")
        volumes.append({"name": f"volume-{number}", **{kind: _source(kind, about) for kind, about in told.items()}})
        mounts.append(mount)
    return volumes, mounts


def _source(kind: str, about: Any) -> dict[str, Any]:
    if isinstance(about, str):
        names = {"persistentVolumeClaim": "claimName", "configMap": "name", "secret": "secretName", "hostPath": "path"}
        if kind == "emptyDir":
            return {"sizeLimit": about}
        return {names[kind]: about}
    return _mapping(about or {})


def _without_empty(spec: dict[str, Any]) -> dict[str, Any]:
    spec["containers"] = [{name: value for name, value in one.items() if value} for one in spec["containers"]]
    return {name: value for name, value in spec.items() if value}


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "advertise_address": _addresses,
    "affinity": _mapping,
    "annotations": _pairs,
    "context": _text,
    "gpu_resource": _text,
    "image_pull_secrets": _names,
    "labels": _labels,
    "namespace": _named(_DNS),
    "node_selector": _selector,
    "pod_template": _template,
    "priority_class": _named(_NAME),
    "python": _text,
    "service_account": _named(_NAME),
    "tolerations": _mappings,
    "user": _user,
    "volumes": _volumes,
    "working_dir": _folder,
}
