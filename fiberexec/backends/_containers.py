"""What containers have in common, whoever runs them."""

from __future__ import annotations

import socket


def signed(code: int | None) -> int | None:
    """An exit code as Python gives it: negative for a signal."""
    return 128 - code if code is not None and 128 < code < 160 else code


def address_towards(target: str) -> str:
    """The address that this host has where it would send to another; its own, if the other is this host. "" for none."""
    try:
        family, _, _, _, address = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError:
        return ""
