"""The cluster does what tests count on: see README.md beside this file."""

from __future__ import annotations

import base64
import json
import socket
import ssl
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

import services
from services import cluster, network

HERE = Path(__file__).parent
VERSIONS = "import fiberexec, json, sys; print(json.dumps(sys.version_info[:3]))"


def kubectl(*arguments: str) -> str:
    command = [str(cluster.HERE / "bin" / "kubectl"), "--kubeconfig", services.require_kubernetes(), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def pod() -> Iterator[str]:
    """A name for a pod, which goes at the end."""
    services.require_kubernetes()
    name = f"test-{uuid.uuid4().hex[:8]}"
    yield name
    kubectl("delete", "pod", name, "--grace-period", "0", "--force", "--ignore-not-found")


def run_python(pod: str, code: str) -> str:
    """What that code prints in a pod with the worker image."""
    image = services.cluster_image(services.worker_image())
    kubectl("run", pod, "--image", image, "--restart", "Never", "--", "python", "-c", code)
    kubectl("wait", "--for", "jsonpath={.status.phase}=Succeeded", f"pod/{pod}", "--timeout", "60s")
    return kubectl("logs", pod)


def test_a_cluster_that_runs_is_left_as_it_is() -> None:
    config = services.require_kubernetes()
    pid = (cluster.HERE / "kube-apiserver.pid").read_text()
    done = subprocess.run([sys.executable, str(HERE), "kubernetes", "up"], capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == config
    assert (cluster.HERE / "kube-apiserver.pid").read_text() == pid


def test_what_pods_know_of_this_machine_stays_true_while_others_come_and_go() -> None:
    services.require_kubernetes()
    given = 3  # NET_ADDR_SET of Linux: the address is the bridge's own, and not that of one of its ports
    assert int(Path(f"/sys/class/net/{cluster.BRIDGE}/addr_assign_type").read_text()) == given


def test_a_pod_runs_the_package_that_is_imported_here(pod: str) -> None:
    assert json.loads(run_python(pod, VERSIONS)) == list(sys.version_info[:3])


ASK_API = """
import json, ssl, urllib.request
folder = "/var/run/secrets/kubernetes.io/serviceaccount"
context = ssl.create_default_context(cafile=folder + "/ca.crt")
request = urllib.request.Request("https://10.96.0.1/version")
request.add_header("Authorization", "Bearer " + open(folder + "/token").read())
print(json.load(urllib.request.urlopen(request, context=context, timeout=10))["gitVersion"])
"""


def test_a_pod_reaches_the_api_server_as_its_service_account(pod: str) -> None:
    assert run_python(pod, ASK_API).startswith("v1.34.")


REACH = """
import socket
try:
    socket.create_connection(({!r}, {}), 1).close()
    print("reached")
except OSError as error:
    print(type(error).__name__)
"""


def test_a_host_outside_reaches_only_the_api_server(pod: str) -> None:
    (host,) = services.require_netns(1)

    def reaches(address: str, port: int) -> str:
        code = REACH.format(address, port)
        done = subprocess.run(services.in_host(host, sys.executable, "-I", "-c", code), capture_output=True, text=True)
        return done.stdout.strip()

    listener = "import socket; s = socket.create_server(('', 7000)); print('listening', flush=True); s.accept()"
    with subprocess.Popen(services.in_host(host, sys.executable, "-c", listener), stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "listening\n"
            assert reaches(cluster.ADDRESS, 6443) == "OSError"  # no route
            network.link("only", host, cluster.ADDRESS)
            assert reaches(cluster.ADDRESS, 6443) == "reached"
            assert reaches(network.address(network.DRIVER), 22) == "TimeoutError"
            assert run_python(pod, REACH.format(network.address(host), 7000)) == "TimeoutError"
        finally:
            network.link("restore", host)
            server.kill()


def test_strict_clients_accept_the_clusters_certificates() -> None:
    config = json.loads(Path(services.require_kubernetes()).read_text())
    authority = config["clusters"][0]["cluster"]["certificate-authority-data"]
    context = ssl.create_default_context(cadata=base64.b64decode(authority).decode())
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    with socket.create_connection((cluster.ADDRESS, 6443), 10) as connection:
        with context.wrap_socket(connection, server_hostname=cluster.ADDRESS) as secure:
            assert secure.version() == "TLSv1.3"
