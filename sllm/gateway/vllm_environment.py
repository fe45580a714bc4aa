"""How vLLM is told to behave in this process. It reads its environment when it is imported: set it up before."""

from __future__ import annotations

import logging
import os

# One thread: a front end computes nothing, and threads that spin take the cores from the engines beside it.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CONFIGURE_LOGGING": "0",  # its loggers write through ours
    "VLLM_PLUGINS": "",  # none, not even our own: that one is for engines
    # A request asks for prompts x n sequences. vLLM's own bounds (1024 x 16384) let one small body take all memory.
    "VLLM_MAX_COMPLETION_PROMPTS": "256",
    "VLLM_MAX_N_SEQUENCES": "16",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOOPBACK_IP": "127.0.0.1",
}


def set_up() -> None:
    """Set the environment; what the operator has set stays, except what would load code or open a way around us."""
    for name, value in _ENVIRONMENT.items():
        if name.startswith("VLLM_"):
            os.environ[name] = value
        else:
            os.environ.setdefault(name, value)
    for name in ("VLLM_API_KEY", "VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        os.environ.pop(name, None)
    for name in ("vllm", "transformers"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # That a request failed is told by the gateway, once.
    logging.getLogger("vllm.entrypoints.generate.base.serving").setLevel(logging.CRITICAL)
