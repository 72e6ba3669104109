"""``fiberexec run`` and what goes with it: attach, cp."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from fiberexec._cli.template import template
from fiberexec._errors import ConfigError, FiberError

if TYPE_CHECKING:
    from fiberexec._cli import run_base
    from fiberexec._cli.places import Places

_BACKENDS = ("local", "docker", "kubernetes")


def commands(group: click.Group) -> None:
    """Add the commands of this module to the command ``fiberexec``."""
    for command in (run, attach, cp, rbac, template):
        group.add_command(command)


# Options of programs in containers.
_ELSEWHERE = ("image", "dockerfile", "registry", "cpu", "memory", "gpu", "namespace", "service_account")
_where = click.option(
    "--backend",
    type=click.Choice(_BACKENDS),
    help="Where the program and its workers run (default: as `fiberexec config` says).",
)
in_namespace = click.option("--namespace", help="The namespace, with kubernetes (default: the current context's).")


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@_where
@click.option("--image", metavar="REF", help="The image that program and workers run (default: it is built).")
@click.option("--dockerfile", type=click.Path(), help="What the image is built from (default: as the project says).")
@click.option(
    "--registry",
    metavar="R",
    envvar="FIBEREXEC_REGISTRY",
    help="Where a built image is pushed to, with kubernetes (default: FIBEREXEC_REGISTRY).",
)
@click.option("--cpu", metavar="CORES", help="Of the program itself, such as 2 or 500m.")
@click.option("--memory", metavar="SIZE", help="Of the program itself, such as 4Gi.")
@click.option("--gpu", type=int, metavar="N", help="Of the program itself.")
@click.option("--env", multiple=True, metavar="NAME[=VALUE]", help="A variable for program and workers; may be repeated.")
@click.option(
    "--volume", multiple=True, metavar="SOURCE:FOLDER[:ro]", help="A volume of program and workers; may be repeated."
)
@in_namespace
@click.option("--service-account", metavar="NAME", help="Whose rights the program has, with kubernetes (default: fiberexec).")
@click.option("--name", help="What the program is called (default: after what it runs).")
@click.option(
    "--ship", multiple=True, metavar="DIR", help="Send this folder (default: the program's own); may be repeated. Empty: none."
)
@click.option("-a", "--attach", "attach_", is_flag=True, help="Show its output and wait for its end: the default.")
@click.option("-d", "--detach", is_flag=True, help="Print its name and return.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(
    backend: str | None,
    command: tuple[str, ...],
    attach_: bool,
    detach: bool,
    name: str | None,
    **options: Any,
) -> None:
    """Run a program where its workers run: on this host, in containers, or in a cluster.

    Its output comes here, and its exit code is passed on. Ctrl-C asks whether to detach from it or to stop it.
    """
    if attach_ and detach:
        raise click.UsageError("--attach and --detach exclude each other")
    from fiberexec._cli import run_attach
    from fiberexec._cli.show import note

    wanted = _wanted(backend, command, name, options)
    unused = [f"--{key.replace('_', '-')}" for key in _ELSEWHERE if options[key] is not None]
    if unused and wanted.backend == "local":
        note(f"fiberexec: {', '.join(unused)}: not for a program on this host, left out")
    place = _place(wanted.backend, wanted.namespace)
    try:
        with run_attach.stoppable():
            place.start(wanted, lambda text: note(f"fiberexec: {text}"))
        if detach:
            click.echo(wanted.name)
            return
        note(f"fiberexec: {wanted.name} runs ({wanted.backend})")
        _show(place, wanted.name)
    finally:
        place.close()


@click.command()
@_where
@in_namespace
@click.argument("name")
def attach(backend: str | None, namespace: str | None, name: str) -> None:
    """Show the output of a program that `fiberexec run` has started, from its beginning, and pass on its exit code."""
    place = _holder(name, backend, namespace)
    try:
        _show(place, name)
    finally:
        place.close()


@click.command()
@_where
@in_namespace
@click.argument("source")
@click.argument("target")
def cp(backend: str | None, namespace: str | None, source: str, target: str) -> None:
    """Copy a file or a folder to a running program, or from it: one of the two is NAME:PATH.

    A path that does not begin with "/" starts in the folder that the program was started in.
    """
    from tarfile import TarError

    (there, from_), (here, to) = _job_path(source), _job_path(target)
    if bool(there) == bool(here):
        raise click.UsageError("one of source and target, and only one, must be NAME:PATH")
    place = _holder(there or here, backend, namespace)
    try:
        if there:
            _fetch(place, there, from_, to)
        elif not os.path.exists(from_):
            raise FiberError(f"there is no file or folder {from_}")
        else:
            place.send(here, to or ".", from_)
    except (OSError, TarError) as error:
        raise FiberError(f"{source} cannot be copied: {error}") from error
    finally:
        place.close()


@click.command()
@in_namespace
@click.option("--service-account", metavar="NAME", default="fiberexec", help="Whose rights these are.")
def rbac(namespace: str | None, service_account: str) -> None:
    """Print the rights that a program needs in a cluster, ready for `kubectl apply -f -`: the smallest Role."""
    from fiberexec._cli import run_job
    from fiberexec.backends._kubernetes_api import Api
    from fiberexec.backends._kubernetes_config import Setup

    if namespace is None:
        try:
            namespace = Api(None).namespace()
        except (Setup, ImportError):
            namespace = "default"
    click.echo(run_job.rights(namespace, service_account), nl=False)


def program(places: Places, name: str) -> run_base.Place | None:
    """The place of a program that is more than a job of its backend: a process of this host, or a Job; None if it is none."""
    from fiberexec._cli.places import PROGRAM

    for row in places.rows:
        if row.id == name and row.role == PROGRAM and row.backend in ("local", "kubernetes"):
            return _place(row.backend, places.namespace)
    return None


def _show(place: run_base.Place, name: str) -> None:
    """Ends the command with the program's exit code, unless the program is left to itself."""
    from fiberexec._cli.run_attach import attached
    from fiberexec._cli.show import note

    code = attached(place, name)
    if code is None:
        return
    try:
        place.remove(name)
    except (FiberError, KeyboardInterrupt) as error:  # which is no end of the program's
        remedy = f"What to do: fiberexec kill {place.where}{name}"
        note(f"fiberexec: what is left of {name} could not be removed: {str(error) or 'interrupted'}. {remedy}")
    click.get_current_context().exit(code)


