"""Prepares a process for vLLM before any engine is built: environment, lazy imports, slow set-up calls made once.

All of this is inherited by every fork; nothing here may start a thread that works or touch CUDA.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from typing import Any

from sllm.core.runtime_layout import SAVED_ARCHITECTURES
from sllm.core.vllm_versions import TESTED_VERSIONS
from sllm.engine.base import EngineKind
from sllm.errors import EngineFailed

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in the host's own process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # threads are the lease's to say
    # One rank still opens sockets for its peers: keep them off the network.
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOOPBACK_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
}

_PLUGIN = "sllm"  # of the group `vllm.general_plugins` in pyproject.toml

# Imported by vLLM only when an engine is built or makes its first step.
_LAZY_MODULES = (
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.model_executor.model_loader",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.structured_output",
    "vllm.distributed.elastic_ep.elastic_execute",
    "vllm.model_executor.layers.fused_moe.eep_reconfigure",
    "vllm.v1.pool.flash_maxsim.flash_maxsim_rerank",
    "vllm.renderers",
    "vllm.tokenizers",
    "vllm.model_executor.models.transformers",
    "transformers.models.auto.configuration_auto",
    "transformers.models.auto.tokenization_auto",
    "compressed_tensors",
    "xgrammar",
    "sllm.loader.saving",
    "sllm.loader.views",
)
_LAZY_CPU_MODULES = (
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.v1.attention.backends.cpu_attn",
)


def warm() -> EngineKind:
    """Import vLLM, our adapter, and what both would import later.

    Raises EngineFailed if vLLM is missing or is not a version that the adapter was tested with.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    _have_our_plugin()
    _keep_from_compiling_on_cpu()
    version = installed_version()
    for module in _LAZY_MODULES:
        importlib.import_module(module)
    from vllm.config.logging import LoggingConfig
    from vllm.logger import configure_logging_if_needed
    from vllm.platforms import current_platform

    configure_logging_if_needed(LoggingConfig())  # visits every logger there is; engines find it done
    keep_requests_out_of_logs()
    if current_platform.is_cpu():
        _prepare_cpu(current_platform)
    from vllm.model_executor.models import ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    for architecture in SAVED_ARCHITECTURES:  # the common ones; any other is imported when a host first needs it
        import_architecture(architecture)
    from sllm.engine import vllm_args, vllm_engine

    vllm_args.parser()
    architectures = tuple(sorted(ModelRegistry.get_supported_archs()))
    return EngineKind(name="vllm", version=version, architectures=architectures, build=vllm_engine.build)


def _have_our_plugin() -> None:
    """vLLM loads every plugin there is, or those that the operator has named: to be called before it does."""
    named = os.environ.get("VLLM_PLUGINS")
    if named is not None and _PLUGIN not in named.split(","):
        os.environ["VLLM_PLUGINS"] = f"{named},{_PLUGIN}".lstrip(",")


def _keep_from_compiling_on_cpu() -> None:
    """To be called before vLLM is imported: torch looks at this when a function is decorated.

    vLLM compiles the ranking of logprobs at the first request that asks for them. On a CPU that takes g++ and stalls
    every stream for many seconds; without g++ the engine dies.
    """
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def keep_requests_out_of_logs() -> None:
    """When a step fails vLLM logs what was scheduled: no tokens, but stop words and schemas, which are users' text."""
    logging.getLogger("vllm.logging_utils.dump_input").disabled = True


def installed_version() -> str:
    """Return vLLM's version. Raises EngineFailed if it is missing or untested."""
    try:
        from vllm.version import __version__ as version
    except ImportError as error:
        raise EngineFailed(
            "vLLM is not installed", hint="install the extra `cpu` or `gpu`: pip install 'sllm[cpu]'"
        ) from error
    if version not in TESTED_VERSIONS:
        raise EngineFailed(
            f"vLLM {version} is installed; this version of sllm was tested with {', '.join(TESTED_VERSIONS)}",
            hint=f"pip install 'vllm=={TESTED_VERSIONS[-1]}'",
        )
    return str(version)


def import_architecture(name: str) -> None:
    """Import a model's code in this process. Without it vLLM inspects it in a new interpreter, which takes seconds."""
    from vllm.model_executor.models import ModelRegistry

    registered = ModelRegistry.models.get(name)
    if registered is not None:
        ModelRegistry.register_model(name, registered.load_model_cls())


def _prepare_cpu(platform: Any) -> None:
    for module in _LAZY_CPU_MODULES:
        importlib.import_module(module)
    from vllm.utils import cpu_resource_utils

    # Each call runs `lscpu`. The machine's processors do not change; which of them are allowed is read anew.
    cpu_resource_utils._get_cpu_list = functools.cache(cpu_resource_utils._get_cpu_list)
    cpu_resource_utils.get_allowed_cpu_list()
    # Repacked weights would be each engine's own copy; without, engines use the pool's bytes as they lie there, and
    # start without the time that repacking takes. All starts are alike: an answer must not depend on the start's
    # layout. See docs/decisions/0008-onednn-and-zero-copy.md.
    kernels: Any = importlib.import_module("vllm._custom_ops")
    kernels._supports_onednn = False
    # Rebinds kernels in every loaded module; once is enough for all forks.
    platform.register_triton_kernel_overrides()
    type(platform).register_triton_kernel_overrides = classmethod(lambda cls: None)
