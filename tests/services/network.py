"""Hosts on one machine, whose network can be cut: network namespaces fx1, fx2, ..., and this machine as "driver".

    fx1 10.213.0.1   fx2 10.213.0.2   ...   driver 10.213.0.254     all plugged into one switch, a namespace of its own

A packet is dropped where it arrives, so its sender hears nothing, whatever it does. Dropping it at the switch would need a
kernel that filters bridged packets; dropping it at the sender's end would tell the sender.
"""

from __future__ import annotations

import re
from pathlib import Path

from .base import STATE, ServiceError, install, locked, need_root, run, succeeds

DRIVER = "driver"
_SWITCH = "fxswitch"
_PORT = "fx0"  # how each host calls its own end of the cable
_NAMESPACES = Path("/run/netns")
_OURS = STATE / "netns.ours"  # says that the hosts were made by calls that have the same folder


def hosts() -> list[str]:
    """The hosts that are up, without the driver."""
    found = [path.name for path in _NAMESPACES.glob("fx*") if re.fullmatch(r"fx\d+", path.name)]
    return sorted(found, key=lambda name: int(name[2:])) if (_NAMESPACES / _SWITCH).exists() else []


def address(host: str) -> str:
    return f"10.213.0.{254 if host == DRIVER else int(host[2:])}"


def up(number: int = 3) -> None:
    """Return when at least so many hosts are up."""
    if not 1 <= number <= 250:
        raise ServiceError(f"the number of hosts must be between 1 and 250, not {number}")
    if len(hosts()) >= number:
        return
    need_root("making network namespaces")
    with locked("netns"):
        install({"ip": "iproute2", "iptables": "iptables"})
        if not hosts():
            _remove()  # what a call that was killed has left
            run("ip", "netns", "add", _SWITCH)
            _OURS.touch()
            run("ip", "-n", _SWITCH, "link", "add", "switch", "type", "bridge")
            run("ip", "-n", _SWITCH, "link", "set", "switch", "up")
            _plug(DRIVER)
        for index in range(len(hosts()) + 1, number + 1):
            host = f"fx{index}"
            run("ip", "netns", "add", host)
            run("ip", "-n", host, "link", "set", "lo", "up")
            _plug(host)


def _plug(host: str) -> None:
    """Lay the cable from a host to the switch, whose end of it is called like the host."""
    here = ["ip"] if host == DRIVER else ["ip", "-n", host]
    run(*here, "link", "add", _PORT, "type", "veth", "peer", "name", host, "netns", _SWITCH)
    run("ip", "-n", _SWITCH, "link", "set", host, "master", "switch", "up")
    run(*here, "address", "add", f"{address(host)}/24", "dev", _PORT)
    run(*here, "link", "set", _PORT, "up")


def down() -> None:
    """Remove the hosts that `up` made. A program that still runs on one goes on without a network."""
    if _OURS.exists():
        need_root("removing network namespaces")
        with locked("netns"):
            _remove()
            _OURS.unlink()


def _remove() -> None:
    if succeeds("ip", "link", "show", _PORT):
        _clear(DRIVER)
        run("ip", "link", "delete", _PORT)  # by hand: with its namespace it would go too, but later
    for path in _NAMESPACES.glob("fx*"):
        if path.name == _SWITCH or re.fullmatch(r"fx\d+", path.name):
            run("ip", "netns", "delete", path.name)


def link(action: str, host: str, other: str | None = None) -> None:
    """Change the network of one host, or between two.

    ``drop``: packets of the host, or between the two, vanish without a trace. ``cut``: the host's cable is pulled, which it
    sees itself. ``only``: the host reaches one address of the driver (of its bridge to containers, for instance), given as
    `other`, and nothing else; nothing reaches the host. ``restore``: all is as at first.
    """
    there = [DRIVER, *hosts()]
    for name in filter(None, (host, None if action == "only" else other)):
        if name not in there:
            raise ServiceError(f"there is no host {name}; there are: {', '.join(there)}")
    need_root("changing the network")
    with locked("netns"):
        if action == "drop":
            for far in [other] if other else [name for name in there if name != host]:
                for at, sender in ((host, far), (far, host)):
                    _filter(at, "-A", *_rule(sender))
        elif action == "cut":
            run("ip", "-n", _SWITCH, "link", "set", host, "down")
        elif action == "only" and host != DRIVER and other:
            run("ip", "-n", host, "route", "replace", f"{other}/32", "via", address(DRIVER), "proto", "static")
            _filter(host, "-A", "PREROUTING", "-i", _PORT, "!", "-s", other, "-j", "DROP")
        elif action == "restore":
            run("ip", "-n", _SWITCH, "link", "set", host, "up")
            _clear(host)
            if host != DRIVER:
                run("ip", "-n", host, "route", "flush", "proto", "static")
            for far in there:
                while far != host and _dropped(far, host):
                    _filter(far, "-D", *_rule(host))
        else:
            raise ServiceError(f"no such action: {action}; there are drop, cut, only and restore")


# In the table `raw`, which comes first: before connections are tracked, and before anything is forwarded to containers.
def _rule(sender: str) -> tuple[str, ...]:
    return ("PREROUTING", "-i", _PORT, "-s", address(sender), "-j", "DROP")


def _filter(host: str, *arguments: str) -> None:
    run(*_iptables(host), *arguments)


def _dropped(host: str, sender: str) -> bool:
    return succeeds(*_iptables(host), "-C", *_rule(sender))


def _iptables(host: str) -> tuple[str, ...]:
    return (*(() if host == DRIVER else ("ip", "netns", "exec", host)), "iptables", "-w", "10", "-t", "raw")


def _clear(host: str) -> None:
    """Forget what this host drops."""
    for line in run(*_iptables(host), "-S", "PREROUTING").splitlines():
        rule = line.split()
        if rule[0] == "-A" and _PORT in rule:
            _filter(host, "-D", *rule[1:])
