"""Address ranges: reserving, mapping, populating and locking memory, through libc and without the GIL.

Python's own mmap cannot map at a given address, and its madvise holds the GIL while the kernel fills memory, which
stops every reading thread for as long (measured: 300 to 600 ms per 512 MiB). No torch here: the store process and
engine hosts use this too.

A range lives as long as any view of it does: memoryviews, arrays and torch tensors made from `Space.buffer` keep the
buffer alive, and the range is unmapped when the last of them is gone. At the end of the process nothing is unmapped:
tensors may outlive the interpreter's own clean-up.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

HUGE_BYTES = 2 << 20  # a huge page: ranges begin at a multiple, so that THP and hugetlb can be used in them
POPULATE_STEP_BYTES = 64 << 20  # how far one populating call goes before `stopped` is asked again

# A ctypes array of bytes. It offers the buffer protocol (memoryview, torch.frombuffer, os.preadv) and weak references.
Buffer: TypeAlias = "ctypes.Array[ctypes.c_ubyte]"

_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MADV_HUGEPAGE = 14
_MADV_POPULATE_READ = 22  # Linux 5.14; mmap has names for these from Python 3.13 on only
_MADV_POPULATE_WRITE = 23
_FALLOC_PUNCH = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE needs FALLOC_FL_KEEP_SIZE
_PROT_NONE = 0
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)  # CDLL, not PyDLL: calls release the GIL
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """`size_bytes` bytes of this process' addresses, from `address`, a multiple of HUGE_BYTES."""

    address: int
    size_bytes: int
    buffer: Buffer = field(repr=False)

    def view(self, offset: int = 0, size_bytes: int | None = None) -> memoryview:
        """Return a writable view of bytes; it keeps the range alive. What is not mapped yet must not be touched."""
        end = self.size_bytes if size_bytes is None else offset + size_bytes
        return memoryview(self.buffer).cast("B")[offset:end]


def reserve(size_bytes: int) -> Space:
    """Take addresses without memory: touching them is a fault until something is mapped there. Raises OSError."""
    return _adopt(*_aligned(size_bytes, _PROT_NONE), size_bytes)


def anonymous(size_bytes: int) -> Space:
    """Make private, zeroed memory, of transparent huge pages where the kernel has them. Raises OSError.

    Nothing is filled yet: pages come as they are touched, or with `populate`.
    """
    address, length = _aligned(size_bytes, _READ_WRITE)
    # Huge pages are worth 7x the CPU seconds per GB of a read; a kernel built without them says EINVAL.
    _advise(address, length, _MADV_HUGEPAGE, ignore=(errno.EINVAL,))
    return _adopt(address, length, size_bytes)


def map_file(
    space: Space, fd: int, *, offset: int, file_offset: int, size_bytes: int, shared: bool, writable: bool = True
) -> None:
    """Map bytes of a file into a range, in place of what was there. Raises OSError.

    Not `shared`: what is written stays in this process (copied page by page), and the descriptor may be read-only.
    Shared and not `writable`: the file's own pages, from a read-only descriptor; a write ends the process (SIGSEGV),
    although the range's buffer says that it can be written, because torch warns about buffers that cannot. Offsets
    and sizes are multiples of the page size, of HUGE_BYTES for hugetlb.
    """
    if offset < 0 or size_bytes <= 0 or offset + size_bytes > _round_up(space.size_bytes):
        raise ValueError(f"{size_bytes} bytes at {offset} are outside a range of {space.size_bytes}")
    kind = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE | _MAP_NORESERVE
    protection = _READ_WRITE if writable else mmap.PROT_READ
    _map(space.address + offset, size_bytes, protection, kind | _MAP_FIXED, fd, file_offset)


def map_extents(fd: int, extents: Iterable[tuple[int, int]], *, shared: bool = False, writable: bool = True) -> Space:
    """Return a new range with (offset, size) extents of a file in it, one behind the other. `shared` and `writable`
    are those of `map_file`. Raises OSError."""
    extents = tuple(extents)
    mapped = reserve(sum(size for _, size in extents))
    position = 0
    for file_offset, size in extents:
        map_file(
            mapped, fd, offset=position, file_offset=file_offset, size_bytes=size, shared=shared, writable=writable
        )
        position += size
    return mapped


