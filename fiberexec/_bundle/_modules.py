"""The driver's answer to a worker that lacks a module: its source if it is the user's own, else what to do about it.

The user's own is what the driver finds, without importing it, outside the standard library and outside the folders that
packages are installed into: scripts' neighbours, what ``PYTHONPATH`` names, editable installs.
"""

from __future__ import annotations

import functools
import importlib.machinery
import json
import os
import sys
import sysconfig
import zipimport

from ._archive import Unfit, collect, pack

TYPE_CHECKING = False
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from importlib.metadata import Distribution

    from ._archive import Files

_COMPILED = (*importlib.machinery.EXTENSION_SUFFIXES, ".so", ".pyd", ".dylib")
_INSTALLED = frozenset(["site-packages", "dist-packages"])
_STANDARD = tuple(
    {
        os.path.join(form(path), "")
        for path in (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), os.path.dirname(os.__file__))
        for form in (os.path.abspath, os.path.realpath)
    }
)


def bundle(name: str) -> tuple[str, bytes] | None:
    """(digest, archive) of the user's own module or package `name`, a top-level one; the digest is of its content.

    The archive has the files of the package, data included, and the metadata of its editable install, so that
    `importlib.metadata` knows it. If the driver has the module and does not send it, the digest is "" and the bytes say
    what to do about it, in words. None: the driver has no such module, or it is part of Python. Never raises.
    """
    try:
        return _bundle(name)
    except Unfit as error:
        return "", f"{error}. Put it into the image, with lines like these in its Dockerfile:\n{_COPY}".encode()
    except Exception as error:
        return "", f"the driver failed to find or to read it: {error!r}".encode(errors="replace")


_COPY = "    COPY . /src\n    RUN pip install /src"


def _bundle(name: str) -> tuple[str, bytes] | None:
    if not name.isidentifier() or name in ("__main__", "__mp_main__"):
        return None
    spec = _find(name)
    if spec is None:
        return None
    files: Files = {}
    if isinstance(spec.loader, zipimport.zipimporter):
        raise Unfit(f"the driver has it in an archive, {spec.origin}")
    if spec.origin is None or not spec.has_location:
        folders = [folder for folder in spec.submodule_search_locations or () if os.path.isdir(folder)]
        for folder in folders:
            if not is_installed(folder):
                _collect_namespace(folder, name, files)
        _collect_mapped(name, files)
        if not files:
            return _installed_hint(name) if any(map(is_installed, folders)) else None
    elif not os.path.isfile(spec.origin):
        return None
    elif is_installed(spec.origin):
        return _installed_hint(name)
    elif spec.submodule_search_locations is None:
        collect(spec.origin, name + _suffix(spec.origin, name), files, [])
    else:
        collect(os.path.dirname(spec.origin), name, files, [])
        _collect_mapped(name, files)
    compiled = [path for path, _ in files.values() if path.endswith(_COMPILED)]
    if compiled:
        raise Unfit(f"the driver's is compiled for its own host ({', '.join(compiled[:3])})")
    return pack(name, files, _metadata(spec.origin or next(iter(files.values()))[0]), strict=False)


