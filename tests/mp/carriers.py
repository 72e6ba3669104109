"""The two kinds of pipes, for tests of what both promise."""

from __future__ import annotations

import pytest

from fiberexec.mp._hubconnection import HubConnection
from fiberexec.mp.connection import Connection, make_pipe

LOCAL, HUB = "local", "elsewhere"  # backends: what carries their pipes
LARGE = [1 << 16, (1 << 20) + 3]  # bytes of messages that go in parts
both = pytest.mark.parametrize("carrier", [LOCAL, HUB], indirect=True)  # a test without it is about descriptors
backend = LOCAL  # of the test that runs


def Pipe(duplex: bool = True) -> tuple[Connection, Connection]:
    return make_pipe(duplex, backend)


def of_the(carrier: str) -> type[Connection]:
    return HubConnection if carrier == HUB else Connection
