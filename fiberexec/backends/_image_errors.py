"""What an image lacks: why containers of it end before they have done anything, wherever they run."""

from __future__ import annotations

import re
import sys

from fiberexec import __version__


def dockerfile_line(extra: str = "") -> str:
    """What puts fiberexec into an image. ``extra``: what a program needs there, and workers do not."""
    return f'RUN pip install "fiberexec[{extra}]=={__version__}"' if extra else f"RUN pip install fiberexec=={__version__}"


DOCKERFILE_LINE = dockerfile_line()


def no_interpreter(image: str) -> str:
    """The image cannot run what a job runs."""
    return (
        f"image {image!r} has no such program: start it from an image with Python (FROM python:{_python()}-slim), and add "
        f'{DOCKERFILE_LINE}; or, where its Python has another path, name that: backend_options={{"python": ...}}'
    )


def verdict(image: str, log: str, python: str, extra: str = "") -> str:
    """Why a container of this image cannot be a worker, as far as its last lines say; "" if they do not.

    ``python`` is the version that the image claims to have, or ""; ``extra``: see dockerfile_line().
    """
    line = dockerfile_line(extra)
    missing = re.search(r"No module named '?([\w.]+)'?", log)
    if missing is not None:
        package = missing[1].partition(".")[0]
        if package == "fiberexec":
            also = "" if not python or _same(python) else f" (and it has Python {python}, the driver has {_python()})"
            return (
                f"image {image!r} has no fiberexec{also}. Add this line to its Dockerfile: {line}. If it is "
                'installed in the home of root: backend_options={"user": "root"}'
            )
        if package in ("pynng", "dill", "cryptography", "tenacity", "click"):
            return f"image {image!r} has a fiberexec without {package}. Add this line to its Dockerfile: {line}"
    if re.search(r"exec format error", log, re.IGNORECASE):
        return f"image {image!r} is for another kind of processor: build it for the engine's"
    if re.search(r"\[FATAL tini|executable file not found", log):
        return no_interpreter(image)
    return ""


def quoted(log: str) -> str:
    """The last lines of a container, to put behind what is said about it."""
    lines = "".join(f"\n    {line}" for line in log.splitlines())
    return f"; its last lines:{lines}" if lines else "; it has written nothing"


def _python() -> str:
    return f"{sys.version_info[0]}.{sys.version_info[1]}"


def _same(version: str) -> bool:
    return version == _python() or version.startswith(_python() + ".")
