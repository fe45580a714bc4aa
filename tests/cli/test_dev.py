"""The command line of `sllm dev` and of single processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from sllm.config import AgentConfig, ControllerConfig, GatewayConfig, load

ETC = Path(__file__).parents[2] / "deploy" / "etc" / "sllm"


@pytest.fixture
def no_engine(monkeypatch):
    """As if vLLM were not installed."""
    monkeypatch.setattr("sllm.cli.roles.find_spec", lambda name: None)


def test_dev_without_an_engine_says_how_to_get_one(sllm, no_engine, home):
    answer = sllm("dev")
    assert answer.code == 2
    assert answer.err == (
        "error: `sllm dev` needs the inference engine, which is not installed\n"
        "hint: install it with `pip install 'sllm[cpu]'`, or 'sllm[gpu]' where there are GPUs\n"
    )
    assert not home.exists()


@pytest.mark.parametrize("role", ["gateway", "agent"])
def test_a_process_that_needs_the_engine_says_so(sllm, no_engine, role):
    answer = sllm(role, "--config", str(ETC / f"{role}.toml"))
    assert answer.code == 2
    assert answer.err.startswith(f"error: the {role} needs the inference engine")


def test_dev_refuses_an_engine_that_does_not_exist(sllm, home):
    answer = sllm("dev", "--engine", "steam")
    assert answer.code == 2
    assert "steam" in answer.err
    assert not home.exists()


@pytest.mark.parametrize("args", [["--nodes", "0"], ["--gateway-port", "65536"], ["--devices-per-node", "-1"]])
def test_dev_refuses_numbers_out_of_range(sllm, home, args):
    assert sllm("dev", *args).code == 2
    assert not home.exists()


@pytest.mark.parametrize(
    ("role", "model"), [("controller", ControllerConfig), ("gateway", GatewayConfig), ("agent", AgentConfig)]
)
def test_the_packaged_configuration_is_valid_and_its_comments_are_too(tmp_path, role, model):
    path = ETC / f"{role}.toml"
    load(path, model)
    # A line that begins with `#` and no space is a setting with its default: it must be one that exists.
    every_setting = tmp_path / "all.toml"
    lines = path.read_text().splitlines()
    every_setting.write_text(
        "\n".join(line[1:] if line[:1] == "#" and line[1:2] not in (" ", "") else line for line in lines)
    )
    config = load(every_setting, model)
    examples = {"tls", "listen", "controller", "name", "state_dir", "allow_any_key", "record"}
    dumped = config.model_dump(by_alias=True, exclude=examples)
    defaults = load(path, model).model_dump(by_alias=True, exclude={"tls", "listen", "controller", "name", "state_dir"})
    assert {key: defaults[key] for key in dumped} == dumped


def test_the_packaged_configuration_has_every_setting():
    for role, model in (("controller", ControllerConfig), ("gateway", GatewayConfig), ("agent", AgentConfig)):
        text = (ETC / f"{role}.toml").read_text()
        names = {field.alias or name for name, field in model.model_fields.items()}
        assert [name for name in names if f"{name} =" not in text and f"[{name}]" not in text] == []
