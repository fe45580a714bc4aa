"""sllm: bare-metal GPU servers as one serverless LLM service."""

from sllm.version import VERSION as __version__

__all__ = ["__version__"]
