"""The loader on a real GPU: `make test-gpu`. Needs torch, xxhash, pytest and the standard library; not yet run."""

from __future__ import annotations

from pathlib import Path

import pytest

import sllm.loader
from sllm.errors import CapacityExceeded, ChunkCorrupt, InvalidArgument

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CHUNK = 1 << 20  # of a checkpoint of this size


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(1)
    return {
        "large": torch.randint(0, 255, (40 << 20,), dtype=torch.uint8, generator=made).view(torch.bfloat16),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "transposed": torch.arange(6, dtype=torch.int32).view(2, 3).t(),
        "odd": torch.tensor([True, False, True]),
    }


@pytest.fixture
def checkpoint(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    sllm.loader.save(tensors, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].device.type == "cuda"
        assert found[name].dtype == tensor.dtype
        here = found[name].cpu().contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(here, tensor.contiguous().reshape(-1).view(torch.uint8))


def test_what_was_saved_is_loaded_onto_the_device(checkpoint: Path, tensors: dict[str, torch.Tensor]) -> None:
    assert_same(sllm.loader.load(checkpoint, device="cuda"), tensors)


@pytest.mark.parametrize("size_bytes", [2 * CHUNK, 7 * CHUNK, 64 << 20])
def test_a_pool_of_any_size_is_passed_through_and_free_again(
    checkpoint: Path, tensors: dict[str, torch.Tensor], size_bytes: int
) -> None:
    with sllm.loader.Pool(size_bytes) as pool:
        for _ in range(2):
            assert_same(sllm.loader.load(checkpoint, device="cuda:0", pool=pool), tensors)
            assert pool.used_bytes == 0


def test_a_tensor_of_the_device_can_be_saved(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    sllm.loader.save({name: tensor.cuda() for name, tensor in tensors.items()}, tmp_path / "from-gpu")
    assert_same(sllm.loader.load(tmp_path / "from-gpu", device="cuda"), tensors)


def test_a_checkpoint_loads_while_the_device_computes(checkpoint: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The arena may be memory that work queued earlier still uses: that work must see its own bytes."""
    busy = torch.ones(40 << 18, device="cuda")
    for _ in range(200):
        busy = busy * 1.0
    total = busy.sum()
    del busy
    found = sllm.loader.load(checkpoint, device="cuda")
    assert total.item() == float(40 << 18)
    assert_same(found, tensors)


def test_bad_bytes_never_reach_a_tensor(checkpoint: Path) -> None:
    path = checkpoint / "partition-000.bin"
    content = bytearray(path.read_bytes())
    content[20 << 20] ^= 1
    path.write_bytes(content)
    used = torch.cuda.memory_allocated()
    with sllm.loader.Pool(8 * CHUNK) as pool:
        with pytest.raises(ChunkCorrupt):
            sllm.loader.load(checkpoint, device="cuda", pool=pool)
        assert pool.used_bytes == 0
    assert torch.cuda.memory_allocated() == used


def test_a_device_without_room_says_so(tmp_path: Path) -> None:
    free, _ = torch.cuda.mem_get_info()
    held = torch.empty(free - (64 << 20), dtype=torch.uint8, device="cuda")
    sllm.loader.save({"w": torch.zeros(256 << 20, dtype=torch.uint8)}, tmp_path / "large")
    with pytest.raises(CapacityExceeded, match="cuda"):
        sllm.loader.load(tmp_path / "large", device="cuda")
    del held


def test_a_device_that_is_not_there_is_refused(checkpoint: Path) -> None:
    with pytest.raises(InvalidArgument):
        sllm.loader.load(checkpoint, device=f"cuda:{torch.cuda.device_count()}")
