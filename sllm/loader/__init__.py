"""① Multi-tier checkpoint loading: the format, the SSD store, the DRAM pool, and what to hold and evict.

As a library, without any process of ours: `convert` and `save` make a checkpoint, `load` gives its tensors, `verify`
says whether it is whole, `Pool` keeps memory ready. These names are imported when they are used, because the agent and
the store process import modules of this package and must not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sllm.loader.conversion import convert as convert
    from sllm.loader.loader import load as load
    from sllm.loader.memory.pool import Pool as Pool
    from sllm.loader.saving import save as save
    from sllm.loader.verifying import verify as verify

_MODULES = {
    "convert": "sllm.loader.conversion",
    "load": "sllm.loader.loader",
    "Pool": "sllm.loader.memory.pool",
    "save": "sllm.loader.saving",
    "verify": "sllm.loader.verifying",
}

__all__ = ["Pool", "convert", "load", "save", "verify"]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
