"""Trees of files as archives: what belongs to one, how much it may be, and a digest that only its content decides."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import time
import zipfile
from threading import Lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    Files = dict[str, tuple[str, os.stat_result]]  # name in the archive ("/" at its end: an empty folder) -> path, status

LIMIT = 200 * 2**20  # bytes of one archive, before compression
MOST_FILES = 100_000  # files and folders that are looked at
LEFT_OUT = frozenset(
    [
        "__pycache__", ".git", ".hg", ".svn", ".venv", ".tox", ".nox", ".eggs", ".mypy_cache", ".pytest_cache", ".ruff_cache",
        ".hypothesis", ".ipynb_checkpoints", "node_modules",
    ]
)  # fmt: skip
_SETTLED = 2 * 10**9  # ns: a file changed more recently may change again and keep its time and size
_KEPT = 64 * 2**20  # bytes of an archive that is kept in memory for the next time
_DATE = 1980, 1, 1, 0, 0, 0

_cache: dict[Hashable, tuple[object, str, bytes]] = {}
_lock = Lock()  # one archive is made at a time: many workers ask for the same at once


class Unfit(Exception):
    """A tree cannot be sent. The message says why and names the files."""


def collect(path: str, name: str, files: Files, problems: list[str]) -> None:
    """Add what is at `path`, a file or a folder, to `files`, under `name` ("" for what is in the folder itself).

    Links are followed, but not in a circle. Left out: what version control, virtual environments and caches keep,
    broken links, sockets and devices. What cannot be read is left out too, and named in `problems`. Raises `Unfit`
    for a tree of more than 100,000 files.
    """
    looked_at = 0
    status = os.stat(path)
    waiting: list[tuple[str, str, os.stat_result, tuple[tuple[int, int], ...]]]
    waiting = [(path, name, status, ((status.st_dev, status.st_ino),))]
    while waiting:
        path, name, status, above = waiting.pop()
        looked_at += 1
        if looked_at > MOST_FILES:
            raise Unfit(f"more than {MOST_FILES:,} files and folders, of which {path} is one")
        if stat.S_ISREG(status.st_mode):
            if not os.access(path, os.R_OK):
                problems.append(f"{path}: no permission to read it")
            elif not _encodable(name):
                problems.append(f"{path!r}: its name is not UTF-8")
            else:
                files.setdefault(name, (path, status))
        elif stat.S_ISDIR(status.st_mode):
            try:
                inside = sorted(os.listdir(path), reverse=True)
            except OSError as error:
                problems.append(f"{path}: {error.strerror}")
                continue
            if not inside and name and _encodable(name):
                files.setdefault(f"{name}/", (path, status))
            for entry in inside:
                where = os.path.join(path, entry)
                try:
                    status = os.stat(where)
                except OSError:
                    continue  # a link to nothing
                mark = status.st_dev, status.st_ino
                if stat.S_ISDIR(status.st_mode) and (
                    entry in LEFT_OUT or mark in above or os.path.exists(os.path.join(where, "pyvenv.cfg"))
                ):
                    continue
                waiting.append((where, f"{name}/{entry}" if name else entry, status, (*above, mark)))


def _encodable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_size(files: Files) -> None:
    """Raise `Unfit`, naming the largest, if `files` are more than 200 MiB."""
    sizes = {path: status.st_size for path, status in files.values() if stat.S_ISREG(status.st_mode)}
    total = sum(sizes.values())
    if total > LIMIT:
        largest = sorted(sizes, key=lambda path: (-sizes[path], path))[:5]
        listed = ", ".join(f"{path} ({_mib(sizes[path])})" for path in largest)
        raise Unfit(f"{_mib(total)}, more than the {_mib(LIMIT)} that can be sent; the largest files: {listed}")


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB" if size >= 2**20 else f"{size:,} bytes"


def pack(key: Hashable, files: Files, texts: Mapping[str, bytes], strict: bool) -> tuple[str, bytes]:
    """(digest, archive) of `files` and of `texts`, which are given by their names and contents.

    The same content gives the same bytes, whatever the files' times and owners. The last archive of each `key` is
    kept, and given again as long as no file has changed. A file that cannot be read after all raises OSError if
    `strict`, and is left out otherwise. Raises `Unfit` for more than 200 MiB.
    """
    check_size(files)
    with _lock:
        return _pack(key, files, texts, strict)


def _pack(key: Hashable, files: Files, texts: Mapping[str, bytes], strict: bool) -> tuple[str, bytes]:
    now = time.time_ns()
    # the time of the last change of status is set by the system alone
    marks = (
        [(name, path, st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns) for name, (path, st) in files.items()],
        dict(texts),
    )
    known = _cache.get(key)
    if known is not None and known[0] == marks:
        return known[1:]
    digest, buffer, total = hashlib.sha256(), io.BytesIO(), 0
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name in sorted({*files, *texts}):
            mode = 0o644
            if name in texts:
                data = texts[name]
            elif name.endswith("/"):
                data, mode = b"", 0o755
            else:
                path, status = files[name]
                mode |= status.st_mode & 0o111 and 0o111
                try:
                    with open(path, "rb") as file:
                        data = file.read(LIMIT + 1)
                except OSError:
                    if strict:
                        raise
                    continue
            total += len(data)
            if total > LIMIT:
                raise Unfit(f"more than {_mib(LIMIT)}; {name} has just grown")
            encoded = name.encode()
            digest.update(b"%d %d %d " % (len(encoded), mode, len(data)) + encoded)
            digest.update(data)
            info = zipfile.ZipInfo(name, _DATE)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.create_system = 3
            kind = stat.S_IFDIR if name.endswith("/") else stat.S_IFREG
            info.external_attr = (kind | mode) << 16
            archive.writestr(info, data, compresslevel=1)
    made = digest.hexdigest(), buffer.getvalue()
    newest = max((max(st.st_mtime_ns, st.st_ctime_ns) for _, st in files.values()), default=0)
    if now - newest > _SETTLED and len(made[1]) <= _KEPT:
        _cache[key] = marks, *made
    else:
        _cache.pop(key, None)
    return made
