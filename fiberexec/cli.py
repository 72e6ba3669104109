"""The command ``fiberexec``: its arguments, and how it prints. What its commands do is in fiberexec._cli.

Rules:
- An error is one message and exit code 1, never a traceback (but with ``python -X dev``).
- With ``--json``, stdout has JSON and nothing else; notes go to stderr either way.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import click

from fiberexec._cli import run
from fiberexec._errors import FiberError

if TYPE_CHECKING:
    from fiberexec._cli.doctor import Finding
    from fiberexec._cli.places import Places


def _version() -> str:
    try:
        return version("fiberexec")
    except PackageNotFoundError:
        return "unknown (not installed)"


class _Group(click.Group):
    """Commands whose errors are messages."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (FiberError, PermissionError) as error:
            raise click.ClickException(str(error)) from error
        except (click.exceptions.Exit, click.ClickException, click.Abort, OSError):
            raise
        except Exception as error:
            if sys.flags.dev_mode:
                raise
            raise click.ClickException(
                f"{type(error).__name__}: {error}\nThis is a defect; `python -X dev -m fiberexec ...` shows where it is."
            ) from error


_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


def _backend(purpose: str) -> Callable[[Any], Any]:
    return click.option("--backend", metavar="NAME", help=purpose)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_version(), message="%(prog)s %(version)s")
def main() -> None:
    """Python executors whose workers may live anywhere."""


run.commands(main)


@main.command()
@_backend("Ask this one only.")
@run.in_namespace
@_json
def ps(backend: str | None, namespace: str | None, as_json: bool) -> None:
    """List the workers of every driver: on this host, and jobs on every backend that answers."""
    from fiberexec._cli import show

    places = _places(backend, namespace)
    places.close()
    if as_json:
        problems = [{"backend": name, "problem": text} for name, text in places.problems.items()]
        show.as_json({"jobs": [row._asdict() for row in places.rows], "problems": problems})
    else:
        now = time.time()
        rows = [("JOB", "BACKEND", "STATE", "AGE", "USER", "PROGRAM", "DRIVER", "HOST", "IMAGE", "COMMAND")]
        for row in places.rows:
            age = "?" if row.started is None else show.age(now - row.started)
            driver = f"{row.driver or '?'}{' (ended)' if row.driver_runs is False else ''}"
            rows.append(
                (row.id, row.backend, row.state, age, row.user, row.program, driver, row.host, row.image or "-", row.command)
            )
        show.table(rows)
        _note_problems(places)
    if backend in places.problems:
        raise click.exceptions.Exit(1)


@main.command()
@click.argument("job")
@click.option("-f", "--follow", is_flag=True, help="Go on until the job ends.")
@_backend("Ask this one only.")
@run.in_namespace
@_json
def logs(job: str, follow: bool, backend: str | None, namespace: str | None, as_json: bool) -> None:
    """Print what a job has written."""
    from fiberexec._cli import jobs

    places = _places(backend, namespace)
    program = run.program(places, job)
    try:
        for line in jobs.logs(places, job, follow) if program is None else program.lines(job, follow):
            text = line.rstrip("\r\n")
            click.echo(json.dumps({"job": job, "line": text}) if as_json else text)
    finally:
        places.close()


@main.command()
@click.argument("target", metavar="JOB|PROGRAM")
@_backend("Ask this one only.")
@run.in_namespace
@_json
def kill(target: str, backend: str | None, namespace: str | None, as_json: bool) -> None:
    """End a job at once; or a program, its driver included where that runs on this host.

    A program is named as `fiberexec ps` shows it, or by its driver: pid@host.
    """
    from fiberexec._cli import jobs, show

    places = _places(backend, namespace)
    program = run.program(places, target)
    try:
        if program is None:
            done, warnings = jobs.kill(places, target)
        else:
            program.remove(target)
            done, warnings = [jobs.Killed(target, program.name, "job", 1)], []
    finally:
        places.close()
    if as_json:
        show.as_json({"ended": [each._asdict() for each in done], "warnings": warnings})
    else:
        for each in done:
            what = {"job": "job", "driver": "driver", "program": f"{each.number} jobs of program"}[each.kind]
            click.echo(f"{each.backend}: {what} {each.target} ended")
        for warning in warnings:
            show.note(warning)


