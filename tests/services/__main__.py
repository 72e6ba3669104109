"""The services of the tests: see README.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run by the path of this folder, as `python3 tests/services`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    __package__ = "services"

from services import cluster, engine, images, network, registry
from services.base import ServiceError


def main() -> int:
    """Do what the command line says; the exit status."""
    arguments = _parser().parse_args()
    try:
        arguments.action(arguments)
    except ServiceError as error:
        print(f"services: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python3 tests/services", description="Start and stop what the tests need.")
    families = parser.add_subparsers(required=True)

    docker = _family(families, "docker", "a Docker engine")
    docker["up"].set_defaults(action=lambda _: engine.up())
    docker["down"].set_defaults(action=lambda _: engine.down())

    registries = _family(families, "registry", f"an image registry at {registry.ADDRESS}")
    registries["up"].set_defaults(action=lambda _: registry.up())
    registries["down"].set_defaults(action=lambda _: registry.down())

    netns = _family(families, "netns", "hosts fx1, fx2, ... whose network can be cut", "link")
    netns["up"].add_argument("hosts", type=int, nargs="?", default=3)
    netns["up"].set_defaults(action=lambda given: network.up(given.hosts))
    netns["down"].set_defaults(action=lambda _: network.down())
    netns["link"].add_argument("what", choices=["drop", "cut", "only", "restore"])
    netns["link"].add_argument("host")
    netns["link"].add_argument("other", nargs="?")
    netns["link"].set_defaults(action=lambda given: network.link(given.what, given.host, given.other))

    more = ("load", "build", "restart")
    kubernetes = _family(families, "kubernetes", "a Kubernetes cluster; `up` prints its kubeconfig", *more)
    kubernetes["up"].set_defaults(action=lambda _: print(cluster.up()))
    kubernetes["down"].set_defaults(action=lambda _: cluster.down())
    kubernetes["load"].add_argument("images", nargs="+", metavar="image", help="of the Docker engine")
    kubernetes["load"].set_defaults(action=lambda given: cluster.load(given.images))
    kubernetes["build"].set_defaults(action=lambda _: print(cluster.build()))

    kubernetes["restart"].add_argument("program", choices=["kube-apiserver", "kubelet"])
    kubernetes["restart"].set_defaults(action=lambda given: cluster.restart(given.program))

    image = families.add_parser("image", help="an image with Python and requirements")
    image.add_argument("name")
    image.add_argument("requirements", nargs="*", metavar="requirement", help="what pip takes")
    image.add_argument("--python", metavar="3.x", help="default: the running one")
    image.set_defaults(action=lambda given: print(images.image(given.name, given.python, given.requirements)))

    worker = families.add_parser("worker", help="an image with a package folder as it is; prints its name")
    worker.add_argument("package", type=Path)
    worker.add_argument("requirements", nargs="*", metavar="requirement")
    worker.add_argument("--python", metavar="3.x", help="default: the running one")
    worker.set_defaults(action=lambda given: print(images.worker(given.python, given.package, given.requirements)))
    return parser


def _family(
    families: argparse._SubParsersAction[argparse.ArgumentParser], name: str, what: str, *more: str
) -> dict[str, argparse.ArgumentParser]:
    actions = families.add_parser(name, help=what).add_subparsers(required=True)
    return {action: actions.add_parser(action) for action in ("up", "down", *more)}


if __name__ == "__main__":
    sys.exit(main())
