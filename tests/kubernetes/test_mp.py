"""fiberexec.mp with its processes in pods: programs that print what they print on one host, wherever they run themselves.

The whole behaviour suite runs in pods where ``TEST_BACKENDS`` names them: see tests/mp/conftest.py.
"""

from __future__ import annotations

import pytest
from shared_objects import EXPECTED, IMPORTS, all_of_them

from .conftest import eventually
from .inside import Inside
from .outside import Outside

pytestmark = pytest.mark.timeout(400)  # images are built and given to the cluster, and a dozen of pods come and go
LIMIT = 250.0  # seconds, for what takes half a minute where nothing else runs


def test_with_the_driver_in_a_pod(driver: Inside) -> None:
    name = driver(IMPORTS + all_of_them())
    eventually(lambda: driver.phase(name) in ("Succeeded", "Failed"), LIMIT)
    expected = "".join(EXPECTED.values()).splitlines()
    said = driver.said(name)  # with what goes to stderr: the traceback of a process that is to fail, and warnings
    assert [line for line in said.splitlines() if line in expected] == expected, said


def test_with_the_driver_where_no_pod_reaches_it(outside: Outside) -> None:
    driver = outside(IMPORTS + all_of_them())
    assert (driver.end(LIMIT), driver.said) == (0, "".join(EXPECTED.values()).splitlines()), driver.errors
