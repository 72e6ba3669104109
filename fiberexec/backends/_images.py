"""Which image workers run where none is named: the project's own, made from what it says about itself, once.

    Dockerfile ─► requirements.txt ─► [project] of pyproject.toml ─► an error with a Dockerfile to paste

The first that the nearest folder has, from the working directory upward. The image's tag is a hash of everything that it is
made from, so what has not changed is never built again. What is generated holds the driver's own fiberexec, whatever
installed that, so that both sides are the same.
"""

from __future__ import annotations

import base64
import hashlib
import io
import logging
import os
import re
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, NamedTuple

import fiberexec
from fiberexec._errors import ConfigError, LaunchError
from fiberexec.backends._docker_errors import FULL, MAKE_ROOM
from fiberexec.backends._image_errors import dockerfile_line

NEEDS = (
    "click>=8.1",
    "cryptography>=42",
    "dill>=0.3.8",
    "pynng>=0.9",
    "tenacity>=9.0",
    'tomli>=2.0; python_version < "3.11"',
)
"""What fiberexec requires."""
EXTRAS = {"docker": "docker>=7.1", "kubernetes": "kubernetes>=31"}
"""What it requires to start jobs there."""
LABEL = "fiberexec.image"  # of images that were made here; its value is the project's folder
_LARGE = 1 << 30  # bytes of a build's context
_LAST = 30  # lines of a failed build that are shown
_WHEEL = f"fiberexec-{fiberexec.__version__}-py3-none-any.whl"
_logger = logging.getLogger("fiberexec")


class Recipe(NamedTuple):
    """An image as it is to be made."""

    source: str  # the file that says so
    folder: str  # of the project
    dockerfile: str  # its name in the context
    files: dict[str, bytes] | None  # the whole context; None: the folder is
    arguments: tuple[tuple[str, str], ...] = ()  # of the build

    def tag(self, platform: str | None = None) -> str:
        """The image's name, with the hash of what it is made from, and for what kind of machine (None: the engine's)."""
        name = re.sub(r"[^a-z0-9]+", "-", os.path.basename(self.folder).lower()).strip("-") or "project"
        return f"fiberexec-{name}:{_digest(self, platform)[:16]}"


def python() -> str:
    """The driver's Python as images name it: code travels only between equal minor versions."""
    return f"{sys.version_info[0]}.{sys.version_info[1]}"


def suggestion(extra: str = "") -> str:
    """A Dockerfile to paste. ``extra``: see dockerfile_line()."""
    return f"    FROM python:{python()}-slim\n    {dockerfile_line(extra)}\n"


def find(
    folder: str,
    dockerfile: str | None = None,
    base: str | None = None,
    arguments: Mapping[str, str] = MappingProxyType({}),
    extra: str = "",
) -> Recipe:
    """The recipe that holds in a folder. Raises ConfigError if there is none.

    ``dockerfile`` is a path, ``base`` the image that a generated one starts from (default: python:X.Y-slim), ``arguments``
    are those of the build, ``extra`` is what fiberexec needs to start jobs from there: see EXTRAS.
    """
    given = tuple(sorted(arguments.items()))
    if dockerfile is not None:
        path = Path(folder, dockerfile).absolute()
        if not path.is_file():
            raise ConfigError(f"there is no file {path} (backend_options: dockerfile)")
        return Recipe(str(path), str(path.parent), path.name, None, given)
    here = Path(folder).absolute()
    for place in (here, *here.parents):
        recipe = _in(place, base, arguments, extra)
        if recipe is not None:
            return recipe._replace(arguments=given)
        if (place / ".git").exists():
            break  # what is above belongs to another project
    raise ConfigError(
        f"there is no image to run: none is given (image=...), and neither {here} nor a folder above it has a Dockerfile, a "
        f"requirements.txt or a pyproject.toml with [project]. A Dockerfile that will do:\n\n{suggestion(extra)}"
    )


def _in(place: Path, base: str | None, arguments: Iterable[str], extra: str) -> Recipe | None:
    path = place / "Dockerfile"
    if path.is_file():
        return Recipe(str(path), str(place), path.name, None)
    path = place / "requirements.txt"
    if path.is_file():
        return _generated(path, _requirements(path, path.parent, set()), base, arguments, extra)
    path = place / "pyproject.toml"
    if path.is_file():
        wanted = _dependencies(path)
        if wanted is not None:
            return _generated(path, wanted, base, arguments, extra)
    return None


