"""The SSD store: checkpoints as folders, each complete or absent. Blocking; the caller gives it a thread.

`ROOT/NAME/` is a checkpoint (docs/checkpoint-format.md); its name on this node is the folder's. A copy that is found
damaged stays where it is, is not used, and is replaced when the same content is added again. `ROOT/.runtime/` has the
engines' own layouts, which give way to checkpoints when room is short.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sllm.core.checkpoint import Checkpoint
from sllm.core.ids import CheckpointName, checkpoint_name
from sllm.core.runtime_layout import CHECKPOINT
from sllm.errors import (
    CapacityExceeded,
    Conflict,
    ExecutionFileDamaged,
    InvalidCheckpoint,
    NotFound,
    SllmError,
)
from sllm.loader.conversion import convert_examined, converted_bytes
from sllm.loader.folder import cannot_read, check_sizes, open_regular, read_manifest
from sllm.loader.format import Manifest, StoredFile
from sllm.loader.runtime_layouts import RuntimeLayout, RuntimeLayouts
from sllm.loader.source import Source, check_one_partition
from sllm.loader.work_folder import flush_folder, remove_leftovers, remove_tree, temporary_name
from sllm.loader.writing import Progress

log = logging.getLogger(__name__)

_PIECE_BYTES = 1 << 20
_RUNTIME = ".runtime"
_QUARANTINED = ".quarantined"  # an empty file in the folder of a copy that is not to be used: survives a restart


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCheckpoint:
    """A checkpoint in the store: what the cluster calls it, and what its files hold."""

    checkpoint: Checkpoint
    manifest: Manifest


class SsdStore:
    """All checkpoints of one node. `limit_bytes` 0: all of the disk.

    What is being written, here or by an engine host that saves a runtime layout, counts against the limit at once.
    One `add` at a time; everything else may run beside it.
    """

    def __init__(self, root: Path, limit_bytes: int = 0) -> None:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.root = root.resolve()
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._room = threading.Lock()  # of whoever looks for room and takes it
        self._being_written: dict[Path, int] = {}  # folder -> bytes
        # Replaced, never changed in place: readers in other threads take no lock.
        self._damaged: frozenset[CheckpointName] = frozenset()
        remove_leftovers(self.root, anything=True)
        self._entries = dict(self._scan())
        self._runtimes = RuntimeLayouts(self.root / _RUNTIME)
        self._drop_orphans()

    def entries(self) -> tuple[StoredCheckpoint, ...]:
        """Return the checkpoints that can be used, by name."""
        damaged = self._damaged
        return tuple(entry for name, entry in sorted(self._entries.items()) if name not in damaged)

    def damaged(self) -> tuple[StoredCheckpoint, ...]:
        """Return those that cannot, by name."""
        damaged = self._damaged
        return tuple(entry for name, entry in sorted(self._entries.items()) if name in damaged)

    def named(self, name: CheckpointName) -> StoredCheckpoint:
        """Raises NotFound."""
        if name not in self._entries:
            raise NotFound(f"checkpoint {name!r} is not on this node")
        return self._entries[name]

    def with_digest(self, digest: str) -> StoredCheckpoint:
        """Return a checkpoint to use. Raises NotFound; InvalidCheckpoint if it is here but damaged."""
        for entry in self.entries():
            if entry.checkpoint.digest == digest:
                return entry
        for entry in self.damaged():
            if entry.checkpoint.digest == digest:
                raise InvalidCheckpoint(
                    f"the copy of {entry.checkpoint.name!r} on this node is damaged", hint="add it again"
                )
        raise NotFound(f"no checkpoint with digest {digest} is on this node")

    def folder(self, entry: StoredCheckpoint) -> Path:
        return self.root / entry.checkpoint.name

    @property
    def used_bytes(self) -> int:
        """Bytes of all files, damaged copies and runtime layouts included."""
        return self._kept_bytes + self._runtimes.used_bytes

    @property
    def capacity_bytes(self) -> int:
        return self._limit_bytes or self.used_bytes + self._free_on_disk()

    def add(
        self,
        name: CheckpointName,
        source: Source,
        origin: str,
        *,
        now: float,
        progress: Progress | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> StoredCheckpoint:
        """Convert a source that was examined, and return the entry; the same content again is no error.

        Raises Conflict if the name is taken by another content, CapacityExceeded, InvalidCheckpoint, Cancelled.
        """
        there = self._entries.get(name)
        if there is not None and name not in self._damaged:
            _check_same(there, convert_examined(source, None, progress=progress, cancelled=cancelled))
            return there

        def approve(manifest: Manifest) -> None:
            if there is not None:
                _check_same(there, manifest)

        with self._room_for(self.root / name, converted_bytes(source), there):
            manifest = convert_examined(
                source,
                self.root / name,
                origin=origin,
                now=now,
                progress=progress,
                cancelled=cancelled,
                approve=approve,
                replace_anything=True,  # what has the name and is no entry is of no use
            )
            return self._took(name, manifest)

    def quarantine(self, entry: StoredCheckpoint) -> None:
        """Use a copy no more: it is damaged."""
        name = entry.checkpoint.name
        with self._lock:
            if self._entries.get(name) != entry:
                return  # it was replaced meanwhile
            self._damaged |= {name}
            try:
                (self.root / name / _QUARANTINED).touch()
            except OSError as error:  # the disk that damaged it may be failing altogether
                log.warning("checkpoint %s: its quarantine will not survive a restart: %s", name, error.strerror)

    def withdraw(self, name: CheckpointName) -> StoredCheckpoint:
        """Take a checkpoint out, at once; its files stay until `discard`. Raises NotFound."""
        entry = self.named(name)
        with self._lock:
            self._entries = {other: kept for other, kept in self._entries.items() if other != name}
            self._damaged -= {name}
        return entry

    def discard(self, entry: StoredCheckpoint) -> None:
        """Delete the files of a checkpoint that was withdrawn, and the runtime layouts made of it."""
        self._drop_orphans()
        gone = temporary_name(self.root)
        try:
            os.rename(self.folder(entry), gone)
            remove_tree(gone)
            flush_folder(self.root)
        except OSError as error:
            raise SllmError(f"cannot delete {self.folder(entry)}: {error.strerror}") from error

    def execution_files(self, digest: str, *, piece_bytes: int) -> Iterator[tuple[str, bytes]]:
        """Yield (path, content) of each execution file, large ones in pieces.

        Raises NotFound; ExecutionFileDamaged, after the last piece of a file that is not what was added, and
        CheckpointUnreadable: the copy is in quarantine then.
        """
        yield from self._pieces(self.with_digest(digest), piece_bytes)

    def check_execution_files(self, entry: StoredCheckpoint) -> None:
        """Read what an engine is about to be configured by: weights are verified as they are read, these are not.

        Raises ExecutionFileDamaged and CheckpointUnreadable: the copy is in quarantine then.
        """
        for _ in self._pieces(entry, _PIECE_BYTES):
            pass

    # --- runtime layouts ----------------------------------------------------------------------

    def runtimes(self) -> tuple[RuntimeLayout, ...]:
        """Return all runtime layouts, the longest unused first."""
        return self._runtimes.all()

    def runtime(self, key: Mapping[str, str]) -> RuntimeLayout | None:
        """Return the runtime layout with exactly this key, if it is here; stale ones are removed."""
        return self._runtimes.find(key)

    def runtime_work(self, key: Mapping[str, str], size_bytes: int) -> Path | None:
        """Return where to write the runtime layout with this key (by CheckpointWriter or `save`), which takes about
        `size_bytes`; None if there is no room for it, even when other runtime layouts give way. The room is kept until
        `adopt_runtime` or `give_up_runtime`."""
        folder = self._runtimes.folder(key)
        try:
            self._take_room(folder, size_bytes, None)
            return self._runtimes.work(key)
        except CapacityExceeded:
            return None
        except OSError as error:
            log.warning("a runtime layout cannot be saved in %s: %s", self.root / _RUNTIME, error.strerror)
            self._give_room_back(folder)
            return None

    def adopt_runtime(self, key: Mapping[str, str]) -> RuntimeLayout:
        """Take in a runtime layout that was written. Raises StaleLayout, InvalidCheckpoint: it is removed."""
        try:
            return self._runtimes.adopt(key)
        finally:
            self._give_room_back(self._runtimes.folder(key))

    def give_up_runtime(self, folder: Path) -> None:
        """Nothing is written any more to this folder of `runtime_work`; what was adopted stays."""
        self._give_room_back(folder)

    def drop_runtime(self, key: Mapping[str, str]) -> None:
        """Remove a runtime layout that did not fit, or that is damaged."""
        folder = self._runtimes.folder(key)
        self._runtimes.remove_all(layout for layout in self._runtimes.all() if layout.folder == folder)

    # ------------------------------------------------------------------------------------------

    def _pieces(self, entry: StoredCheckpoint, piece_bytes: int) -> Iterator[tuple[str, bytes]]:
        for file in entry.manifest.execution_files:
            try:
                yield from _checked_pieces(self.folder(entry), file, piece_bytes)
            except InvalidCheckpoint:
                self.quarantine(entry)
                raise

    def _took(self, name: CheckpointName, manifest: Manifest) -> StoredCheckpoint:
        entry = _entry(name, manifest)
        with self._lock:
            self._entries = {**self._entries, name: entry}
            self._damaged -= {name}
        return entry

    def _drop_orphans(self) -> None:
        """Remove runtime layouts of checkpoints that are not here any more."""
        digests = {entry.checkpoint.digest for entry in self._entries.values()}
        orphans = [layout for layout in self._runtimes.all() if layout.manifest.key.get(CHECKPOINT) not in digests]
        self._runtimes.remove_all(orphans)

    @property
    def _kept_bytes(self) -> int:
        return sum(entry.manifest.stored_bytes for entry in self._entries.values())

    @contextmanager
    def _room_for(self, folder: Path, needed_bytes: int, replaced: StoredCheckpoint | None) -> Iterator[None]:
        self._take_room(folder, needed_bytes, replaced)
        try:
            yield
        finally:
            self._give_room_back(folder)

    def _take_room(self, folder: Path, needed_bytes: int, replaced: StoredCheckpoint | None) -> None:
        """Let runtime layouts go as far as needed. Raises CapacityExceeded if that is not enough: none goes then."""
        with self._room:
            free = self._free_on_disk()  # without what is being written: a writer reserves it there itself
            if self._limit_bytes:
                given_up = replaced.manifest.stored_bytes if replaced else 0
                others = sum(size for other, size in list(self._being_written.items()) if other != folder)
                free = min(free, self._limit_bytes - self.used_bytes - others + given_up)
            possible = free + self._runtimes.used_bytes
            if needed_bytes > possible:
                raise CapacityExceeded(
                    f"the checkpoint has {needed_bytes} bytes, the SSD store has room for {max(0, possible)}",
                    hint="remove checkpoints that are not needed: sllm checkpoint remove",
                )
            self._runtimes.make_room(needed_bytes - free)
            self._being_written[folder] = needed_bytes

    def _give_room_back(self, folder: Path) -> None:
        self._being_written.pop(folder, None)  # without the lock: an event loop does not wait for files to be deleted

    def _free_on_disk(self) -> int:
        return shutil.disk_usage(self.root).free

    def _scan(self) -> Iterator[tuple[CheckpointName, StoredCheckpoint]]:
        for folder in sorted(self.root.iterdir()):
            if folder.name.startswith(".") or not folder.is_dir():
                continue
            try:
                entry = _entry(checkpoint_name(folder.name), read_manifest(folder))
            except SllmError as error:
                # One damaged folder must not keep the node's other checkpoints from being served.
                log.error("checkpoint %s is left out: %s", folder.name, error)
            else:
                yield entry.checkpoint.name, entry
                self._check_found(folder, entry)

    def _check_found(self, folder: Path, entry: StoredCheckpoint) -> None:
        try:
            if (folder / _QUARANTINED).exists():
                raise InvalidCheckpoint("it was put in quarantine")
            check_sizes(folder, entry.manifest)
        except SllmError as error:
            log.error("checkpoint %s is damaged: %s", folder.name, error)
            self._damaged |= {entry.checkpoint.name}


def _entry(name: CheckpointName, manifest: Manifest) -> StoredCheckpoint:
    if manifest.model is None or manifest.layout != "hf":
        raise InvalidCheckpoint("it does not say which model it is", hint="add it from a folder that has a config.json")
    check_one_partition(manifest)
    checkpoint = Checkpoint(
        name=name,
        digest=manifest.digest,
        size_bytes=manifest.tensor_bytes,
        architecture=manifest.model.architecture,
        dtype=manifest.main_dtype,
        tensor_count=len(manifest.tensors),
        max_model_len=manifest.model.max_model_len,
        source=manifest.source,
        created_at=manifest.created_at,
    )
    return StoredCheckpoint(checkpoint=checkpoint, manifest=manifest)


def _check_same(there: StoredCheckpoint, manifest: Manifest) -> None:
    if manifest.digest != there.checkpoint.digest:
        raise Conflict(
            f"checkpoint {there.checkpoint.name!r} is there already, with other content",
            hint="choose another name, or remove it first: sllm checkpoint remove",
        )


def _checked_pieces(folder: Path, file: StoredFile, piece_bytes: int) -> Iterator[tuple[str, bytes]]:
    digest = hashlib.sha256()
    with os.fdopen(open_regular(folder / file.path, ExecutionFileDamaged), "rb") as opened:
        piece = _read(opened, piece_bytes)
        while True:
            digest.update(piece)
            yield file.path, piece  # an empty file too
            piece = _read(opened, piece_bytes)
            if not piece:
                break
    if digest.hexdigest() != file.sha256:
        raise ExecutionFileDamaged(f"{folder / file.path} is not what was added: its sha256 differs")


def _read(file: BinaryIO, size_bytes: int) -> bytes:
    try:
        return file.read(size_bytes)
    except OSError as error:
        raise cannot_read(file.name, error, ExecutionFileDamaged) from error
