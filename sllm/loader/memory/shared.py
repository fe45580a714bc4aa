"""The DRAM pool as one memory object: a memfd that is shared by descriptor, never by name.

A lease is a descriptor: the pool opened anew and read-only, with a shared lock on the leased extents that belongs to
that open file description (`F_OFD_SETLK`, fcntl(2)). The kernel lifts the lock when the last copy of the descriptor is
closed, by whichever process, however it ended; a lease therefore survives every process but its holders, and nobody
has to give it back.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
import threading
from collections.abc import Sequence
from pathlib import Path

from sllm.core.grant import POOL_BLOCK_BYTES, Extent
from sllm.errors import CapacityExceeded, InvalidArgument
from sllm.loader.memory import space

log = logging.getLogger(__name__)

_F_OFD_GETLK = 36  # fcntl has no names for these
_F_OFD_SETLK = 37
_FLOCK = struct.Struct("@hhqqi4x")  # type, whence, start, length, pid
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_HUGE_PAGE_BYTES = 2 << 20
_MFD_HUGE_2MB = 21 << 26


class SharedPool:
    """Owns `fd` (open for reading and writing) and a mapping of all of it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.size_bytes = os.fstat(fd).st_size
        self.huge = os.fstat(fd).st_blksize >= _HUGE_PAGE_BYTES
        self._space = space.map_extents(fd, ((0, self.size_bytes),), shared=True)
        self._filling = threading.Lock()

    @classmethod
    def create(cls, size_bytes: int, *, hugepages: bool) -> SharedPool:
        """Make an empty pool, of huge pages if `hugepages` and enough are reserved. Raises CapacityExceeded."""
        size_bytes = max(POOL_BLOCK_BYTES, size_bytes // POOL_BLOCK_BYTES * POOL_BLOCK_BYTES)
        if hugepages and size_bytes <= free_huge_bytes():
            try:
                return cls(_sealed(size_bytes, flags=os.MFD_HUGETLB | _MFD_HUGE_2MB))
            except OSError as error:  # another process was faster
                log.warning("huge pages for the pool cannot be had: %s", error)
        try:
            return cls(_sealed(size_bytes, flags=0))
        except OSError as error:
            raise CapacityExceeded(f"cannot make a pool of {size_bytes} bytes: {error.strerror}") from error

    @classmethod
    def adopt(cls, fd: int) -> SharedPool:
        """Take over the descriptor of a pool that another process made. Raises InvalidArgument if it is none."""
        try:
            size_bytes, seals = os.fstat(fd).st_size, fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            if seals & _SEALS != _SEALS or size_bytes <= 0 or size_bytes % POOL_BLOCK_BYTES:
                raise InvalidArgument("the descriptor is not that of a pool")
            return cls(fd)
        except OSError as error:
            raise InvalidArgument(f"the descriptor is not that of a pool: {error.strerror}") from error

    def view(self, offset: int, size_bytes: int) -> memoryview:
        return self._space.view(offset, size_bytes)

    def lease(self, extents: Sequence[Extent]) -> int:
        """Return a new read-only descriptor that pins the extents for as long as a copy of it is open anywhere."""
        fd = os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            for extent in extents:
                fcntl.fcntl(fd, _F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, *extent, 0))
        except BaseException:
            os.close(fd)
            raise
        return fd

    def leased(self, extents: Sequence[Extent]) -> bool:
        """True if anybody holds a lease on any byte of them."""
        return any(self._locked(extent) for extent in extents)

    def give_up(self) -> None:
        """Give the memory that nobody leases back to the machine: a single lease would keep all of the pool's.

        The content is lost. Best effort: a warning in the log says what could not be done. Waits for `prefault`, which
        is to be stopped before.
        """
        try:
            with self._filling:
                self._give_up(Extent(0, self.size_bytes))
        except OSError as error:
            log.warning("the pool's memory stays until the last lease on it ends: %s", error)

    def _give_up(self, extent: Extent) -> None:
        if not self._locked(extent):
            space.punch(self.fd, *extent)
        elif extent.size_bytes > POOL_BLOCK_BYTES:  # only part of it may be
            half = extent.size_bytes // POOL_BLOCK_BYTES // 2 * POOL_BLOCK_BYTES
            self._give_up(Extent(extent.offset, half))
            self._give_up(Extent(extent.offset + half, extent.size_bytes - half))

    def prefault(self, *, lock: bool, stopped: threading.Event) -> None:
        """Fill all pages, so that no read waits for memory, and then keep them from being paged out if `lock`.

        Best effort: a warning in the log says what could not be done. It may take seconds per GB: give it a thread.
        """
        try:
            with self._filling:
                space.populate(self._space, write=True, stopped=stopped.is_set)
                if lock and not self.huge and not stopped.is_set():  # huge pages are never paged out
                    space.lock(self._space)
        except OSError as error:
            log.warning("the pool's memory comes as it is used, or may be paged out: %s%s", error, _why(error))

    def _locked(self, extent: Extent) -> bool:
        found = fcntl.fcntl(self.fd, _F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, *extent, 0))
        return bool(_FLOCK.unpack(found)[0] != fcntl.F_UNLCK)


def free_huge_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Return the bytes of reserved huge pages (2 MiB) that nobody has taken or claimed."""
    values = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines())
    if int(values.get("Hugepagesize", "0 kB").split()[0]) << 10 != _HUGE_PAGE_BYTES:
        return 0
    free, claimed = (int(values.get(f"HugePages_{name}", "0")) for name in ("Free", "Rsvd"))
    return max(0, free - claimed) * _HUGE_PAGE_BYTES


def _sealed(size_bytes: int, *, flags: int) -> int:
    fd = os.memfd_create("sllm-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    try:
        os.ftruncate(fd, size_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _why(error: OSError) -> str:
    if error.errno in (errno.EPERM, errno.ENOMEM, errno.EAGAIN):
        return "; raise its limit (systemd: LimitMEMLOCK=infinity) or set store.lock = false"
    return ""
