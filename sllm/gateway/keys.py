"""Who may ask. This version has no API keys yet: on loopback everybody may, elsewhere nobody, unless the operator has
opened it to everybody."""

from __future__ import annotations

import ipaddress
import logging
from dataclasses import dataclass

from sllm.config import GatewayConfig
from sllm.errors import Unauthenticated

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """`open_to_all`: any key is accepted, and none too. `warning` is what the operator must know of it."""

    open_to_all: bool
    warning: str = ""

    @classmethod
    def of(cls, config: GatewayConfig) -> Keys:
        """Loopback is open; elsewhere only `allow_any_key = true` opens it."""
        if _is_loopback(config.listen):
            return cls(open_to_all=True)
        if config.allow_any_key:
            warning = "allow_any_key: anybody who can reach %s may use every model, without an API key"
        else:
            warning = "every request will be refused: no API keys can be checked, and %s is not on loopback"
        return cls(open_to_all=config.allow_any_key, warning=warning % config.listen)

    def warn(self) -> None:
        """Log the warning, if there is one."""
        if self.warning:
            log.warning("%s", self.warning)

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
