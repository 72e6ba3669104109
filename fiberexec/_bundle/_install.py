"""The worker's side: a module that nothing here finds is asked for, unpacked once a host, and imported as any other.

The finder stands last, so what the image has is never replaced. What several workers of a host want at once is asked
for by one of them; the others wait for it.
"""

from __future__ import annotations

import os
import sys
from _thread import get_ident
from importlib.machinery import PathFinder
from time import monotonic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    Ask = Callable[[str], tuple[str, bytes] | None]

_LIMIT = 256 * 2**20  # bytes of one archive, unpacked; what the driver sends is less
_HEXADECIMAL = frozenset("0123456789abcdef")


def install(
    ask: Ask,
    folder: str,
    *,
    image: str = "",
    excuse: Callable[[float | None], None] | None = None,
) -> Finder:
    """Let this process import what its driver has and its host has not. A later call replaces an earlier one's.

    Parameters
    ----------
    ask:
        Gets the name of a top-level module; returns what `bundle` returned in the driver. May block. What it raises
        makes the import fail with ImportError, and is asked again at the next.
    folder:
        Where code is unpacked, into one folder for each digest; all workers of the job share it.
    image:
        What the worker runs in, for messages; by default the variable ``FIBEREXEC_IMAGE``.
    excuse:
        Called in the importing thread, with None as a request begins and with the seconds that it took as it ends:
        they are not the task's.
    """
    finder = Finder(ask, folder, image, excuse)
    sys.meta_path[:] = [*(one for one in sys.meta_path if not isinstance(one, Finder)), finder]
    return finder


class Finder:
    """A finder as `sys.meta_path` wants it."""

    def __init__(
        self,
        ask: Ask,
        folder: str,
        image: str,
        excuse: Callable[[float | None], None] | None,
    ) -> None:
        self._ask = ask
        self._folder = os.path.abspath(folder)
        self._image = image
        self._excuse = excuse
        self._places: dict[str, str] = {}  # by top-level module: the folder that it was unpacked into
        self._missing: dict[str, str] = {}  # by top-level module: what the driver said about it
        self._asking: set[int] = set()  # threads: what asking itself imports is not asked for

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        top, _, rest = fullname.partition(".")
        if rest and not _in_namespace(fullname):
            return None
        place = self._place(top)
        if place is not None:
            parents = fullname.split(".")[:-1]
            return PathFinder.find_spec(fullname, [os.path.join(place, *parents)])
        if not rest and top in self._missing and sys.meta_path[-1] is self and _is_import():
            raise ModuleNotFoundError(self._explain(top), name=fullname)
        return None

    def invalidate_caches(self) -> None:
        """`importlib.invalidate_caches()`: what was not to be had is asked for again."""
        self._missing.clear()

    def _place(self, top: str) -> str | None:
        if top in self._places:
            return self._places[top]
        thread = get_ident()
        if top in self._missing or thread in self._asking or top in sys.stdlib_module_names or not top.isidentifier():
            return None
        begun = monotonic()
        self._asking.add(thread)
        if self._excuse is not None:
            self._excuse(None)
        try:
            self._fetch(top)
        except Exception as error:
            raise ImportError(
                f"module {top!r} is not on this host, and asking the driver for it failed: {error!r}", name=top
            ) from error
        finally:
            self._asking.discard(thread)
            if self._excuse is not None:
                self._excuse(monotonic() - begun)
        return self._places.get(top)

    def _fetch(self, top: str) -> None:
        import fcntl

        names = os.path.join(self._folder, ".names")
        os.makedirs(names, 0o700, exist_ok=True)
        record = os.path.join(names, top)
        lock = os.open(f"{record}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            digest = _read(record)
            if not digest:
                answer = self._ask(top)
                digest, data = answer if answer is not None else ("", b"")
                if not digest:
                    self._missing[top] = bytes(data).decode()
                    return
                unpack(digest, data, self._folder)
                _write(record, digest)
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # for a forked child, too, that has the descriptor
            os.close(lock)
        place = os.path.join(self._folder, digest)
        if place not in sys.path:
            sys.path.append(place)  # for processes that this one starts
        sys.path_importer_cache.pop(place, None)
        self._places[top] = place

    def _explain(self, top: str) -> str:
        image = self._image or os.environ.get("FIBEREXEC_IMAGE", "")
        where = f"image {image!r}, on host {os.uname().nodename}," if image else f"host {os.uname().nodename}"
        said = self._missing[top] or (
            "neither has the driver a module of that name to send. If it is a package that the task needs, add it to the "
            f"image's Dockerfile:\n    RUN pip install {top}"
        )
        return f"No module named {top!r}: {where} has none; {said}"


def _in_namespace(fullname: str) -> bool:
    """Whether the package that a module belongs to has no file of its own, and so may have parts elsewhere."""
    parent = sys.modules.get(fullname.rpartition(".")[0])
    return parent is not None and getattr(parent, "__file__", None) is None and hasattr(parent, "__path__")


def _is_import() -> bool:
    """Whether somebody imports, and does not merely ask, as `importlib.util.find_spec` does."""
    try:
        return sys._getframe(3).f_code.co_name == "_find_and_load_unlocked"
    except ValueError:
        return False


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.read()
    except FileNotFoundError:
        return ""


def _write(path: str, text: str) -> None:
    draft = f"{path}.{os.getpid()}.draft"
    with open(draft, "w", encoding="ascii") as file:
        file.write(text)
    os.rename(draft, path)


def unpack(digest: str, data: bytes, folder: str) -> str:
    """Unpack an archive of `bundle` or `ship` into ``folder/digest``, and return that path.

    It is there whole or not at all; what is there already stays. Raises ValueError for an archive with names that lead
    out of the folder, OSError if the disk refuses.
    """
    if len(digest) != 64 or not _HEXADECIMAL.issuperset(digest):
        raise ValueError(f"not a digest: {digest!r}")
    place = os.path.join(folder, digest)
    if os.path.isdir(place):
        return place
    import io
    import shutil
    import zipfile

    draft = os.path.join(folder, f".{digest[:16]}.{os.getpid()}.{os.urandom(4).hex()}")
    os.makedirs(draft, 0o700)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sum(one.file_size for one in archive.infolist()) > _LIMIT:
                raise ValueError("the archive is too large")
            for one in archive.infolist():
                parts = one.filename.rstrip("/").split("/")
                if not {"", ".", ".."}.isdisjoint(parts) or "\\" in one.filename or "\0" in one.filename:
                    raise ValueError(f"the archive has a file {one.filename!r}, which is outside of it")
                path = os.path.join(draft, *parts)
                os.makedirs(path if one.is_dir() else os.path.dirname(path), exist_ok=True)
                if not one.is_dir():
                    with archive.open(one) as source, open(path, "xb") as file:
                        shutil.copyfileobj(source, file, 2**20)
                    os.chmod(path, (one.external_attr >> 16) & 0o111 | 0o644)
        os.rename(draft, place)
    except BaseException as error:
        shutil.rmtree(draft, ignore_errors=True)
        if not (isinstance(error, OSError) and os.path.isdir(place)):  # another worker was quicker
            raise
    return place
