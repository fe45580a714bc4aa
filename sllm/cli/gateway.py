"""`sllm gateway`."""

from __future__ import annotations

from sllm.cli.roles import ConfigOption, require_engine, run_role

EXAMPLE = "sllm gateway --config /etc/sllm/gateway.toml"


def gateway(config: ConfigOption) -> None:
    from sllm.config import GatewayConfig, load

    settings = load(config, GatewayConfig)
    require_engine("the gateway")
    from sllm.gateway.main import new_event_loop, run

    run_role(settings, run, new_event_loop)
