"""Bad input: each a clear error with a hint at the CLI, and nothing changed."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import openai
import pytest
from e2e.cluster import DEMO_MODEL, Cluster

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    folder = tmp_path / "broken"
    shutil.copytree(DEMO_MODEL, folder)
    return folder


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    weights = folder / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size - 4096)


def hostile_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")


def index_names_what_is_not_there(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"no.such.tensor": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (no_config, "config.json"),
        (only_pickle, "pickle"),
        (truncated, "model.safetensors"),
        (hostile_header, "header"),
        (index_names_what_is_not_there, "no.such.tensor"),
        (shutil.rmtree, "broken"),
    ],
)
def test_a_broken_source_is_refused_and_nothing_is_kept(
    fake_cluster: Cluster, broken: Path, break_it: Callable[[Path], None], said: str
) -> None:
    break_it(broken)
    before = fake_cluster.json("checkpoint", "list")
    done = fake_cluster.cli("checkpoint", "add", "broken", str(broken), expect=2 if broken.exists() else 3)
    assert said in done.stderr
    assert "error:" in done.stderr
    assert "hint:" in done.stderr
    assert done.stdout == ""
    assert fake_cluster.json("checkpoint", "list") == before


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (["deploy", "x", "--checkpoint", "nowhere"], 3, "nowhere"),
        (["deploy", "a b", "--checkpoint", "demo"], 2, "a b"),
        (["deploy", "a/b/c", "--checkpoint", "demo"], 2, "a/b/c"),
        (["deploy", "x", "--checkpoint", "demo", "--min", "3", "--max", "2"], 2, "min"),
        (["deploy", "x", "--checkpoint", "demo", "--devices", "99"], 7, "99"),
        (["deploy", "x", "--checkpoint", "demo", "--max-model-len", "99999999"], 2, "99999999"),
        (["deploy", "x", "--checkpoint", "demo", "--engine-arg", "dtypo=float32"], 2, "dtypo"),
        (["deploy", "x", "--checkpoint", "demo", "--engine-arg", "middleware=evil.Thing"], 2, "middleware"),
        (["deploy", "x", "--checkpoint", "demo", "--engine-arg", "dtype"], 2, "KEY=VALUE"),
        (["deploy", "x", "--checkpoint", "demo", "--keep-alive", "soon"], 2, "soon"),
        (["delete", "nobody"], 3, "nobody"),
        (["scale", "nobody", "--replicas", "1"], 3, "nobody"),
        (["checkpoint", "show", "nowhere"], 3, "nowhere"),
        (["checkpoint", "remove", "nowhere"], 3, "nowhere"),
        (["checkpoint", "add", "../x", str(DEMO_MODEL)], 2, "../x"),
        (["checkpoint", "add", "x", str(DEMO_MODEL), "--node", "nobody"], 3, "nobody"),
        (["logs", "rep-0"], 3, "rep-0"),
        (["logs", "nobody"], 3, "nobody"),
    ],
)
def test_a_wrong_command_says_what_is_wrong(fake_cluster: Cluster, command: list[str], code: int, said: str) -> None:
    done = fake_cluster.cli(*command, expect=code)
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert fake_cluster.json("status")["deployments"] == []


def test_a_name_that_is_taken_by_other_content_is_a_conflict(fake_cluster: Cluster, broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert "demo" in fake_cluster.cli("checkpoint", "add", "demo", str(broken), "--all", expect=4).stderr
    fake_cluster.cli("checkpoint", "add", "demo", str(DEMO_MODEL), "--all")  # the same content again is fine


def test_a_checkpoint_in_use_is_not_removed(fake_cluster: Cluster) -> None:
    fake_cluster.cli("deploy", "user", "--checkpoint", "demo")
    assert "user" in fake_cluster.cli("checkpoint", "remove", "demo", expect=4).stderr
    fake_cluster.cli("delete", "user")


def test_a_second_agent_with_the_same_name_is_refused(fake_cluster: Cluster) -> None:
    config = next(fake_cluster.state.rglob("node-1.toml"))
    text = config.read_text()
    twin = fake_cluster.folder / "twin.toml"
    twin.write_text(text.replace(str(fake_cluster.state / "node-1"), str(fake_cluster.folder / "twin")))
    assert twin.read_text() != text
    assert "node-1" in fake_cluster.cli("agent", "--config", str(twin), expect=4).stderr


def test_a_second_cluster_in_one_state_folder_is_refused(fake_cluster: Cluster) -> None:
    done = fake_cluster.cli("dev", "--state", str(fake_cluster.state), "--gateway-port", "0", expect=4)
    assert str(fake_cluster.state) in done.stderr


def test_a_taken_gateway_port_is_named(fake_cluster: Cluster) -> None:
    port = fake_cluster.base_url.rsplit(":", 1)[1].split("/")[0]
    arguments = ["--state", str(fake_cluster.folder / "third"), "--controller-port", "0", "--gateway-port", port]
    assert port in fake_cluster.cli("dev", "--engine", "fake", *arguments, expect=4).stderr


@pytest.mark.vllm
def test_an_architecture_that_the_engine_lacks_is_refused(vllm_cluster: Cluster, broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchForCausalLM"]}))
    assert "NoSuchForCausalLM" in vllm_cluster.cli("checkpoint", "add", "strange", str(broken), expect=2).stderr


@pytest.mark.vllm
def test_what_the_engine_refuses_reaches_the_client_in_its_own_words(vllm_cluster: Cluster) -> None:
    vllm_cluster.cli("deploy", "wrong", "--checkpoint", "demo", "--engine-arg", "dtype=float99")
    with pytest.raises(openai.APIStatusError) as caught:
        vllm_cluster.client().completions.create(model="wrong", prompt="x")
    assert "float99" in caught.value.message
    row = vllm_cluster.until(lambda: vllm_cluster.deployment("wrong"), "listed")
    assert row["state"] in ("failed", "sleeping")
    vllm_cluster.cli("delete", "wrong")
