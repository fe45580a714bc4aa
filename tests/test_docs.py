"""The documentation keeps up with the code where a machine can tell."""

import re
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from sllm import errors
from sllm.config import AgentConfig, ControllerConfig, GatewayConfig
from sllm.core.engine_args import ENGINE_ARGS
from sllm.migration.source import TRANSITIONS
from sllm.sim.scenario import ScenarioConfig

DOCS = Path(__file__).resolve().parents[1] / "docs"


def keys_of(model: type[BaseModel]) -> set[str]:
    keys = {field.alias or name for name, field in model.model_fields.items()}
    for field in model.model_fields.values():
        for kind in models_in(field.annotation):
            keys |= keys_of(kind)
    return keys


def models_in(annotation: object) -> set[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}
    return {model for part in get_args(annotation) for model in models_in(part)}


@pytest.mark.parametrize(
    ("model", "document"),
    [
        (ControllerConfig, "configuration.md"),
        (GatewayConfig, "configuration.md"),
        (AgentConfig, "configuration.md"),
        (ScenarioConfig, "simulation.md"),
    ],
)
def test_every_configuration_key_is_documented(model: type[BaseModel], document: str) -> None:
    text = (DOCS / document).read_text()
    missing = {key for key in keys_of(model) if f"`{key}`" not in text and f"[{key}]" not in text}
    assert missing == set()


def test_every_exit_code_is_documented() -> None:
    text = (DOCS / "cli.md").read_text()
    codes = {outcome.exit_code for outcome in errors.OUTCOMES.values()} | {errors.EXIT_OK, errors.EXIT_INTERRUPTED}
    assert {code for code in codes if f"| {code} |" not in text} == set()


def test_engine_arguments_point_to_where_they_are_listed() -> None:
    assert ENGINE_ARGS
    assert "engine_args.py" in (DOCS / "decisions" / "0002-engine-arguments-allow-list.md").read_text()


def test_every_row_of_the_migration_protocol_is_documented() -> None:
    text = (DOCS / "migration.md").read_text()
    rows = {f"| {phase} | `{event.__name__}` |" for phase, event in TRANSITIONS}
    assert {row for row in rows if row not in text} == set()


def test_links_between_documents_lead_somewhere() -> None:
    root = DOCS.parent
    for document in [*root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("examples/**/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.relative_to(root)}: {target}"
