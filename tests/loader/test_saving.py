"""Saving: what comes back has the same values, shapes, strides and sharing."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sllm.errors import CapacityExceeded, Conflict, InvalidArgument, UnsupportedCheckpoint
from sllm.loader import load, save, verify
from sllm.loader.dtypes import ITEM_BYTES
from sllm.loader.format import PAGE_BYTES, ModelFacts


def bytes_of(tensor: torch.Tensor) -> bytes:
    if not tensor.numel():
        return b""
    return bytes(tensor.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8).tolist())


def back(tensors: dict[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    manifest = save(tensors, path)
    assert list(manifest.tensors) == list(tensors)
    verify(path, deep=True)
    found = load(path)
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        plain = tensor.detach().resolve_conj().resolve_neg()
        assert (found[name].dtype, found[name].shape) == (plain.dtype, plain.shape)
        assert bytes_of(found[name]) == bytes_of(plain)
    return found


@pytest.mark.parametrize("name", sorted(ITEM_BYTES))
def test_every_dtype_comes_back(tmp_path: Path, name: str) -> None:
    dtype = getattr(torch, name)
    assert dtype.itemsize == ITEM_BYTES[name]
    raw = torch.arange(3 * 16 * 2, dtype=torch.uint8)
    if dtype is torch.bool:
        raw %= 2
    tensor = raw.view(dtype)
    found = save({"w": tensor}, tmp_path / "c").tensors["w"]
    assert (found.dtype, found.shape) == (name, tuple(tensor.shape))
    assert bytes(raw.tolist()) == (tmp_path / "c" / "partition-000.bin").read_bytes()[: len(raw)]
    assert load(tmp_path / "c")["w"].dtype is dtype


@pytest.mark.parametrize("name", sorted(ITEM_BYTES))
def test_of_every_dtype_a_view_with_holes_comes_back_without_them(tmp_path: Path, name: str) -> None:
    dtype = getattr(torch, name)
    elements = torch.arange(6 * dtype.itemsize, dtype=torch.uint8).view(6, dtype.itemsize) % 2
    view = elements.flatten().view(dtype)[::2]
    manifest = save({"w": view}, tmp_path / "c")
    assert manifest.tensors["w"].size_bytes == 3 * dtype.itemsize
    found = load(tmp_path / "c")["w"]
    assert (found.dtype, found.shape, found.stride()) == (dtype, (3,), (1,))
    assert bytes_of(found.view(torch.uint8)) == bytes_of(elements[::2])


def test_scalars_empty_tensors_parameters_and_any_names_come_back(tmp_path: Path) -> None:
    tensors = {
        "": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "empty scalar's neighbour": torch.empty(2, 0, 5, dtype=torch.int64),
        "parameter/with slash\n": torch.nn.Parameter(torch.randn(3, 4)),
        "ümläut": torch.tensor(True),
    }
    back(tensors, tmp_path / "c")


def test_no_tensors_at_all_come_back(tmp_path: Path) -> None:
    assert back({}, tmp_path / "c") == {}


def test_views_keep_their_strides(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    views = {
        "transposed": base.t(),
        "permuted": torch.randn(2, 3, 4).permute(2, 0, 1),
        "expanded": torch.randn(3, 1).expand(3, 100),
    }
    found = back(views, tmp_path / "c")
    assert {name: tensor.stride() for name, tensor in found.items()} == {
        name: tensor.stride() for name, tensor in views.items()
    }


def test_conjugated_and_negated_views_come_back_as_values(tmp_path: Path) -> None:
    z = torch.randn(5, dtype=torch.complex64)
    back({"conjugate": z.conj(), "imaginary": z.conj().imag}, tmp_path / "c")


def test_tied_tensors_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    weight = torch.randn(300, 64)
    found = back({"embed": weight, "norm": torch.ones(8), "head": weight, "rows": weight[100:200]}, tmp_path / "c")
    assert (tmp_path / "c" / "partition-000.bin").stat().st_size == 19 * PAGE_BYTES
    assert found["head"].data_ptr() == found["embed"].data_ptr()
    assert found["rows"].data_ptr() == found["embed"].data_ptr() + 100 * 64 * 4


def test_views_that_overlap_in_part_are_stored_once(tmp_path: Path) -> None:
    base = torch.arange(100_000, dtype=torch.int32)
    found = back({"a": base[:60_000], "b": base[40_000:]}, tmp_path / "c")
    assert (tmp_path / "c" / "partition-000.bin").stat().st_size < 110 * PAGE_BYTES
    assert found["b"].data_ptr() == found["a"].data_ptr() + 40_000 * 4


def test_views_of_other_element_sizes_stay_aligned(tmp_path: Path) -> None:
    base = torch.arange(64, dtype=torch.int32)
    back({"odd": base[1:20], "wide": base.view(torch.int64)[3:], "widest": base.view(torch.complex128)}, tmp_path / "c")


def test_of_a_large_tensor_only_what_a_view_spans_is_stored(tmp_path: Path) -> None:
    base = torch.randn(1000, 1000)
    found = back({"row": base[500], "column": base[:, 3], "block": base[10:12, 5:7]}, tmp_path / "c")
    # The column and the block overlap others' spans; a column alone is stored without its holes.
    assert (tmp_path / "c" / "partition-000.bin").stat().st_size <= 4_000_000 + 2 * PAGE_BYTES
    save({"column": base[:, 3]}, tmp_path / "alone")
    assert (tmp_path / "alone" / "partition-000.bin").stat().st_size == PAGE_BYTES
    assert torch.equal(load(tmp_path / "alone")["column"], found["column"])


@st.composite
def shared_views(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Views, of several dtypes, on a few storages."""
    dtypes = st.sampled_from([torch.uint8, torch.int16, torch.float32, torch.int64, torch.complex128])
    storages = [torch.arange(256, dtype=torch.uint8) + seed for seed in range(draw(st.integers(1, 2)))]
    found = {}
    for number in range(draw(st.integers(0, 6))):
        typed = storages[draw(st.integers(0, len(storages) - 1))].view(draw(dtypes))
        begin = draw(st.integers(0, typed.numel()))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        stride = [draw(st.integers(0, 4)) for _ in shape]
        span = 1 + sum(max(0, n - 1) * step for n, step in zip(shape, stride, strict=True))
        if begin + span <= typed.numel():
            found[f"t{number}"] = typed.as_strided(shape, stride, begin)
    return found


