"""Looks at a folder to add and says what it holds, or why it is refused. Reads; writes nothing.

It may be a folder of safetensors, or a checkpoint of our own format.

The folder is distrusted: symlinks may not lead out of it (a snapshot in a Hugging Face cache may use its blobs), only
regular files are opened, and weights are safetensors or nothing, because unpickling runs whatever code the file holds.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sllm.errors import InvalidArgument, InvalidCheckpoint, NotFound, UnsupportedCheckpoint
from sllm.loader.facts import (
    CONFIG,
    check_shards_present,
    check_tensors_present,
    model_facts,
    shards_in_index,
)
from sllm.loader.folder import check_sizes, open_regular, read_manifest
from sllm.loader.format import MANIFEST, Manifest, ModelFacts
from sllm.loader.safetensors import LENGTH_BYTES, StoredTensor, header_bytes, parse

INDEX = "model.safetensors.index.json"
_FIRST_PARTITION = "partition-000.bin"
MAX_EXECUTION_FILE_BYTES = 64 << 20
_PICKLE = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
# Weights in other forms, and code: neither is needed to serve the safetensors beside them.
_LEFT_OUT = _PICKLE | {".gguf", ".onnx", ".h5", ".msgpack", ".npz", ".ot", ".tflite", ".py", ".pyc", ".so"}


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """`path` is the name within the folder, `real` where its bytes are."""

    path: str
    real: Path
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A folder that was found to be in order.

    `facts` is None if it need not have a config.json and has none. `manifest` is set if it is a checkpoint of our own
    format; `shards` are its partitions then, and `tensors` is empty.
    """

    facts: ModelFacts | None
    shards: tuple[SourceFile, ...]
    execution_files: tuple[SourceFile, ...]
    tensors: tuple[StoredTensor, ...]
    manifest: Manifest | None = None


def locate(source: str, roots: Sequence[Path]) -> Path:
    """Resolve a source given by a user. Raises NotFound, InvalidArgument."""
    path = Path(source)
    if not path.is_absolute() or "\0" in source:
        raise InvalidArgument(f"source {source!r} is not an absolute path", hint="the node reads it, not this shell")
    real = Path(os.path.realpath(path))
    if not _within(real, roots):
        raise InvalidArgument(
            f"source {source} is outside the folders that this node may read from", hint="see [sources] roots"
        )
    if not os.path.exists(real):  # Path.exists raises where the way there is closed to us
        raise NotFound(f"source {source} is not there", hint="the node reads it: is it on the node's disk?")
    if not os.path.isdir(real):
        raise InvalidArgument(f"source {source} is not a folder", hint="name the Hugging Face folder, not a file in it")
    return real


def _within(real: Path, roots: Sequence[Path]) -> bool:
    return any(real.is_relative_to(os.path.realpath(root)) for root in roots)


def _boundary(folder: Path, roots: Sequence[Path]) -> Path:
    """Return what links must stay in: the folder, or its whole repository where it is a snapshot in a cache.

    A Hugging Face cache is `REPOSITORY/snapshots/REVISION/FILE -> ../../blobs/HASH`.
    """
    repository = folder.parent.parent
    in_cache = folder.parent.name == "snapshots" and os.path.isdir(repository / "blobs")
    return repository if in_cache and _within(repository, roots) else folder


def examine(folder: Path, roots: Sequence[Path] = (), *, need_config: bool = True) -> Source:
    """Check a folder completely, all but the tensors' values. Raises InvalidCheckpoint, UnsupportedCheckpoint."""
    if os.path.lexists(folder / _FIRST_PARTITION):
        return _examine_checkpoint(folder, need_config)
    files = _files(folder, _boundary(folder, roots))
    if need_config and CONFIG not in files:
        raise InvalidCheckpoint(f"{folder} has no {CONFIG}", hint="is this a Hugging Face model folder?")
    facts = _facts(files, need_config)
    shards, weight_map = _shards(files, folder)
    tensors = tuple(tensor for shard in shards for tensor in read_tensors(shard))
    check_tensors_present(weight_map, tensors)
    if not tensors:
        raise InvalidCheckpoint(f"{folder} holds no tensors")
    # The index tells of shards, which a checkpoint does not have.
    rest = (file for name, file in sorted(files.items()) if not name.endswith(".safetensors") and name != INDEX)
    execution = tuple(rest)
    for file in execution:
        _check_small(file)
    return Source(facts=facts, shards=shards, execution_files=execution, tensors=tensors)


