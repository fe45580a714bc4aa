"""`sllm agent`."""

from __future__ import annotations

from sllm.cli.roles import ConfigOption, require_engine, run_role

EXAMPLE = "sllm agent --config /etc/sllm/agent.toml"


def agent(config: ConfigOption) -> None:
    from sllm.config import AgentConfig, load

    settings = load(config, AgentConfig)
    if settings.engine.kind == "vllm":
        require_engine("the agent")
    from sllm.agent.main import run

    run_role(settings, run)
