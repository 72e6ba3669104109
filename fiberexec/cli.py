"""The command ``fiberexec``."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

import click

from fiberexec import _config
from fiberexec._errors import ConfigError


def _version() -> str:
    try:
        return version("fiberexec")
    except PackageNotFoundError:
        return "unknown (not installed)"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_version(), message="%(prog)s %(version)s")
def main() -> None:
    """Python executors whose workers may live anywhere."""


@main.command()
def config() -> None:
    """Print each setting that applies here, and where it came from."""
    try:
        settings = _config.load()
    except ConfigError as error:
        raise click.ClickException(str(error)) from error
    rows = [(name, _show(name, getattr(settings, name)), settings.sources[name]) for name in _config.CHECKS]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, value, source in rows:
        click.echo(f"{name:{widths[0]}}  {value:{widths[1]}}  {source}")


def _show(name: str, value: object) -> str:
    if value is ...:
        return "the backend's"
    if name == "memory" and isinstance(value, int):
        return f"{value / 2**20:g} MiB"
    if name == "env" and isinstance(value, Mapping):
        return repr(dict.fromkeys(value, "***"))  # the values may be secrets
    return repr(value)
