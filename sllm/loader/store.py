"""The SSD store: checkpoints as folders, each complete or absent. Blocking; the caller gives it a thread.

`ROOT/NAME/` has the files and their manifest. A checkpoint is copied to `ROOT/.tmp-…`, flushed, then renamed: a crash
leaves no half checkpoint, and what it leaves behind is removed at the next start. A copy that is found damaged stays
where it is, is not used, and is replaced when the same content is added again.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from sllm.core.checkpoint import Checkpoint
from sllm.core.ids import CheckpointName
from sllm.errors import CapacityExceeded, Conflict, InvalidCheckpoint, NotFound, SllmError
from sllm.loader.checking import check, check_sizes
from sllm.loader.copying import Progress, copy_files, flush_folder, write_flushed
from sllm.loader.manifest import Manifest, digest_of, main_dtype
from sllm.loader.source import MANIFEST, Source, examine, open_regular

log = logging.getLogger(__name__)

_TMP = ".tmp-"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class SsdStore:
    """All checkpoints of one node. `limit_bytes` 0: all of the disk.

    One `add` at a time; everything else may run beside it.
    """

    def __init__(self, root: Path, limit_bytes: int = 0) -> None:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.root = root.resolve()
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        # Replaced, never changed in place: readers in other threads take no lock.
        self._damaged: frozenset[CheckpointName] = frozenset()
        self._manifests = dict(self._scan())

    def manifests(self) -> tuple[Manifest, ...]:
        """Return the checkpoints that can be used, by name."""
        damaged = self._damaged
        return tuple(manifest for name, manifest in sorted(self._manifests.items()) if name not in damaged)

    def damaged(self) -> tuple[Manifest, ...]:
        """Return those that cannot, by name."""
        damaged = self._damaged
        return tuple(manifest for name, manifest in sorted(self._manifests.items()) if name in damaged)

    def named(self, name: CheckpointName) -> Manifest:
        """Raises NotFound."""
        if name not in self._manifests:
            raise NotFound(f"checkpoint {name!r} is not on this node")
        return self._manifests[name]

    def with_digest(self, digest: str) -> Manifest:
        """Return a checkpoint to use. Raises NotFound; InvalidCheckpoint if it is here but damaged."""
        for manifest in self.manifests():
            if manifest.checkpoint.digest == digest:
                return manifest
        for manifest in self.damaged():
            if manifest.checkpoint.digest == digest:
                raise InvalidCheckpoint(
                    f"the copy of {manifest.checkpoint.name!r} on this node is damaged", hint="add it again"
                )
        raise NotFound(f"no checkpoint with digest {digest} is on this node")

    def folder(self, manifest: Manifest) -> Path:
        return self.root / manifest.checkpoint.name

    @property
    def used_bytes(self) -> int:
        return sum(_stored_bytes(manifest) for manifest in self._manifests.values())

    @property
    def capacity_bytes(self) -> int:
        return self._limit_bytes or self.used_bytes + self._free_on_disk()

    def add(self, name: CheckpointName, source: Source, origin: str, *, now: float, progress: Progress) -> Manifest:
        """Copy a source that was examined, and return its manifest; the same content again is no error.

        Raises Conflict if the name is taken by another content, CapacityExceeded, InvalidCheckpoint, and whatever
        `progress` raises.
        """
        there = self._manifests.get(name)
        if there is not None and name not in self._damaged:
            return self._same_again(there, source, progress)
        self._check_room(source.total_bytes, there)
        work = self.root / f"{_TMP}{secrets.token_hex(6)}"
        work.mkdir(mode=0o700)
        try:
            manifest = self._fill(work, name, source, origin, now=now, progress=progress)
            if there is not None:
                _check_same(there, manifest.checkpoint.digest)
            self._put(work, name)
        except OSError as error:
            raise _write_error(error, name) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
        with self._lock:
            self._manifests = {**self._manifests, name: manifest}
            self._damaged -= {name}
        return manifest

    def quarantine(self, manifest: Manifest) -> None:
        """Use a copy no more: it is damaged."""
        with self._lock:
            if self._manifests.get(manifest.checkpoint.name) == manifest:
                self._damaged |= {manifest.checkpoint.name}

    def check(self, manifest: Manifest) -> None:
        """Raises InvalidCheckpoint if the stored files are visibly not what was added."""
        check(self.folder(manifest), manifest)

    def withdraw(self, name: CheckpointName) -> Manifest:
        """Take a checkpoint out, at once; its files stay until `discard`. Raises NotFound."""
        manifest = self.named(name)
        with self._lock:
            self._manifests = {other: kept for other, kept in self._manifests.items() if other != name}
            self._damaged -= {name}
        return manifest

    def discard(self, manifest: Manifest) -> None:
        """Delete the files of a checkpoint that was withdrawn."""
        try:
            self._set_aside(manifest.checkpoint.name)
            flush_folder(self.root)
        except OSError as error:
            raise SllmError(f"cannot delete {self.folder(manifest)}: {error.strerror}") from error

    def _put(self, work: Path, name: CheckpointName) -> None:
        """Give a finished copy its name, in place of what cannot be used."""
        if (self.root / name).exists():
            self._set_aside(name)
        os.rename(work, self.root / name)
        flush_folder(self.root)

    def _set_aside(self, name: CheckpointName) -> None:
        gone = self.root / f"{_TMP}{secrets.token_hex(6)}"
        os.rename(self.root / name, gone)
        shutil.rmtree(gone, ignore_errors=True)

    def execution_files(self, digest: str, *, piece_bytes: int) -> Iterator[tuple[str, bytes]]:
        """Yield (path, content) of each execution file, large ones in pieces. Raises NotFound."""
        manifest = self.with_digest(digest)
        for file in manifest.execution_files:
            with os.fdopen(open_regular(self.folder(manifest) / file.path), "rb") as opened:
                yield file.path, opened.read(piece_bytes)
                while piece := opened.read(piece_bytes):
                    yield file.path, piece

    def _same_again(self, there: Manifest, source: Source, progress: Progress) -> Manifest:
        _check_same(there, digest_of(copy_files((*source.shards, *source.execution_files), None, progress)))
        return there

    def _fill(
        self, work: Path, name: CheckpointName, source: Source, origin: str, *, now: float, progress: Progress
    ) -> Manifest:
        files = copy_files((*source.shards, *source.execution_files), work, progress)
        copy = examine(work)  # the source may have changed since it was examined
        manifest = Manifest(
            checkpoint=Checkpoint(
                name=name,
                digest=digest_of(files),
                size_bytes=sum(tensor.size_bytes for tensor in copy.tensors),
                architecture=copy.facts.architecture,
                dtype=main_dtype(copy.tensors),
                tensor_count=len(copy.tensors),
                max_model_len=copy.facts.max_model_len,
                source=origin,
                created_at=now,
            ),
            shards=files[: len(source.shards)],
            execution_files=files[len(source.shards) :],
            tensors=copy.tensors,
        )
        write_flushed(work / MANIFEST, manifest.to_json().encode())
        flush_folder(work)
        return manifest

    def _check_room(self, needed_bytes: int, replaced: Manifest | None) -> None:
        free = self._free_on_disk()
        if self._limit_bytes:
            given_up = _stored_bytes(replaced) if replaced else 0
            free = min(free, self._limit_bytes - self.used_bytes + given_up)
        if needed_bytes > free:
            raise CapacityExceeded(
                f"the checkpoint has {needed_bytes} bytes, the SSD store has room for {max(0, free)}",
                hint="remove checkpoints that are not needed: sllm checkpoint remove",
            )

    def _free_on_disk(self) -> int:
        return shutil.disk_usage(self.root).free

    def _scan(self) -> Iterator[tuple[CheckpointName, Manifest]]:
        for folder in sorted(self.root.iterdir()):
            if folder.name.startswith(_TMP):
                shutil.rmtree(folder, ignore_errors=True)
            elif folder.is_dir():
                try:
                    manifest = _read_manifest(folder)
                except SllmError as error:
                    # One damaged folder must not keep the node's other checkpoints from being served.
                    log.error("checkpoint %s is left out: %s", folder.name, error)
                else:
                    yield manifest.checkpoint.name, manifest
                    self._check_found(folder, manifest)

    def _check_found(self, folder: Path, manifest: Manifest) -> None:
        try:
            check_sizes(folder, manifest)
        except SllmError as error:
            log.error("checkpoint %s is damaged: %s", folder.name, error)
            self._damaged |= {manifest.checkpoint.name}


def _read_manifest(folder: Path) -> Manifest:
    try:
        manifest = Manifest.from_json((folder / MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidCheckpoint(f"cannot read its {MANIFEST}: {error.strerror}") from error
    if manifest.checkpoint.name != folder.name:
        raise InvalidCheckpoint(f"its {MANIFEST} is that of {manifest.checkpoint.name!r}")
    return manifest


def _check_same(there: Manifest, digest: str) -> None:
    if digest != there.checkpoint.digest:
        raise Conflict(
            f"checkpoint {there.checkpoint.name!r} is there already, with other content",
            hint="choose another name, or remove it first: sllm checkpoint remove",
        )


def _stored_bytes(manifest: Manifest) -> int:
    return sum(file.size_bytes for file in (*manifest.shards, *manifest.execution_files))


def _write_error(error: OSError, name: CheckpointName) -> SllmError:
    if error.errno in _DISK_FULL:
        return CapacityExceeded(
            f"the disk is full: checkpoint {name!r} was not added", hint="remove checkpoints that are not needed"
        )
    return SllmError(f"cannot store checkpoint {name!r}: {error.strerror}")
