"""The SSD store: a checkpoint is there completely or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sllm.core.ids import CheckpointName
from sllm.errors import (
    Cancelled,
    CapacityExceeded,
    Conflict,
    ExecutionFileDamaged,
    InvalidCheckpoint,
    NotFound,
    StaleLayout,
    UnsupportedCheckpoint,
)
from sllm.loader.conversion import convert
from sllm.loader.folder import read_manifest
from sllm.loader.source import examine
from sllm.loader.store import SsdStore, StoredCheckpoint
from sllm.loader.writing import CheckpointWriter

NAME = CheckpointName("demo")


def add(store: SsdStore, model: Path, name: CheckpointName = NAME) -> StoredCheckpoint:
    return store.add(name, examine(model), str(model), now=1.0)


def visible(store: SsdStore) -> list[str]:
    return sorted(path.name for path in store.root.iterdir())


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


def test_a_model_that_no_report_could_name_is_refused_before_anything_is_written(store: SsdStore, model: Path) -> None:
    (model / "config.json").write_text(r'{"architectures": ["\ud800"]}')
    with pytest.raises(InvalidCheckpoint, match="which no model has"):
        add(store, model)
    assert visible(store) == []


def test_a_checkpoint_that_no_report_could_name_is_left_out(store: SsdStore, model: Path) -> None:
    manifest = store.folder(add(store, model)) / "manifest.json"
    first, body = manifest.read_bytes().split(b"\n", 1)
    body = body.replace(b"LlamaForCausalLM", rb"\ud800")
    header = {**json.loads(first[:-1] + b"}"), "digest": f"sha256:{hashlib.sha256(body).hexdigest()}"}
    manifest.write_bytes(json.dumps(header).encode()[:-1] + b",\n" + body)
    again = SsdStore(store.root)
    assert (again.entries(), again.damaged()) == ((), ())


def test_a_source_whose_path_is_not_utf8_is_named_readably(store: SsdStore, model: Path) -> None:
    entry = store.add(NAME, examine(model), os.fsdecode(b"/m\xff"), now=1.0)
    assert entry.checkpoint.source == r"/m\udcff"


def test_removes_what_a_crash_left(store: SsdStore, model: Path) -> None:
    entry = add(store, model)
    left = store.root / ".sllm-tmp-0123456789ab"
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
    path.write_bytes(path.read_bytes().replace(b"chunk_bytes", b"chunk_sizes"))


def cut(folder: Path) -> None:
    os.truncate(folder / "partition-000.bin", 100)


def lost(folder: Path) -> None:
    (folder / "partition-000.bin").unlink()


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


def test_an_execution_file_that_is_not_what_was_added_is_not_given_as_if_it_were(store: SsdStore, model: Path) -> None:
    entry = add(store, model)
    (store.folder(entry) / "tokenizer.json").write_text("[]")
    with pytest.raises(ExecutionFileDamaged):
        list(store.execution_files(entry.checkpoint.digest, piece_bytes=16))
    assert store.damaged() == (entry,)


def test_a_checkpoint_of_our_own_format_is_added_as_it_is(store: SsdStore, model: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "converted")
    assert add(store, tmp_path / "converted").checkpoint.digest == add(store, model).checkpoint.digest


def test_a_checkpoint_that_does_not_say_which_model_it_is_is_not_added(
    store: SsdStore, model: Path, tmp_path: Path
) -> None:
    (model / "config.json").unlink()
    convert(model, tmp_path / "converted")
    with pytest.raises(InvalidCheckpoint, match="which model"):
        add(store, tmp_path / "converted")
    assert visible(store) == []


def test_a_checkpoint_of_several_partitions_is_not_served(store: SsdStore, model: Path, tmp_path: Path) -> None:
    entry = add(store, model)
    for folder in (tmp_path / "two", store.root / "two"):
        with CheckpointWriter(folder, [4096, 4096]) as writer:
            for _ in range(2):
                with writer.partition():
                    pass
            writer.commit({}, model=entry.manifest.model)
    with pytest.raises(UnsupportedCheckpoint, match="2 partitions"):
        add(store, tmp_path / "two", CheckpointName("more"))
    assert SsdStore(store.root).entries() == (entry,)


def test_a_name_that_an_alien_file_has_is_taken_over(store: SsdStore, model: Path) -> None:
    (store.root / NAME).write_text("not ours")
    add(store, model)
    assert visible(store) == [NAME]


# --- runtime layouts ------------------------------------------------------------------------------

LAYOUT_BYTES = 8192


def key_of(entry: StoredCheckpoint, **changes: str) -> dict[str, str]:
    return {
        "checkpoint": entry.checkpoint.digest,
        "engine": "vllm",
        "engine_version": "0.32.0",
        "rank": "0",
        **changes,
    }


def write_runtime(store: SsdStore, key: dict[str, str], said: dict[str, str] | None = None) -> Path:
    """Write a runtime layout as an engine host does; `said` is the key it puts in it."""
    work = store.runtime_work(key, LAYOUT_BYTES)
    assert work
    with CheckpointWriter(work, [LAYOUT_BYTES]) as writer:
        with writer.partition():
            pass
        writer.commit({}, layout="runtime", key=said or key)
    return work


def test_a_runtime_layout_is_found_by_its_key_also_after_a_restart(store: SsdStore, model: Path) -> None:
    entry = add(store, model)
    key = key_of(entry)
    assert store.runtime(key) is None
    folder = write_runtime(store, key)
    assert store.runtime(key) is None  # not before it is adopted
    assert store.adopt_runtime(key).folder == folder
    for there in (store, SsdStore(store.root)):
        found = there.runtime(dict(reversed(key.items())))
        assert found
        assert (found.folder, dict(found.manifest.key)) == (folder, key)
        assert there.runtime(key_of(entry, rank="1")) is None
        assert there.used_bytes == entry.manifest.stored_bytes + LAYOUT_BYTES


def test_a_runtime_layout_that_was_made_for_something_else_is_removed_not_adopted(store: SsdStore, model: Path) -> None:
    key = key_of(add(store, model))
    folder = write_runtime(store, key, said={**key, "dtype": "float16"})
    with pytest.raises(StaleLayout):
        store.adopt_runtime(key)
    assert not folder.exists()
    assert store.runtime(key) is None


def test_an_hf_layout_is_never_taken_for_a_runtime_layout(store: SsdStore, model: Path) -> None:
    entry = add(store, model)
    key = key_of(entry)
    work = store.runtime_work(key, LAYOUT_BYTES)
    assert work
    shutil.copytree(store.folder(entry), work)
    assert SsdStore(store.root).runtime(key) is None
    assert not work.exists()


def test_layouts_of_another_version_of_an_engine_are_removed_when_one_is_asked_for(
    store: SsdStore, model: Path
) -> None:
    entry = add(store, model)
    old, other = key_of(entry, engine_version="0.31.0"), key_of(entry, engine="other", engine_version="1")
    for key in (old, other):
        write_runtime(store, key)
        store.adopt_runtime(key)
    assert store.runtime(key_of(entry)) is None
    assert [dict(layout.manifest.key) for layout in store.runtimes()] == [other]


@pytest.mark.parametrize("damage", [cut, lost, manifest_changed])
def test_a_damaged_runtime_layout_is_removed(store: SsdStore, model: Path, damage: Callable[[Path], None]) -> None:
    key = key_of(add(store, model))
    folder = write_runtime(store, key)
    store.adopt_runtime(key)
    damage(folder)
    again = SsdStore(store.root)
    assert again.runtime(key) is None
    assert not folder.exists()


def test_a_runtime_layout_that_loses_its_files_is_not_given_out(store: SsdStore, model: Path) -> None:
    key = key_of(add(store, model))
    lost(write_runtime(store, key))
    with pytest.raises(InvalidCheckpoint):
        store.adopt_runtime(key)
    folder = write_runtime(store, key)
    store.adopt_runtime(key)
    lost(folder)
    assert store.runtime(key) is None
    assert store.runtimes() == ()


def test_runtime_layouts_go_with_the_last_checkpoint_of_their_content(store: SsdStore, model: Path) -> None:
    entry = add(store, model)
    add(store, model, CheckpointName("twin"))
    folder = write_runtime(store, key_of(entry))
    store.adopt_runtime(key_of(entry))
    store.discard(store.withdraw(NAME))
    assert folder.exists()
    store.discard(store.withdraw(CheckpointName("twin")))
    assert not folder.exists()


def test_an_orphan_runtime_layout_is_removed_at_the_start(store: SsdStore, model: Path) -> None:
    entry = add(store, model)
    folder = write_runtime(store, key_of(entry))
    store.adopt_runtime(key_of(entry))
    shutil.rmtree(store.folder(entry))
    SsdStore(store.root)
    assert not folder.exists()


def test_what_is_being_written_counts_against_the_limit(tmp_path: Path, model: Path) -> None:
    entry = add(SsdStore(tmp_path / "checkpoints"), model)
    size, key, other = entry.manifest.stored_bytes, key_of(entry), key_of(entry, rank="1")
    store = SsdStore(tmp_path / "checkpoints", limit_bytes=2 * size + LAYOUT_BYTES - 1)
    work = store.runtime_work(key, LAYOUT_BYTES)
    assert work
    assert store.runtime_work(key, LAYOUT_BYTES) == work  # the same, not one more
    assert store.runtime_work(other, size) is None
    with pytest.raises(CapacityExceeded):
        add(store, model, CheckpointName("twin"))
    store.give_up_runtime(work)

    def meanwhile(done_bytes: int, total_bytes: int) -> None:
        assert store.runtime_work(key, LAYOUT_BYTES) is None

    store.add(CheckpointName("twin"), examine(model), "", now=0.0, progress=meanwhile)
    assert store.runtime_work(key, LAYOUT_BYTES - 1)


def test_room_of_a_runtime_layout_is_free_when_it_was_refused(tmp_path: Path, model: Path) -> None:
    entry = add(SsdStore(tmp_path / "checkpoints"), model)
    store = SsdStore(tmp_path / "checkpoints", limit_bytes=entry.manifest.stored_bytes + LAYOUT_BYTES)
    lost(write_runtime(store, key_of(entry)))
    with pytest.raises(InvalidCheckpoint):
        store.adopt_runtime(key_of(entry))
    assert store.runtime_work(key_of(entry, rank="1"), LAYOUT_BYTES)


def test_the_longest_unused_runtime_layouts_make_room_for_a_checkpoint_and_no_checkpoint_does(
    tmp_path: Path, model: Path
) -> None:
    store = SsdStore(tmp_path / "checkpoints")
    entry = add(store, model)
    size = entry.manifest.stored_bytes
    keys = [key_of(entry, rank=str(rank)) for rank in range(3)]
    for key in keys:
        write_runtime(store, key)
        store.adopt_runtime(key)
    for seconds, key in enumerate(keys):
        os.utime(store.adopt_runtime(key).folder, (seconds, seconds))
    os.utime(store.adopt_runtime(keys[0]).folder, (9, 9))  # used last, though made first
    store = SsdStore(store.root, limit_bytes=size + 3 * LAYOUT_BYTES + size - 1)
    twin = add(store, model, CheckpointName("twin"))
    assert [layout.manifest.key["rank"] for layout in store.runtimes()] == ["2", "0"]
    assert store.used_bytes == 2 * size + 2 * LAYOUT_BYTES
    store = SsdStore(store.root, limit_bytes=2 * size + 2 * LAYOUT_BYTES)
    (model / "tokenizer.json").write_bytes(bytes(2 * LAYOUT_BYTES))
    with pytest.raises(CapacityExceeded):
        add(store, model, CheckpointName("larger"))
    assert len(store.runtimes()) == 2  # all of them would not have been enough: none went
    assert store.entries() == (entry, twin)


def test_a_runtime_layout_for_which_there_is_no_room_is_not_begun(tmp_path: Path, model: Path) -> None:
    entry = add(SsdStore(tmp_path / "checkpoints"), model)
    store = SsdStore(tmp_path / "checkpoints", limit_bytes=entry.manifest.stored_bytes + 100)
    assert store.runtime_work(key_of(entry), 101) is None
    assert store.runtime_work(key_of(entry), 100)


def test_a_runtime_layout_that_did_not_fit_is_dropped(store: SsdStore, model: Path) -> None:
    key = key_of(add(store, model))
    folder = write_runtime(store, key)
    store.adopt_runtime(key)
    store.drop_runtime(key)
    assert (store.runtime(key), folder.exists()) == (None, False)
