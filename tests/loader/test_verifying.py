"""A checkpoint that is not what was written is found, whatever is wrong with it, without a crash or a hang."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sllm import errors
from sllm.errors import Cancelled, SllmError
from sllm.loader import load, save, verify
from sllm.loader.folder import read_manifest
from sllm.loader.format import MAX_MANIFEST_BYTES, PAGE_BYTES, to_bytes

SIZE = 5 << 20


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tensors = {"w": torch.arange(SIZE // 8), "tiny": torch.ones(2)}
    save(tensors, tmp_path / "c", execution_files={"config.json": b"{}"})
    return tmp_path / "c"


def test_a_whole_checkpoint_is_said_to_be_whole(checkpoint: Path) -> None:
    seen: list[tuple[int, int]] = []
    found = verify(checkpoint, deep=True, progress=lambda done, total: seen.append((done, total)))
    assert (found.chunks, found.files, found.deep) == (6, 1, True)
    assert found.size_bytes == SIZE + PAGE_BYTES + 2
    assert seen == sorted(seen)
    assert seen[-1] == (found.size_bytes, found.size_bytes)


def test_verifying_is_called_off_at_the_next_chunk(checkpoint: Path) -> None:
    seen: list[int] = []
    with pytest.raises(Cancelled):
        verify(checkpoint, progress=lambda done, _: seen.append(done), cancelled=lambda: len(seen) == 2)
    assert len(seen) == 2


Damage = Callable[[Path], object]


def write_over(name: str, offset: int, data: bytes) -> Damage:
    def damage(folder: Path) -> None:
        with open(folder / name, "r+b") as file:
            file.seek(offset)
            file.write(data)

    return damage


def cut(name: str, size: int) -> Damage:
    return lambda folder: os.truncate(folder / name, size)


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def in_place_of(name: str, make: Callable[[Path], object]) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).rename(folder.parent / f"real-{name}")
        make(folder / name)

    return damage


def link(path: Path) -> None:
    path.symlink_to(path.parent.parent / f"real-{path.name}")


DAMAGE: dict[str, tuple[Damage, type[SllmError]]] = {
    "no manifest": (remove("manifest.json"), errors.ManifestMissing),
    "a manifest that is a link": (in_place_of("manifest.json", link), errors.ManifestMissing),
    "a manifest that is a FIFO": (in_place_of("manifest.json", os.mkfifo), errors.ManifestMissing),
    "a manifest that is a folder": (in_place_of("manifest.json", Path.mkdir), errors.ManifestMissing),
    "an empty manifest": (cut("manifest.json", 0), errors.ManifestMalformed),
    "half a manifest": (cut("manifest.json", 300), errors.ManifestCorrupt),
    "a manifest without end": (cut("manifest.json", MAX_MANIFEST_BYTES + 1), errors.ManifestMalformed),
    "no partition": (remove("partition-000.bin"), errors.PartitionMissing),
    "a partition that is a link": (in_place_of("partition-000.bin", link), errors.PartitionMissing),
    "a partition that is a FIFO": (in_place_of("partition-000.bin", os.mkfifo), errors.PartitionMissing),
    "a partition that is a folder": (in_place_of("partition-000.bin", Path.mkdir), errors.PartitionMissing),
    "a short partition": (cut("partition-000.bin", SIZE), errors.PartitionTruncated),
    "an empty partition": (cut("partition-000.bin", 0), errors.PartitionTruncated),
    "a long partition": (cut("partition-000.bin", SIZE + 2 * PAGE_BYTES), errors.PartitionTruncated),
    "the first byte": (write_over("partition-000.bin", 0, b"\xff"), errors.ChunkCorrupt),
    "a byte in the middle": (write_over("partition-000.bin", SIZE // 2 + 1, b"\xff"), errors.ChunkCorrupt),
    "the last byte": (write_over("partition-000.bin", SIZE + PAGE_BYTES - 1, b"\xff"), errors.ChunkCorrupt),
}
ONLY_VERIFY: dict[str, tuple[Damage, type[SllmError]]] = {
    "no execution file": (remove("config.json"), errors.ExecutionFileDamaged),
    "an execution file that is a link": (in_place_of("config.json", link), errors.ExecutionFileDamaged),
    "an execution file that is a FIFO": (in_place_of("config.json", os.mkfifo), errors.ExecutionFileDamaged),
    "a longer execution file": (write_over("config.json", 2, b"\n"), errors.ExecutionFileDamaged),
    "another execution file": (write_over("config.json", 0, b"[]"), errors.ExecutionFileDamaged),
}


@pytest.mark.parametrize(("damage", "error"), [*DAMAGE.values(), *ONLY_VERIFY.values()], ids=[*DAMAGE, *ONLY_VERIFY])
def test_damage_is_found_and_named(checkpoint: Path, damage: Damage, error: type[SllmError]) -> None:
    damage(checkpoint)
    with pytest.raises(error) as found:
        verify(checkpoint)
    assert type(found.value) is error
    assert "\n" not in found.value.message
    assert found.value.hint


@pytest.mark.parametrize(("damage", "error"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_weights_are_not_loaded(checkpoint: Path, damage: Damage, error: type[SllmError]) -> None:
    damage(checkpoint)
    with pytest.raises(error):
        load(checkpoint)


def test_a_forged_chunk_is_found_by_looking_deeper(checkpoint: Path) -> None:
    """xxh3 can be forged; here the forger has changed the hash in the manifest too."""
    manifest = read_manifest(checkpoint)
    (partition,) = manifest.partitions
    forged = replace(partition, sha256="00" * 32)
    (checkpoint / "manifest.json").write_bytes(to_bytes(replace(manifest, partitions=(forged,))))
    verify(checkpoint)
    with pytest.raises(errors.ChunkCorrupt, match="sha256"):
        verify(checkpoint, deep=True)


def test_files_that_the_manifest_does_not_name_are_not_looked_at(checkpoint: Path) -> None:
    os.mkfifo(checkpoint / "another")
    (checkpoint / "partition-001.bin").write_text("x")
    verify(checkpoint, deep=True)


def test_a_path_that_is_no_folder_has_no_manifest(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(errors.ManifestMissing):
            verify(path)
