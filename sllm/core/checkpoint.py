"""Checkpoint: a model's weights at rest, as its manifest describes them."""

from __future__ import annotations

from dataclasses import dataclass

from sllm.core.ids import CheckpointName, checkpoint_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What a node knows of a checkpoint that it holds.

    `digest` names the content: two nodes hold the same checkpoint if and only if their digests are equal.
    `size_bytes` counts tensor bytes; `max_model_len` is the longest context the model was made for (tokens).
    """

    name: CheckpointName
    digest: str
    size_bytes: int
    architecture: str
    dtype: str
    tensor_count: int
    max_model_len: int
    source: str = ""
    created_at: float = 0.0

    def __post_init__(self) -> None:
        checkpoint_name(self.name)
        if self.size_bytes < 0 or self.tensor_count < 0:
            raise ValueError("a checkpoint cannot have a negative size")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionFile:
    """One small file of a checkpoint besides its weights: configuration, tokenizer, chat template."""

    path: str
    content: bytes
