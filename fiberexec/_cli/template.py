"""``fiberexec template``: the pod that the settings make, and whether a cluster takes it."""

from __future__ import annotations

from typing import Any

import click

from fiberexec._errors import FiberError


@click.command()
@click.option("--image", metavar="REF", help="The image (default: that of the settings).")
@click.option("--pod-template", metavar="FILE", type=click.Path(exists=True, dir_okay=False), help="YAML of a pod, merged in.")
@click.option("--namespace", help="The namespace (default: the current context's).")
@click.option("--check/--no-check", default=True, help="Whether the cluster is asked if it takes it: a server-side dry run.")
def template(image: str | None, pod_template: str | None, namespace: str | None, check: bool) -> None:
    """Print the pod in which workers run on Kubernetes, as YAML: the settings, and your pod_template, put together."""
    from fiberexec import _config
    from fiberexec.backends import registry
    from fiberexec.backends.kubernetes import KubernetesBackend

    own: dict[str, Any] = {"pod_template": pod_template, "namespace": namespace}
    found = _config.load(backend="kubernetes", image=image)
    told = {**found.backend_options, **{name: value for name, value in own.items() if value is not None}}
    backend = registry.create_jobs("kubernetes", _config.load(backend="kubernetes", image=image, backend_options=told))
    if not isinstance(backend, KubernetesBackend):
        raise FiberError("another package has registered a backend of the name 'kubernetes'")
    try:
        body = backend.template(check)
        import yaml  # type: ignore[import-untyped]

        click.echo(yaml.safe_dump(body, sort_keys=False), nl=False)
        if check:
            click.echo("the cluster takes it (server-side dry run)", err=True)
    finally:
        backend.close()