def _examine_checkpoint(folder: Path, need_config: bool) -> Source:
    manifest = read_manifest(folder)
    check_sizes(folder, manifest)
    if manifest.layout != "hf":
        raise UnsupportedCheckpoint(
            f"{folder} is a layout of an engine's own", hint="name the checkpoint that it was made from"
        )
    if need_config:
        check_one_partition(manifest)
    if need_config and manifest.model is None:
        raise InvalidCheckpoint(f"{folder} does not say which model it is", hint="convert a folder with a config.json")
    return Source(
        facts=manifest.model,
        shards=tuple(
            SourceFile(path=partition.file, real=folder / partition.file, size_bytes=partition.size_bytes)
            for partition in manifest.partitions
        ),
        execution_files=tuple(
            SourceFile(path=file.path, real=folder / file.path, size_bytes=file.size_bytes)
            for file in manifest.execution_files
        ),
        tensors=(),
        manifest=manifest,
    )


def check_one_partition(manifest: Manifest) -> None:
    """Raise UnsupportedCheckpoint for what a library can load and a node cannot serve: engines start from one."""
    if len(manifest.partitions) != 1:
        raise UnsupportedCheckpoint(
            f"the checkpoint has {len(manifest.partitions)} partitions, and only one can be served",
            hint="convert the model's own folder: sllm checkpoint convert",
        )


def _facts(files: Mapping[str, SourceFile], need_config: bool) -> ModelFacts | None:
    if CONFIG not in files:
        return None
    try:
        return model_facts(read_small(files[CONFIG]))
    except InvalidCheckpoint:
        if need_config:
            raise
        return None  # a library's folder may have a config.json that is not a model's


def read_tensors(shard: SourceFile) -> tuple[StoredTensor, ...]:
    """Read and check a shard's header."""
    with os.fdopen(open_regular(shard.real), "rb") as file:
        length = header_bytes(file.read(LENGTH_BYTES), shard.size_bytes, shard.path)
        return parse(file.read(length), shard.size_bytes, shard.path)


def read_small(file: SourceFile) -> bytes:
    """Read a configuration file."""
    _check_small(file)
    with os.fdopen(open_regular(file.real), "rb") as opened:
        return opened.read(MAX_EXECUTION_FILE_BYTES + 1)


def _check_small(file: SourceFile) -> None:
    if file.size_bytes > MAX_EXECUTION_FILE_BYTES:
        raise InvalidCheckpoint(
            f"{file.path} has {file.size_bytes} bytes; files besides weights may have {MAX_EXECUTION_FILE_BYTES}",
            hint="remove it if the model does not need it",
        )


def _files(folder: Path, boundary: Path) -> dict[str, SourceFile]:
    """Return the folder's regular files that a checkpoint may need. Folders in it are left out, as are hidden files."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries)
    except OSError as error:
        raise InvalidCheckpoint(f"cannot read {folder}: {error.strerror}") from error
    found = {}
    for name in names:
        wanted = not name.startswith(".") and name != MANIFEST and Path(name).suffix.lower() not in _LEFT_OUT
        if wanted and (file := _file(folder, name, boundary)):
            found[name] = file
    return found


def _file(folder: Path, name: str, boundary: Path) -> SourceFile | None:
    if not name.isprintable():
        raise InvalidCheckpoint(f"{folder} has a file with an unprintable name: {name!r}")
    real = Path(os.path.realpath(folder / name))
    if not real.is_relative_to(boundary):
        raise InvalidCheckpoint(
            f"{name} is a link that leads out of {folder}", hint="make a copy without links: cp -rL SOURCE COPY"
        )
    try:
        status = real.stat()
    except OSError as error:
        raise InvalidCheckpoint(f"cannot read {name} in {folder}: {error.strerror}") from error
    if stat.S_ISDIR(status.st_mode):
        return None
    if not stat.S_ISREG(status.st_mode):
        raise InvalidCheckpoint(f"{name} in {folder} is not a regular file")
    return SourceFile(path=name, real=real, size_bytes=status.st_size)


def _shards(files: dict[str, SourceFile], folder: Path) -> tuple[tuple[SourceFile, ...], dict[str, str]]:
    """Return the shards to load and what the index, if there is one, says is in them."""
    present = {name: file for name, file in files.items() if name.endswith(".safetensors")}
    if INDEX in files:
        weight_map = shards_in_index(read_small(files[INDEX]), INDEX)
        check_shards_present(weight_map, present)
        # What the index does not name is another form of the same weights.
        return tuple(present[name] for name in sorted(set(weight_map.values()))), weight_map
    if not present:
        raise _no_safetensors(folder)
    return tuple(file for _, file in sorted(present.items())), {}


def _no_safetensors(folder: Path) -> InvalidCheckpoint:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in _PICKLE)
    if pickles:
        return InvalidCheckpoint(
            f"{folder} has its weights as pickle ({pickles[0]}), which is refused: loading it runs any code it holds",
            hint="convert it to safetensors on a machine that you can afford to lose",
        )
    return InvalidCheckpoint(f"{folder} has no safetensors file", hint="is this a Hugging Face model folder?")
