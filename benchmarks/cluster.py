"""In a Kubernetes cluster: ``python -m benchmarks.cluster figures`` and ``python -m benchmarks.cluster peers``.

figures: how soon a pod's first task has a result, how soon 50 workers have joined, how many calls an idle executor makes.
peers: the rows ``pods_*``, beside Dask, whose scheduler and workers are pods of the same image.

The driver is a pod as well, started by ``fiberexec run``. Everything is in a namespace of its own, which goes at the end.
Needs the rights of a cluster's administrator, and kubectl; where no image is named, the services of the tests.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from .rows import ELSEWHERE

ROOT = Path(__file__).resolve().parent.parent
FOLDER = "/bench"
PORT = 8786
TARGETS = {"first_result": 1.5, "joined": 10.0, "idle": 1.0}


class Cluster:
    """One, as kubectl sees it, and a namespace there."""

    def __init__(self, kubectl: str) -> None:
        self._kubectl = kubectl
        self.space = f"fx-bench-{os.getpid()}"

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        done = subprocess.run([self._kubectl, *arguments], capture_output=True, text=True, input=stdin, timeout=120)
        if done.returncode:
            raise SystemExit(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def apply(self, *things: dict[str, Any]) -> None:
        self.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": list(things)}))

    @contextmanager
    def namespace(self) -> Iterator[None]:
        self.kubectl("create", "namespace", self.space)
        try:
            self.kubectl("-n", self.space, "wait", "--for=create", "serviceaccount/default", "--timeout=60s")
            yield
        finally:
            self.kubectl("delete", "namespace", self.space, "--wait=false")

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Calls by the driver's service account are counted apart, as a flow of their own."""
        subject = {"kind": "ServiceAccount", "serviceAccount": {"namespace": self.space, "name": "fiberexec"}}
        every = {"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"], "namespaces": ["*"], "clusterScope": True}
        rule = {"subjects": [subject], "resourceRules": [every]}
        self.apply(
            {
                "apiVersion": "flowcontrol.apiserver.k8s.io/v1",
                "kind": "FlowSchema",
                "metadata": {"name": self.space},
                "spec": {
                    "matchingPrecedence": 100,
                    "priorityLevelConfiguration": {"name": "workload-low"},
                    "rules": [rule],
                },
            }
        )
        try:
            yield
        finally:
            self.kubectl("delete", "flowschema", self.space)

    def calls(self) -> float:
        """How many there were; watches count when they begin."""
        found = re.search(
            rf'^apiserver_flowcontrol_dispatched_requests_total{{flow_schema="{self.space}",.*}} (\S+)$',
            self.kubectl("get", "--raw", "/metrics"),
            re.MULTILINE,
        )
        return float(found[1]) if found else 0.0

    def run(self, image: str, *command: str, **env: str) -> subprocess.Popen[str]:
        """Start a program of this package in a pod."""
        options = [word for name, value in env.items() for word in ("--env", f"{name}={value}")]
        place = ("--backend", "kubernetes", "--namespace", self.space, "--image", image, "--ship", "benchmarks")
        line = [sys.executable, "-m", "fiberexec", "run", *place, *options, "python", "-m", *command]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(line, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)

    def dask(self, image: str, workers: int) -> str:
        """Start a scheduler and workers; the scheduler's address."""
        files = {path.name: path.read_text() for path in sorted((ROOT / "benchmarks").glob("*.py"))}
        self.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": self._named("code"), "data": files})
        dask = ["python", "-m", "distributed.cli.dask_scheduler", "--no-dashboard", "--port", str(PORT)]
        self.apply(self._pod("scheduler", image, dask))
        self.kubectl("-n", self.space, "wait", "--for=condition=Ready", "pod/scheduler", "--timeout=100s")
        host = self.kubectl("-n", self.space, "get", "pod", "scheduler", "-o", "jsonpath={.status.podIP}")
        worker = ["python", "-m", "distributed.cli.dask_worker", f"tcp://{host}:{PORT}", "--nthreads", "1", "--no-dashboard"]
        self.apply(*(self._pod(f"worker-{number}", image, worker) for number in range(workers)))
        return f"tcp://{host}:{PORT}"

    def _named(self, name: str) -> dict[str, str]:
        return {"name": name, "namespace": self.space}

    def _pod(self, name: str, image: str, command: list[str]) -> dict[str, Any]:
        """A pod that can import what the tasks are made of."""
        container = {
            "name": "main",
            "image": image,
            "imagePullPolicy": "IfNotPresent",
            "command": command,
            "env": [{"name": "PYTHONPATH", "value": FOLDER}, {"name": "HOME", "value": "/tmp"}],
            "volumeMounts": [{"name": "code", "mountPath": f"{FOLDER}/benchmarks"}],
            "workingDir": "/tmp",
        }
        volumes = [{"name": "code", "configMap": {"name": "code"}}]
        spec = {"restartPolicy": "Never", "containers": [container], "volumes": volumes}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": self._named(name), "spec": spec}


