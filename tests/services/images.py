"""Images for workers, made from this machine's own files: no registry is asked, driver and workers have the same Python.

Three layers, each kept until what it is made of changes:
- fiberexec-test/python:3.12, an interpreter of this machine, what it needs, busybox for all the rest, and pip;
- the same with requirements, installed by the interpreter's pip as it is configured here;
- the same with the package under test.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from . import engine
from .base import STATE, ServiceError, install, locked, run, say, succeeds

_LABEL = "fiberexec.test.key"

_ASK = """
import json, os, platform, sys, sysconfig
paths = sysconfig.get_paths()
print(json.dumps({
    "path": os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable),
    "prefix": sys.base_prefix, "site": paths["purelib"], "stdlib": paths["stdlib"],
    "minor": "%d.%d" % sys.version_info[:2], "version": platform.python_version()}))
"""


@dataclass(frozen=True)
class Interpreter:
    """A Python of this machine, not a virtual environment's."""

    path: str
    prefix: str
    stdlib: str
    site: str  # where packages are installed
    minor: str  # 3.12
    version: str  # 3.12.1

    def there(self, path: str) -> str:
        """Where something of its prefix is in an image."""
        inside = path.startswith(self.prefix + "/") and self.prefix != "/usr"
        return "/usr/local" + path[len(self.prefix) :] if inside else path


def find_python(minor: str | None = None) -> Interpreter:
    """The interpreter of a minor version ("3.12"), by default of the running one."""
    candidates = [sys.executable]
    if minor:
        pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
        candidates += [str(path) for path in sorted(pyenv.glob(f"versions/{minor}.*/bin/python3"))]
        candidates += [path for path in (shutil.which(f"python{minor}"), f"/usr/bin/python{minor}") if path]
    for candidate in candidates:
        found = _ask(candidate)
        found = found and _ask(found.path)  # what a virtual environment is based on
        if found and minor in (None, found.minor):
            return found
    raise ServiceError(f"there is no Python {minor} on this machine, neither on PATH nor in pyenv")


def _ask(python: str) -> Interpreter | None:
    try:
        done = subprocess.run([python, "-I", "-c", _ASK], capture_output=True, timeout=60)
        return Interpreter(**json.loads(done.stdout))
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None  # for instance one of pyenv's shims, whose version is not selected


def image(name: str, minor: str | None = None, requirements: Sequence[str] = ()) -> str:
    """An image with Python and requirements (what pip takes, paths too); returns its name."""
    python = find_python(minor)
    _need_engine()
    with locked("image"):
        base = _base(python)
        if requirements:
            _with_requirements(name, base, python, requirements)
        else:
            run("docker", "tag", base, name)
    return name


def worker(minor: str | None, package: Path, requirements: Sequence[str]) -> str:
    """An image with requirements and that very package folder, compiled; returns its name, which changes with its content."""
    python = find_python(minor)
    _need_engine()
    with locked("image"):
        wanted = _hash("".join(sorted(requirements)))
        base = _with_requirements(f"fiberexec-test/requirements:{python.minor}-{wanted}", _base(python), python, requirements)
        key = _hash(_id(base), *_contents(package))
        name = f"fiberexec-test/worker:{python.minor}-{key}"
        if _key(name) != key:
            with _scratch() as scratch:
                _copy_package(package, scratch / "site", python)
                _write_script(scratch / "bin" / package.name, f"from {package.name}.cli import main\nmain()\n")
                _build(name, base, key, scratch, python)
            # Those of yesterday's versions; one that a container uses stays.
            old = ["--filter", f"label={_LABEL}", "--filter", "until=24h"]
            succeeds("docker", "image", "prune", "--all", "--force", *old, seconds=60)
    return name


def _need_engine() -> None:
    if not engine.answers():
        raise ServiceError("no Docker engine answers: start one by `docker up`")


def _with_requirements(name: str, base: str, python: Interpreter, requirements: Sequence[str]) -> str:
    key = _hash(_id(base), *requirements)
    if _key(name) != key or any(os.path.exists(each) for each in requirements):  # a path's content may have changed
        say(f"building {name}")
        with _scratch() as scratch:
            _pip(python, scratch, requirements)
            _build(name, base, key, scratch, python)
    return name


