"""What the disk can give: fio, direct, reading the very file that is loaded, in several settings."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from loader_device import Device
from loader_measure import Sample

BUFFER_BYTES = 128 << 20  # the largest of the settings that use their buffers again needs half of it
PAGE_BYTES = 4096
KIB = 1 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """`jobs` threads, each with `depth` reads of `block_bytes` in flight in its own part of the file.

    One that `keeps` has a buffer for every block, and all of them in flight: it ends with the whole file in memory.
    """

    engine: str
    block_bytes: int
    jobs: int
    depth: int = 1
    huge: bool = True
    keeps: bool = False

    @property
    def name(self) -> str:
        depth = " keeping all" if self.keeps else f" depth {self.depth}" if self.depth > 1 else ""
        return f"fio {self.engine} {self.block_bytes // KIB // KIB}M x{self.jobs}{depth}{', huge' if self.huge else ''}"


# The yardstick that anyone gets without thought, and the ones to beat it with. Buffers on huge pages save the kernel
# the pinning of 4 KiB pages, which is most of what a direct read costs.
PLAIN = Setting(engine="psync", block_bytes=1 << 20, jobs=2, huge=False)
TUNED = (
    Setting(engine="psync", block_bytes=1 << 20, jobs=1),
    Setting(engine="psync", block_bytes=1 << 20, jobs=2),
    Setting(engine="psync", block_bytes=1 << 20, jobs=4),
    Setting(engine="psync", block_bytes=8 << 20, jobs=2),
    Setting(engine="psync", block_bytes=8 << 20, jobs=4),
    Setting(engine="io_uring", block_bytes=1 << 20, jobs=1, depth=8),
    Setting(engine="io_uring", block_bytes=4 << 20, jobs=1, depth=4),
)
# fio uses its buffers again and again, and few small ones stay in the CPU's cache: nothing it has read need ever reach
# memory. A loader's must. These do the same, and are what a loader can be held to where memory is no faster than the
# disk. (io_uring cannot register so many buffers.)
KEEPING = (
    Setting(engine="libaio", block_bytes=8 << 20, jobs=1, keeps=True),
    Setting(engine="libaio", block_bytes=8 << 20, jobs=2, keeps=True),
)


def buffer_bytes(file_bytes: int) -> int:
    """Return the huge pages that reading a file of this size takes at most, in bytes."""
    return BUFFER_BYTES + file_bytes


def available() -> bool:
    return shutil.which("fio") is not None


def version() -> str:
    return subprocess.run(["fio", "--version"], capture_output=True, text=True, check=True).stdout.strip()


def read(setting: Setting, file: Path, device: Device) -> Sample:
    """Read a whole file once. The seconds are fio's own: from its first read to its last."""
    arguments = _arguments(setting, file)
    done = subprocess.run(arguments, capture_output=True, text=True, preexec_fn=device.join)
    if done.returncode:
        raise RuntimeError(f"{setting.name}: {done.stderr.strip() or done.stdout.strip()}")
    job = json.loads(done.stdout)["jobs"][0]
    result = job["read"]
    # fio rounds the runtime to milliseconds, and the parts down to whole blocks: scale to the bytes of the file.
    seconds = result["runtime"] / 1e3 * file.stat().st_size / result["io_bytes"]
    return Sample(seconds=seconds, cpu_s=(job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1e3)


def _arguments(setting: Setting, file: Path) -> list[str]:
    part = file.stat().st_size // setting.jobs // PAGE_BYTES * PAGE_BYTES
    return [
        "fio",
        "--name=read",
        f"--filename={file}",
        "--rw=read",
        "--readonly",
        "--direct=1",
        "--thread",
        "--group_reporting",
        "--output-format=json",
        f"--ioengine={setting.engine}",
        f"--bs={min(setting.block_bytes, part)}",
        f"--iodepth={-(-part // setting.block_bytes) if setting.keeps else setting.depth}",
        f"--numjobs={setting.jobs}",
        f"--size={part}",
        f"--offset_increment={part}",
        *(["--mem=shmhuge"] if setting.huge else []),
    ]
