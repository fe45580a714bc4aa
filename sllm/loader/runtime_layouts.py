"""Runtime layouts on SSD: an engine's own parameters, kept so that its next start need not make them again. Blocking.

They can always be made anew, so they live on room that nothing else wants: the longest unused go first. Each is a
checkpoint folder with layout "runtime", named by a hash of its key. One whose key does not fit is never given out: it
is removed, and made anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sllm.core.runtime_layout import CHECKPOINT, ENGINE, ENGINE_VERSION
from sllm.errors import SllmError, StaleLayout
from sllm.failpoints import failpoint
from sllm.loader.folder import check_sizes, read_manifest
from sllm.loader.format import Manifest
from sllm.loader.work_folder import remove_leftovers, remove_tree, temporary_name

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeLayout:
    """`last_used` is in seconds since the epoch."""

    folder: Path
    manifest: Manifest
    last_used: float


class RuntimeLayouts:
    """Those under one folder, which is made when the first is written."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        # Replaced, never changed in place: readers in other threads take no lock.
        self._layouts: dict[Path, RuntimeLayout] = {}
        if root.is_dir():
            remove_leftovers(root, anything=True)
            found = (self._read(folder) for folder in sorted(root.iterdir()))
            self._layouts = {layout.folder: layout for layout in found if layout}

    def all(self) -> tuple[RuntimeLayout, ...]:
        """Return them, the longest unused first."""
        return tuple(sorted(self._layouts.values(), key=lambda layout: (layout.last_used, layout.folder)))

    @property
    def used_bytes(self) -> int:
        return sum(layout.manifest.stored_bytes for layout in self.all())

    def folder(self, key: Mapping[str, str]) -> Path:
        """Return where the layout with this key is, if it is here."""
        text = json.dumps(dict(sorted(key.items())), separators=(",", ":"))
        return self._root / hashlib.sha256(text.encode()).hexdigest()[:32]

    def work(self, key: Mapping[str, str]) -> Path:
        """Return where the layout with this key is to be written. Raises OSError."""
        self._root.mkdir(mode=0o700, exist_ok=True)
        return self.folder(key)

    def find(self, key: Mapping[str, str]) -> RuntimeLayout | None:
        """Return the layout with this key, if it is here and whole. Removes those that its engine has outgrown."""
        self.remove_all([layout for layout in self.all() if _outgrown(layout.manifest.key, key)])
        found = self._layouts.get(self.folder(key))
        if found is None:
            return None
        try:
            check_sizes(found.folder, found.manifest)
            return self._used(found)
        except (SllmError, OSError) as error:
            log.warning("a runtime layout is removed: %s", error)
            self.remove_all([found])
            return None

    def adopt(self, key: Mapping[str, str]) -> RuntimeLayout:
        """Take in what was written to `work(key)`. Raises StaleLayout, InvalidCheckpoint: it is removed then."""
        failpoint("adopt-runtime")
        folder = self.folder(key)
        try:
            manifest = read_manifest(folder)
            if manifest.layout != "runtime" or dict(manifest.key) != dict(key):
                raise StaleLayout(f"the runtime layout in {folder} was made for something else")
            check_sizes(folder, manifest)
        except SllmError:
            _delete(folder)
            raise
        return self._used(RuntimeLayout(folder=folder, manifest=manifest, last_used=0.0))

    def remove_all(self, layouts: Iterable[RuntimeLayout]) -> None:
        """Delete layouts. Readers that have their files open keep them."""
        folders = {layout.folder for layout in layouts}
        with self._lock:
            self._layouts = {folder: kept for folder, kept in self._layouts.items() if folder not in folders}
        for folder in folders:
            _delete(folder)

    def make_room(self, short_bytes: int) -> None:
        """Delete the longest unused, until `short_bytes` are free or none is left."""
        for layout in self.all():
            if short_bytes <= 0:
                return
            log.info("runtime layout %s makes room", layout.folder.name)
            self.remove_all([layout])
            short_bytes -= layout.manifest.stored_bytes

    def _used(self, layout: RuntimeLayout) -> RuntimeLayout:
        """Note that it was used just now; the folder's own time remembers it over a restart."""
        os.utime(layout.folder)
        used = RuntimeLayout(folder=layout.folder, manifest=layout.manifest, last_used=os.stat(layout.folder).st_mtime)
        with self._lock:
            self._layouts = {**self._layouts, used.folder: used}
        return used

    def _read(self, folder: Path) -> RuntimeLayout | None:
        """Return what a folder holds; what cannot be used is deleted, because it is made anew."""
        try:
            manifest = read_manifest(folder)
            check_sizes(folder, manifest)
            if manifest.layout == "runtime" and self.folder(manifest.key) == folder:
                return RuntimeLayout(folder=folder, manifest=manifest, last_used=os.stat(folder).st_mtime)
        except (SllmError, OSError) as error:
            log.warning("runtime layout %s is removed: %s", folder.name, error)
        _delete(folder)
        return None


def _outgrown(key: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """True if it is of another version of the engine that is asked for: of no use to anybody any more."""
    same = all(key.get(name) == wanted.get(name) for name in (CHECKPOINT, ENGINE))
    return same and key.get(ENGINE_VERSION) != wanted.get(ENGINE_VERSION)


def _delete(folder: Path) -> None:
    """Move it away first: at no time does half a layout have its name."""
    gone = temporary_name(folder.parent)
    try:
        os.rename(folder, gone)
    except FileNotFoundError:
        return
    remove_tree(gone)
