"""Is a stored checkpoint still what its manifest says? Sizes and headers, which are read in no time; not the bytes."""

from __future__ import annotations

from pathlib import Path

from sllm.errors import InvalidCheckpoint
from sllm.loader.manifest import Manifest
from sllm.loader.source import SourceFile, read_tensors

_HINT = "add the checkpoint again: sllm checkpoint add"


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Raises InvalidCheckpoint."""
    for file in (*manifest.shards, *manifest.execution_files):
        path = folder / file.path
        if not path.is_file() or path.stat().st_size != file.size_bytes:
            raise InvalidCheckpoint(f"its file {file.path} is missing or has another size", hint=_HINT)


def check(folder: Path, manifest: Manifest) -> None:
    """Check all that can be checked without reading the tensors. Raises InvalidCheckpoint."""
    try:
        check_sizes(folder, manifest)
        _check_headers(folder, manifest)
    except OSError as error:  # the disk has lost it
        raise InvalidCheckpoint(f"its files cannot be read: {error.strerror}", hint=_HINT) from error


def _check_headers(folder: Path, manifest: Manifest) -> None:
    for shard in manifest.shards:
        expected = tuple(tensor for tensor in manifest.tensors if tensor.shard == shard.path)
        stored = SourceFile(path=shard.path, real=folder / shard.path, size_bytes=shard.size_bytes)
        if read_tensors(stored) != expected:
            raise InvalidCheckpoint(f"the header of {shard.path} is not what it was when it was added", hint=_HINT)