@settings(deadline=None)
@given(shared_views())
def test_any_views_of_shared_memory_come_back(tensors: dict[str, torch.Tensor]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        back(tensors, Path(folder, "c"))


def test_equal_tensors_make_equal_checkpoints(tmp_path: Path) -> None:
    one = save({"w": torch.ones(10), "v": torch.zeros(3).expand(2, 3)}, tmp_path / "one")
    other = save({"w": torch.ones(10), "v": torch.zeros(3).expand(2, 3)}, tmp_path / "other")
    assert one.digest == other.digest


def test_saving_again_leaves_no_tail_of_what_was_longer(tmp_path: Path) -> None:
    save({"w": torch.randn(1 << 20)}, tmp_path / "c", execution_files={"old.json": b"{}"})
    back({"w": torch.randn(10)}, tmp_path / "c")
    assert sorted(os.listdir(tmp_path / "c")) == ["manifest.json", "partition-000.bin"]
    assert (tmp_path / "c" / "partition-000.bin").stat().st_size == PAGE_BYTES


def test_a_checkpoint_that_is_loaded_may_be_saved_over(tmp_path: Path) -> None:
    weight = torch.randn(1000)
    save({"w": weight}, tmp_path / "c")
    loaded = load(tmp_path / "c")
    save({"w": loaded["w"] * 2, "v": loaded["w"]}, tmp_path / "c")
    assert torch.equal(loaded["w"], weight)
    assert torch.equal(load(tmp_path / "c")["w"], weight * 2)


def test_what_goes_with_the_tensors_is_kept(tmp_path: Path) -> None:
    facts = ModelFacts(architecture="X", max_model_len=7)
    key = {"checkpoint": "sha256:0", "engine": "vllm", "engine_version": "1", "dtype": "float32"}
    manifest = save(
        {"w": torch.ones(1)},
        tmp_path / "c",
        layout="runtime",
        key=key,
        model=facts,
        execution_files={"config.json": b"{}"},
        source="here",
    )
    assert (manifest.layout, dict(manifest.key), manifest.model, manifest.source) == ("runtime", key, facts, "here")
    assert verify(tmp_path / "c").manifest == manifest


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: torch.eye(3).to_sparse(), UnsupportedCheckpoint),
        (lambda: torch.empty(3, device="meta"), UnsupportedCheckpoint),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8), UnsupportedCheckpoint),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_plain_tensor_is_refused_by_name_before_anything_is_written(
    tmp_path: Path, make: Callable[[], torch.Tensor], error: type[Exception]
) -> None:
    with pytest.raises(error, match="'bad'"):
        save({"good": torch.ones(3), "bad": make()}, tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_and_no_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(Conflict):
        save({"w": torch.ones(3)}, tmp_path)
    assert os.listdir(tmp_path) == ["precious.txt"]


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "..", "", "manifest.json", "partition-000.bin", "a\nb"])
def test_an_execution_file_goes_nowhere_else(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidArgument, match="cannot have the name"):
        save({}, tmp_path / "c", execution_files={name: b"x"})
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_of_more_than_two_gigabytes_comes_back(tmp_path: Path) -> None:
    size = (2 << 30) + PAGE_BYTES
    tensor = torch.zeros(size, dtype=torch.uint8)  # pages that nobody wrote to take no memory
    tensor[0], tensor[-1] = 1, 2
    try:
        manifest = save({"before": torch.ones(3), "w": tensor}, tmp_path / "c")
    except CapacityExceeded:
        pytest.skip("the disk is too small")
    row = manifest.tensors["w"]
    with open(tmp_path / "c" / "partition-000.bin", "rb") as file:
        ends = [os.pread(file.fileno(), 2, row.offset), os.pread(file.fileno(), 2, row.offset + size - 2)]
    assert ends == [b"\1\0", b"\0\2"]
    assert row.size_bytes == size
    assert len(set(manifest.partitions[0].chunks[1:-1])) == 1
    shutil.rmtree(tmp_path / "c")  # pytest would keep it


def test_what_is_no_tensor_and_a_layout_without_its_key_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    for wrong in ({"a": 1}, {1: torch.ones(1)}):
        with pytest.raises(InvalidArgument):
            save(wrong, tmp_path / "made")  # type: ignore[arg-type]
    for layout, key in (("runtime", None), ("hf", {"a": "b"}), ("other", None)):
        with pytest.raises(InvalidArgument):
            save({"a": torch.ones(1)}, tmp_path / "made", layout=layout, key=key)
    assert list(tmp_path.iterdir()) == []


def test_storages_of_different_lengths_at_one_address_are_each_saved_whole(tmp_path: Path) -> None:
    memory = bytearray(range(64))
    short, long = (torch.frombuffer(memory, dtype=torch.uint8, count=count) for count in (16, 64))
    save({"short": short, "long": long}, tmp_path / "made")
    loaded = load(tmp_path / "made")
    assert torch.equal(loaded["short"], short)
    assert torch.equal(loaded["long"], long)