def _requirements(path: Path, root: Path, seen: set[Path]) -> Iterator[str]:
    """The lines of a requirements file and of those that it includes, without what lies in the project itself."""
    if path in seen:
        return
    seen.add(path)
    try:
        text = path.read_text("utf-8").replace("\\\n", " ")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    for line in map(str.strip, text.splitlines()):
        include = re.match(r"(?:-r|--requirement|-c|--constraint)[ =]*(\S+)", line)
        if include is not None and line.startswith(("-c", "--constraint")):
            raise ConfigError(
                f"{path}: {line!r}: an image made from requirements.txt takes no constraints; write a Dockerfile"
            )
        if include is not None:
            yield from _requirements((path.parent / include[1]).resolve(), root, seen)
        elif re.match(r"(-e|--editable)\b|\.{0,2}/|\.$|\.\[|file:", line):
            _logger.info(
                "%s: %r is not put into the image: the project's own code is sent to workers when they import it", path, line
            )
        elif line and not line.startswith("#"):
            yield line


def _dependencies(path: Path) -> list[str] | None:
    """What [project] of a pyproject.toml requires; None where there is no such table."""
    try:
        toml: Any = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
        project = toml.loads(path.read_text("utf-8")).get("project")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    if not isinstance(project, Mapping):
        return None
    if "dependencies" in (project.get("dynamic") or ()):
        raise ConfigError(
            f"{path} does not say itself what the project requires (dynamic = [..., 'dependencies']): write a "
            "requirements.txt beside it (pip freeze > requirements.txt), or a Dockerfile"
        )
    wanted = project.get("dependencies", [])
    if not isinstance(wanted, list) or not all(isinstance(line, str) for line in wanted):
        raise ConfigError(f"{path}: dependencies of [project] must be a list of str")
    return wanted


def _generated(source: Path, wanted: Iterable[str], base: str | None, arguments: Iterable[str], extra: str) -> Recipe:
    pip = "RUN PIP_ROOT_USER_ACTION=ignore python -m pip install --no-cache-dir --disable-pip-version-check"
    lines = [
        f"FROM {base or f'python:{python()}-slim'}",
        *(f"ARG {name}" for name in arguments),
        "COPY requirements.txt /opt/fiberexec/",
        f"{pip} -r /opt/fiberexec/requirements.txt",
        f"COPY {_WHEEL} /opt/fiberexec/",
        f"{pip} /opt/fiberexec/{_WHEEL}{f' {EXTRAS[extra]!r}' if extra else ''}",  # beside requirements, which may have hashes
    ]
    files = {
        "Dockerfile": "".join(f"{line}\n" for line in lines).encode(),
        "requirements.txt": "".join(f"{line}\n" for line in wanted).encode(),
        _WHEEL: _wheel(),
    }
    return Recipe(str(source), str(source.parent), "Dockerfile", files)


