"""Descriptors that run out: what needs one fails, and nothing else."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest

from fiberexec import FiberExecutor
from fiberexec._hub import client


def test_a_worker_that_the_driver_has_no_descriptor_for_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    attach = client.attach
    failed: list[Any] = []

    def once(*args: Any) -> Any:
        if not failed:
            failed.append(args)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return attach(*args)

    monkeypatch.setattr(client, "attach", once)
    with FiberExecutor(1, backend="agents") as executor:
        assert executor.submit(pow, 2, 3).result(60) == 8
        assert executor.stats().failed_launches == 1
    assert failed
