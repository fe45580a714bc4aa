"""`sllm.loader.load`: a checkpoint's tensors, and every way in which there are none."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sllm.loader
from sllm.errors import (
    Cancelled,
    CapacityExceeded,
    ChunkCorrupt,
    Conflict,
    DeadlineExceeded,
    InvalidArgument,
    ManifestCorrupt,
    ManifestMissing,
    PartitionMissing,
    PartitionTruncated,
    SllmError,
    UnknownDtype,
)
from sllm.loader.arrangement import arrange
from sllm.loader.dtypes import ITEM_BYTES
from sllm.loader.folder import read_manifest
from sllm.loader.pipeline import Control

torch = pytest.importorskip("torch")

from sllm.loader import loader  # noqa: E402 - needs torch

PAGE = 4096


def small() -> dict[str, Any]:
    """Tensors of all kinds; large enough for several chunks of 1 MiB."""
    made = torch.Generator().manual_seed(1)
    large = torch.randint(0, 255, (3 << 20,), dtype=torch.uint8, generator=made)
    return {
        "model.large": large.view(torch.float16).view(3, -1),
        "model.scalar": torch.tensor(2.5),
        "model.empty": torch.empty(0, 4, dtype=torch.int64),
        "model.transposed": torch.arange(6, dtype=torch.int32).view(2, 3).t(),
        "model.odd": torch.tensor([True, False, True]),
        "lm_head": torch.randn(257, 129, generator=made, dtype=torch.float64),
    }


def same(one: Any, other: Any) -> bool:
    """Equal to the bit, NaNs too."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return bytes_in(one) == bytes_in(other)


def bytes_in(tensor: Any) -> bytes:
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    sllm.loader.save(small(), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def partition(checkpoint: Path) -> Path:
    return checkpoint / "partition-000.bin"


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("verify", [False, True])
def test_what_was_saved_is_loaded(checkpoint: Path, pooled: bool, verify: bool) -> None:
    pool = sllm.loader.Pool(8 << 20) if pooled else None
    found = sllm.loader.load(checkpoint, pool=pool, verify=verify)
    expected = small()
    assert list(found) == list(expected)
    assert all(same(found[name], expected[name]) for name in expected)


@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(ITEM_BYTES)), st.lists(st.integers(0, 5), max_size=4), st.integers(0, 255)),
        max_size=12,
    )
)
@settings(deadline=None, max_examples=50)
def test_any_dtype_and_shape_comes_back_to_the_byte(rows: list[tuple[str, list[int], int]]) -> None:
    tensors = {}
    for number, (dtype, shape, seed) in enumerate(rows):
        count = ITEM_BYTES[dtype]
        for n in shape:
            count *= n
        content = [(seed + n) % (2 if dtype == "bool" else 256) for n in range(count)]
        raw = torch.tensor(content, dtype=torch.uint8)
        tensors[f"t{number}"] = raw.view(getattr(torch, dtype)).view(shape)
    with tempfile.TemporaryDirectory() as folder:
        sllm.loader.save(tensors, f"{folder}/c")
        found = sllm.loader.load(f"{folder}/c")
    assert list(found) == list(tensors)
    assert all(same(found[name], tensors[name]) for name in tensors)


