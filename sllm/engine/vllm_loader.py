"""The load format `sllm`: vLLM takes its weights from the node's pool, which this process has mapped.

`register` is called by vLLM itself, in every process, through the entry point group `vllm.general_plugins`. Which
memory it is cannot travel through vLLM's configuration, so the engine leaves it in this module with `offer`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sllm.core.launch import Launch
from sllm.engine.base import Hooks
from sllm.engine.weights import Weights
from sllm.errors import EngineFailed

if TYPE_CHECKING:
    from sllm.loader.memory.cuda import Registration

LOAD_FORMAT = "sllm"


@dataclass(slots=True)
class Offer:
    """What the next model that is built in this process is loaded from.

    `kept`: parameters to save once it serves. `registration`: that of the weights' memory, while it is loaded to a GPU.
    """

    weights: Weights
    launch: Launch
    hooks: Hooks
    kept: dict[str, Any] | None = None
    registration: Registration | None = None


_offered: Offer | None = None


def offer(weights: Weights, launch: Launch, hooks: Hooks) -> Offer:
    """Say what the next model is loaded from, and return where to find what is left to do after it is built."""
    global _offered
    _offered = Offer(weights, launch, hooks)
    return _offered


def withdraw() -> None:
    """Forget what was offered: it would keep the memory mapped."""
    global _offered
    _offered = None


def register() -> None:
    """Make the load format known to vLLM. May be called again."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    class PoolLoader(DefaultModelLoader):
        """Differs from vLLM's own loader in where the tensors come from; what is checked after loading is the same."""

        def __init__(self, load_config: Any) -> None:
            config = copy.copy(load_config)
            config.load_format = "safetensors"  # the base class knows its own formats only
            super().__init__(config)

        def download_model(self, model_config: Any) -> None:
            """Nothing to fetch: the memory is here."""

        def load_model(self, *args: Any, **kwargs: Any) -> Any:
            """CUDA, if any, is up: it gets to know the memory beside the construction of the model."""
            from sllm.engine.device import registered

            offered = _expected()
            with registered(offered.weights) as offered.registration:
                return super().load_model(*args, **kwargs)

        def load_weights(self, model: Any, model_config: Any) -> None:
            from sllm.engine import vllm_runtime

            offered = _expected()
            if offered.weights.manifest.layout == "runtime":
                device = next(model.parameters()).device
                vllm_runtime.use(model, offered.weights, offered.launch, device, offered.registration)
                return
            super().load_weights(model, model_config)
            offered.kept = vllm_runtime.to_save(model, offered.launch, model_config)

        def get_all_weights(self, model_config: Any, model: Any) -> Generator[tuple[str, Any], None, None]:
            self.counter_before_loading_weights = time.perf_counter()  # for the base class' log
            yield from _tensors(_expected())

        def track_weights_loading(self, model: Any, loaded_weights: Any, quantized: bool = False) -> None:
            """Refuse a checkpoint that leaves any parameter as it was allocated: vLLM asks that of quantised models
            only, and would serve the others with whatever was in memory."""
            super().track_weights_loading(model, loaded_weights, quantized=True)

    register_model_loader(LOAD_FORMAT)(PoolLoader)


def _expected() -> Offer:
    if _offered is None:
        raise EngineFailed("no weights were offered to this process")
    return _offered


def _tensors(offered: Offer) -> Generator[tuple[str, Any], None, None]:
    """Yield (name, tensor) in load order, each once its bytes are there, telling the done share in bytes.

    vLLM's own copies to a GPU are faster from registered memory, and must not begin while it is being registered.
    """
    from sllm.engine import vllm_runtime

    weights, tensors = offered.weights, offered.weights.tensors
    views = vllm_runtime.views_on(vllm_runtime.memory_of(weights), weights)
    total = sum(tensor.size_bytes for tensor in tensors.values()) or 1
    done = 0
    for name, tensor in tensors.items():
        weights.wait(tensor)
        if offered.registration is not None:
            offered.registration.wait(tensor.offset + tensor.size_bytes)
        yield name, views.pop(name)
        done += tensor.size_bytes
        offered.hooks.progress(done / total)
