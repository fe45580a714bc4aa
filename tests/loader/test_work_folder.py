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
