"""The options of the docker backend: what is refused at once, and what it says."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest

from fiberexec import ConfigError
from fiberexec.backends.base import Resources

from .conftest import settings

pytest.importorskip("docker")


def backend(**arguments: Any) -> Any:
    from fiberexec.backends.docker import DockerBackend

    return DockerBackend(settings(**arguments))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"volume": {}}, "has no option 'volume': did you mean 'volumes'"),
        ({"shmsize": "1g"}, "did you mean 'shm_size'"),
        ({"quite_wrong": 1}, "fiberexec's own are advertise_address, "),
        ({"environment": {"A": "B"}}, "use env={...} of the executor"),
        ({"mem_limit": "1g"}, "use memory= of the executor"),
        ({"image": "x"}, "use image= of the executor"),
        ({"name": "x"}, "'name' cannot be set: each container has a name of its own"),
        ({"restart_policy": {}}, "fiberexec itself starts another"),
        ({"pull": "sometimes"}, "pull must be 'missing', 'always' or 'never', got 'sometimes'"),
        ({"user": -1}, "user must be a uid"),
        ({"user": True}, "user must be a uid"),
        ({"user": 1.5}, "user must be a uid"),
        ({"network": "none"}, "from which a container can reach the driver"),
        ({"network": 7}, "network must be a str"),
        ({"labels": {"fiberexec.job": "x"}}, "must not have names that are empty or begin with 'fiberexec.'"),
        ({"labels": {"a": 1}}, "labels must map str to str"),
        ({"labels": 3}, "labels must be a list of str"),
        ({"extra_hosts": ["a"]}, "extra_hosts must map names to addresses"),
        ({"working_dir": ""}, "working_dir must be a str that is not empty"),
        ({"advertise_address": "tcp://10.0.0.1"}, "advertise_address must be a host name or an IP address"),
        ({"advertise_address": "10.0.0.1:80"}, "without a port"),
        ({"advertise_address": 1}, "advertise_address must be a list of str"),
        ({"volumes": {"/data": "data"}}, "must name absolute folders of the container, not 'data'"),
        ({"volumes": {"/data": {"target": "/data"}}}, "must have 'bind'"),
        ({"volumes": {"/data": {"bind": "/data", "mode": "z"}}}, "must have the mode 'ro' or 'rw', not 'z'"),
        ({"volumes": ["/data"]}, "'source:folder'"),
        ({"volumes": {"": "/data"}}, "must name a folder of the host, or a volume"),
        ({"volumes": 5}, "volumes must be a list of str"),
        ({"mounts": [{"target": "/x", "source": "/y", "type": "magic"}]}, 'Unsupported mount type: "magic"'),
        ({"mounts": [{"nonsense": 1}]}, "what docker.types.Mount takes"),
        ({"ulimits": {"nofile": 1}}, "ulimits="),
        ({"ulimits": [{"name": "nofile", "soft": "many"}]}, "Ulimit.soft must be an integer"),
        ({"pids_limit": "many"}, "pids_limit='many'"),
        ({"shm_size": "many"}, "shm_size='many'"),
        ({"sysctls": [1]}, "sysctls=[1]"),
        ({"cpu_shares": "x"}, "cpu_shares="),
        ({"security_opt": "no"}, "security_opt="),
        ({"device_requests": [{"count": "all"}]}, "DeviceRequest.count must be an integer"),
        ({"log_config": 3}, "log_config=3"),
        ({"build_args": {"a": 1}}, "build_args must map str to str"),
        ({"python": 3}, "python must be a str"),
        ({"entrypoint": [1]}, "entrypoint must be a list of str"),
        ({"dockerfile": 1}, "dockerfile must be a str"),
        ({"base_image": ""}, "base_image must be a str that is not empty"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_option_is_refused_when_the_backend_is_made(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        backend(backend_options=options)
    assert said in str(caught.value)


def test_sizes_that_docker_never_takes_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"cpu=0.001: Docker gives a container at least 0.01"):
        backend(cpu=0.001)
    with pytest.raises(ConfigError, match="memory=5 MiB: Docker gives a container at least 6 MiB"):
        backend(memory=5)


def test_a_backend_is_made_without_asking_anybody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    one = backend(cpu=2, memory="1Gi", gpu=2)
    assert one.largest.capacity == Resources(2.0, 1 << 30, 2) and one.largest.devices == ("0", "1")
    assert one.name == "docker" and one.idle_timeout == 60 and one.default_workers >= 1
    one.close()


def test_gpus_are_asked_for_as_docker_wants_it() -> None:
    assert backend(gpu=2)._options.host["device_requests"] == [{"count": 2, "capabilities": [["gpu"]]}]
    mine = [{"device_ids": ["3"], "capabilities": [["gpu"]]}]
    assert backend(gpu=1, backend_options={"device_requests": mine})._options.host["device_requests"] == mine


def test_hardening_gives_way_only_to_what_is_said() -> None:
    host = backend(backend_options={"cap_add": ["NET_RAW"], "security_opt": ["seccomp=unconfined"]})._options.host
    assert host["cap_drop"] == ["ALL"] and host["security_opt"] == ["no-new-privileges", "seccomp=unconfined"] and host["init"]
    host = backend(backend_options={"security_opt": ["no-new-privileges=false"], "cap_drop": []})._options.host
    assert host["security_opt"] == ["no-new-privileges=false"] and host["cap_drop"] == []
    assert "cap_drop" not in backend(backend_options={"privileged": True})._options.host


def test_without_dockers_sdk_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "docker"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "docker", None)
    with pytest.raises(ConfigError, match=r'pip install "fiberexec\[docker\]"'):
        backend()


def test_the_sdk_is_loaded_when_a_backend_is_made_and_not_before() -> None:
    import subprocess

    code = "import sys, fiberexec.backends.docker; print({'docker', 'requests', 'tenacity'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert done.stdout.strip() == "set()", done.stderr
