"""`fiberexec doctor`: what is checked on this host, and what is said about it. What jobs say of theirs is in job_checks."""

from __future__ import annotations

import concurrent.futures
import importlib
import importlib.metadata
import inspect
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import fiberexec
from fiberexec import _config
from fiberexec._cli import probe
from fiberexec._cli.listener import Listening
from fiberexec._errors import ConfigError, FiberError

OK, WARNING, BROKEN, SKIPPED = "ok", "warning", "broken", "skipped"
_OLDEST, _NEWEST = (3, 10), (3, 13)
_EXTRAS = ("docker", "kubernetes", "progress")
_NEEDED_FOR = {"docker": "docker", "kubernetes": "kubernetes"}  # backend: extra
_TIMEOUT = 60.0  # seconds that one check may take


class Finding(NamedTuple):
    """What a check has found. The names of these are those of ``--json``."""

    check: str
    status: str  # OK, WARNING, BROKEN or SKIPPED
    found: str
    remedy: str = ""  # what to do


def examine(backend: str | None, image: str | None) -> Iterator[Finding]:
    """The findings, each as soon as it is there. Without a backend: that of the settings."""
    yield _python()
    yield Finding("fiberexec", OK, f"{fiberexec.__version__} in {fiberexec.__path__[0]}")
    dependencies = list(_dependencies())
    yield from dependencies
    try:
        settings = _config.load(backend=backend, image=image)
        yield Finding("settings", OK, f"backend {settings.backend!r} ({settings.sources['backend']})")
    except ConfigError as error:
        yield Finding("settings", BROKEN, str(error), "correct it; `fiberexec config` shows them all")
        settings = _config.Settings(backend=backend or "local", image=image)
    yield from _extras(settings.backend)
    yield _guarded("temporary files", _temporary)
    yield _guarded("local workers", _local_task)
    if any(finding.status == BROKEN for finding in dependencies):
        yield Finding("encryption", SKIPPED, "it needs what is missing above")
        return
    handshake = _guarded("encryption", _handshake)
    yield handshake
    if settings.backend != "local":
        from fiberexec._cli import job_checks

        yield from job_checks.examine(settings)


def _guarded(check: str, call: Callable[[], Finding]) -> Finding:
    try:
        return call()
    except FiberError as error:
        return Finding(check, BROKEN, str(error))
    except Exception as error:
        return Finding(check, BROKEN, f"{type(error).__name__}: {error}")


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    found = f"{version} at {sys.executable or '(no interpreter)'}"
    if not sys.executable:
        return Finding("python", BROKEN, found, "sys.executable is empty: run a Python interpreter that can start others")
    if not _OLDEST <= sys.version_info[:2] <= _NEWEST:
        oldest, newest = (".".join(map(str, each)) for each in (_OLDEST, _NEWEST))
        return Finding("python", WARNING, found, f"fiberexec is tested with Python {oldest} to {newest}: use one of them")
    return Finding("python", OK, found)


# -- packages


def _dependencies() -> Iterator[Finding]:
    try:
        wanted = importlib.metadata.requires("fiberexec") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding(
            "installation", WARNING, "fiberexec is not installed, only found on the path: what it needs is not known",
            f"{sys.executable} -m pip install fiberexec=={fiberexec.__version__}",
        )  # fmt: skip
        wanted = ["click", "cryptography", "dill", "pynng", "tenacity"]
    for line in wanted:
        requirement, _, marker = line.partition(";")
        if "extra" not in marker and not ("python_version" in marker and sys.version_info >= (3, 11)):
            yield _package(requirement.strip())


def _extras(backend: str) -> Iterator[Finding]:
    """Those that are missing; only what this backend needs is broken without."""
    module = {"progress": "rich"}
    for extra in _EXTRAS:
        name = module.get(extra, extra)
        finding = _package(name)
        if finding.status == OK:
            yield finding
        elif _NEEDED_FOR.get(backend) == extra:
            yield Finding(name, BROKEN, finding.found, _pip(f'"fiberexec[{extra}]"'))
        else:
            yield Finding(name, SKIPPED, f"{finding.found}; it is optional", _pip(f'"fiberexec[{extra}]"'))


def _package(requirement: str) -> Finding:
    """Whether a package is there, as new as it must be, and can be imported."""
    name, least = [*re.split(r"[ >=<~!,\[]+", requirement), ""][:2]
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, BROKEN, "it is not installed", _pip(f'"{requirement}"'))
    if least and _numbers(version) < _numbers(least):
        return Finding(name, BROKEN, f"{version} is too old, {least} is needed", _pip(f'--upgrade "{requirement}"'))
    try:
        importlib.import_module(name)
    except Exception as error:
        return Finding(name, BROKEN, f"{version} cannot be imported: {error}", _pip(f'--force-reinstall "{requirement}"'))
    return Finding(name, OK, version)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)[:3]]


def _pip(what: str) -> str:
    return f"{sys.executable} -m pip install {what}"


# -- this host


def _temporary() -> Finding:
    folder = tempfile.gettempdir()
    with tempfile.TemporaryDirectory(prefix="fiberexec-doctor-") as made, open(f"{made}/file", "wb") as file:
        file.write(bytes(1 << 20))
    return Finding("temporary files", OK, folder)


def _local_task() -> Finding:
    started = time.monotonic()
    run_task(fiberexec.FiberExecutor(1, backend="local", startup_timeout=_TIMEOUT), _TIMEOUT)
    return Finding("local workers", OK, f"one has started and run a task in {time.monotonic() - started:.2f} s")


def run_task(executor: fiberexec.FiberExecutor, seconds: float) -> None:
    """Run a task, and end the executor. Raises what keeps it from being run, and FiberError if nothing comes."""
    with executor:
        try:
            executor.submit(abs, -1).result(seconds)
        except concurrent.futures.TimeoutError:
            executor.kill_workers()
            raise FiberError(f"there is no result after {seconds:g} seconds") from None


def _handshake() -> Finding:
    """Two processes of this host link up, as hub and agent do."""
    with Listening("127.0.0.1") as listening:
        done = subprocess.run(
            [sys.executable, "-c", source(), "-"],
            input=listening.told("doctor", [f"tls+tcp://127.0.0.1:{listening.port}"], linger=0),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            timeout=_TIMEOUT,
        )
    report = reported(done.stdout.decode(errors="replace"))
    problem = "the probe has said nothing" if report is None else report.get("lacks") or report.get("tls", "no route")
    if problem:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        remedy = _pip("--force-reinstall pynng cryptography") + ": the two programs of this very host cannot link up"
        return Finding("encryption", BROKEN, f"{problem}{f' ({last})' if last else ''}", remedy)
    return Finding("encryption", OK, "keys were made, and two processes have linked up with mutual TLS")


def source() -> str:
    """The probe's program."""
    return inspect.getsource(probe)


def reported(text: str) -> dict[str, object] | None:
    """What a probe has printed, None if it has not."""
    for line in text.splitlines():
        _, mark, rest = line.partition(probe.MARK)
        if mark:
            try:
                report = json.loads(rest)
            except ValueError:
                continue  # the end of it is missing
            if isinstance(report, dict):
                return report
    return None


def new_program() -> str:
    """A name for the program that a doctor is."""
    return f"fx-doctor-{secrets.token_hex(5)}"
