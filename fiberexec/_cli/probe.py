"""What `fiberexec doctor` runs where a worker would run: a program that says what it finds there, and ends.

It is sent as text, so it needs nothing but some Python 3, and every import of fiberexec's may fail. It is told, on stdin or in
a file, {"job", "server", "ca", "certificate", "key", "hub": [addresses], "linger": seconds}; what it prints holds no secret.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MARK = "fiberexec-probe "
_PATIENCE = 5.0  # seconds


def main() -> None:
    """The program."""
    if sys.argv[1:] in ([], ["-"]):
        told = json.load(sys.stdin)
    else:
        with open(sys.argv[1]) as file:
            told = json.load(file)
    report: dict[str, Any] = {"time": time.time(), "python": list(sys.version_info[:3]), "user": os.getuid()}
    try:
        import fiberexec
        from fiberexec import _messages

        report["fiberexec"] = fiberexec.__version__
        report["protocol"] = _messages.VERSION
    except Exception as error:
        report["lacks"] = str(error)
    report["routes"] = {address: route(address) for address in told["hub"]}
    open_routes = [address for address in told["hub"] if not report["routes"][address]]
    if open_routes and "lacks" not in report:
        report["tls"] = shake(open_routes[0], told)
    print(MARK + json.dumps(report), flush=True)
    time.sleep(told["linger"])
    os._exit(0)  # nng's threads do not end in order


def route(address: str) -> str:
    """Why nobody answers there, "" if somebody does."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _PATIENCE).close()
    except Exception as error:
        return str(error)
    return ""


def shake(address: str, told: dict[str, Any]) -> str:
    """What is wrong with the link to that address, "" for nothing."""
    try:
        from fiberexec._link import Dialer

        link = Dialer(address, told["server"], told["ca"], told["certificate"], told["key"], 1)
        link.send((b"?",))
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            if select.select([link.fileno()], [], [], 0.1)[0]:
                answers = [answer for answer in link.received() if answer is not None]
                if answers:
                    known = answers[0].decode()
                    return "" if known == told["job"] else f"the other end takes us for {known!r}"
                return "the connection was closed"
        return f"no handshake within {_PATIENCE:g} seconds"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    main()
