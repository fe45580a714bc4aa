"""The SSD store: a checkpoint is there completely or not at all."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sllm.core.ids import CheckpointName
from sllm.errors import Cancelled, CapacityExceeded, Conflict, InvalidCheckpoint, NotFound
from sllm.loader.copying import cancelling
from sllm.loader.manifest import Manifest
from sllm.loader.source import examine
from sllm.loader.store import SsdStore

NAME = CheckpointName("demo")


def ignore(_: int) -> None:
    pass


def add(store: SsdStore, model: Path, name: CheckpointName = NAME) -> Manifest:
    return store.add(name, examine(model), str(model), now=1.0, progress=ignore)


@pytest.fixture
def store(tmp_path: Path) -> SsdStore:
    return SsdStore(tmp_path / "checkpoints")


def test_keeps_what_was_added_over_a_restart(store: SsdStore, model: Path) -> None:
    manifest = add(store, model)
    assert manifest.checkpoint.size_bytes == 40
    assert manifest.checkpoint.tensor_count == 4
    assert manifest.checkpoint.dtype == "float32"
    assert manifest.checkpoint.max_model_len == 128
    assert SsdStore(store.root).manifests() == (manifest,)
    copied = {path.name: path.read_bytes() for path in store.folder(manifest).iterdir()}
    copied.pop("checkpoint.json")
    assert copied == {path.name: path.read_bytes() for path in model.iterdir()}


def test_reports_progress_up_to_the_total(store: SsdStore, model: Path) -> None:
    source, seen = examine(model), []
    store.add(NAME, source, "", now=0.0, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == source.total_bytes


def test_the_same_content_again_is_no_error(store: SsdStore, model: Path) -> None:
    assert add(store, model) == add(store, model)


def test_a_name_is_not_given_to_another_content(store: SsdStore, model: Path) -> None:
    first = add(store, model)
    (model / "tokenizer.json").write_text('{"changed": true}')
    with pytest.raises(Conflict, match="other content"):
        add(store, model)
    assert store.manifests() == (first,)


def test_the_digest_names_content_not_name_or_place(store: SsdStore, model: Path) -> None:
    one = add(store, model)
    other = add(store, model, CheckpointName("again"))
    assert one.checkpoint.digest == other.checkpoint.digest
    assert store.with_digest(one.checkpoint.digest) in (one, other)
    (model / "tokenizer.json").write_text("[]")
    assert add(store, model, CheckpointName("changed")).checkpoint.digest != one.checkpoint.digest


def test_a_cancelled_copy_leaves_nothing(store: SsdStore, model: Path) -> None:
    with pytest.raises(Cancelled):
        store.add(NAME, examine(model), "", now=0.0, progress=cancelling(lambda: True, ignore))
    assert list(store.root.iterdir()) == []


def test_a_source_that_changes_while_it_is_copied_is_refused(store: SsdStore, model: Path) -> None:
    source = examine(model)
    shard = model / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InvalidCheckpoint, match="truncated"):
        store.add(NAME, source, "", now=0.0, progress=ignore)
    assert list(store.root.iterdir()) == []


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
    assert list(store.root.iterdir()) == []
    assert store.manifests() == ()


def test_refuses_what_is_beyond_its_limit_before_copying(tmp_path: Path, model: Path) -> None:
    store = SsdStore(tmp_path / "checkpoints", limit_bytes=100)
    with pytest.raises(CapacityExceeded, match="room for 100"):
        store.add(NAME, examine(model), "", now=0.0, progress=pytest.fail)


def test_removes_what_a_crash_left(store: SsdStore, model: Path) -> None:
    manifest = add(store, model)
    (store.root / ".tmp-dead").mkdir()
    (store.root / ".tmp-dead" / "part").write_text("x")
    assert SsdStore(store.root).manifests() == (manifest,)
    assert not (store.root / ".tmp-dead").exists()


@pytest.mark.parametrize("damage", ["manifest", "shard", "shorter", "name"])
def test_a_damaged_checkpoint_is_left_out_and_the_others_stay(store: SsdStore, model: Path, damage: str) -> None:
    kept = add(store, model, CheckpointName("kept"))
    folder = store.folder(add(store, model))
    match damage:
        case "manifest":
            (folder / "checkpoint.json").write_text("{}")
        case "shard":
            (folder / "model.safetensors").unlink()
        case "shorter":
            (folder / "model.safetensors").write_bytes(b"")
        case "name":
            folder.rename(folder.with_name("other"))
    found = SsdStore(store.root)
    assert found.manifests() == (kept,)
    add(found, model)  # puts a whole one in its place
    assert [m.checkpoint.name for m in SsdStore(store.root).manifests()][:2] == [NAME, "kept"]
    assert found.damaged() == ()


def header_changed(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes().replace(b"model.scale", b"model.elacs"))


def cut(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [header_changed, cut, Path.unlink])
def test_a_stored_file_is_checked_without_reading_its_tensors(
    store: SsdStore, model: Path, damage: Callable[[Path], None]
) -> None:
    manifest = add(store, model)
    store.check(manifest)
    damage(store.folder(manifest) / "model.safetensors")
    with pytest.raises(InvalidCheckpoint):
        store.check(manifest)


def test_a_copy_in_quarantine_is_not_given_out_and_is_replaced_by_the_same_content(
    store: SsdStore, model: Path
) -> None:
    manifest = add(store, model)
    shard = store.folder(manifest) / "model.safetensors"
    shard.write_bytes(b"damaged")
    store.quarantine(manifest)
    assert (store.manifests(), store.damaged()) == ((), (manifest,))
    with pytest.raises(InvalidCheckpoint, match="damaged"):
        store.with_digest(manifest.checkpoint.digest)
    (model / "tokenizer.json").write_text("other")
    with pytest.raises(Conflict, match="other content"):
        add(store, model)
    (model / "tokenizer.json").write_text("{}")
    again = add(store, model)
    assert again == store.with_digest(manifest.checkpoint.digest)
    assert shard.read_bytes() == (model / "model.safetensors").read_bytes()
    assert [path.name for path in store.root.iterdir()] == [NAME]


def test_a_twin_of_a_damaged_copy_is_used_in_its_place(store: SsdStore, model: Path) -> None:
    manifest, twin = add(store, model), add(store, model, CheckpointName("twin"))
    store.quarantine(manifest)
    assert store.with_digest(manifest.checkpoint.digest) == twin


def test_removes_a_checkpoint(store: SsdStore, model: Path) -> None:
    add(store, model)
    manifest = store.withdraw(NAME)
    assert store.manifests() == ()
    assert store.folder(manifest).exists()
    store.discard(manifest)
    assert list(store.root.iterdir()) == []
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
