"""Reads this process' TLS identity from the files its configuration names."""

from __future__ import annotations

from pathlib import Path

from sllm.config import TlsConfig
from sllm.errors import InvalidConfiguration
from sllm.rpc.transport import Tls


def load_tls(config: TlsConfig | None) -> Tls | None:
    """Return the identity, or None where the configuration has no `[tls]`. Raises InvalidConfiguration."""
    if config is None:
        return None
    return Tls(ca=_read(config.ca), certificate=_read(config.certificate), key=_read(config.key))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidConfiguration(f"cannot read {path}: {error.strerror}", hint="see [tls]") from error
