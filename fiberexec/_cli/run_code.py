"""The user's code on its way to a job: which folders go, where they are then, and how what goes is packed.

What is sent keeps its place relative to the working directory, so that the command line means the same there as here.
"""

from __future__ import annotations

import io
import os
import sys
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, NamedTuple

from fiberexec._bundle._archive import Unfit, check_size, collect
from fiberexec._errors import ConfigError, FiberError

HOME = "fiberexec-run"  # the folder of a job that has everything of ours, below its root
CODE = "code"  # in that


class Code(NamedTuple):
    """What is sent. ``files``: (path here, its name below CODE). ``folder``: where the program starts, below CODE."""

    files: tuple[tuple[str, str], ...]
    folder: str


def program_folder(command: Sequence[str]) -> str | None:
    """The folder of the program that a command runs, if that is here: a file with a relative path, or a module of this folder.

    What has an absolute path is the image's.
    """
    module = False
    for number, word in enumerate(command):
        if module:
            name = word.split(".")[0]
            return os.curdir if os.path.isdir(name) or os.path.isfile(f"{name}.py") else None
        if number and word == "-m":
            module = True
        elif not os.path.isabs(word) and os.path.isfile(word):
            return os.path.dirname(word) or os.curdir
    return None


def collect_code(folders: Iterable[str]) -> Code:
    """What is in the folders. Raises ConfigError for what cannot be sent."""
    here = os.getcwd()
    wanted = [os.path.abspath(folder) for folder in folders]
    root = os.path.commonpath([here, *wanted])
    found: dict[str, tuple[str, os.stat_result]] = {}
    problems: list[str] = []
    for folder in wanted:
        if not os.path.exists(folder):
            raise ConfigError(f"--ship: there is no file or folder {folder}")
        name = os.path.relpath(folder, root)
        try:
            collect(folder, "" if name == os.curdir else name, found, problems)
        except Unfit as error:
            raise ConfigError(f"--ship: {folder}: {error}") from None
    if problems:
        raise ConfigError(f"--ship: cannot send {'; '.join(problems[:5])}")
    try:
        check_size(found)
    except Unfit as error:
        raise ConfigError(f"--ship: {error}. Put them into the image, or into a volume (--volume)") from None
    folder = os.path.relpath(here, root)
    return Code(tuple((path, name) for name, (path, _) in sorted(found.items())), "" if folder == os.curdir else folder)


def archive(entries: Iterable[tuple[str, bytes] | tuple[str, str]], folders: Iterable[str] = ()) -> IO[bytes]:
    """A tar archive of (name, content or path). Whoever the program runs as may read and change what is in it."""
    import tempfile

    file = tempfile.TemporaryFile()
    made: set[str] = set()
    with tarfile.open(mode="w", fileobj=file) as tar:
        for name in folders:
            for parent in _parents(f"{name}/"):
                _add_folder(tar, parent, made)
        for name, content in entries:
            for parent in _parents(name):
                _add_folder(tar, parent, made)
            if name.endswith("/"):
                continue
            entry = tarfile.TarInfo(name)
            entry.mode = 0o666
            if isinstance(content, bytes):
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
                continue
            with open(content, "rb") as source:
                status = os.fstat(source.fileno())
                entry.size = status.st_size
                entry.mtime = status.st_mtime
                entry.mode |= status.st_mode & 0o111 and 0o111
                tar.addfile(entry, source)
    file.seek(0)
    return file


def packed(code: Code | None, spec: bytes) -> IO[bytes]:
    """The archive that is unpacked at a job's root: the code, and what is to be run."""
    files = () if code is None else code.files
    entries: list[tuple[str, bytes] | tuple[str, str]] = [(f"{HOME}/{CODE}/{name}", path) for path, name in files]
    folders = [HOME] if code is None else [f"{HOME}/{CODE}/{code.folder}".rstrip("/")]
    return archive([*entries, (f"{HOME}/run.json", spec)], folders)


def tree(path: str, name: str) -> list[tuple[str, str]]:
    """What `archive` takes of a file or a folder that is to have a name. Raises FiberError for what cannot be read."""
    found: dict[str, tuple[str, os.stat_result]] = {}
    problems: list[str] = []
    try:
        collect(path, name, found, problems)
    except Unfit as error:
        raise FiberError(f"{path}: {error}") from None
    if problems:
        raise FiberError(f"cannot read {'; '.join(problems[:5])}")
    return [(entry, source) for entry, (source, _) in sorted(found.items())] or [(f"{name}/", path)]


def _parents(name: str) -> Iterator[str]:
    position = name.find("/")
    while position >= 0:
        if position:
            yield name[:position]
        position = name.find("/", position + 1)


def _add_folder(tar: tarfile.TarFile, name: str, made: set[str]) -> None:
    if name and name not in made:
        made.add(name)
        entry = tarfile.TarInfo(name)
        entry.type, entry.mode = tarfile.DIRTYPE, 0o777
        tar.addfile(entry)


def unpack(stream: IO[bytes], target: str, name: str | None = None) -> None:
    """Unpack what came from a job to ``target``, a folder, or the path of what there is under another name.

    Nothing leaves the target, and nothing else than files, folders and links within is made: other links and special files
    are left out, and said to be.
    """
    from fiberexec._cli.show import note

    if sys.version_info < (3, 12) and not hasattr(tarfile, "data_filter"):
        raise ConfigError("this Python is too old to unpack archives safely: update it")
    with tarfile.open(mode="r|", fileobj=stream) as tar:
        for entry in tar:
            _, _, rest = entry.name.partition("/")
            if name is not None:
                entry.name = f"{name}/{rest}" if rest else name
                if entry.islnk():  # to a file that came before, whose name has changed likewise
                    entry.linkname = f"{name}/{entry.linkname.partition('/')[2]}"
            try:
                tar.extract(entry, target, filter="data")
            except (tarfile.AbsoluteLinkError, tarfile.LinkOutsideDestinationError, tarfile.SpecialFileError) as error:
                if not rest:
                    raise FiberError(f"nothing was copied: {error}") from None
                note(f"fiberexec: left out: {error}")
