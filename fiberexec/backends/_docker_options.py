"""The docker backend's options, checked: which arguments of Docker's own a job's container gets."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

from fiberexec._errors import ConfigError

API = "1.41"  # for checks alone: the engine's own version is asked when it is first needed
PULL = ("missing", "always", "never")
LABEL = "fiberexec."  # how the labels begin that are ours
_OURS = (
    "advertise_address",
    "base_image",
    "build_args",
    "dockerfile",
    "entrypoint",
    "extra_hosts",
    "labels",
    "network",
    "pull",
    "python",
    "user",
    "volumes",
    "working_dir",
)
_REFUSED = {
    "auto_remove": "containers are removed anyway, once their end is known",
    "binds": "use volumes={host folder: container folder}",
    "command": "a container runs fiberexec's agent; entrypoint=[...] runs something before it",
    "cpu_count": "use cpu=",
    "detach": "a container's stdin is fiberexec's own",
    "environment": "use env={...} of the executor: a container's environment is there for everybody to read",
    "host_config": "give its parts as options of their own",
    "image": "use image= of the executor",
    "mem_limit": "use memory= of the executor",
    "name": "each container has a name of its own; use labels",
    "nano_cpus": "use cpu= of the executor",
    "network_disabled": "workers could not reach the driver",
    "network_mode": "use network=",
    "networking_config": "use network=",
    "restart_policy": "fiberexec itself starts another container where one has ended",
    "stdin_open": "a container's stdin is fiberexec's own",
    "tty": "a container's stdin is fiberexec's own",
}
_VOLUME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*\Z")
_LEAST_MEMORY = 6 << 20  # what Docker takes


class Options(NamedTuple):
    """What a container is made with."""

    image: str | None
    pull: str
    user: str | None  # None: the image's own, or somebody without rights where that is root
    advertise: tuple[str, ...]  # none: found out
    python: str  # the interpreter in the container, "" for the one that the job's command names
    entrypoint: tuple[str, ...] | None  # what runs the job's command; none: nothing; None: what the image says
    base_image: str | None  # of an image that is made
    build_args: dict[str, str]
    dockerfile: str | None
    labels: dict[str, str]
    container: dict[str, Any]  # further arguments of the SDK's create_container
    host: dict[str, Any]  # arguments of its create_host_config


def check(settings: Any) -> Options:
    """Check an executor's settings. Raises ConfigError; contacts nobody."""
    try:
        sdk: Any = import_module("docker")
    except ImportError as error:
        raise ConfigError(f"backend 'docker' needs Docker's SDK: pip install \"fiberexec[docker]\" ({error})") from None
    sdk_container = set(inspect.signature(sdk.APIClient.create_container).parameters) - {"self"}
    sdk_host = set(inspect.signature(sdk.types.HostConfig).parameters) - {"self", "version"}
    given = dict(settings.backend_options)
    for name in given:
        _known(name, {*_OURS, *sdk_container, *sdk_host} - set(_REFUSED))
    container = {name: given[name] for name in given if name in sdk_container and name not in (*_OURS, "host_config")}
    host = {name: given[name] for name in given if name in sdk_host and name not in _OURS}
    if "extra_hosts" in given:
        host["extra_hosts"] = _checked(_hosts, "extra_hosts", given)
    if "working_dir" in given:
        container["working_dir"] = _checked(_text, "working_dir", given)
    if "network" in given:
        host["network_mode"] = _checked(_network, "network", given)
    if found := mounts(given):
        host["mounts"] = [_mount(mount) for mount in found]
    _harden(host)
    _size(settings, host)
    for name, value in host.items():
        _tried(name, value, sdk.types.HostConfig, API)
    for name, value in container.items():
        if name not in ("use_config_proxy", "platform"):
            _tried(name, value, sdk.types.ContainerConfig, API, "image", None)
    return Options(
        image=settings.image,
        pull=_checked(_pull, "pull", given) or "missing",
        user=_checked(_user, "user", given),
        advertise=_checked(_addresses, "advertise_address", given) or (),
        python=_checked(_text, "python", given) or "",
        entrypoint=_checked(_words, "entrypoint", given) if "entrypoint" in given else (),
        base_image=_checked(_text, "base_image", given),
        build_args=_checked(_pairs, "build_args", given) or {},
        dockerfile=_checked(_text, "dockerfile", given),
        labels=_checked(_labels, "labels", given) or {},
        container=container,
        host=host,
    )


