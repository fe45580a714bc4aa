"""The loaders that are compared, all doing the same work: a checkpoint on disk -> a dictionary of tensors.

Peers live in an environment of their own (`make bench-loader` makes it from bench/peers.txt); one that is not installed
is left out, and the table says so.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from loader_checkpoints import Tensors

Load = Callable[[], Tensors]
POOL_BLOCK_BYTES = 8 << 20
BARE_THREADS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Loader:
    """`prepare` takes a checkpoint's folder, does what is not on the clock, and returns the load. `package` is what
    must be installed, `format` which of the formats it reads."""

    name: str
    package: str
    format: str
    prepare: Callable[[Path], Load]
    ours: bool = False

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.package.replace("-", "_")) is not None

    @property
    def version(self) -> str:
        return importlib.metadata.version(self.package)


# --- peers ----------------------------------------------------------------------------------


def torch_load(folder: Path) -> Load:
    def load() -> Tensors:
        tensors: Tensors = {}
        for file in sorted(folder.glob("*.bin")):
            tensors |= torch.load(file, map_location="cpu", weights_only=True)
        return tensors

    return load


def load_file(folder: Path) -> Load:
    import safetensors.torch

    def load() -> Tensors:
        tensors: Tensors = {}
        for file in sorted(folder.glob("*.safetensors")):
            tensors |= safetensors.torch.load_file(file)
        return tensors

    return load


def runai(strategy: str | None = None) -> Callable[[Path], Load]:
    """`strategy` is Run:ai's own word for how it reads; without one it chooses."""

    def prepare(folder: Path) -> Load:
        if strategy:
            os.environ["RUNAI_STREAMER_FS_STRATEGY"] = strategy
        from runai_model_streamer import SafetensorsStreamer

        def load() -> Tensors:
            with SafetensorsStreamer() as streamer:
                streamer.stream_files([str(file) for file in sorted(folder.glob("*.safetensors"))])
                return dict(streamer.get_tensors())

        return load

    return prepare


def fastsafetensors(folder: Path) -> Load:
    from fastsafetensors import SafeTensorsFileLoader

    def load() -> Tensors:
        loader = SafeTensorsFileLoader(None, "cpu", nogds=True)
        loader.add_filenames({0: [str(file) for file in sorted(folder.glob("*.safetensors"))]})
        buffers = loader.copy_files_to_device()
        return {name: buffers.get_tensor(name) for name in loader.get_keys()}

    return load


def tensorizer(folder: Path) -> Load:
    from tensorizer import TensorDeserializer

    def load() -> Tensors:
        return dict(TensorDeserializer(str(folder / "model.tensors"), device="cpu", num_readers=4).items())

    return load


# --- ours -----------------------------------------------------------------------------------


def pooled(*, verify: bool) -> Callable[[Path], Load]:
    """Into a pool that was made before the clock, as a server's is."""

    def prepare(folder: Path) -> Load:
        import sllm.loader

        pool = sllm.loader.Pool(pool_bytes(folder))
        return lambda: sllm.loader.load(folder, verify=verify, pool=pool)

    return prepare


def fresh(folder: Path) -> Load:
    """Into memory that the load itself asks for, as all peers do."""
    import sllm.loader

    return lambda: sllm.loader.load(folder)


def bare(folder: Path) -> Load:
    """The limit of any loader that returns tensors in memory of their own: plain reads of all bytes, each to its place.

    fio reads into the same few buffers again and again, which stay in the CPU's cache; where memory is slow that is
    faster than any reading that keeps what it read.
    """
    import sllm.loader
    from sllm.loader.folder import read_manifest
    from sllm.loader.views import bytes_of, tensors_on

    pool = sllm.loader.Pool(pool_bytes(folder))
    (file,) = partitions(folder)

    def load() -> Tensors:
        memory = pool.allocate(file.stat().st_size)
        _read_bare(file, memoryview(memory.buffer).cast("B"))
        tensors: Tensors = tensors_on(bytes_of(memory.buffer), read_manifest(folder).tensors)
        return tensors

    return load


def _read_bare(file: Path, memory: memoryview) -> None:
    descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    offsets = iter(range(0, len(memory), POOL_BLOCK_BYTES))  # its `next` is atomic

    def work() -> None:
        for offset in offsets:
            count = os.preadv(descriptor, [memory[offset : offset + POOL_BLOCK_BYTES]], offset)
            assert count == min(POOL_BLOCK_BYTES, len(memory) - offset), "a disk in memory reads whole chunks"

    threads = [threading.Thread(target=work) for _ in range(BARE_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(descriptor)


class Tailed:
    """A load into a pool that notes how long after its last byte it was done, in `tail_s`."""

    def __init__(self, folder: Path) -> None:
        import sllm.loader

        self._folder = folder
        self._pool = sllm.loader.Pool(pool_bytes(folder))
        self._last_byte = 0.0
        self.tail_s = 0.0

    def __call__(self) -> Tensors:
        import sllm.loader

        tensors: Tensors = sllm.loader.load(self._folder, pool=self._pool, progress=self._progress)
        self.tail_s = time.perf_counter() - self._last_byte
        return tensors

    def _progress(self, done_bytes: int, total_bytes: int) -> None:
        self._last_byte = time.perf_counter()


def partitions(folder: Path) -> list[Path]:
    return sorted(folder.glob("partition-*.bin"))


def pool_bytes(folder: Path) -> int:
    """Return the size of a pool that holds the checkpoint: every partition in whole blocks."""
    return sum(-(-file.stat().st_size // POOL_BLOCK_BYTES) * POOL_BLOCK_BYTES for file in partitions(folder))


TORCH = Loader(name="torch.load", package="torch", format="torch", prepare=torch_load)
LOAD_FILE = Loader(name="safetensors load_file", package="safetensors", format="safetensors", prepare=load_file)
RUNAI = Loader(name="Run:ai", package="runai-model-streamer", format="safetensors", prepare=runai())
RUNAI_DIRECT = Loader(
    name="Run:ai, direct", package="runai-model-streamer", format="safetensors", prepare=runai("io_uring_direct")
)
FAST = Loader(name="fastsafetensors", package="fastsafetensors", format="safetensors", prepare=fastsafetensors)
TENSORIZER = Loader(name="tensorizer", package="tensorizer", format="tensorizer", prepare=tensorizer)
BARE = Loader(name="bare reads into a pool", package="sllm", format="sllm", prepare=bare, ours=True)
POOL = Loader(name="sllm, pool", package="sllm", format="sllm", prepare=pooled(verify=True), ours=True)
UNVERIFIED = Loader(
    name="sllm, pool, no checksums", package="sllm", format="sllm", prepare=pooled(verify=False), ours=True
)
TAILED = Loader(name="sllm, pool, with progress", package="sllm", format="sllm", prepare=Tailed, ours=True)
FRESH = Loader(name="sllm, fresh memory", package="sllm", format="sllm", prepare=fresh, ours=True)

PEERS = (TORCH, LOAD_FILE, RUNAI, RUNAI_DIRECT, FAST, TENSORIZER)
OURS = (POOL, UNVERIFIED, FRESH)
