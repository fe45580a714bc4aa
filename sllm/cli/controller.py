"""`sllm controller`."""

from __future__ import annotations

from sllm.cli.roles import ConfigOption, run_role

EXAMPLE = "sllm controller --config /etc/sllm/controller.toml"


def controller(config: ConfigOption) -> None:
    from sllm.config import ControllerConfig, load

    settings = load(config, ControllerConfig)
    from sllm.controller.main import run

    run_role(settings, run)
