"""The version of sllm, importable at no cost (`sllm --version` must not pay for anything else)."""

VERSION = "0.1.0"
