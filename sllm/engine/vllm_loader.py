"""The load format `sllm`: vLLM takes its weights from the shared memory that this process was given.

`register` is called by vLLM itself, in every process, through the entry point group `vllm.general_plugins`. Which
memory it is cannot travel through vLLM's configuration, so the engine leaves it in this module with `offer`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from sllm.engine.base import Weights
from sllm.errors import EngineFailed

LOAD_FORMAT = "sllm"


@dataclass(frozen=True, slots=True)
class _Offer:
    weights: Weights
    progress: Callable[[float], None]


_offered: _Offer | None = None


def offer(weights: Weights, progress: Callable[[float], None]) -> None:
    """Say what the next model that is built in this process is loaded from."""
    global _offered
    _offered = _Offer(weights, progress)


def register() -> None:
    """Make the load format known to vLLM. May be called again."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    class SharedMemoryLoader(DefaultModelLoader):
        """Differs from vLLM's own loader in where the tensors come from; what is checked after loading is the same."""

        def __init__(self, load_config: Any) -> None:
            config = copy.copy(load_config)
            config.load_format = "safetensors"  # the base class knows its own formats only
            super().__init__(config)

        def download_model(self, model_config: Any) -> None:
            """Nothing to fetch: the memory is here."""

        def get_all_weights(self, model_config: Any, model: Any) -> Generator[tuple[str, Any], None, None]:
            self.counter_before_loading_weights = time.perf_counter()  # for the base class' log
            yield from _tensors()

        def track_weights_loading(self, model: Any, loaded_weights: Any, quantized: bool = False) -> None:
            """Refuse a checkpoint that leaves any parameter as it was allocated: vLLM asks that of quantised models
            only, and would serve the others with whatever was in memory."""
            super().track_weights_loading(model, loaded_weights, quantized=True)

    register_model_loader(LOAD_FORMAT)(SharedMemoryLoader)


def _tensors() -> Generator[tuple[str, Any], None, None]:
    """Yield (name, tensor), telling the done share in bytes."""
    if _offered is None:
        raise EngineFailed("no weights were offered to this process")
    weights, progress = _offered.weights, _offered.progress
    if weights.memory is None:
        return
    from sllm.loader.views import views

    total = sum(entry.size_bytes for entry in weights.tensors) or 1
    done = 0
    for entry, named in zip(weights.tensors, views(weights.memory, weights.tensors), strict=True):
        yield named
        done += entry.size_bytes
        progress(done / total)