def _build(name: str, base: str, key: str, scratch: Path, python: Interpreter) -> None:
    (scratch / "site").mkdir(exist_ok=True)
    (scratch / "bin").mkdir(exist_ok=True)
    steps = f"FROM {base}\nCOPY site {python.there(python.site)}\nCOPY bin /usr/local/bin\n"
    (scratch / "Dockerfile").write_text(steps)
    # The classic builder is the one that every client has.
    options = ["--network", "none", "--label", f"{_LABEL}={key}", "--tag", name]
    run("env", "DOCKER_BUILDKIT=0", "docker", "build", *options, scratch)


def _pip(python: Interpreter, scratch: Path, requirements: Sequence[str]) -> None:
    """Install requirements into scratch/site and scratch/bin."""
    pip = [python.path, "-m", "pip"]
    if not succeeds(*pip, "--version", seconds=60):
        run(python.path, "-m", "venv", scratch / "venv")
        pip = [str(scratch / "venv/bin/python"), "-m", "pip"]
    options = ["--quiet", "--no-warn-script-location", "--disable-pip-version-check", "--root-user-action=ignore"]
    run(*pip, "install", *options, "--target", scratch / "site", *requirements, seconds=1200)
    if (scratch / "site" / "bin").exists():
        (scratch / "site" / "bin").rename(scratch / "bin")
    for script in (scratch / "bin").glob("*"):
        _write_script(script, script.read_text().partition("\n")[2])  # it names the interpreter of this machine


def _write_script(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/usr/bin/env python3\n{text}")
    path.chmod(0o755)


def _copy_package(package: Path, site: Path, python: Interpreter) -> None:
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(package, site / package.name, ignore=ignored)
    for info in package.parent.glob(f"{package.name}-*.dist-info"):  # its version and entry points
        shutil.copytree(info, site / info.name, ignore=ignored)
    # Compiled here once, not in each container. Whatever happens to times on the way, the content stays the same.
    options = ["-q", "--invalidation-mode", "unchecked-hash", "-s", str(site), "-p", python.there(python.site)]
    # A module that cannot be compiled is for whoever imports it to find.
    succeeds(python.path, "-m", "compileall", *options, site / package.name, seconds=100)


@contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="image-", dir=STATE) as folder:
        yield Path(folder)


# What an image was made of is in a label of it: nothing else has to be remembered.


