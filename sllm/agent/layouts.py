"""Which layout of a checkpoint a replica starts from: the engine's own parameters if they were saved, or the original.

The original is good for any engine. A runtime layout is good for one key only, and can always be made anew: whatever
is wrong with one, it is removed and the start begins again from the original.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sllm.agent.warm.base import Warm
from sllm.agent.weights import Weights
from sllm.core.device import Device
from sllm.core.launch import WarmReady
from sllm.core.replica import ReplicaSpec
from sllm.core.runtime_layout import runtime_key, will_be_saved
from sllm.errors import SllmError
from sllm.loader.folder import read_manifest
from sllm.loader.runtime_layouts import RuntimeLayout
from sllm.loader.store import SsdStore, StoredCheckpoint

log = logging.getLogger(__name__)

_ENGINES = ("vllm",)  # those that can save their parameters, and use saved ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """What a start reads. `folder` has its manifest, `execution_folder` the execution files; `save_to` is where the
    engine host writes a runtime layout ("": nowhere)."""

    stored: StoredCheckpoint | RuntimeLayout
    folder: Path
    execution_folder: Path
    save_to: str = ""

    @property
    def is_runtime(self) -> bool:
        return isinstance(self.stored, RuntimeLayout)


class Layouts:
    """Belongs to the event loop; the store's own work is in threads."""

    def __init__(self, store: SsdStore, weights: Weights, warm: Warm) -> None:
        self._store = store
        self._weights = weights
        self._warm = warm
        self._being_saved: set[str] = set()

    async def choose(self, entry: StoredCheckpoint, spec: ReplicaSpec, devices: Sequence[Device]) -> Chosen:
        """Return what to start from. The folder to save to is this start's alone, until `saved` or `given_up`."""
        found = await self.readable(entry, spec, devices)
        if isinstance(found, RuntimeLayout):
            execution_folder = self._store.folder(entry)
            return Chosen(stored=found, folder=found.folder, execution_folder=execution_folder)
        about = self._warm.about
        if about is None or about.engine not in _ENGINES:
            return self.original(entry)
        work = await asyncio.to_thread(self._work, entry, spec, _key(spec, devices, about))
        if work is None or str(work) in self._being_saved:
            return self.original(entry)
        self._being_saved.add(str(work))
        return self.original(entry, save_to=str(work))

    async def readable(
        self, entry: StoredCheckpoint, spec: ReplicaSpec, devices: Sequence[Device]
    ) -> StoredCheckpoint | RuntimeLayout:
        """Return what a start like this would read, and begin nothing."""
        about = self._warm.about
        if about is None or about.engine not in _ENGINES:
            return entry
        return await asyncio.to_thread(self._store.runtime, _key(spec, devices, about)) or entry

    def original(self, entry: StoredCheckpoint, *, save_to: str = "") -> Chosen:
        """Return the checkpoint as it was added."""
        folder = self._store.folder(entry)
        return Chosen(stored=entry, folder=folder, execution_folder=folder, save_to=save_to)

    async def check_execution_files(self, entry: StoredCheckpoint) -> None:
        """Raise the InvalidCheckpoint that says which of a checkpoint's execution files is not what was added; the copy
        is in quarantine then."""
        await asyncio.to_thread(self._store.check_execution_files, entry)

    def given_up(self, chosen: Chosen) -> None:
        """The engine host that was to save is gone."""
        if chosen.save_to:
            self._being_saved.discard(chosen.save_to)
            self._store.give_up_runtime(Path(chosen.save_to))

    async def saved(self, folder: Path) -> None:
        """Take in what an engine host has saved there, and have it in memory for the next start.

        The key is the one that the host wrote: since it was forked, the agent and its warm process may have become
        another version.
        """
        try:
            layout = await asyncio.to_thread(self._adopted, folder)
        except (SllmError, OSError) as error:
            log.warning("the runtime layout in %s is of no use: %s", folder, error)
            return
        log.info("runtime layout %s: %d bytes", folder.name, layout.manifest.tensor_bytes)
        self._weights.prefetch(layout)

    async def drop(self, chosen: Chosen, reason: SllmError) -> None:
        """Remove a runtime layout that did not fit or is damaged."""
        if isinstance(chosen.stored, RuntimeLayout):
            log.warning("runtime layout %s is removed: %s", chosen.folder.name, reason)
            await asyncio.to_thread(self._store.drop_runtime, chosen.stored.manifest.key)

    def _work(self, entry: StoredCheckpoint, spec: ReplicaSpec, key: Mapping[str, str]) -> Path | None:
        """Return where a start saves its parameters, if it does. To ask the store is to make room: so that comes last.
        Blocking."""
        if not will_be_saved(_config(self._store.folder(entry)), spec.engine_args):
            return None
        return self._store.runtime_work(key, entry.manifest.tensor_bytes)

    def _adopted(self, folder: Path) -> RuntimeLayout:
        """Blocking."""
        return self._store.adopt_runtime(read_manifest(folder).key)


def _key(spec: ReplicaSpec, devices: Sequence[Device], about: WarmReady) -> dict[str, str]:
    """As the engine host computes it (`sllm.engine.vllm_runtime.key_of`)."""
    return runtime_key(
        spec,
        engine=about.engine,
        version=about.version,
        device_kind=devices[0].kind,
        world_size=len(devices),
        rank=0,
    )


def _config(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's config.json; an empty one if it cannot be read, which the engine host will tell."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
