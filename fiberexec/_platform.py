"""Everything that depends on the operating system, each with a portable alternative.

Set FIBEREXEC_PORTABLE=1 to force the alternatives (the tests do, on Linux).
"""

from __future__ import annotations

import mmap
import os
import sys
from _socket import CMSG_SPACE, SCM_RIGHTS, SOL_SOCKET, gethostname, socket, socketpair
from _thread import get_ident
from time import monotonic, sleep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

LINUX = sys.platform == "linux" and not os.environ.get("FIBEREXEC_PORTABLE")

# -- memory shared between a worker and whoever reaps it

CELL_WORDS = 4  # words of 8 bytes in a cell: see RUNNING ... in _worker
_CELL_BYTES = 8 * CELL_WORDS
_HUGE = 4 << 20  # bytes


def make_cells(count: int) -> int:
    """A descriptor of zeroed memory for ``count`` cells, without a name in any file system."""
    if sys.platform == "linux" and LINUX:
        fd = os.memfd_create("fiberexec-cells", os.MFD_CLOEXEC)
    else:
        import tempfile

        fd, name = tempfile.mkstemp(prefix="fiberexec-cells-")
        os.unlink(name)
    try:
        os.write(fd, bytes(max(count * _CELL_BYTES, mmap.PAGESIZE)))  # a full disk says so here, not by SIGBUS later
    except OSError:
        os.close(fd)
        raise
    return fd


def map_cells(fd: int) -> memoryview:
    """All cells behind ``fd`` as one view of unsigned 64-bit words, each written and read at once."""
    return memoryview(mmap.mmap(fd, os.fstat(fd).st_size)).cast("Q")


def fresh_memory(size: int) -> bytearray | memoryview:
    """Writable memory for a large buffer; huge pages where there are any, since a page fault costs more than a copy."""
    if LINUX and size >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        return memoryview(memory)
    return bytearray(size)


def stream_pair() -> tuple[socket, socket]:
    """Two connected sockets that block, whatever socket.setdefaulttimeout() was told."""
    pair = socketpair()
    for end in pair:
        end.setblocking(True)
    return pair


def send_fd(sock: socket, data: bytes, fd: int) -> None:
    """Send data and a descriptor with it: socket.send_fds() without the cost of importing socket."""
    sock.sendmsg([data], [(SOL_SOCKET, SCM_RIGHTS, fd.to_bytes(4, sys.byteorder))])


