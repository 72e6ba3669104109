"""A driver outside the cluster that gets no outpost is told why."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import psutil
import pytest
import services

from fiberexec import FiberExecutor
from fiberexec._hub import launch
from fiberexec.backends._kubernetes_api import ApiError
from fiberexec.backends._kubernetes_link import Link

from .conftest import apply, eventually, kubectl
from .outside import Outside, left

pytestmark = pytest.mark.timeout(240)


FAILS = """
from fiberexec import BrokenExecutor
try:
    with FiberExecutor(2, startup_timeout={seconds}) as pool:
        pool.submit(where).result()
except BrokenExecutor as error:
    say(f"{{error}} {{error.__cause__}}")
"""


@pytest.mark.parametrize(
    ("image", "seconds", "expected"),
    [  # the first may yet come: startup_timeout is waited for
        ("localhost:1/no/such:image", 20, r"does not start: \w+Pull\w*: .*What to do: correct image="),
        ("No/Name", 80, r"does not start: InvalidImageName: .*What to do|is no name of an image"),
        ("bare", 80, r"has no fiberexec|No module named 'fiberexec'"),
    ],
)
def test_an_outpost_that_cannot_start_says_why(
    image: str, seconds: int, expected: str, outside: Outside, own_space: str
) -> None:
    code = FAILS.format(seconds=seconds)
    driver = outside(code, image=services.cluster_image(services.bare_image()) if image == "bare" else image)
    assert re.search(expected, driver.says(0), re.DOTALL)
    assert driver.end() == 0
    eventually(lambda: left(own_space) == [])


def test_who_gives_up_an_outpost_that_does_not_start_does_not_wait_for_it(outside: Outside, own_space: str) -> None:
    driver = outside(
        """
pool = FiberExecutor(2)
future = pool.submit(where)
sys.stdin.readline()
pool.shutdown(cancel_futures=True)
say(future.cancelled())
""",
        image="localhost:1/no/such:image",
    )
    eventually(lambda: "ErrImagePull" in driver.errors)  # the warning
    driver.tell()
    assert driver.says(0, 20) is True
    assert driver.end() == 0
    eventually(lambda: left(own_space) == [])


def test_an_outpost_that_is_being_made_goes_before_its_program_is_closed(
    own_space: str, monkeypatch: pytest.MonkeyPatch, nothing_left_behind: None
) -> None:
    monkeypatch.setenv("KUBECONFIG", services.require_kubernetes())
    options = {"namespace": own_space}
    pool = FiberExecutor(1, backend="kubernetes", image="localhost:1/no/such:image", backend_options=options)
    pool.submit(int)
    eventually(lambda: left(own_space) != [])
    pool.shutdown(cancel_futures=True)
    launch.close()
    assert not [one for one in psutil.Process().children() if Link.__module__ in " ".join(one.cmdline())]
    eventually(lambda: left(own_space) == [])


def limited(space: str, folder: Path, rules: list[dict[str, Any]]) -> str:
    """A kubeconfig for somebody who may do just this."""
    apply(
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "me", "namespace": space}},
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "Role",
            "metadata": {"name": "fiberexec", "namespace": space},
            "rules": rules,
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": {"name": "fiberexec", "namespace": space},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "fiberexec"},
            "subjects": [{"kind": "ServiceAccount", "name": "me", "namespace": space}],
        },
    )
    token = kubectl("-n", space, "create", "token", "me")
    config = json.loads(kubectl("config", "view", "--raw", "-o", "json"))
    config["users"][0]["user"] = {"token": token}
    path = folder / "kubeconfig"
    path.write_text(json.dumps(config))
    path.chmod(0o600)
    return str(path)


RULES: list[dict[str, Any]] = [
    {"apiGroups": [""], "resources": ["pods"], "verbs": ["create", "delete", "get", "list", "watch"]},
    {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]},
    {"apiGroups": [""], "resources": ["events"], "verbs": ["list"]},
    {"apiGroups": [""], "resources": ["secrets"], "verbs": ["create"]},
]
MORE: list[dict[str, Any]] = [
    {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["create", "delete", "get"]},
    {"apiGroups": [""], "resources": ["pods/portforward"], "verbs": ["create", "get"]},
]


def test_it_works_with_the_smallest_role(outside: Outside, own_space: str, tmp_path: Path) -> None:
    driver = outside(
        "with FiberExecutor(2) as pool:\n    say(pool.submit(where).result())",
        kubeconfig=limited(own_space, tmp_path, RULES + MORE),
    )
    assert driver.says(0)[1].startswith("fx-")
    assert driver.end() == 0
    eventually(lambda: left(own_space) == [])


@pytest.mark.parametrize(("rules", "missing"), [(RULES, "jobs"), (RULES + MORE[:1], "pods/portforward")])
def test_who_lacks_a_right_is_told_which(
    rules: list[dict[str, Any]], missing: str, outside: Outside, own_space: str, tmp_path: Path
) -> None:
    driver = outside(FAILS.format(seconds=80), kubeconfig=limited(own_space, tmp_path, rules))
    said = driver.says(0)
    assert f"{missing} in namespace {own_space}" in said and "pods/portforward], verbs: [create, get]" in said
    assert driver.end() == 0
    eventually(lambda: left(own_space) == [])


def test_a_server_that_goes_away_while_an_outpost_starts_may_answer_again(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {
        "namespace": "here",
        "job": {"metadata": {"name": "it"}},
        "context": None,
        "port": 1,
        "timeout": 60.0,
        "known": False,
    }
    link = Link(told)
    away = ApiError(0, "", "no route to host", "https://somewhere")
    assert link._failed(away, "making it").final  # it may be a wrong address

    def call(method: str, *_: Any, **__: Any) -> Any:
        if method == "POST":
            return {}
        raise away

    monkeypatch.setattr(link._api, "call", call)
    with pytest.raises(ApiError):
        link._make()
    assert not link._failed(away, "making it").final
    assert not Link({**told, "known": True})._failed(away, "making it").final  # not the first outpost
