"""Checkpoints on this machine, by the path of their folder: what `show`, `verify` and `convert` have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sllm.cli.units import time_text

if TYPE_CHECKING:
    from sllm.cli.progress import Progress
    from sllm.loader.format import Manifest


def shares(progress: Progress, phase: str) -> Callable[[int, int], None]:
    """Return a callback of (bytes done, bytes in all) that shows the done share."""

    def report(done_bytes: int, total_bytes: int) -> None:
        progress.update(phase, done_bytes / total_bytes if total_bytes else 1.0)

    return report


def manifest_object(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Return the JSON of a checkpoint's folder; its tensors are not in it."""
    model = manifest.model
    return {
        "path": str(folder),
        "digest": manifest.digest,
        "layout": manifest.layout,
        "key": dict(manifest.key),
        "architecture": model.architecture if model else "",
        "max_model_len": model.max_model_len if model else 0,
        "dtype": manifest.main_dtype,
        "tensor_count": len(manifest.tensors),
        "size_bytes": manifest.tensor_bytes,
        "chunk_bytes": manifest.chunk_bytes,
        "partitions": [{"file": each.file, "size_bytes": each.size_bytes} for each in manifest.partitions],
        "execution_files": [file.path for file in manifest.execution_files],
        "source": manifest.source,
        "created_at": time_text(manifest.created_at),
    }


def tensor_objects(manifest: Manifest) -> list[dict[str, Any]]:
    """Return the JSON of a checkpoint's tensors, in load order."""
    return [{"name": name, **tensor._asdict()} for name, tensor in manifest.tensors.items()]