def _job_path(text: str) -> tuple[str, str]:
    """(name of a program or "", path)"""
    name, colon, path = text.partition(":")
    return (name, path) if colon and "/" not in name and name not in ("", ".", "..") else ("", text)


def _fetch(place: run_base.Place, name: str, path: str, target: str) -> None:
    from fiberexec._cli import run_code

    with place.fetch(name, path) as archive:
        if os.path.isdir(target):
            base = posixpath.basename(posixpath.normpath(path))
            run_code.unpack(archive, target, base if base not in ("", ".", "..") else None)  # a link's own name
        else:
            folder, base = os.path.split(target)
            if not base:
                raise FiberError(f"there is no folder {target}")
            run_code.unpack(archive, folder or ".", base)


# -- what is wanted


def _wanted(backend: str | None, command: tuple[str, ...], name: str | None, options: dict[str, Any]) -> run_base.Wanted:
    from fiberexec import _config
    from fiberexec._cli import run_base, run_code

    if options["image"] and options["dockerfile"]:
        raise click.UsageError("--image and --dockerfile exclude each other")
    settings = _config.load(backend=backend, image=options["image"])
    if options["dockerfile"]:
        settings = settings._replace(image=None)  # of a file or a variable, which an option outdoes
    if settings.backend not in _BACKENDS:
        raise ConfigError(f"`fiberexec run` knows the backends {', '.join(_BACKENDS)}, not {settings.backend!r}: --backend")
    settings = settings._replace(backend_options=_with_volumes(settings, list(_each_volume(options["volume"]))))
    sizes = {
        key: _config.check(key, _number(options[key]), f"--{key}")
        for key in ("cpu", "memory", "gpu")
        if options[key] is not None
    }
    nothing = {"cpu": None, "memory": None, "gpu": None}
    ship = options["ship"]
    folders: Sequence[str] = [folder for folder in ship if folder]
    if not ship:
        own = run_code.program_folder(command)
        folders = [] if own is None else [own]
    local = settings.backend == "local"
    return run_base.Wanted(
        backend=settings.backend,
        command=command,
        name=run_base.default_name(command) if name is None else run_base.checked_name(name),
        env=_environment(options["env"]),
        code=None if local or not folders else run_code.collect_code(folders),
        settings=settings,
        size=settings._replace(**{**nothing, **sizes}),
        dockerfile=options["dockerfile"],
        registry=options["registry"],
        namespace=options["namespace"],
        service_account=options["service_account"],
    )


