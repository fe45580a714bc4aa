"""The same on a GPU: what the link can carry, and SSD -> GPU beside it. Not yet run on a GPU.

The limit is measured in the same run: copies of one large registered buffer. The load goes through a pool that was
registered before the clock, so that the copy of one chunk runs beside the read of the next. What an engine host does,
DRAM -> GPU, is in loader_cuda_pool.py, which runs by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from common import table
from loader_cases import WARM_UP, write
from loader_checkpoints import Tensors, size_of
from loader_device import plain_folder
from loader_measure import Sample, digest, drop_cache, in_fork, stopwatch
from loader_peers import load_file, pool_bytes
from loader_report import Goal, Result, Samples, median_s, ratio

COPY_BYTES = 1 << 30
LINK, REGISTER, POOLED, LOAD_FILE = "host -> GPU, 1 GiB", "registering 1 GiB", "sllm, pool -> GPU", "load_file -> GPU"


def run(rounds: int, *, quick: bool) -> Result:
    """Measure on the first GPU; a CUDA context cannot be forked, so each fork makes its own, before the clock."""
    kind = "tiny" if quick else "1b"
    with plain_folder() as device:
        in_fork(lambda: write(kind, {"safetensors", "sllm"}, device.folder))
        expected = in_fork(lambda: digest(load_file(device.folder / "safetensors")()))
        turns: dict[str, Callable[[], Sample]] = {
            REGISTER: _register,
            LINK: _link,
            POOLED: partial(_pooled, device.folder / "sllm"),
            LOAD_FILE: partial(_load_file, device.folder / "safetensors"),
        }
        samples: Samples = {name: [] for name in turns}
        for _ in range(rounds):
            for name, measure in turns.items():
                samples[name].append(in_fork(measure))
    loaded = [sample for name in (POOLED, LOAD_FILE) for sample in samples[name]]
    if any(sample.digest != expected for sample in loaded):
        raise SystemExit("a load to the GPU returned other tensors than were written")
    return Result(
        case="cuda",
        title="1.2 GB, 254 tensors, disk -> GPU",
        size_bytes=size_of(kind),
        samples={name: samples[name] for name in (POOLED, LOAD_FILE)},
        goals=[Goal(what="time of load_file -> GPU / ours", target=1, value=ratio(samples, LOAD_FILE, POOLED))],
        facts={"disk": device.name, "quick": quick, **_link_facts(samples)},
    )


def _link_facts(samples: Samples) -> dict[str, float]:
    facts = {
        "link_gb_per_s": COPY_BYTES / median_s(samples, LINK) / 1e9,
        "register_s_per_gb": median_s(samples, REGISTER) / COPY_BYTES * 1e9,
    }
    table("the link", ["", ""], [[name, value] for name, value in facts.items()])
    return facts


def _register() -> Sample:
    torch.cuda.init()
    memory = torch.zeros(COPY_BYTES, dtype=torch.uint8)
    with stopwatch() as watch:
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), COPY_BYTES, 0)))
    return watch.sample()


def _link() -> Sample:
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device="cuda")
    target.copy_(source)  # the first copy makes streams
    torch.cuda.synchronize()
    with stopwatch() as watch:
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
    return watch.sample()


def _pooled(folder: Path) -> Sample:
    import sllm.loader

    pool = sllm.loader.Pool(pool_bytes(folder))
    sllm.loader.load(folder.parent / WARM_UP / "sllm", device="cuda", pool=pool)
    drop_cache(folder)
    with stopwatch() as watch:
        tensors = sllm.loader.load(folder, device="cuda", pool=pool)
        torch.cuda.synchronize()
    return watch.sample(digest=digest(_on_cpu(tensors)))


def _load_file(folder: Path) -> Sample:
    import safetensors.torch

    torch.zeros(1, device="cuda")
    drop_cache(folder)
    with stopwatch() as watch:
        tensors = safetensors.torch.load_file(folder / "model.safetensors", device="cuda")
        torch.cuda.synchronize()
    return watch.sample(digest=digest(_on_cpu(tensors)))


def _on_cpu(tensors: Tensors) -> Tensors:
    return {name: tensor.cpu() for name, tensor in tensors.items()}
