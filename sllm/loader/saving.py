"""Saves tensors as a checkpoint: what `torch.save` is for, in the form that loads fast. Blocking; imports torch.

Tensors that share memory share it in the checkpoint too: tied weights, and views that overlap, are stored once. A view
with holes that shares its memory with no other tensor is stored without them, contiguous. Everything else keeps its
strides.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from sllm.errors import InvalidArgument, UnknownDtype, UnsupportedCheckpoint
from sllm.loader.dtypes import ITEM_BYTES
from sllm.loader.folder import checked_path
from sllm.loader.format import LAYOUTS, Manifest, ModelFacts, Tensor, place, span_bytes
from sllm.loader.writing import CheckpointWriter, Meter, PartitionWriter, Progress

_MAX_ITEM_BYTES = 16  # of complex128: where a region begins modulo this is kept, so that every element stays aligned
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


@dataclass(slots=True)
class _View:
    """A tensor to save: `begin` to `end` are bytes of its storage; `owner` names the storage."""

    name: str
    tensor: torch.Tensor
    owner: tuple[str, int, int]
    begin: int
    end: int


@dataclass(slots=True)
class _Region:
    """Bytes of one storage that are stored together, and the views that lie in them."""

    begin: int
    end: int
    views: list[_View]

    @property
    def lead(self) -> int:
        return self.begin % _MAX_ITEM_BYTES

    @property
    def size_bytes(self) -> int:
        return self.lead + self.end - self.begin


def save(
    tensors: Mapping[str, torch.Tensor],
    path: str | os.PathLike[str],
    *,
    layout: str = "hf",
    key: Mapping[str, str] | None = None,
    model: ModelFacts | None = None,
    execution_files: Mapping[str, bytes] | None = None,
    source: str = "",
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Manifest:
    """Write a checkpoint with these tensors, in this order, and return its manifest.

    Tensors may be of any torch dtype that is not quantised, on any device, of any strides. A checkpoint at `path` is
    replaced in one step: readers see the old one or the new one. `progress(done_bytes, total_bytes)` is called for
    every chunk; `cancelled()` is asked as often. Raises UnknownDtype and UnsupportedCheckpoint for tensors that cannot
    be stored, InvalidArgument for what is no tensor or no path, CapacityExceeded if the disk is full, Conflict
    if something else is at `path`, Cancelled.
    """
    if layout not in LAYOUTS or (layout == "runtime") is not bool(key):
        raise InvalidArgument(f"layout {layout!r} with key {key!r}", hint="'hf' without a key, or 'runtime' with one")
    folder = checked_path(path)
    regions = _regions([_view(name, tensor) for name, tensor in tensors.items()])
    offsets, size_bytes = place(region.size_bytes for region in regions)
    files = execution_files or {}
    meter = Meter(size_bytes + sum(map(len, files.values())), progress, cancelled)
    with CheckpointWriter(folder, [size_bytes], meter) as writer:
        with writer.partition() as partition:
            for region, offset in zip(regions, offsets, strict=True):
                partition.skip_to(offset + region.lead)
                _write(region, partition)
        for name, content in files.items():
            writer.add_file(name, [content])
        rows = dict(_rows(regions, offsets))
        return writer.commit(
            {name: rows[name] for name in tensors},
            layout=layout,
            key=key,
            model=model,
            source=source,
            created_at=time.time(),
        )


def _view(name: str, tensor: torch.Tensor) -> _View:
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        kinds = f"{type(name).__name__} -> {type(tensor).__name__}"
        raise InvalidArgument(f"{str(name)[:80]!r}: {kinds} cannot be saved", hint="give a dict of names to tensors")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested or tensor.device.type == "meta":
        raise UnsupportedCheckpoint(
            f"tensor {name[:80]!r} is sparse, quantised, nested or without data, and cannot be saved",
            hint="save its parts, which are plain tensors",
        )
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in ITEM_BYTES:
        raise UnknownDtype(f"tensor {name[:80]!r} has dtype {dtype}, which checkpoints cannot hold")
    plain = tensor.detach().resolve_conj().resolve_neg()
    begin = plain.storage_offset() * plain.itemsize
    span = span_bytes(dtype, tuple(plain.shape), plain.stride())
    storage = plain.untyped_storage()
    # With its length: of two storages that begin at one address, the longer one is not all in the shorter.
    owner = (str(plain.device), storage.data_ptr(), storage.nbytes())
    return _View(name=name, tensor=plain, owner=owner, begin=begin, end=begin + span)


def _regions(views: list[_View]) -> list[_Region]:
    """Return what to store, in the order of the tensors that come first in each."""
    order = {id(view): number for number, view in enumerate(views)}
    by_owner: dict[tuple[str, int, int], list[_View]] = {}
    for view in views:
        by_owner.setdefault(view.owner, []).append(view)
    regions = [region for shared in by_owner.values() for region in _merged(shared)]
    for region in regions:
        region.views.sort(key=lambda view: order[id(view)])
    return sorted((_without_holes(region) for region in regions), key=lambda region: order[id(region.views[0])])


def _merged(views: Iterable[_View]) -> Iterator[_Region]:
    """Yield the unions of views that overlap. An empty view overlaps nothing."""
    current: _Region | None = None
    for view in sorted(views, key=lambda view: (view.begin, view.end)):
        if view.begin == view.end:
            yield _Region(view.begin, view.end, [view])
        elif current is not None and view.begin < current.end:
            current.end = max(current.end, view.end)
            current.views.append(view)
        else:
            if current is not None:
                yield current
            current = _Region(view.begin, view.end, [view])
    if current is not None:
        yield current


def _without_holes(region: _Region) -> _Region:
    view, *others = region.views
    if others or region.end - region.begin <= view.tensor.numel() * view.tensor.itemsize:
        return region
    view.tensor = _compact(view.tensor)
    view.begin, view.end = 0, view.tensor.numel() * view.tensor.itemsize
    return _Region(view.begin, view.end, [view])


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy. As integers: torch cannot copy elements of less than a byte, and warns of others."""
    integers = _INTEGERS.get(tensor.itemsize)
    return tensor.view(integers).contiguous().view(tensor.dtype) if integers else tensor.contiguous()


def _write(region: _Region, partition: PartitionWriter) -> None:
    """Copy from whatever device, a chunk at a time."""
    storage = region.views[0].tensor.untyped_storage()
    source = torch.empty(0, dtype=torch.uint8, device=region.views[0].tensor.device).set_(storage)
    position = region.begin
    while position < region.end:
        room = partition.room()[: region.end - position]
        torch.frombuffer(room, dtype=torch.uint8).copy_(source[position : position + len(room)])
        partition.advance(len(room))
        position += len(room)


def _rows(regions: list[_Region], offsets: tuple[int, ...]) -> Iterator[tuple[str, Tensor]]:
    for region, offset in zip(regions, offsets, strict=True):
        for view in region.views:
            yield (
                view.name,
                Tensor(
                    0,
                    offset + region.lead + view.begin - region.begin,
                    view.end - view.begin,
                    str(view.tensor.dtype).removeprefix("torch."),
                    tuple(view.tensor.shape),
                    view.tensor.stride(),
                ),
            )
