"""Jobs as pods of a real cluster: what they are given, what they can do, how their ends are told."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import services
from services import cluster

from fiberexec import FiberError, FiberExecutor
from fiberexec.backends.base import Job, JobBackend

from .conftest import SLEEP, Place, apply, eventually, get, kubectl

Make = Callable[..., Place]
pytestmark = pytest.mark.timeout(300)  # images are built and given to the cluster, and pods come as they come
SECRET = b"no-one-may-read-this"


def test_it_is_a_job_backend(place: Make) -> None:
    assert isinstance(place().backend, JobBackend)


def test_an_executor_has_its_workers_in_pods(place: Make, space: str) -> None:
    image = services.cluster_image(services.worker_image())
    with FiberExecutor(2, backend="kubernetes", image=image, backend_options={"namespace": space}) as executor:
        host = executor.submit(platform.node).result(60)
        assert host.startswith("fx-") and host != platform.node()
        assert list(executor.map(pow, range(100), [2] * 100)) == [n * n for n in range(100)]

    def left() -> list[str]:
        """What has not gone: the cluster collects Secrets after their pods, and an outpost stays as long as the program."""
        found = get("-n", space, "pods,secrets", "-l", f"fiberexec.program={host.rpartition('-')[0]}")["items"]
        names = [one["metadata"]["name"] for one in found if not one["metadata"].get("deletionTimestamp")]
        return [name for name in names if "outpost" not in name]

    deadline = time.monotonic() + 60
    while left() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left() == []


WHO = (
    "import getpass, json, os, pathlib; "
    "print(json.dumps([os.getuid(), os.getgid(), getpass.getuser(), str(pathlib.Path.home()), "
    "[line.split()[1] for line in open('/proc/self/status') if line.startswith(('CapBnd', 'NoNew', 'Seccomp:'))], "
    "os.path.exists('/var/run/secrets/kubernetes.io'), [n for n in os.environ if n.endswith('_SERVICE_HOST')], "
    "os.statvfs('/dev/shm').f_blocks * os.statvfs('/dev/shm').f_frsize >> 20]))"
)


def test_a_pod_is_nobody_without_rights_tokens_or_names_of_services(place: Make, space: str) -> None:
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "other", "namespace": space}}
    apply({**service, "spec": {"ports": [{"port": 1}]}})
    one = place()
    log = one.end(one.start(1, f"{WHO}; raise SystemExit(1)")).log
    uid, gid, user, home, status, has_token, names, shared = json.loads(log)
    assert (uid, gid, user, home) == (65534, 65534, "fiberexec", "/tmp")
    assert status == ["0000000000000000", "1", "2"]
    assert not has_token and names == ["KUBERNETES_SERVICE_HOST"]  # which the kubelet gives to all
    assert shared > 100  # MiB: large arrays fit


def test_credentials_are_a_file_of_a_secret_that_goes_with_the_pod(place: Make, space: str) -> None:
    one = place()
    code = f"print(open('/var/run/fiberexec/credentials').read() == {SECRET.decode()!r}); {SLEEP}"
    job = one.start(1, code, SECRET)
    one.says(job, "True")
    pod = kubectl("-n", space, "get", "pod", job, "-o", "yaml")
    assert SECRET.decode() not in pod.replace(repr(SECRET.decode()), "")  # the code above has it, nothing else
    [secret] = get("-n", space, "secrets", "-l", f"fiberexec.program={one.program}")["items"]
    assert secret["metadata"]["ownerReferences"][0]["name"] == job and secret["immutable"]
    kubectl("-n", space, "delete", "pod", job, "--grace-period=1")
    eventually(lambda: not get("-n", space, "secrets", "-l", f"fiberexec.program={one.program}")["items"])


def test_the_agents_command_names_the_file_where_others_have_stdin(place: Make) -> None:
    one = place()
    code = "import sys; print(sys.argv[1:]); raise SystemExit(1)"
    one.backend.start(Job(f"{one.program}-1", one.program, ("python", "-c", code, "-"), b"x"))
    assert one.end(f"{one.program}-1").log == "['/var/run/fiberexec/credentials']\n"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("pass", 0),
        ("print('last words'); raise SystemExit(3)", 3),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV); signal.pause()", None),
    ],
)
def test_an_end_is_told_as_it_was(code: str, expected: int | None, place: Make) -> None:
    one = place()
    job = one.start(1, code)
    if expected is None:  # a first process ignores what it has no handler for
        one.runs(job)
        one.backend.terminate([job])
        assert one.end(job).code == -9
        return
    exit = one.end(job)
    assert (exit.code, exit.reason, exit.infrastructure) == (expected, "", False)
    assert exit.log == ("last words\n" if expected else "")


def test_a_job_that_was_killed_for_its_memory_says_so_and_names_the_limit(place: Make) -> None:
    one = place(memory="64Mi")
    exit = one.end(one.start(1, "x = bytearray(1 << 30)"))
    assert (exit.code, exit.reason, exit.infrastructure) == (-9, "OOMKilled", False)
    assert "its limit of 64 MiB" in exit.log


def test_a_child_that_was_killed_for_its_memory_is_not_its_jobs_end(place: Make) -> None:
    one = place(memory="64Mi")
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'bytearray(1 << 30)']); sys.exit(7)"
    exit = one.end(one.start(1, code))
    assert (exit.code, exit.infrastructure) == (7, False)


@pytest.mark.parametrize("grace", [0, 1])
def test_a_pod_that_somebody_deletes_is_nobodys_fault(grace: int, place: Make, space: str) -> None:
    one = place()
    job = one.start(1, SLEEP)
    one.says(job, "up")
    began = time.monotonic()
    kubectl("-n", space, "delete", "pod", job, f"--grace-period={grace}", "--wait=false", *(["--force"] if not grace else []))
    exit = one.end(job)
    assert (exit.reason, exit.infrastructure) == ("Deleted", True)
    assert grace or time.monotonic() - began > 4  # its processes outlive its object


def test_an_evicted_pod_is_nobodys_fault(place: Make, space: str) -> None:
    one = place()
    job = one.start(1, SLEEP)
    one.says(job, "up")
    eviction: dict[str, object] = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": job}}
    eviction["deleteOptions"] = {"gracePeriodSeconds": 1}
    kubectl("create", "--raw", f"/api/v1/namespaces/{space}/pods/{job}/eviction", "-f", "-", stdin=json.dumps(eviction))
    exit = one.end(job)
    assert (exit.reason, exit.infrastructure) == ("EvictionByEvictionAPI", True)


def test_a_pod_that_takes_more_disk_than_it_may_is_to_blame(place: Make) -> None:
    template = {"spec": {"containers": [{"name": "worker", "resources": {"limits": {"ephemeral-storage": "1Mi"}}}]}}
    one = place(backend_options={"pod_template": template})
    job = one.start(1, f"open('/tmp/big', 'wb').write(bytes(8 << 20)); {SLEEP}")
    exit = one.end(job, 100)
    assert (exit.reason, exit.infrastructure) == ("Evicted", False)
    assert "ephemeral" in exit.log and "1Mi" in exit.log


def test_terminated_jobs_end_and_are_gone(place: Make) -> None:
    one = place()
    running, starting = one.start(1, SLEEP), one.start(2, SLEEP)
    one.says(running, "up")
    one.backend.terminate([running, starting])
    assert one.end(running).code == -9
    one.end(starting)
    eventually(lambda: [job for job in one.backend.list() if job["program"] == one.program] == [])


def test_a_program_is_removed_whole_and_no_other_is_touched(place: Make, space: str) -> None:
    one, other = place(), place()
    for number in range(3):
        one.start(number, SLEEP)
    kept = other.start(1, SLEEP)
    assert one.backend.remove(one.program) == 3
    for number in range(3):
        one.end(f"{one.program}-{number}")
    eventually(lambda: one.backend.remove(one.program) == 0)
    eventually(lambda: not get("-n", space, "secrets", "-l", f"fiberexec.program={one.program}")["items"])
    assert kept in [job["id"] for job in one.backend.list()] and not other.ended


def test_jobs_are_listed_with_what_is_known_of_them(place: Make) -> None:
    one = place(backend_options={"labels": {"team": "blue"}, "annotations": {"example.org/why": "a test"}})
    job = one.start(1, SLEEP)
    one.runs(job)
    [found] = [each for each in one.backend.list() if each["id"] == job]
    assert found["program"] == one.program and found["image"] == services.bare_image() and found["host"]
    assert found["started"] > 1e9 and found["labels"]["team"] == "blue"
    assert found["labels"]["fiberexec.driver"].startswith(f"{os.getpid()}@")


def test_logs_are_followed_until_the_job_ends(place: Make) -> None:
    one = place()
    job = one.start(1, "import time; print('ä', flush=True); time.sleep(8); print('b\\nc'); print('d', end='')")
    one.runs(job)
    assert list(one.backend.logs(job, follow=True)) == ["ä", "b", "c", "d"]
    with pytest.raises(FiberError, match="there is no job 'no-such'"):
        next(one.backend.logs("no-such"))


def test_a_driver_that_pods_reach_says_so(place: Make, space: str) -> None:
    image = services.cluster_image(services.worker_image())
    options = {"namespace": space, "advertise_address": cluster.ADDRESS}
    place()  # sets KUBECONFIG
    with FiberExecutor(1, backend="kubernetes", image=image, backend_options=options) as executor:
        assert executor.submit(pow, 2, 10).result(60) == 1024
    one = place(backend_options={"advertise_address": ["driver.example", "::1"]})
    assert one.backend.advertise() == ("driver.example", "::1")
    assert one.backend.reach(7, "x") == ("driver.example:7", "[::1]:7")


def test_volumes_are_mounted(place: Make, space: str) -> None:
    apply(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "conf", "namespace": space}, "data": {"a": "1"}},
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "keys", "namespace": space}, "stringData": {"b": "2"}},
    )
    volumes = {"/conf": {"configMap": "conf"}, "/keys": {"secret": "keys", "read_only": True}, "/scratch": {"emptyDir": {}}}
    one = place(backend_options={"volumes": volumes})
    code = "open('/scratch/x', 'w'); print(open('/conf/a').read(), open('/keys/b').read()); raise SystemExit(1)"
    assert one.end(one.start(1, code)).log == "1 2\n"


def test_what_options_say_beats_the_template_and_ours_beats_both(place: Make, space: str) -> None:
    template = f"""
        metadata: {{labels: {{team: red, color: green}}, name: mine}}
        spec:
          activeDeadlineSeconds: 500
          restartPolicy: Always
          nodeSelector: {{a: b}}
          tolerations: [{{key: gpu, operator: Exists}}]
          securityContext: {{runAsUser: 1234}}
          containers:
          - {{name: worker, image: {services.bare_image()}, env: [{{name: TEAM, value: red}}]}}
    """
    node = {"kubernetes.io/os": "linux"}
    options = {"pod_template": template, "labels": {"team": "blue"}, "node_selector": node, "priority_class": None}
    one = place(image=None, cpu=0.1, memory=100, backend_options=options)
    job = one.start(1, SLEEP)
    pod = get("-n", space, "pod", job)
    assert pod["metadata"]["labels"].items() >= {"team": "blue", "color": "green", "fiberexec.job": job}.items()
    spec = pod["spec"]
    assert spec["nodeSelector"] == {"a": "b", **node} and spec["restartPolicy"] == "Never"
    assert spec["activeDeadlineSeconds"] == 500 and spec["tolerations"][0]["key"] == "gpu"
    assert spec["securityContext"] == {
        "runAsUser": 1234, "runAsGroup": 65534, "runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}
    }  # fmt: skip
    [container] = spec["containers"]
    assert {"name": "TEAM", "value": "red"} in container["env"]
    assert container["resources"]["limits"] == {"cpu": "100m", "memory": str(100 << 20)}
    assert container["resources"]["requests"] == container["resources"]["limits"]


def test_tasks_survive_pods_that_are_deleted_and_none_is_charged(place: Make, space: str) -> None:
    place()  # sets KUBECONFIG
    image = services.cluster_image(services.worker_image())
    options = {"namespace": space, "advertise_address": cluster.ADDRESS, "labels": {"test": "survive"}}
    with FiberExecutor(3, backend="kubernetes", image=image, max_worker_losses=1, backend_options=options) as executor:
        squares = [f"sleep 0.2; echo {number * number}" for number in range(200)]
        futures = [executor.submit(subprocess.check_output, ["sh", "-c", text]) for text in squares]
        for grace in (0, 1, 0):
            futures[sum(future.done() for future in futures[:-5]) + 4].result(60)
            found = get("-n", space, "pods", "-l", "test=survive", "--field-selector=status.phase=Running")["items"]
            if found:
                force = ["--force"] if not grace else []
                name = found[0]["metadata"]["name"]
                kubectl("-n", space, "delete", "pod", name, f"--grace-period={grace}", "--wait=false", *force)
        assert [int(future.result(100)) for future in futures] == [number * number for number in range(200)]


def test_ten_pods_come_up_at_once_and_each_end_is_told_once(place: Make) -> None:
    one = place()
    with ThreadPoolExecutor(10) as pool:
        jobs = list(pool.map(lambda number: one.start(number, SLEEP), range(10)))
    eventually(lambda: sum(job["program"] == one.program and job["state"] == "running" for job in one.backend.list()) == 10)
    assert one.backend.remove(one.program) == 10
    for job in jobs:
        one.end(job)
    assert sorted(ended.job for ended in one.ended) == sorted(jobs)
