from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

# the helper is imported by path: it is also what the other interpreter runs
_spec = importlib.util.spec_from_file_location("serialize_peer", Path(__file__).with_name("peer.py"))
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _module
_spec.loader.exec_module(_module)


@pytest.fixture(scope="session")
def peer() -> Iterator[Any]:
    """A fresh interpreter, the same for all tests of a run: what one leaves there must not harm the next."""
    with _module.Peer() as one:
        one.call(len, "")
        # the check for what tests leave behind compares states of processes: it begins as it will be found
        process = psutil.Process(one.process.pid)
        deadline = time.monotonic() + 30
        while process.status() != psutil.STATUS_SLEEPING and time.monotonic() < deadline:
            time.sleep(0.001)
        yield one


@pytest.fixture(scope="session")
def peer_module() -> Any:
    return _module