def _number(text: object) -> object:
    """A size in whole MiB, or cores, may be given without a unit."""
    return int(text) if isinstance(text, str) and text.isdecimal() else text


def _environment(given: Sequence[str]) -> dict[str, str]:
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not name or "\0" in text:
            raise ConfigError(f"--env must be NAME=VALUE, or NAME for the value that it has here, got {text!r}")
        if not equals and name not in os.environ:
            raise ConfigError(f"--env {name}: there is no such variable here; --env {name}=VALUE gives it a value")
        found[name] = value if equals else os.environ[name]
    return found


def _each_volume(given: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    for text in given:
        source, _, rest = text.partition(":")
        folder, _, mode = rest.partition(":")
        if not source or not folder.startswith("/") or mode not in ("", "ro", "rw"):
            raise ConfigError(f"--volume must be SOURCE:FOLDER or SOURCE:FOLDER:ro, with an absolute FOLDER, got {text!r}")
        yield source, folder, mode or "rw"


def _with_volumes(settings: Any, added: list[tuple[str, str, str]]) -> dict[str, Any]:
    """The backend's options, with these volumes too; those of containers as mounts, whose paths hold where the program is."""
    options = dict(settings.backend_options)
    if settings.backend == "local" and added:
        raise ConfigError("--volume: a program on this host sees its folders where they are; leave it out, or give --backend")
    if settings.backend == "kubernetes" and added:
        kind = {True: "hostPath", False: "persistentVolumeClaim"}  # of a source that begins with "/", or not
        claims = {
            folder: {kind[source.startswith("/")]: source, "read_only": mode == "ro"} for source, folder, mode in added
        }
        options["volumes"] = {**(options.get("volumes") or {}), **claims}
    elif settings.backend == "docker" and (added or options.get("volumes")):
        from fiberexec.backends import _docker_options

        mounts = [*_docker_options.mounts(options), *_docker_options.mounts({"volumes": list(map(":".join, added))})]
        options = {name: value for name, value in options.items() if name not in ("volumes", "mounts")}
        options["mounts"] = list({_docker_options.target(mount): mount for mount in mounts}.values())  # the last one holds
    return options


# -- places


def _place(backend: str, namespace: str | None) -> run_base.Place:
    if backend == "local":
        from fiberexec._cli.run_local import LocalPlace

        return LocalPlace()
    if backend == "docker":
        from fiberexec._cli.run_docker import DockerPlace

        return DockerPlace()
    from fiberexec._cli.run_kubernetes import KubernetesPlace

    return KubernetesPlace(namespace)


def _holder(name: str, backend: str | None, namespace: str | None) -> run_base.Place:
    """The place that has a program of this name; without a backend, all are asked. Raises FiberError."""
    problems = []
    for each in [backend] if backend else _BACKENDS:
        place: run_base.Place | None = None
        try:
            place = _place(each, namespace)
            if place.has(name):
                return place
            place.close()
        except (FiberError, ConfigError) as error:
            if backend:
                raise
            problems.append(f"{each} could not be asked: {error}")
            if place is not None:
                place.close()
    asked = f" ({'; '.join(problems)})" if problems else ""
    raise FiberError(f"there is no program {name!r} that `fiberexec run` has started, or its end has been seen{asked}")
