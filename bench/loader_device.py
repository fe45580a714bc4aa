"""Where the checkpoints lie while loaders are measured: a fast, repeatable disk in memory, or a plain folder."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common import ROOT

RAMDEV = ROOT / "bench" / "ramdev.sh"
HUGE_PAGES = Path("/proc/sys/vm/nr_hugepages")
HUGE_PAGE_BYTES = 2 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A folder to put checkpoints into. `group` is the cgroup.procs file of a throttled device's readers, or None."""

    folder: Path
    name: str
    group: Path | None = None

    def join(self) -> None:
        """Put this process under the device's throttle; its reads are not limited before."""
        if self.group:
            self.group.write_text(str(os.getpid()))

    @contextmanager
    def throttled(self, bytes_per_s: int) -> Iterator[Device]:
        """Limit the reads of whoever joins."""
        _ramdev("throttle", self.folder, str(bytes_per_s))
        group = Path(_ramdev("group", self.folder))
        try:
            yield Device(folder=self.folder, name=f"{self.name}, {bytes_per_s / 1e9:g} GB/s", group=group)
        finally:
            _ramdev("throttle", self.folder, "0")


@contextmanager
def ram_device(size_bytes: int) -> Iterator[Device]:
    """Make a disk in memory for `size_bytes` of files. Needs root."""
    with tempfile.TemporaryDirectory(prefix="sllm-bench-") as parent:
        folder = Path(parent) / "disk"
        _ramdev("up", folder, str(-(-size_bytes * 21 // (20 << 30)) + 1))  # the file system's own 5 %
        try:
            yield Device(folder=folder, name="RAM-backed disk")
        finally:
            _ramdev("down", folder)


@contextmanager
def plain_folder() -> Iterator[Device]:
    """A folder on whatever disk the temporary files are on: good for a smoke run, worthless for figures."""
    with tempfile.TemporaryDirectory(prefix="sllm-bench-") as parent:
        yield Device(folder=Path(parent), name="plain folder")


@contextmanager
def huge_pages(size_bytes: int, *, reserve: bool) -> Iterator[bool]:
    """Yield whether so many bytes of huge pages (2 MiB) are free; `reserve` them first where this process may."""
    missing = -(-size_bytes // HUGE_PAGE_BYTES) - _free_huge_pages()
    before = int(HUGE_PAGES.read_text())
    if reserve and missing > 0 and os.geteuid() == 0:
        HUGE_PAGES.write_text(str(before + missing))
    try:
        yield _free_huge_pages() * HUGE_PAGE_BYTES >= size_bytes
    finally:
        if int(HUGE_PAGES.read_text()) != before:
            HUGE_PAGES.write_text(str(before))


def _free_huge_pages() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("HugePages_Free:")), 0)


def _ramdev(command: str, folder: Path, *arguments: str) -> str:
    done = subprocess.run(["bash", RAMDEV, command, folder, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stderr.strip()} (--quick needs no such disk)")
    return done.stdout.strip()
