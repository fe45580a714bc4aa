"""A folder that takes its place in one step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from sllm.errors import Conflict
from sllm.loader.conversion import convert
from sllm.loader.work_folder import WorkFolder, remove_leftovers, temporary_name


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(destination: Path, publish: bool, **options: bool) -> None:
    with closing(WorkFolder(destination, **options)) as work:
        (work.path / "new").write_text("x")
        if publish:
            work.publish()
        else:
            work.discard()


def test_a_folder_has_its_name_when_it_is_published_and_not_before(tmp_path: Path) -> None:
    write(tmp_path / "c", publish=False)
    assert left(tmp_path) == []
    write(tmp_path / "c", publish=True)
    assert (left(tmp_path), left(tmp_path / "c")) == (["c"], ["new"])


def test_what_is_moved_aside_to_be_deleted_is_a_leftover_after_a_crash(tmp_path: Path) -> None:
    aside = temporary_name(tmp_path)
    assert aside.name.startswith(".sllm-tmp-")
    aside.mkdir()
    remove_leftovers(tmp_path)
    assert left(tmp_path) == []


def make_file(path: Path) -> None:
    path.write_text("x")


@pytest.mark.parametrize(
    "make", [make_file, Path.mkdir, lambda path: path.symlink_to("/etc")], ids=["file", "folder", "link"]
)
@pytest.mark.parametrize("name", [".tmp-0123456789ab", ".sllm-tmp-0123456789", ".sllm-tmp-0123456789abcd", "sllm-tmp"])
def test_nothing_of_others_is_taken_for_a_leftover(tmp_path: Path, name: str, make: Callable[[Path], object]) -> None:
    make(tmp_path / name)
    remove_leftovers(tmp_path)
    assert left(tmp_path) == [name]


@pytest.mark.parametrize(
    "content", ["{}", '{"format":"sllm-checkpoint","version":2,\n'], ids=["other", "later version"]
)
def test_a_leftover_with_what_no_writer_makes_stays(tmp_path: Path, content: str) -> None:
    left_over = tmp_path / ".sllm-tmp-0123456789ab"
    left_over.mkdir()
    (left_over / "manifest.json").write_text(content)
    remove_leftovers(tmp_path)
    assert left(left_over) == ["manifest.json"]
    remove_leftovers(tmp_path, anything=True)
    assert left(tmp_path) == []


@pytest.mark.parametrize("name", ["config.json", "partition-000.bin"])
def test_what_a_writer_had_begun_is_a_leftover_when_it_has_ended(tmp_path: Path, name: str) -> None:
    work = WorkFolder(tmp_path / "c")
    (work.path / name).touch()
    remove_leftovers(tmp_path)
    assert work.path.exists()
    work.close()
    remove_leftovers(tmp_path)
    assert left(tmp_path) == []


def test_a_whole_checkpoint_that_was_exchanged_and_not_deleted_is_a_leftover(model: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "c")
    (tmp_path / "c").rename(temporary_name(tmp_path))
    remove_leftovers(tmp_path)
    assert left(tmp_path) == ["source"]


@pytest.mark.parametrize("content", ["", "{}", '{"name": "app"}', '{"format":"other",\n"x":1}', "[" * 100_000])
def test_a_folder_with_a_manifest_of_something_else_is_not_replaced(tmp_path: Path, content: str) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "manifest.json").write_text(content)
    with pytest.raises(Conflict, match=r"no manifest.json of format sllm-checkpoint"):
        write(tmp_path / "c", publish=True)
    assert left(tmp_path / "c") == ["manifest.json"]


@pytest.mark.parametrize("target", ["kept", "nowhere"])
def test_a_link_in_the_way_of_who_owns_the_folder_is_replaced_and_not_followed(tmp_path: Path, target: str) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "thesis.txt").touch()
    (tmp_path / "c").symlink_to(target)
    write(tmp_path / "c", publish=True, replace_anything=True)
    assert not (tmp_path / "c").is_symlink()
    assert (left(tmp_path), left(tmp_path / "c"), left(tmp_path / "kept")) == (["c", "kept"], ["new"], ["thesis.txt"])


def test_a_link_by_the_name_of_a_leftover_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / ".sllm-tmp-0123456789ab").symlink_to("kept")
    remove_leftovers(tmp_path)
    assert (tmp_path / "kept").is_dir()


def test_a_copy_in_quarantine_is_replaced_only_by_who_owns_the_folder(model: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "c")
    (tmp_path / "c" / ".quarantined").touch()
    with pytest.raises(Conflict, match="quarantined"):
        write(tmp_path / "c", publish=True)
    write(tmp_path / "c", publish=True, replace_anything=True)
    assert left(tmp_path / "c") == ["new"]