@main.command()
@_backend("Clean this one only.")
@run.in_namespace
@click.option("--all", "everything", is_flag=True, help="Whoever made them, jobs of drivers that still run too.")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@_json
def clean(backend: str | None, namespace: str | None, everything: bool, dry_run: bool, as_json: bool) -> None:
    """Remove what dead drivers have left: jobs, and on this host the hubs' folders.

    A driver is dead when it was on this host and does not run any more. Jobs of drivers on other hosts are left alone.
    """
    from fiberexec._cli import jobs, show

    places = _places(backend, namespace)
    try:
        removed, spared = jobs.clean(places, everything, dry_run, backend in (None, "local"))
    finally:
        places.close()
    if as_json:
        problems = [{"backend": name, "problem": text} for name, text in places.problems.items()]
        told = {"dry_run": dry_run, "removed": [each._asdict() for each in removed]}
        show.as_json({**told, "spared": [row._asdict() for row in spared], "problems": problems})
    else:
        for each in removed:
            what = each.program if each.backend == "local" else f"{each.number} jobs of {each.program}, driver {each.driver}"
            click.echo(f"{each.backend}: {what}: {'would be removed' if dry_run else 'removed'}")
        if not removed:
            click.echo("nothing to remove")
        for driver in dict.fromkeys(row.driver for row in spared):
            count = sum(row.driver == driver for row in spared)
            why = "which may run, or whose end nobody has seen; --all removes them too"
            show.note(f"left alone: {count} jobs of driver {driver or '(unknown)'}, {why}")
        _note_problems(places)
    if backend in places.problems:
        raise click.exceptions.Exit(1)


@main.command()
@_backend("Check this one, by default that of the settings.")
@click.option("--image", help="What its jobs run, by default that of the settings.")
@_json
def doctor(backend: str | None, image: str | None, as_json: bool) -> None:
    """Check that workers can run here, or on a backend: each finding says what to do.

    Exit code 1: something is broken.
    """
    from fiberexec._cli import doctor, show

    findings = []
    for finding in doctor.examine(backend, image):
        findings.append(finding)
        if not as_json:
            _print(finding)
    broken = [finding for finding in findings if finding.status == doctor.BROKEN]
    if as_json:
        show.as_json({"ok": not broken, "findings": [finding._asdict() for finding in findings]})
    if broken:
        raise click.exceptions.Exit(1)


def _print(finding: Finding) -> None:
    colour = {"ok": "green", "warning": "yellow", "broken": "red"}.get(finding.status)
    click.echo(f"{click.style(f'{finding.status:8}', fg=colour)} {finding.check}: {finding.found}")
    if finding.remedy:
        click.echo(f"{'':8} what to do: {finding.remedy}")


@main.command()
@_json
def config(as_json: bool) -> None:
    """Print each setting that applies here, and where it came from."""
    from fiberexec import _config
    from fiberexec._cli import show

    settings = _config.load()
    if as_json:
        values = {name: _plain(name, getattr(settings, name)) for name in _config.CHECKS}
        show.as_json({name: {"value": value, "source": settings.sources[name]} for name, value in values.items()})
    else:
        show.table([(name, _show(name, getattr(settings, name)), settings.sources[name]) for name in _config.CHECKS])


def _places(backend: str | None, namespace: str | None) -> Places:
    from fiberexec._cli.places import Places
    from fiberexec.backends import registry

    if backend is not None and backend not in registry.names():
        names = ", ".join(registry.names())
        raise click.BadParameter(f"there is no backend {backend!r}, only {names}", param_hint="--backend")
    return Places(None if backend is None else [backend], namespace)


def _note_problems(places: Places) -> None:
    from fiberexec._cli import show

    for name, text in places.problems.items():
        show.note(f"{name}: not asked: {text}")


def _plain(name: str, value: object) -> object:
    """A setting's value for JSON: memory in bytes; "backend": as the backend says."""
    if value is ...:
        return "backend"
    if isinstance(value, Mapping):
        return dict.fromkeys(value, "***") if name == "env" else dict(value)
    return value


def _show(name: str, value: object) -> str:
    if value is ...:
        return "the backend's"
    if name == "memory" and isinstance(value, int):
        return f"{value / 2**20:g} MiB"
    if name == "env" and isinstance(value, Mapping):
        return repr(dict.fromkeys(value, "***"))  # the values may be secrets
    return repr(value)