def _find(name: str) -> ModuleSpec | None:
    """Where the driver has the module: as it is loaded, else as an import would find it; imports nothing."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    if isinstance(spec, importlib.machinery.ModuleSpec) and (spec.has_location or spec.submodule_search_locations):
        return spec
    for finder in tuple(sys.meta_path):
        try:
            spec = finder.find_spec(name, None)
        except Exception:
            continue  # its own trouble: the next may know
        if spec is not None:
            return spec
    return None


def is_installed(path: str) -> bool:
    """Whether `path` is part of Python, or in a folder that packages are installed into."""
    for form in os.path.abspath(path), os.path.realpath(path):
        if not _INSTALLED.isdisjoint(form.split(os.sep)) or form.startswith(_STANDARD):
            return True
    return False


def _suffix(origin: str, name: str) -> str:
    base = os.path.basename(origin)
    return base[len(name) :] if base.startswith(name) else os.path.splitext(base)[1]


def _collect_namespace(folder: str, name: str, files: Files) -> None:
    """A package without ``__init__.py``: the folders in it that hold code, with all that is in them.

    Any folder beside a script looks like such a package, one full of data too.
    """
    waiting = [(folder, name, 0)]
    while waiting:
        folder, name, depth = waiting.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            continue
        if any(entry.name.endswith(".py") for entry in entries):
            collect(folder, name, files, [])
        elif depth < 8:
            for entry in entries:
                if entry.name.isidentifier() and entry.is_dir(follow_symlinks=False):
                    waiting.append((entry.path, f"{name}/{entry.name}", depth + 1))


def _collect_mapped(name: str, files: Files) -> None:
    """The parts of a package that setuptools' editable installs have elsewhere: nothing but their tables tells where."""
    for finder in tuple(sys.meta_path):
        mapping = getattr(sys.modules.get(getattr(finder, "__module__", "")), "MAPPING", None)
        if not isinstance(mapping, dict):
            continue
        for module, path in mapping.items():
            if module.startswith(f"{name}."):
                place = module.replace(".", "/")
                if os.path.isdir(path):
                    collect(path, place, files, [])
                elif os.path.isfile(f"{path}.py"):
                    collect(f"{path}.py", f"{place}.py", files, [])


# -- what is known of installed packages -----------------------------------------------------------------------------


def _installed_hint(name: str) -> tuple[str, bytes] | None:
    if name in sys.stdlib_module_names:
        return None
    owners = _owners(tuple(sys.path)).get(name) or [name]
    lines = "\n".join(f"    RUN pip install {owner}" for owner in owners)
    these = "this line" if len(owners) == 1 else "those of these lines that it needs"
    return "", f"the driver has it as an installed package. Add {these} to the image's Dockerfile:\n{lines}".encode()


@functools.lru_cache(maxsize=1)
def _owners(_path: tuple[str, ...]) -> dict[str, list[str]]:
    """For each top-level module what pip calls its packages, with the driver's versions."""
    from importlib import metadata

    found: dict[str, list[str]] = {}
    for module, owners in metadata.packages_distributions().items():
        for owner in sorted(set(owners)):
            version = metadata.version(owner).partition("+")[0]  # a local version is on no index
            found.setdefault(module, []).append(f"{owner}=={version}")
    return found


def _metadata(path: str) -> dict[str, bytes]:
    """The metadata of the editable install that the file at `path` belongs to, as files of an archive."""
    path = os.path.realpath(path)
    projects = [one for one in _projects(tuple(sys.path)) if path.startswith(os.path.join(one[0], ""))]
    return max(projects, key=lambda one: len(one[0]))[1] if projects else {}


@functools.lru_cache(maxsize=1)
def _projects(_path: tuple[str, ...]) -> list[tuple[str, dict[str, bytes]]]:
    """The projects that are installed editable: (folder, files of metadata)."""
    from importlib import metadata

    found = []
    for one in metadata.distributions():
        folder = _project_folder(one)
        if folder is None:
            continue
        main = one.read_text("METADATA") or one.read_text("PKG-INFO")
        if not main:
            continue
        stem = f"{one.metadata['Name'].replace('-', '_')}-{one.version}.dist-info"
        files = {f"{stem}/METADATA": main.encode()}
        points = one.read_text("entry_points.txt")
        if points:
            files[f"{stem}/entry_points.txt"] = points.encode()
        found.append((os.path.realpath(folder), files))
    return found


def _project_folder(one: Distribution) -> str | None:
    try:
        link = one.read_text("direct_url.json")  # PEP 610
        if link:
            told = json.loads(link)
            if told.get("dir_info", {}).get("editable") and told["url"].startswith("file://"):
                from urllib.request import url2pathname

                return url2pathname(told["url"].removeprefix("file://"))
        folder = os.fspath(one.locate_file(""))  # type: ignore[call-overload]
    except (OSError, TypeError, ValueError, KeyError, AttributeError):
        return None
    return None if is_installed(os.path.join(folder, "x")) else str(folder)
