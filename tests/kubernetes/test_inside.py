"""A driver in a pod of the cluster, with the rights that are advised and no others."""

from __future__ import annotations

import pytest
from clusters import namespace

from fiberexec.backends._kubernetes_errors import role

from .conftest import eventually, get, kubectl
from .inside import Inside

pytestmark = pytest.mark.timeout(300)  # images are built and given to the cluster, and pods come as they come


def others(space: str) -> list[str]:
    """What there is besides the driver."""
    found = get("-n", space, "pods,secrets,configmaps", "-l", "fiberexec.job")["items"]
    return [f"{one['kind']} {one['metadata']['name']}" for one in found]


def test_its_workers_are_pods_of_its_own_image_that_belong_to_it(own_space: str, driver: Inside) -> None:
    name = driver("""
with FiberExecutor(2, backend="kubernetes") as executor:
    print(executor.submit(platform.node).result(), flush=True)
    executor.submit(time.sleep, 15).result()
    print(sum(executor.map(abs, range(1000))), flush=True)
""")
    eventually(lambda: driver.phase(name) != "Pending" and "fx-" in driver.said(name))
    host = driver.said(name).split()[0]
    worker = get("-n", own_space, "pod", host)
    [owner] = worker["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"]) == ("Pod", name)
    own = get("-n", own_space, "pod", name)
    assert worker["spec"]["containers"][0]["image"] == own["spec"]["containers"][0]["image"]
    eventually(lambda: driver.phase(name) == "Succeeded")
    assert driver.said(name).split()[1:] == ["499500"]
    eventually(lambda: others(own_space) == [])


@pytest.mark.parametrize("how", ["its pod is deleted", "it is killed"])
def test_nothing_is_left_of_a_driver_that_dies(how: str, own_space: str, driver: Inside) -> None:
    code = """
executor = FiberExecutor(2, backend="kubernetes", driver_timeout=10)
futures = [executor.submit(time.sleep, 600) for _ in range(2)]
while sum(future.running() for future in futures) < 2:
    time.sleep(0.1)
print("running", flush=True)
time.sleep(1)
if DYING:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(600)
"""
    name = driver(code.replace("DYING", str(how == "it is killed")), after=600)  # its pod lives on
    eventually(lambda: driver.phase(name) != "Pending" and "running" in driver.said(name))
    assert how == "it is killed" or others(own_space)  # a janitor is quick
    if how != "it is killed":
        kubectl("-n", own_space, "delete", "pod", name, "--grace-period=0", "--force")
    eventually(lambda: others(own_space) == [], 100)


def test_a_pod_without_rights_is_told_the_role(own_space: str, driver: Inside) -> None:
    kubectl("-n", own_space, "delete", "rolebinding", "fiberexec")
    name = driver("""
try:
    FiberExecutor(1, backend="kubernetes").submit(int).result()
except Exception as error:
    print(error, error.__cause__)
""")
    eventually(lambda: driver.phase(name) == "Succeeded")
    said = driver.said(name)
    assert "kind: RoleBinding" in said and f"name: driver, namespace: {own_space}" in said and "portforward" not in said


def test_a_pod_without_a_token_is_told_what_it_lacks_and_runs_nothing_here(own_space: str, driver: Inside) -> None:
    code = """
for options in ({}, {"image": "i:1"}):
    try:
        FiberExecutor(1, **options).submit(int).result()
    except Exception as error:
        print(type(error).__name__, error)
"""
    name = driver(code, token=False)
    eventually(lambda: driver.phase(name) == "Succeeded")
    first, second = driver.said(name).splitlines()
    assert first == second and first.startswith("ConfigError this pod has no service account token")
    assert "fiberexec rbac --namespace NAMESPACE" in first and "automountServiceAccountToken: true" in first


def test_pods_in_another_namespace_than_the_programs_belong_to_nobody_and_it_says_so(own_space: str, driver: Inside) -> None:
    with namespace() as other:
        user = f"system:serviceaccount:{own_space}:driver"
        kubectl("apply", "-f", "-", stdin=role(other, user))
        name = driver(f"""
with FiberExecutor(1, backend="kubernetes", backend_options={{"namespace": "{other}"}}) as executor:
    print(executor.submit(pow, 2, 10).result())
""")
        eventually(lambda: driver.phase(name) == "Succeeded")
        said = driver.said(name)
        assert "1024" in said and f"it is in namespace {own_space}, and they are in {other}" in said