def test_a_converted_checkpoint_has_the_tensors_of_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    source = tmp_path / "source"
    source.mkdir()
    tensors = {"a": torch.randn(300, 70), "b": torch.ones(5, dtype=torch.bfloat16), "c": torch.tensor(3)}
    safetensors.save_file(tensors, source / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 128}
    (source / "config.json").write_text(json.dumps(config))
    sllm.loader.convert(source, tmp_path / "made")
    found = sllm.loader.load(tmp_path / "made")
    expected = safetensors.load_file(source / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(same(found[name], expected[name]) for name in expected)


def test_tied_tensors_share_memory_and_may_be_written(tmp_path: Path) -> None:
    weight = torch.zeros(100, 100)
    sllm.loader.save({"embed": weight, "head": weight}, tmp_path / "tied")
    found = sllm.loader.load(tmp_path / "tied")
    found["embed"][0, 0] = 7
    assert found["head"][0, 0] == 7
    assert sllm.loader.load(tmp_path / "tied")["head"][0, 0] == 0


def test_tensors_are_views_of_one_piece_of_the_pool(checkpoint: Path) -> None:
    with sllm.loader.Pool(8 << 20) as pool:
        found = sllm.loader.load(checkpoint, pool=pool)
        begin = pool.memory.address
        assert all(begin <= each.data_ptr() < begin + pool.size_bytes for each in found.values() if each.numel())
        assert pool.used_bytes == (checkpoint / "partition-000.bin").stat().st_size


def test_the_pool_gets_its_memory_back_with_the_last_tensor(checkpoint: Path) -> None:
    with sllm.loader.Pool(8 << 20) as pool:
        found = sllm.loader.load(checkpoint, pool=pool)
        one = found["lm_head"][3]
        del found
        assert pool.used_bytes > 0
        del one
        assert pool.used_bytes == 0


def test_two_loads_of_one_checkpoint_have_memory_of_their_own(checkpoint: Path) -> None:
    with sllm.loader.Pool(8 << 20) as pool:
        one, other = (sllm.loader.load(checkpoint, pool=pool) for _ in range(2))
        one["model.scalar"].fill_(9)
        assert other["model.scalar"] == 2.5


def test_a_pool_that_is_full_refuses_and_keeps_what_it_has(checkpoint: Path) -> None:
    with sllm.loader.Pool(4 << 20) as pool:
        held = sllm.loader.load(checkpoint, pool=pool)
        with pytest.raises(CapacityExceeded, match="are free"):
            sllm.loader.load(checkpoint, pool=pool)
        assert same(held["lm_head"], small()["lm_head"])


def test_threads_load_side_by_side_through_one_pool(checkpoint: Path) -> None:
    expected, found = small(), []

    def work() -> None:
        for _ in range(5):
            tensors = sllm.loader.load(checkpoint, pool=pool)
            found.append(all(same(tensors[name], expected[name]) for name in expected))

    with sllm.loader.Pool(32 << 20) as pool:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [True] * 20
        assert pool.used_bytes == 0


def test_progress_ends_with_all_bytes(checkpoint: Path, partition: Path) -> None:
    seen: list[tuple[int, int]] = []
    sllm.loader.load(checkpoint, progress=lambda done, total: seen.append((done, total)))
    size = partition.stat().st_size
    assert seen == sorted(set(seen))
    assert seen[-1] == (size, size)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lose_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def lose_partition(folder: Path) -> None:
    (folder / "partition-000.bin").unlink()


def cut_partition(folder: Path) -> None:
    os.truncate(folder / "partition-000.bin", PAGE)


def link_partition(folder: Path) -> None:
    (folder / "partition-000.bin").rename(folder / "elsewhere")
    (folder / "partition-000.bin").symlink_to("elsewhere")


DAMAGES: list[tuple[Callable[[Path], None], type[SllmError]]] = [
    (lose_manifest, ManifestMissing),
    (lambda folder: flip(folder / "manifest.json"), ManifestCorrupt),
    (lose_partition, PartitionMissing),
    (link_partition, PartitionMissing),
    (cut_partition, PartitionTruncated),
    (lambda folder: flip(folder / "partition-000.bin"), ChunkCorrupt),
]


@pytest.mark.parametrize(("damage", "error"), DAMAGES, ids=[error.reason for _, error in DAMAGES])
def test_a_damaged_checkpoint_is_its_own_error_and_gives_everything_back(
    checkpoint: Path, damage: Callable[[Path], None], error: type[SllmError]
) -> None:
    damage(checkpoint)
    descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    with sllm.loader.Pool(8 << 20) as pool:
        with pytest.raises(error) as raised:
            sllm.loader.load(checkpoint, pool=pool)
        assert pool.used_bytes == 0, "while the error, and so its traceback, is alive"
        assert "\n" not in raised.value.message
        assert raised.value.hint
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == (descriptors, threads)


def test_there_is_no_checkpoint_where_there_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ManifestMissing):
        sllm.loader.load(tmp_path / "nowhere")


def test_a_load_can_be_cancelled_and_can_be_late(checkpoint: Path) -> None:
    with sllm.loader.Pool(8 << 20) as pool:
        with pytest.raises(Cancelled):
            sllm.loader.load(checkpoint, pool=pool, cancelled=lambda: True)
        with pytest.raises(DeadlineExceeded):
            sllm.loader.load(checkpoint, pool=pool, deadline_s=0)
        assert pool.used_bytes == 0