def figures(cluster: Cluster, image: str, arguments: list[str]) -> bool:
    """Print each figure and its target; whether all are met."""
    found: dict[str, list[float]] = {}
    before = 0.0
    with cluster.counted(), cluster.run(image, "benchmarks.pods", *arguments) as driver:
        assert driver.stdout is not None
        for line in driver.stdout:
            word, _, rest = line.strip().partition(" ")
            if word != "FIGURE":
                print(line, end="", file=sys.stderr)
                continue
            name, _, text = rest.partition(" ")
            values = json.loads(text)
            print(name, values, file=sys.stderr)
            if name == "first_result":
                found.setdefault(name, []).append(values["from_running"])
            elif name == "joined":
                found[name] = [values["from_last_start"]]
            elif name == "idle_begins":
                before = cluster.calls()
                if not before:
                    raise SystemExit("the API server does not count the driver's calls: what it makes is not known")
            else:
                found["idle"] = [(cluster.calls() - before) * 60 / values["seconds"]]
    if driver.returncode:
        raise SystemExit(f"the driver has ended with {driver.returncode}")
    titles = {
        "first_result": "a container's start to its first task's result, s",
        "joined": "the last container's start until all have joined, s",
        "idle": "calls a minute of an idle executor, watches that begin among them",
    }
    print("| what | target | median | worst | |\n|---|---|---|---|---|")
    met = True
    for name, title in titles.items():
        values, target = found[name], TARGETS[name]
        median = statistics.median(values)
        met = met and median <= target
        verdict = "met" if median <= target else "**missed**"
        print(f"| {title} | ≤ {target:g} | {median:.2f} | {max(values):.2f} | {verdict} |")
    return met


def peers(cluster: Cluster, image: str, arguments: list[str]) -> bool:
    """Print the tables of the rows; whether the run came to its end."""
    address = cluster.dask(image, 2)
    named = "--row" in arguments
    rows = [] if named else [word for row in ELSEWHERE if row.key.startswith("pods_") for word in ("--row", row.key)]
    options = [*rows, "--peer", "dask", *arguments]
    with cluster.run(image, "benchmarks", *options, BENCHMARK_DASK=address) as driver:
        assert driver.stdout is not None
        for line in driver.stdout:
            print(line, end="", flush=True)
    return driver.returncode == 0


def prepared(image: str | None) -> tuple[str, str]:
    """(kubectl, image): those of the tests' services, where none is given."""
    if image is not None:
        return "kubectl", image
    sys.path.insert(0, str(ROOT / "tests"))
    services: Any = import_module("services")
    os.environ["KUBECONFIG"] = services.require_kubernetes()
    kubectl = str(services.cluster.HERE / "bin" / "kubectl")
    return kubectl, services.cluster_image(services.worker_image(None, "kubernetes", "distributed", "numpy"))


def main() -> None:
    """Measure what the command line says. What else it has goes to benchmarks.pods, or to benchmarks."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cluster", description="fiberexec in a Kubernetes cluster")
    parser.add_argument("what", choices=["figures", "peers"])
    parser.add_argument("--image", metavar="REF", help="with fiberexec, kubernetes, distributed, numpy (default: it is built)")
    options, rest = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that nothing stays in the cluster
    kubectl, image = prepared(options.image)
    cluster = Cluster(kubectl)
    begun = time.monotonic()
    with cluster.namespace():
        met = (figures if options.what == "figures" else peers)(cluster, image, rest)
    print(f"{time.monotonic() - begun:.0f} s", file=sys.stderr)
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