def populate(
    space: Space,
    *,
    write: bool,
    offset: int = 0,
    size_bytes: int | None = None,
    threads: int = 1,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Make pages present, so that nobody faults on them later; `stopped()` is asked every POPULATE_STEP_BYTES.

    `write` fills them (for memory that will be read into); otherwise they are only mapped. Best effort in one way: a
    kernel before 5.14 cannot, and pages then come as they are touched. Raises OSError (EFAULT, ENOMEM) if the machine
    has not that much memory to give.
    """
    end = space.size_bytes if size_bytes is None else offset + size_bytes
    advice = _MADV_POPULATE_WRITE if write else _MADV_POPULATE_READ
    steps = iter(range(offset, end, POPULATE_STEP_BYTES))  # its `next` is atomic: the threads share it
    errors: list[OSError] = []

    def work() -> None:
        for start in steps:
            if errors or stopped():
                return
            length = min(POPULATE_STEP_BYTES, end - start)
            try:
                _advise(space.address + start, length, advice, ignore=(errno.EINVAL,))
            except OSError as error:
                errors.append(error)

    helpers = [threading.Thread(target=work, name="populate", daemon=True) for _ in range(threads - 1)]
    for helper in helpers:
        helper.start()
    work()
    for helper in helpers:
        helper.join()
    if errors:
        raise errors[0]


def lock(space: Space) -> None:
    """Keep a range from being paged out, and make all of it present. Raises OSError.

    Without CAP_IPC_LOCK only RLIMIT_MEMLOCK bytes can be locked (EPERM, ENOMEM, EAGAIN).
    """
    if _libc.mlock(space.address, space.size_bytes) != 0:
        _fail(f"mlock of {space.size_bytes} bytes")


def punch(fd: int, offset: int, size_bytes: int) -> None:
    """Take the pages of a memfd away, wherever they are mapped: what is read there next is zeros. Raises OSError."""
    if _libc.fallocate(fd, _FALLOC_PUNCH, offset, size_bytes) != 0:
        _fail(f"fallocate of {size_bytes} bytes")


def _aligned(size_bytes: int, protection: int) -> tuple[int, int]:
    """Map anonymous memory at a multiple of HUGE_BYTES; return its address and length."""
    if size_bytes < 0:
        raise ValueError(f"a range cannot have {size_bytes} bytes")
    length = _round_up(size_bytes)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    found = _map(None, length + HUGE_BYTES, protection, flags, -1, 0)
    address = _round_up_address(found)
    if address > found:
        _unmap(found, address - found)
    if (tail := found + HUGE_BYTES - address) > 0:
        _unmap(address + length, tail)
    return address, length


def _adopt(address: int, length: int, size_bytes: int) -> Space:
    """Give a mapping an owner: the buffer, whose end is the mapping's end."""
    buffer = (ctypes.c_ubyte * size_bytes).from_address(address)
    weakref.finalize(buffer, _unmap, address, length).atexit = False
    return Space(address=address, size_bytes=size_bytes, buffer=buffer)


def _map(address: int | None, length: int, protection: int, flags: int, fd: int, offset: int) -> int:
    found = _libc.mmap(address, length, protection, flags, fd, offset)
    if found is None or found == _FAILED:
        _fail(f"mmap of {length} bytes")
    return int(found)


def _unmap(address: int, length: int) -> None:
    _libc.munmap(address, length)  # fails for addresses that were never mapped only


def _advise(address: int, length: int, advice: int, *, ignore: tuple[int, ...]) -> None:
    """madvise, again and again while the kernel asks for it. Raises OSError."""
    while _libc.madvise(address, length, advice) != 0:
        number = ctypes.get_errno()
        if number in ignore:
            return
        if number not in (errno.EAGAIN, errno.EINTR):
            raise OSError(number, f"madvise {advice} of {length} bytes: {os.strerror(number)}")


def _fail(what: str) -> None:
    number = ctypes.get_errno()
    raise OSError(number, f"{what}: {os.strerror(number)}")


def _round_up(size_bytes: int) -> int:
    return max(1, -(-size_bytes // HUGE_BYTES)) * HUGE_BYTES


def _round_up_address(address: int) -> int:
    return -(-address // HUGE_BYTES) * HUGE_BYTES