def test_an_error_of_the_callers_progress_ends_the_load(checkpoint: Path) -> None:
    def progress(done: int, total: int) -> None:
        raise LookupError("the caller's")

    with sllm.loader.Pool(8 << 20) as pool:
        with pytest.raises(LookupError, match="the caller's"):
            sllm.loader.load(checkpoint, pool=pool, progress=progress)
        assert pool.used_bytes == 0


def test_a_dtype_that_this_torch_lacks_ends_the_load(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "float64")  # an older torch
    with sllm.loader.Pool(8 << 20) as pool:
        with pytest.raises(UnknownDtype, match="float64"):
            sllm.loader.load(checkpoint, pool=pool)
        assert pool.used_bytes == 0


@pytest.mark.parametrize("device", ["meta", "nonsense", "cuda:99"])
def test_a_device_that_is_none_is_refused(checkpoint: Path, device: str) -> None:
    with pytest.raises(InvalidArgument):
        sllm.loader.load(checkpoint, device=device)


def test_fresh_memory_is_given_back_too(checkpoint: Path) -> None:
    found = sllm.loader.load(checkpoint)
    address = found["model.large"].data_ptr()
    del found
    gc.collect()
    with open("/proc/self/maps", encoding="utf-8") as lines:
        ranges = [line.split(" ", 1)[0].split("-") for line in lines]
    assert not any(int(begin, 16) <= address < int(end, 16) for begin, end in ranges)


def test_the_library_needs_neither_grpc_nor_vllm_and_its_modules_need_no_torch(checkpoint: Path) -> None:
    heavy = "{'grpc', 'vllm', 'google.protobuf', 'pydantic'}"
    program = f"""
import sys
import sllm.loader
import sllm.loader.memory.space, sllm.loader.memory.pool, sllm.loader.storage.direct, sllm.loader.pipeline
assert "torch" not in sys.modules, "without load, nothing needs torch"
tensors = sllm.loader.load(sys.argv[1])
assert tensors["model.scalar"] == 2.5
print(sorted({heavy} & set(sys.modules)))
"""
    found = subprocess.run(
        [sys.executable, "-c", program, str(checkpoint)], capture_output=True, text=True, timeout=100
    )
    assert (found.stdout.strip(), found.returncode) == ("[]", 0), found.stderr


def test_no_garbage_is_collected_during_a_load(checkpoint: Path) -> None:
    seen: list[bool] = []
    sllm.loader.load(checkpoint, progress=lambda done, total: seen.append(gc.isenabled()))
    assert seen
    assert not any(seen)
    assert gc.isenabled()


def test_a_load_onto_a_device_that_gets_no_ring_keeps_nothing_there(checkpoint: Path) -> None:
    """The CPU is the device: a load fails before it asks for CUDA, when its pool turns out to be closed."""
    pool = sllm.loader.Pool(8 << 20)
    pool.close()
    manifest = read_manifest(checkpoint)
    with pytest.raises(Conflict, match="closed") as raised:
        loader._load_onto(torch.device("cpu"), manifest, arrange(manifest), [], pool, Control())
    frames = [frame for frame, _ in traceback.walk_tb(raised.tb)]
    (target,) = [frame.f_locals["target"] for frame in frames if frame.f_code.co_name == "_load_onto"]
    assert target.untyped_storage().size() == 0, "while the error, and so its traceback, is alive"


def test_ctrl_c_ends_a_load_and_gives_everything_back(checkpoint: Path) -> None:
    interrupted = threading.Event()

    def on_signal(number: int, frame: object) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    def progress(done: int, total: int) -> None:
        if not interrupted.is_set():
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            assert interrupted.wait(30)

    threads = threading.active_count()
    before = signal.signal(signal.SIGINT, on_signal)
    try:
        with sllm.loader.Pool(8 << 20) as pool:
            with pytest.raises(KeyboardInterrupt):
                sllm.loader.load(checkpoint, pool=pool, progress=progress)
            assert pool.used_bytes == 0
            assert threading.active_count() == threads
    finally:
        signal.signal(signal.SIGINT, before)
