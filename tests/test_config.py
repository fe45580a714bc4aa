"""Configuration: every mistake is named with its file and key."""

from pathlib import Path

import pytest

from sllm.config import AgentConfig, ControllerConfig, load
from sllm.errors import InvalidConfiguration

AGENT = 'name = "n0"\ncontroller = "127.0.0.1:7700"\nstate_dir = "/tmp/x"\n'


def written(folder: Path, text: str) -> Path:
    path = folder / "agent.toml"
    path.write_text(text)
    return path


def test_a_small_file_gets_sane_defaults(tmp_path: Path) -> None:
    config = load(written(tmp_path, AGENT), AgentConfig)
    assert config.engine.kind == "vllm"
    assert config.devices.kind == "auto"
    assert config.engine.grace_s == 60


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (AGENT + "typo = 1\n", "unknown key 'typo'"),
        (AGENT + "[engine]\ngrase_s = 1\n", "unknown key 'engine.grase_s'"),
        (AGENT + "[engine]\ngrace_s = -1\n", "engine.grace_s"),
        (AGENT.replace("n0", "a b"), "name"),
        (AGENT.replace("127.0.0.1:7700", "somewhere"), "HOST:PORT"),
        ("name = ", "not TOML"),
        ("", "name"),
    ],
)
def test_a_mistake_is_named_with_its_file(tmp_path: Path, text: str, named: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(InvalidConfiguration) as caught:
        load(path, AgentConfig)
    assert named in caught.value.message
    assert str(path) in caught.value.message


@pytest.mark.parametrize(
    "change",
    [
        'listen = "0.0.0.0:7710"\n',
        '[engine]\nbind_host = "10.0.0.1"\n',
        'listen = "node-1.example:7710"\n',
        'listen = "[::]:7710"\n',
    ],
)
def test_nothing_crosses_a_network_in_the_clear(tmp_path: Path, change: str) -> None:
    with pytest.raises(InvalidConfiguration, match=r"needs a \[tls\] section"):
        load(written(tmp_path, AGENT + change), AgentConfig)
    tls = '[tls]\nca = "a"\ncertificate = "b"\nkey = "c"\n'
    assert load(written(tmp_path, AGENT + change + tls), AgentConfig).tls


def test_loopback_needs_no_tls(tmp_path: Path) -> None:
    for host in ("127.0.0.1", "localhost", "[::1]"):
        assert load(written(tmp_path, AGENT + f'listen = "{host}:0"\n'), AgentConfig).tls is None


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfiguration, match="nowhere"):
        load(tmp_path / "nowhere.toml", ControllerConfig)
