"""The SSD store: a checkpoint is there completely or not at all."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from sllm.core.ids import CheckpointName
from sllm.errors import Cancelled, CapacityExceeded, Conflict, InvalidCheckpoint, NotFound
from sllm.loader.folder import read_manifest
from sllm.loader.format import to_bytes
from sllm.loader.source import examine
from sllm.loader.store import SsdStore, StoredCheckpoint

NAME = CheckpointName("demo")


def add(store: SsdStore, model: Path, name: CheckpointName = NAME) -> StoredCheckpoint:
    return store.add(name, examine(model), str(model), now=1.0)


def visible(store: SsdStore) -> list[str]:
    """Return what is in the store's folder, runtime layouts aside."""
    return sorted(path.name for path in store.root.iterdir() if path.name != ".runtime")


@pytest.fixture
def store(tmp_path: Path) -> SsdStore:
    return SsdStore(tmp_path / "checkpoints")


def test_keeps_what_was_added_over_a_restart(store: SsdStore, model: Path) -> None:
    entry = add(store, model)
    assert entry.checkpoint.size_bytes == 4096
    assert entry.checkpoint.tensor_count == 4
    assert entry.checkpoint.dtype == "float32"
    assert entry.checkpoint.max_model_len == 128
    assert SsdStore(store.root).entries() == (entry,)
    folder = store.folder(entry)
    assert read_manifest(folder) == entry.manifest
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "partition-000.bin",
        "manifest.json",
    }
    assert (folder / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


def test_reports_progress_up_to_the_total(store: SsdStore, model: Path) -> None:
    seen: list[tuple[int, int]] = []
    store.add(NAME, examine(model), "", now=0.0, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {seen[-1][0]} == {store.used_bytes}


def test_the_same_content_again_is_no_error(store: SsdStore, model: Path) -> None:
    assert add(store, model) == add(store, model)


def test_a_name_is_not_given_to_another_content(store: SsdStore, model: Path) -> None:
    first = add(store, model)
    (model / "tokenizer.json").write_text('{"changed": true}')
    with pytest.raises(Conflict, match="other content"):
        add(store, model)
    assert store.entries() == (first,)


def test_the_digest_names_content_not_name_or_place(store: SsdStore, model: Path) -> None:
    one = add(store, model)
    other = add(store, model, CheckpointName("again"))
    assert one.checkpoint.digest == other.checkpoint.digest
    assert store.with_digest(one.checkpoint.digest) in (one, other)
    (model / "tokenizer.json").write_text("[]")
    assert add(store, model, CheckpointName("changed")).checkpoint.digest != one.checkpoint.digest


def test_a_cancelled_copy_leaves_nothing(store: SsdStore, model: Path) -> None:
    with pytest.raises(Cancelled):
        store.add(NAME, examine(model), "", now=0.0, cancelled=lambda: True)
    assert visible(store) == []


def test_a_source_that_changes_while_it_is_copied_is_refused(store: SsdStore, model: Path) -> None:
    source = examine(model)
    shard = model / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InvalidCheckpoint, match="became shorter"):
        store.add(NAME, source, "", now=0.0)
    assert visible(store) == []


@contextmanager
def small_disk() -> Iterator[None]:
    """Files may not grow beyond some bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (128, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_said_so_and_leaves_nothing(store: SsdStore, model: Path) -> None:
    with small_disk(), pytest.raises(CapacityExceeded, match="disk is full"):
        add(store, model)
    assert visible(store) == []
    assert store.entries() == ()


def test_refuses_what_is_beyond_its_limit_before_copying(tmp_path: Path, model: Path) -> None:
    store = SsdStore(tmp_path / "checkpoints", limit_bytes=100)
    with pytest.raises(CapacityExceeded, match="room for 100"):
        store.add(NAME, examine(model), "", now=0.0, cancelled=lambda: pytest.fail("it began"))


def test_removes_what_a_crash_left(store: SsdStore, model: Path) -> None:
    entry = add(store, model)
    left = store.root / ".tmp-0123456789ab"
    left.mkdir()
    (left / "part").write_text("x")
    assert SsdStore(store.root).entries() == (entry,)
    assert not left.exists()


@pytest.mark.parametrize("damage", ["manifest", "no manifest", "partition", "shorter", "execution file", "a file"])
def test_a_damaged_checkpoint_is_left_out_and_the_others_stay(store: SsdStore, model: Path, damage: str) -> None:
    kept = add(store, model, CheckpointName("kept"))
    folder = store.folder(add(store, model))
    match damage:
        case "manifest":
            (folder / "manifest.json").write_text("{}")
        case "no manifest":
            (folder / "manifest.json").unlink()
        case "partition":
            (folder / "partition-000.bin").unlink()
        case "shorter":
            (folder / "partition-000.bin").write_bytes(b"")
        case "execution file":
            (folder / "tokenizer.json").unlink()
        case "a file":
            shutil.rmtree(folder)
            folder.write_text("not a folder")
    found = SsdStore(store.root)
    assert found.entries() == (kept,)
    add(found, model)  # puts a whole one in its place
    assert [entry.checkpoint.name for entry in SsdStore(store.root).entries()] == [NAME, "kept"]
    assert found.damaged() == ()
    assert visible(found) == [NAME, "kept"]


def test_a_renamed_folder_is_the_same_content_by_another_name(store: SsdStore, model: Path) -> None:
    entry = add(store, model)
    store.folder(entry).rename(store.root / "other")
    found = SsdStore(store.root).named(CheckpointName("other"))
    assert found.checkpoint.digest == entry.checkpoint.digest


def test_a_folder_that_has_no_checkpoints_name_is_left_out_and_left_alone(store: SsdStore, model: Path) -> None:
    folder = store.folder(add(store, model)).rename(store.root / "a name")
    assert SsdStore(store.root).entries() == ()
    assert folder.exists()


def manifest_changed(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b"model.scale", b"model.elacs"))


def manifest_replaced(folder: Path) -> None:
    path = folder / "manifest.json"
    manifest = read_manifest(folder)
    path.write_bytes(to_bytes(replace(manifest, tensors={})))


def cut(folder: Path) -> None:
    os.truncate(folder / "partition-000.bin", 100)


def lost(folder: Path) -> None:
    (folder / "partition-000.bin").unlink()


@pytest.mark.parametrize("damage", [manifest_changed, manifest_replaced, cut, lost])
def test_a_stored_file_is_checked_without_reading_its_tensors(
    store: SsdStore, model: Path, damage: Callable[[Path], None]
) -> None:
    entry = add(store, model)
    store.check(entry)
    damage(store.folder(entry))
    with pytest.raises(InvalidCheckpoint):
        store.check(entry)


def test_a_copy_in_quarantine_is_not_given_out_and_is_replaced_by_the_same_content(
    store: SsdStore, model: Path
) -> None:
    entry = add(store, model)
    partition = store.folder(entry) / "partition-000.bin"
    content = partition.read_bytes()
    partition.write_bytes(bytes(4096))
    store.quarantine(entry)
    assert (store.entries(), store.damaged()) == ((), (entry,))
    with pytest.raises(InvalidCheckpoint, match="damaged"):
        store.with_digest(entry.checkpoint.digest)
    (model / "tokenizer.json").write_text("other")
    with pytest.raises(Conflict, match="other content"):
        add(store, model)
    (model / "tokenizer.json").write_text("{}")
    again = add(store, model)
    assert again == store.with_digest(entry.checkpoint.digest)
    assert partition.read_bytes() == content
    assert visible(store) == [NAME]


def test_a_quarantine_survives_a_restart(store: SsdStore, model: Path) -> None:
    entry = add(store, model)
    store.quarantine(entry)
    again = SsdStore(store.root)
    assert (again.entries(), again.damaged()) == ((), (entry,))
    add(again, model)
    assert len(SsdStore(store.root).entries()) == 1


def test_a_copy_that_was_replaced_meanwhile_is_not_put_in_quarantine(store: SsdStore, model: Path) -> None:
    entry = add(store, model)
    store.quarantine(entry)
    replaced = store.add(NAME, examine(model), "elsewhere", now=2.0)
    store.quarantine(entry)
    assert store.entries() == (replaced,)


def test_a_twin_of_a_damaged_copy_is_used_in_its_place(store: SsdStore, model: Path) -> None:
    entry, twin = add(store, model), add(store, model, CheckpointName("twin"))
    store.quarantine(entry)
    assert store.with_digest(entry.checkpoint.digest) == twin


def test_removes_a_checkpoint(store: SsdStore, model: Path) -> None:
    add(store, model)
    entry = store.withdraw(NAME)
    assert store.entries() == ()
    assert store.folder(entry).exists()
    store.discard(entry)
    assert visible(store) == []
    with pytest.raises(NotFound):
        store.withdraw(NAME)
    with pytest.raises(NotFound):
        store.named(NAME)


def test_gives_execution_files_in_pieces(store: SsdStore, model: Path) -> None:
    (model / "empty.txt").write_text("")
    digest = add(store, model).checkpoint.digest
    pieces = list(store.execution_files(digest, piece_bytes=16))
    whole: dict[str, bytes] = {}
    for path, content in pieces:
        assert len(content) <= 16
        whole[path] = whole.get(path, b"") + content
    assert whole == {path.name: path.read_bytes() for path in model.iterdir() if path.suffix != ".safetensors"}
    with pytest.raises(NotFound):
        next(store.execution_files("sha256:none", piece_bytes=16))
