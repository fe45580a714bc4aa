"""The runtime layout: a vLLM model's own parameters, fused and padded, saved once and then used as they lie in memory.

On a CPU a parameter becomes a view of the node's pool: only small ones are copied, and engines of one checkpoint share
the bytes. On a GPU the partition goes to the device in chunks as it arrives, and parameters are views of it there.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch

from sllm.core.launch import Launch
from sllm.core.runtime_layout import is_saved, runtime_key
from sllm.engine.device import on_device
from sllm.engine.vllm_setup import installed_version
from sllm.engine.weights import Weights
from sllm.errors import SllmError, StaleLayout
from sllm.loader.format import LARGE_BYTES
from sllm.loader.memory.cuda import Registration
from sllm.loader.saving import save
from sllm.loader.views import bytes_of, tensors_on

log = logging.getLogger(__name__)

_LOWEST_PRIORITY = 19


def key_of(launch: Launch) -> dict[str, str]:
    """Return the key that a runtime layout must have to be good for a launch in this process."""
    return runtime_key(
        launch.spec,
        engine="vllm",
        version=installed_version(),
        device_kind=launch.device_kind,
        world_size=max(1, len(launch.device_ids)),
        rank=launch.rank,
    )


def parameters(model: Any) -> dict[str, Any]:
    """Return what a layout holds of a model: parameters and persistent buffers, tied ones under each name."""
    return dict(model.state_dict(keep_vars=True))


def use(
    model: Any, weights: Weights, launch: Launch, device: torch.device, registration: Registration | None = None
) -> None:
    """Make a saved layout a model's parameters, in place of those that were allocated for it.

    `registration` is that of the weights' memory, if they go to a GPU.
    Raises StaleLayout if it is another engine's, or does not fit the model exactly; the error of the load.
    """
    own = parameters(model)
    _check_key(weights.manifest.key, key_of(launch))
    _check_fit(own, weights)
    if registration is not None:
        for parameter in own.values():
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=device)  # room for what takes its place
        memory = on_device(weights, registration, device)
    else:
        memory = memory_of(weights)
        weights.wait_all()
    for name, view in views_on(memory, weights).items():
        own[name].data = _apart(view) if device.type == "cpu" else view


def _apart(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a small tensor. vLLM replaces large ones, if anything; small ones (scales of attention layers) it changes in
    place, and a write to the pool would copy a page of it: 2 MiB where pages are huge, and the end of the process if
    none of those is free."""
    return tensor.clone() if tensor.nbytes < LARGE_BYTES else tensor


def memory_of(weights: Weights) -> torch.Tensor:
    """Return the partition as one tensor of bytes."""
    assert weights.memory is not None, "nothing has released it"
    return bytes_of(weights.memory.buffer)


def views_on(memory: torch.Tensor, weights: Weights) -> dict[str, torch.Tensor]:
    """Return the partition's tensors, in load order, as views on its bytes, wherever those are."""
    return tensors_on(memory, weights.tensors, (0,) * (weights.partition + 1))


def _check_key(found: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    if dict(found) != dict(wanted):
        odd = sorted(name for name in {**found, **wanted} if found.get(name) != wanted.get(name))[0]
        raise StaleLayout(
            f"the runtime layout was made for {odd} {found.get(odd, '(none)')!r}, not {wanted.get(odd, '(none)')!r}"
        )


def _check_fit(own: Mapping[str, Any], weights: Weights) -> None:
    saved = {
        name: (tensor.dtype, tensor.shape, tensor.stride) if tensor.size_bytes else (tensor.dtype, tensor.shape, None)
        for name, tensor in weights.tensors.items()
    }
    wanted = {name: _described(parameter) for name, parameter in own.items()}
    if saved != wanted:
        odd = sorted(name for name in {**saved, **wanted} if saved.get(name) != wanted.get(name))[0]
        raise StaleLayout(
            f"the runtime layout does not fit the model: {odd!r} is {saved.get(odd)}, not {wanted.get(odd)}"
        )


def _described(parameter: Any) -> tuple[str, tuple[int, ...], tuple[int, ...] | None]:
    dtype = str(parameter.dtype).removeprefix("torch.")
    return dtype, tuple(parameter.shape), parameter.stride() if parameter.numel() else None


# --- saving ---------------------------------------------------------------------------------


def to_save(model: Any, launch: Launch, config: Any) -> dict[str, torch.Tensor] | None:
    """Return the parameters to save, after loading and before vLLM processes them any further; None: do not."""
    if not launch.save_runtime or not is_saved(config.architectures, quantised=config.quantization is not None):
        return None
    return {name: _apart(parameter.detach()) for name, parameter in parameters(model).items()}


def save_in_background(tensors: dict[str, torch.Tensor], launch: Launch, saved: Callable[[], None]) -> None:
    """Write a runtime layout to where the launch says, at the lowest priority; `saved` is called once it is there."""
    key = key_of(launch)

    def work() -> None:
        # Of this thread and those it starts: Linux keeps a priority for each.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        try:
            manifest = save(tensors, launch.save_runtime, layout="runtime", key=key, source=launch.spec.digest)
        except SllmError as error:
            log.warning("the runtime layout was not saved: %s", error)
            return
        finally:
            tensors.clear()
        log.info("the runtime layout is saved: %d bytes", manifest.tensor_bytes)
        saved()

    threading.Thread(target=work, name="save", daemon=True).start()