def _wheel() -> bytes:
    """The fiberexec that runs here, as a wheel."""
    root = Path(fiberexec.__file__).parent
    info = f"fiberexec-{fiberexec.__version__}.dist-info"
    needs = "".join(f"Requires-Dist: {need}\n" for need in NEEDS)
    files = {
        f"fiberexec/{path.relative_to(root).as_posix()}": path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.suffix in (".py", ".typed") and "__pycache__" not in path.parts
    }
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: fiberexec\nVersion: {fiberexec.__version__}\n{needs}".encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: fiberexec\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = "".join(f"{name},sha256={_sum(data)},{len(data)}\n" for name, data in files.items())
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name)  # with a date that is always the same
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _sum(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


# -- what an image is made from


def _digest(recipe: Recipe, platform: str | None) -> str:
    found = hashlib.sha256(recipe.dockerfile.encode())
    if recipe.arguments or platform:
        found.update(repr((recipe.arguments, platform)).encode("utf-8", "surrogateescape"))
    for name, mode, opened in _entries(recipe):
        found.update(f"\0{name}\0{mode}\0".encode("utf-8", "surrogateescape"))
        if isinstance(opened, bytes):
            found.update(opened)
            continue
        with open(opened, "rb") as file:
            while piece := file.read(1 << 20):
                found.update(piece)
    return found.hexdigest()


def _entries(recipe: Recipe) -> Iterator[tuple[str, str, bytes | str]]:
    """(name, kind and rights, content or the path of the file that has it) of everything in the context."""
    if recipe.files is not None:
        for name, data in recipe.files.items():
            yield name, "", data
        return
    for name in _included(recipe):
        path = os.path.join(recipe.folder, name)
        status = os.lstat(path)
        if os.path.islink(path):
            yield name, "link", os.readlink(path).encode("utf-8", "surrogateescape")
        elif os.path.isfile(path):
            yield name, oct(status.st_mode), path
        else:
            yield name, oct(status.st_mode), b""


def _included(recipe: Recipe) -> list[str]:
    """The files of a folder that Docker's builder sees: not those that .dockerignore names."""
    return sorted(
        import_module("docker.utils").exclude_paths(recipe.folder, _ignored(recipe.folder), dockerfile=recipe.dockerfile)
    )


def _ignored(folder: str) -> list[str]:
    try:
        lines = Path(folder, ".dockerignore").read_text("utf-8").splitlines()
    except FileNotFoundError:
        return []
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def context(recipe: Recipe) -> IO[bytes]:
    """The build's context as a tar archive."""
    if recipe.files is None:
        archive: IO[bytes] = import_module("docker.utils").tar(
            recipe.folder, exclude=_ignored(recipe.folder), dockerfile=(recipe.dockerfile, None)
        )
        return archive
    buffer = io.BytesIO()
    with tarfile.open(mode="w", fileobj=buffer) as files:
        for name, data in recipe.files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            files.addfile(entry, io.BytesIO(data))
    buffer.seek(0)
    return buffer


def build(client: Any, recipe: Recipe, arguments: Mapping[str, str], platform: str | None, said: Callable[[str], None]) -> str:
    """Build the image on a Docker engine unless it is there; return its name. ``said`` gets the build's lines.

    Raises LaunchError with the last lines of a build that fails, and what the SDK raises.
    """
    tag = recipe.tag(platform)
    try:
        client.api.inspect_image(tag)
        return tag
    except import_module("docker.errors").ImageNotFound:
        pass
    _logger.warning("building image %s from %s, once: it is kept until that changes", tag, recipe.source)
    with context(recipe) as archive:
        size = archive.seek(0, os.SEEK_END)
        archive.seek(0)
        if size > _LARGE:
            _logger.warning(
                "the build of %s sends %.1f GB to the engine: name in %s what the image does not need",
                *(recipe.source, size / 1e9, os.path.join(recipe.folder, ".dockerignore")),
            )
        answers = client.api.build(
            fileobj=archive,
            custom_context=True,
            dockerfile=recipe.dockerfile,
            tag=tag,
            rm=True,
            forcerm=True,
            decode=True,
            timeout=None,
            buildargs=dict(arguments),
            labels={LABEL: recipe.folder},
            platform=platform,
        )
        _follow(answers, tag, recipe, said)
    _logger.warning("image %s is built", tag)
    return tag


def _follow(answers: Iterable[Mapping[str, Any]], tag: str, recipe: Recipe, said: Callable[[str], None]) -> None:
    lines: list[str] = []
    error = ""
    for answer in answers:  # to the end, or the connection stays open
        error = error or str(answer.get("error", "")).strip()
        for line in str(answer.get("stream", "")).splitlines():
            if line.strip():
                said(line)
                lines.append(line)
                del lines[:-_LAST]
    if error:
        remedy = f"correct {recipe.source}"
        if "buildkit" in error.lower():
            remedy = f"build it with BuildKit (docker build -t NAME {recipe.folder}) and give image='NAME'"
        elif FULL in error.lower():
            remedy = MAKE_ROOM
        text = "\n".join(f"    {line}" for line in lines)
        raise LaunchError(
            f"Docker: building image {tag} failed: {error}. What to do: {remedy}. Its last lines:\n{text}", final=True
        )