def _known(name: str, names: set[str]) -> None:
    if name in _REFUSED:
        raise ConfigError(f"backend_options: {name!r} cannot be set: {_REFUSED[name]}")
    if name not in names:
        from difflib import get_close_matches

        near = get_close_matches(name, sorted(names), 1)
        hint = f": did you mean {near[0]!r}?" if near else f"; fiberexec's own are {', '.join(_OURS)}"
        raise ConfigError(f"backend 'docker' has no option {name!r}{hint}")


def _checked(check: Callable[[Any], Any], name: str, given: Mapping[str, Any]) -> Any:
    value = given.get(name)
    if value is None:
        return None
    try:
        return check(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"backend_options: {name} {error}, got {value!r}") from None


def _tried(name: str, value: object, make: Callable[..., object], *args: object) -> None:
    """Let the SDK look at an option: it checks the types of many."""
    try:
        make(*args, **{name: value})
    except (TypeError, ValueError, LookupError, AttributeError, import_module("docker.errors").DockerException) as error:
        raise ConfigError(f"backend_options: {name}={value!r}: {error}") from None


def _harden(host: dict[str, Any]) -> None:
    """A container can do nothing that an ordinary process cannot, unless an option says so."""
    host.setdefault("init", True)  # reaps orphans, and passes SIGTERM on, which a first process otherwise ignores
    if host.get("privileged"):
        return
    host.setdefault("cap_drop", ["ALL"])
    extra = host.get("security_opt") or []
    if isinstance(extra, list) and not any(str(item).startswith("no-new-privileges") for item in extra):
        host["security_opt"] = ["no-new-privileges", *extra]


def _size(settings: Any, host: dict[str, Any]) -> None:
    if settings.cpu is not None:
        if settings.cpu < 0.01:
            raise ConfigError(f"cpu={settings.cpu:g}: Docker gives a container at least 0.01")
        host["nano_cpus"] = round(settings.cpu * 1e9)
    if settings.memory is not None:
        if settings.memory < _LEAST_MEMORY:
            raise ConfigError(f"memory={settings.memory / 2**20:g} MiB: Docker gives a container at least 6 MiB")
        host["mem_limit"] = settings.memory
        host.setdefault("memswap_limit", settings.memory)  # none: a job that swaps is slow for no visible reason
    host.setdefault("shm_size", settings.memory or 1 << 30)  # an upper bound; Docker's own of 64 MiB fails large arrays
    if settings.gpu and "device_requests" not in host:
        host["device_requests"] = [{"count": settings.gpu, "capabilities": [["gpu"]]}]


# -- checks: return the value as it is used, or raise TypeError or ValueError that says what it must be


def _text(value: object) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise TypeError("must be a str that is not empty")
    return value


def _pull(value: object) -> str:
    if value not in PULL:
        raise ValueError(f"must be {', '.join(map(repr, PULL[:-1]))} or {PULL[-1]!r}")
    return str(value)


