"""What a cluster changes outside of its folder, and how that is undone: containers, mounts, networks, kernel settings."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from .base import succeeds, wait_until

_SYSTEM = Path("/proc/sys")
# The kubelet changes these as it starts. Forwarding is not among them: a Docker engine that came later needs it too.
_SETTINGS = (
    *("vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops"),
    *("kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes"),
)
# Where the kubelet and its plugins write, whatever they are told.
_STRAYS = (
    "/var/lib/kubelet/device-plugins",
    "/var/lib/kubelet",
    "/var/lib/cni/results",
    "/var/lib/cni",
    "/var/log/containers",
)


def set_system(name: str, value: str) -> None:
    with suppress(FileNotFoundError):  # a kernel without that part
        (_SYSTEM / name).write_text(value)


def note_settings(folder: Path) -> None:
    """Remember the kernel's settings for `restore_settings`."""
    there = {name: (_SYSTEM / name).read_text().strip() for name in _SETTINGS if (_SYSTEM / name).exists()}
    (folder / "settings.json").write_text(json.dumps(there))


def restore_settings(folder: Path) -> None:
    with suppress(FileNotFoundError):
        for name, value in json.loads((folder / "settings.json").read_text()).items():
            set_system(name, value)


def firewall(bridge: str, pods: str) -> list[Callable[[str], list[str]]]:
    """The rules that let pods through, each as a function of what to do with it (-I, -D)."""
    return [
        # Docker drops what others forward.
        lambda action: [action, "FORWARD", "-i", bridge, "-j", "ACCEPT"],
        lambda action: [action, "FORWARD", "-o", bridge, "-j", "ACCEPT"],
        lambda action: ["-t", "nat", action, "POSTROUTING", "-s", pods, "!", "-d", pods, "-j", "MASQUERADE"],
    ]


def unplug(bridge: str, pods: str) -> None:
    """Remove the bridge, its rules and those of kube-proxy."""
    for rule in firewall(bridge, pods):
        while succeeds("iptables", "-w", "10", *rule("-D")):
            pass
    for family in ("ip", "ip6"):
        succeeds("nft", "delete", "table", family, "kube-proxy")
    succeeds("ip", "link", "delete", bridge)


def remove(state: Path, store: Path, network: str) -> None:
    """End all containers of a containerd that has ended itself, and remove what they had.

    It is not asked to do so: it takes its time, and may be what has crashed.
    """
    shims = list(_shims(str(state)))
    for address in state.glob("containerd/io.containerd.runtime.v2.task/k8s.io/*/address"):
        with suppress(OSError):
            os.unlink(address.read_text().strip().removeprefix("unix://"))
    for pid in shims:
        _kill(pid)
    wait_until(lambda: not [pid for pid in _contained() if _kill(pid)], 20)
    _remove_cgroups()
    for result in Path("/var/lib/cni/results").glob(f"{network}-*"):
        for namespace in _namespaces(result):
            succeeds("umount", namespace)
            Path(namespace).unlink(missing_ok=True)
        container = result.name.removeprefix(f"{network}-").partition("-")[0]
        for each in result.parent.glob(f"*-{container}-*"):  # there is one for the loopback too
            each.unlink()
    inside = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in sorted(inside, reverse=True):
        if mount.startswith((f"{state}/", f"{store}/")):
            succeeds("umount", "--lazy", mount)
    for link in Path("/var/log/containers").glob("*"):
        if link.is_symlink() and os.readlink(link).startswith(f"{state}/"):
            link.unlink()
    Path("/var/lib/kubelet/device-plugins/kubelet.sock").unlink(missing_ok=True)
    for folder in _STRAYS:
        with suppress(OSError):  # not empty: somebody else's
            os.rmdir(folder)


def _shims(state: str) -> Iterator[int]:
    """The processes that hold the containers: they name the socket of their containerd."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if "containerd-shim" in words[0] and any(word.startswith(f"{state}/") for word in words):
                yield int(folder.name)


def _namespaces(result: Path) -> set[str]:
    """The network namespaces that a plugin says it has put an interface into."""
    interfaces = json.loads(result.read_text()).get("result", {}).get("interfaces", [])
    return {each["sandbox"] for each in interfaces if each.get("sandbox")}


def _cgroups() -> list[Path]:
    found = [*Path("/sys/fs/cgroup").glob("kubepods*"), *Path("/sys/fs/cgroup").glob("*/kubepods*")]
    return [folder for top in found for folder in (top, *(path for path in top.rglob("*") if path.is_dir()))]


def _contained() -> set[int]:
    """The processes in pods."""
    pids: set[int] = set()
    for folder in _cgroups():
        with suppress(OSError):
            pids.update(map(int, (folder / "cgroup.procs").read_text().split()))
    return pids


def _remove_cgroups() -> None:
    for folder in sorted(_cgroups(), key=lambda path: len(path.parts), reverse=True):
        with suppress(OSError):
            folder.rmdir()


def _kill(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False
