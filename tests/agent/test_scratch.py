"""Temporary files of engine hosts."""

from __future__ import annotations

import asyncio
from pathlib import Path

from sllm.agent.scratch import Scratch
from sllm.core.ids import ReplicaId

ONE, OTHER = ReplicaId("rep-1"), ReplicaId("rep-2")


def fill(scratch: Scratch, replica: ReplicaId) -> None:
    scratch.path(replica).mkdir()
    (scratch.path(replica) / "file").write_text("x")


async def test_a_replicas_files_go_with_it(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    fill(scratch, ONE)
    fill(scratch, OTHER)
    scratch.remove(ONE)
    assert not scratch.path(ONE).exists()
    scratch.remove(ONE)
    await asyncio.get_running_loop().shutdown_default_executor()
    assert list(tmp_path.iterdir()) == [scratch.path(OTHER)]


def test_what_dead_hosts_left_goes(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    fill(scratch, ONE)
    fill(scratch, OTHER)
    scratch.keep_only([OTHER])
    assert list(tmp_path.iterdir()) == [scratch.path(OTHER)]