def receive_fds(sock: socket, size: int, count: int) -> tuple[bytes, list[int]]:
    """One read, and the descriptors that came with it: as send_fd()."""
    data, ancillary, _, _ = sock.recvmsg(size, CMSG_SPACE(4 * count))
    fds: list[int] = []
    for level, kind, content in ancillary:
        if level == SOL_SOCKET and kind == SCM_RIGHTS:
            fds += memoryview(content[: len(content) // 4 * 4]).cast("i")
    return data, fds


# -- dying together

_SOON = 0.01  # seconds


def tie_group_to(fd: int) -> None:
    """Let the kernel kill this process' group when the last writer of the pipe ``fd`` has gone.

    It works whatever the group is doing. Elsewhere than on Linux the fork server does it when it hears of the end.
    """
    if not LINUX:
        return
    import fcntl

    # A description of its own: whom the kernel signals is kept there.
    own = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.fcntl(own, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(own, 10, 9)  # F_SETSIG, SIGKILL
    fcntl.fcntl(own, fcntl.F_SETFL, fcntl.fcntl(own, fcntl.F_GETFL) | os.O_ASYNC)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent dies, so that they can be found and ended."""
    if not LINUX:
        return
    import ctypes

    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def hold_while_forking(number: int, in_child: Callable[[], None]) -> None:
    """From now on a signal that comes while this process forks waits; to the child it comes after ``in_child()``.

    Before, it would meet a handler of the parent's there, and Python forgets what came before the child's first step.
    """
    from signal import SIG_BLOCK, SIG_SETMASK, pthread_sigmask

    masks = {}  # by thread

    def before() -> None:
        masks[get_ident()] = pthread_sigmask(SIG_BLOCK, ())
        pthread_sigmask(SIG_BLOCK, {number})

    def after() -> None:
        if get_ident() in masks:  # else a signal has just ended before()
            pthread_sigmask(SIG_SETMASK, masks.pop(get_ident()))

    def after_in_child() -> None:
        in_child()
        after()

    os.register_at_fork(before=before, after_in_parent=after, after_in_child=after_in_child)


def repeat_when_ignored(number: int, raised: type[BaseException]) -> None:
    """Let a signal come again whose handler raised where Python ignores that: in a finalizer, or a hook of a fork."""
    from _thread import start_new_thread

    said = sys.unraisablehook

    def again() -> None:
        sleep(_SOON)
        os.kill(os.getpid(), number)

    def ignored(unraisable: sys.UnraisableHookArgs) -> None:
        if unraisable.exc_type is raised:
            start_new_thread(again, ())
        else:
            said(unraisable)

    sys.unraisablehook = ignored


def children(pid: int) -> list[int]:
    """The ids of the direct children of ``pid``; empty where the system does not tell."""
    found: list[int] = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as file:
                found += map(int, file.read().split())
    except OSError:
        pass
    return found


def reap(pid: int, seconds: float) -> None:
    """Wait for the end of a child of this process, and kill it if it takes longer than ``seconds``."""
    deadline = monotonic() + seconds
    pause = 0.0001
    while True:
        try:
            if os.waitpid(pid, os.WNOHANG)[0]:
                return
        except ChildProcessError:  # somebody else waits for every child, or children are ignored
            return
        if monotonic() > deadline:
            os.kill(pid, 9)  # SIGKILL: the module signal is not cheap
        sleep(pause)
        pause = min(2 * pause, 0.05)


def memory_kills() -> int:
    """How many processes the kernel has killed for want of memory, in this container if it tells; 0 where it does not."""
    for name in (*_memory_events(), "/proc/vmstat"):  # the last counts the whole machine
        try:
            with open(name) as file:
                for line in file:
                    if line.startswith("oom_kill "):
                        return int(line.split()[1])
        except OSError:
            continue
    return 0


def _memory_events() -> list[str]:
    """Files in which this process' own cgroup may count such things."""
    found = []
    try:
        with open("/proc/self/cgroup") as file:
            for line in file:
                number, kinds, path = line.rstrip("\n").split(":", 2)
                if number == "0" or "memory" in kinds.split(","):
                    root, leaf = ("", "memory.events") if number == "0" else ("/memory", "memory.oom_control")
                    found += [f"/sys/fs/cgroup{root}{path}/{leaf}", f"/sys/fs/cgroup{root}/{leaf}"]  # in a container: the last
    except (OSError, ValueError):
        pass
    return found


# -- what this machine has


def cpu_count() -> int:
    """The CPUs that this process may use: affinity and cgroup quota counted, at least 1."""
    if sys.platform == "linux":
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    return max(1, min(count, int(_cpu_quota() or count)))


def _cpu_quota() -> float | None:
    for quota_file, period_file in (
        ("/sys/fs/cgroup/cpu.max", None),
        ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
    ):
        try:
            with open(quota_file) as file:
                words = file.read().split()
            if period_file:
                with open(period_file) as file:
                    words += file.read().split()
            quota, period = words[:2]
            if quota not in ("max", "-1"):
                return int(quota) / int(period)
        except (OSError, ValueError):
            continue
    return None


def memory_total() -> int:
    """Bytes of memory that this process may use: the machine's, or its cgroup's limit if that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(name) as file:
                total = min(total, int(file.read()))
        except (OSError, ValueError):
            continue
    return total


def memory_story() -> str:
    """What is to be said of a process that was killed for want of memory: the limit, and what was in use at most."""
    text = f"it was killed for want of memory: {memory_total() / 2**20:.0f} MiB is what there is for all that runs here"
    for name in ("/sys/fs/cgroup/memory.peak", "/sys/fs/cgroup/memory/memory.max_usage_in_bytes"):
        try:
            with open(name) as file:
                return f"{text}, {int(file.read()) / 2**20:.0f} MiB were in use at most\n"
        except (OSError, ValueError):
            continue
    return text + "\n"


def gpu_devices() -> tuple[str, ...]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names: list[str] = []
        for name in map(str.strip, visible.split(",")):
            if name in names or not (name.isdigit() or name.startswith(("GPU-", "MIG-"))):
                break  # CUDA, too, takes what comes before the first name that is none
            names.append(name)
        return tuple(names)
    try:
        return tuple(str(i) for i in range(len(os.listdir("/proc/driver/nvidia/gpus"))))
    except OSError:
        return ()


def memory_of(pid: int) -> int:
    """Resident bytes of a process; 0 where the system does not tell or the process has gone."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * mmap.PAGESIZE
    except (OSError, IndexError, ValueError):
        return 0


def host_name() -> str:
    """The name of this host."""
    return gethostname()


def user_name(user: int) -> str:
    """The name of a user of this host, or the number."""
    import pwd

    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)


def pid_space() -> str:
    """What is the same for all who know this process by its number, and for nobody else; "" where that cannot be told.

    It stands for a machine and a namespace there. Different hosts may have the same name, and a container that of its host.
    """
    from hashlib import sha256

    for path in ("/etc/machine-id", "/proc/sys/kernel/random/boot_id"):  # the second where the first is missing or empty
        try:
            with open(path, "rb") as file:
                machine = file.read().strip()
            if machine:
                return sha256(b"%d %b" % (os.stat("/proc/self/ns/pid").st_ino, machine)).hexdigest()[:16]
        except OSError:
            continue
    return ""