def _hash(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(b"%d:%s" % (len(data), data))
    return digest.hexdigest()[:12]


def _contents(folder: Path) -> Iterable[str | bytes]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield str(path.relative_to(folder))
            yield path.read_bytes()


def _inspect(name: str, what: str) -> str:
    try:
        return run("docker", "image", "inspect", "--format", what, name, seconds=30).strip()
    except ServiceError:
        return ""


def _key(name: str) -> str:
    return _inspect(name, f'{{{{index .Config.Labels "{_LABEL}"}}}}')


def _id(name: str) -> str:
    return _inspect(name, "{{.Id}}")


def _base(python: Interpreter) -> str:
    name = f"fiberexec-test/python:{python.minor}"
    key = _hash(python.path, python.version, Path(__file__).read_bytes())
    if _key(name) != key:
        say(f"building {name} from {python.path}")
        install({"busybox": "busybox-static"})
        root = name + "-bare"
        with _scratch() as scratch:
            with tarfile.open(scratch / "root.tar", "w") as archive:
                _write_root(archive, python)
            settings = ["ENV LANG=C.UTF-8 PYTHONUNBUFFERED=1", 'CMD ["python3"]']
            run("docker", "import", *(f"--change={each}" for each in settings), scratch / "root.tar", root)
            _pip(python, scratch, ["pip"])
            _build(name, root, key, scratch, python)
    return name


# Tests, and programs that no worker runs: most of an interpreter's size. Packages come from requirements alone.
_LEFT_OUT = {"test", "tests", "idlelib", "tkinter", "turtledemo", "ensurepip", "site-packages", "dist-packages"}
_LEFT_OUT.add("EXTERNALLY-MANAGED")  # Debian's word against pip, which does not hold in an image


def _write_root(archive: tarfile.TarFile, python: Interpreter) -> None:
    """A root file system with that Python in /usr/local, or where Debian has it."""
    for folder in ("bin", "sbin", "lib", "lib64"):
        _add(archive, f"usr/{folder}", tarfile.DIRTYPE)
        _add(archive, folder, tarfile.SYMTYPE, target=f"usr/{folder}")
    for folder in ("usr/local/bin", "root", "run", "etc/ssl/certs", "proc", "sys", "dev"):
        _add(archive, folder, tarfile.DIRTYPE)
    for folder in ("tmp", "var/tmp"):
        _add(archive, folder, tarfile.DIRTYPE, mode=0o1777)
    _add(archive, "etc/passwd", text="root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n")
    _add(archive, "etc/group", text="root:x:0:\nnogroup:x:65534:\n")
    _add(archive, "etc/nsswitch.conf", text="hosts: files dns\n")

    tools = Path(shutil.which("busybox") or "/bin/busybox")
    archive.add(tools.resolve(), "usr/bin/busybox")
    for tool in run(tools, "--list").split():
        if tool != "busybox":
            _add(archive, f"usr/bin/{tool}", tarfile.SYMTYPE, target="/usr/bin/busybox")

    there = python.there(python.path)
    archive.add(python.path, there)
    for alias in {"/usr/local/bin/python", "/usr/local/bin/python3", f"/usr/local/bin/python{python.minor}"} - {there}:
        _add(archive, alias, tarfile.SYMTYPE, target=there)
    archive.add(python.stdlib, python.there(python.stdlib), filter=_wanted)
    for name, path in _libraries(python).items():
        loader = name.startswith("ld-")  # every program names its path; for the others it knows where to look
        archive.add(os.path.realpath(path), f"/usr{path.removeprefix('/usr')}" if loader else f"{_system_libraries()}/{name}")

    # Whom this machine trusts, the image trusts: a proxy's authority too. Programs look in the one place or the other.
    bundle = Path("/etc/ssl/certs/ca-certificates.crt")
    if bundle.exists():
        archive.add(bundle.resolve(), str(bundle))
        _add(archive, "usr/lib/ssl", tarfile.DIRTYPE)
        _add(archive, "usr/lib/ssl/cert.pem", tarfile.SYMTYPE, target=str(bundle))
        _add(archive, "usr/lib/ssl/certs", tarfile.SYMTYPE, target=str(bundle.parent))


def _add(
    archive: tarfile.TarFile, path: str, kind: bytes = tarfile.REGTYPE, *, target: str = "", text: str = "", mode: int = 0
) -> None:
    entry = tarfile.TarInfo(path)
    entry.type, entry.linkname, entry.mode = kind, target, mode or (0o755 if kind == tarfile.DIRTYPE else 0o644)
    data = text.encode()
    entry.size = len(data)
    archive.addfile(entry, BytesIO(data))


def _wanted(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    name = os.path.basename(entry.name)
    if name in _LEFT_OUT or name.startswith("config-") or name.endswith(".a"):
        return None
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = "root"
    return entry


def _system_libraries() -> str:
    return f"/usr/lib/{os.uname().machine}-linux-gnu"


def _libraries(python: Interpreter) -> dict[str, str]:
    """The shared libraries of the interpreter and its modules, and those that wheels may count on, by name."""
    modules = [str(path) for path in Path(python.stdlib, "lib-dynload").glob("*.so") if "tkinter" not in path.name]
    listing = subprocess.run(["ldd", python.path, *modules], capture_output=True, text=True).stdout
    found = {os.path.basename(path): path for path in re.findall(r"(/\S+) \(0x", listing)}
    for name in ("stdc++.so.6", "gcc_s.so.1", "rt.so.1", "pthread.so.0", "dl.so.2", "util.so.1", "resolv.so.2"):
        name = f"lib{name}"
        path = f"{_system_libraries()}/{name}"
        if os.path.exists(path):
            found.setdefault(name, path)
    return found
