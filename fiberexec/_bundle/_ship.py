"""Files and folders that the user names in ``ship``, for every job."""

from __future__ import annotations

import os

from fiberexec._errors import ConfigError

from ._archive import Unfit, check_size, collect, pack

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._archive import Files


def check_ship(paths: Sequence[str | os.PathLike[str]]) -> None:
    """Raise `ConfigError` unless `ship` can send `paths`; reads no file."""
    _collect(paths)


def ship(paths: Sequence[str | os.PathLike[str]]) -> tuple[str, bytes]:
    """(digest, archive) of the files and folders at `paths`; the digest is a SHA-256 of their content, in hexadecimal.

    A relative path keeps its name in the archive ("conf/a.yaml"; "." is all that is in the current folder); an
    absolute one, or one that leads out of the current folder, has its last part. Caches, virtual environments and what
    version control keeps are left out of folders.

    Raises
    ------
    ConfigError
        A path does not exist or cannot be read, two of them would have one name, or they are more than 200 MiB.
    """
    files = _collect(paths)
    try:
        return pack("ship", files, {}, strict=True)
    except Unfit as error:
        raise ConfigError(f"ship: {error}") from None
    except OSError as error:
        raise ConfigError(f"ship: {error.filename} cannot be read: {error.strerror}") from error


def _collect(paths: Sequence[str | os.PathLike[str]]) -> Files:
    files: Files = {}
    problems: list[str] = []
    for path in [os.fspath(one) for one in paths]:
        if not os.path.exists(path):
            raise ConfigError(f"ship: there is no file or folder {path!r} (the current folder is {os.getcwd()})")
        added: Files = {}
        try:
            collect(path, _name(path), added, problems)
        except Unfit as error:
            raise ConfigError(f"ship: {path}: {error}") from None
        for name, (source, _) in added.items():
            if name in files and not os.path.samefile(files[name][0], source):
                raise ConfigError(f"ship: {files[name][0]} and {source} would both be {name!r} in the workers' folder")
        if not added and not os.path.isdir(path):
            problems.append(f"{path}: not a file or a folder")
        files.update(added)
    if problems:
        raise ConfigError(f"ship: cannot send {'; '.join(problems[:5])}")
    try:
        check_size(files)
    except Unfit as error:
        raise ConfigError(f"ship: {error}. Put them into the image, or into a volume that the workers share") from None
    return files


def _name(path: str) -> str:
    normal = os.path.normpath(path)
    if normal == os.curdir:
        return ""
    if os.path.isabs(normal) or normal.split(os.sep)[0] == os.pardir:
        return os.path.basename(os.path.abspath(normal))
    return normal.replace(os.sep, "/")