def _user(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return str(value)
    if isinstance(value, str) and value:
        return value
    raise TypeError("must be a uid, or a str such as '1000:1000' or 'nobody'")


def _words(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        import shlex

        return tuple(shlex.split(value))
    words = tuple(value) if isinstance(value, Iterable) else (None,)
    if not all(isinstance(word, str) for word in words):
        raise TypeError("must be a list of str")
    return words


def _pairs(value: object) -> dict[str, str]:
    if not isinstance(value, Mapping) or not all(isinstance(text, str) for pair in value.items() for text in pair):
        raise TypeError("must map str to str")
    return dict(value)


def _labels(value: object) -> dict[str, str]:
    labels = _pairs(value) if isinstance(value, Mapping) else dict.fromkeys(_words(value), "")
    if any(name.startswith(LABEL) or not name for name in labels):
        raise ValueError(f"must not have names that are empty or begin with {LABEL!r}")
    return labels


def _hosts(value: object) -> dict[str, str]:
    if isinstance(value, Mapping):
        return _pairs(value)
    pairs = [word.partition(":") for word in _words(value)]
    if not all(name and address for name, _, address in pairs):
        raise ValueError("must map names to addresses, or be a list of 'name:address'")
    return {name: address for name, _, address in pairs}


def _network(value: object) -> str:
    name = _text(value)
    if name == "none":
        raise ValueError("must be a network from which a container can reach the driver")
    return name


def _addresses(value: object) -> tuple[str, ...]:
    addresses = (value,) if isinstance(value, str) else _words(value)
    for address in addresses:
        if not address or not re.fullmatch(r"[\w.-]+|[0-9a-fA-F:.]*:[0-9a-fA-F:.]*:[0-9a-fA-F:.]*", address):
            raise ValueError("must be a host name or an IP address, without a port, or several of them")
    return addresses


def mounts(given: Mapping[str, Any]) -> list[Any]:
    """What ``volumes`` and ``mounts`` say, in the form of ``mounts``: each path is whole. Raises ConfigError."""
    return [*(_checked(_volumes, "volumes", given) or ()), *(given.get("mounts") or ())]


def target(mount: Any) -> str:
    """Where one of mounts() is in a container."""
    return str(mount.get("Target", mount.get("target"))) if isinstance(mount, Mapping) else repr(mount)


def _volumes(value: object) -> list[dict[str, Any]]:
    if not isinstance(value, Mapping):
        parts = [word.split(":") for word in _words(value)]
        if not all(2 <= len(part) <= 3 for part in parts):
            raise ValueError("must map sources to folders, or be a list of 'source:folder' or 'source:folder:ro'")
        return [_volume(part[0], part[1], part[2] if len(part) == 3 else "rw") for part in parts]
    found = []
    for source, target in value.items():
        if isinstance(target, Mapping):
            if not {"bind"} <= set(target) <= {"bind", "mode"}:
                raise ValueError("must have 'bind', and perhaps 'mode', for each source")
            found.append(_volume(source, target["bind"], target.get("mode", "rw")))
        else:
            found.append(_volume(source, target, "rw"))
    return found


def _volume(source: object, target: object, mode: object) -> dict[str, Any]:
    if isinstance(source, os.PathLike):
        source = os.path.join(os.curdir, os.fspath(source))
    if not isinstance(source, str) or not isinstance(target, str):
        raise TypeError("must map folders of the host, or names of volumes, to folders of the container")
    if not target.startswith("/"):
        raise ValueError(f"must name absolute folders of the container, not {target!r}")
    if mode not in ("ro", "rw"):
        raise ValueError(f"must have the mode 'ro' or 'rw', not {mode!r}; Docker's others are for mounts=[...]")
    if _VOLUME.match(source):
        return {"type": "volume", "source": source, "target": target, "read_only": mode == "ro"}
    if not source:
        raise ValueError("must name a folder of the host, or a volume")
    path = os.path.abspath(os.path.expanduser(source))
    return {"type": "bind", "source": path, "target": target, "read_only": mode == "ro"}


def _mount(given: Any) -> Any:
    """Docker's own description of a mount, from the arguments of the SDK's Mount or as it is."""
    if isinstance(given, Mapping) and "Target" in given:
        return dict(given)
    try:
        return import_module("docker.types").Mount(**given)
    except (TypeError, import_module("docker.errors").DockerException) as error:
        raise ConfigError(f"backend_options: mounts must have what docker.types.Mount takes, got {given!r}: {error}") from None
