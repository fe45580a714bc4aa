"""What the released scheduler of the paper's authors gets wrong, and this agent does not.

The number is that of a list that has others too: see `tests/controller/test_released_defects.py`.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sllm.agent import probing
from sllm.core.node import NodeReport
from sllm.core.residency import Tier
from sllm.core.startup import Basis
from sllm.loader.storage.direct import DirectFile
from sllm.scheduler.estimate import seconds_per_byte
from sllm.scheduler.estimator import Estimator

MIB = 1 << 20


async def loaded(node: Any, digest: str) -> None:
    """Have a checkpoint read into memory, and forgotten again: a load of its own."""
    before = len(node.local.weights.loads)
    node.local.weights.prefetch(node.local.store.with_digest(digest))
    await node.until(lambda: len(node.local.weights.loads) > before)
    node.local.weights.forget(digest)
    await node.until(lambda: not node.local.weights.in_memory)


async def test_defect_6_bandwidth_is_measured_once_on_the_wrong_disk_through_the_page_cache_and_never_refined(
    make_node: Callable[..., Any], make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here: the first measurement reads the store's own file, directly where its file system can; each load refines it;
    and where nothing was measured, that is said."""
    opened: list[tuple[Path, bool]] = []

    class Noted(DirectFile):
        def __init__(self, path: Path, size_bytes: int) -> None:
            descriptors = set(os.listdir("/proc/self/fd"))
            super().__init__(path, size_bytes)
            new = (int(fd) for fd in set(os.listdir("/proc/self/fd")) - descriptors)
            flags = [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in new if _is_open(fd)]
            opened.append((path, any(flag & os.O_DIRECT for flag in flags)))

    monkeypatch.setattr(probing, "DirectFile", Noted)
    node, estimator = make_node(), Estimator()

    def reported() -> NodeReport:
        report: NodeReport = node.local.report("127.0.0.1:1")
        estimator.reported(report, 0.0)
        return report

    assert seconds_per_byte(estimator.learnt(0.0), reported().name, Tier.SSD).basis is Basis.GUESSED
    digest = await node.add(make_model("m", 8 * MIB))
    await node.local.measure_disk()
    report = reported()
    ((path, direct),) = opened
    assert path.is_relative_to(node.local.store.root)
    assert direct or not _takes_direct(path), "past the page cache"
    first = seconds_per_byte(estimator.learnt(0.0), report.name, Tier.SSD)
    assert report.probe is not None
    assert first.basis is Basis.MEASURED
    assert first.seconds == pytest.approx(report.probe.read_s / report.probe.size_bytes)
    for loads in range(1, 4):
        await loaded(node, digest)
        report = reported()
        refined = seconds_per_byte(estimator.learnt(0.0), report.name, Tier.SSD)
        assert refined.observations == 1 + loads
    paces = [load.read_s / load.size_bytes for load in (report.probe, *report.loads)]
    assert min(paces) <= refined.seconds <= max(paces)


def _is_open(descriptor: int) -> bool:
    """That of the listing itself is closed by now."""
    return os.path.exists(f"/proc/self/fd/{descriptor}")


def _takes_direct(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True
