"""Runtime layouts under one folder, each under the name that its key gives."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sllm.errors import ManifestMissing
from sllm.loader.runtime_layouts import RuntimeLayout, RuntimeLayouts
from sllm.loader.writing import CheckpointWriter

KEY = {"checkpoint": "sha256:0", "engine": "vllm", "engine_version": "1"}


def write(layouts: RuntimeLayouts, key: dict[str, str]) -> RuntimeLayout:
    with CheckpointWriter(layouts.work(key), [4096]) as writer:
        with writer.partition():
            pass
        writer.commit({}, layout="runtime", key=key)
    return layouts.adopt(key)


def test_a_folders_name_says_nothing_of_the_order_of_its_key_and_all_of_the_rest(tmp_path: Path) -> None:
    layouts = RuntimeLayouts(tmp_path)
    assert layouts.folder(KEY) == layouts.folder(dict(reversed(KEY.items())))
    others = [{**KEY, name: "other"} for name in KEY] + [{**KEY, "more": ""}]
    assert len({layouts.folder(key) for key in [KEY, *others]}) == 1 + len(others)


def test_nothing_is_made_before_the_first_is_written(tmp_path: Path) -> None:
    layouts = RuntimeLayouts(tmp_path / ".runtime")
    assert (layouts.all(), layouts.used_bytes, layouts.find(KEY)) == ((), 0, None)
    assert not (tmp_path / ".runtime").exists()
    write(layouts, KEY)
    assert layouts.used_bytes == 4096


def test_a_layout_under_another_keys_name_is_removed_at_the_start(tmp_path: Path) -> None:
    layouts = RuntimeLayouts(tmp_path)
    other = {**KEY, "rank": "1"}
    write(layouts, KEY).folder.rename(layouts.folder(other))
    again = RuntimeLayouts(tmp_path)
    assert (again.all(), again.find(other), list(tmp_path.iterdir())) == ((), None, [])


def test_what_is_adopted_must_have_been_written(tmp_path: Path) -> None:
    with pytest.raises(ManifestMissing):
        RuntimeLayouts(tmp_path).adopt(KEY)
    assert list(tmp_path.iterdir()) == []


def test_what_was_used_last_goes_last(tmp_path: Path) -> None:
    layouts = RuntimeLayouts(tmp_path)
    keys = [{**KEY, "rank": str(rank)} for rank in range(3)]
    for seconds, key in enumerate(keys):
        os.utime(write(layouts, key).folder, (seconds, seconds))
    layouts = RuntimeLayouts(tmp_path)
    assert layouts.find(keys[0])
    layouts.make_room(4097)
    assert [dict(layout.manifest.key) for layout in layouts.all()] == [keys[0]]
