"""Who may ask. This version has no API keys yet, so that the answer depends on where the gateway listens."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from sllm.config import GatewayConfig
from sllm.errors import Unauthenticated


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """`open_to_all`: any key is accepted, and none too."""

    open_to_all: bool

    @classmethod
    def of(cls, config: GatewayConfig) -> Keys:
        """Loopback is open; elsewhere only `allow_any_key = true` opens it."""
        return cls(open_to_all=config.allow_any_key or _is_loopback(config.listen))

    def check(self) -> None:
        """Raise Unauthenticated if the caller may not ask."""
        if not self.open_to_all:
            raise Unauthenticated(
                "this gateway cannot check API keys and does not listen on loopback, so it refuses every request",
                hint="listen on 127.0.0.1, or set allow_any_key = true behind a proxy that checks keys",
            )


def _is_loopback(listen: str) -> bool:
    host = listen.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
