"""The agent with the real vLLM: the same wire, the same phases; and what only a real engine refuses."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sllm.core.ids import CheckpointName, DeviceId, OperationId, ReplicaId
from sllm.core.residency import Tier
from sllm.errors import UnsupportedCheckpoint
from sllm.linux import start_ticks
from sllm.rpc.agents import AddCheckpointCommand

pytestmark = [pytest.mark.e2e, pytest.mark.vllm, pytest.mark.timeout(300)]

CPU = (DeviceId("cpu-0"),)
WIDTH, INNER, WORDS = 64, 512, 64  # some parameters large enough to be used where they lie
LAYER = {
    "self_attn.q_proj": [WIDTH, WIDTH],
    "self_attn.k_proj": [WIDTH, WIDTH],
    "self_attn.v_proj": [WIDTH, WIDTH],
    "self_attn.o_proj": [WIDTH, WIDTH],
    "mlp.gate_proj": [INNER, WIDTH],
    "mlp.up_proj": [INNER, WIDTH],
    "mlp.down_proj": [WIDTH, INNER],
    "input_layernorm": [WIDTH],
    "post_attention_layernorm": [WIDTH],
}


def write_llama(folder: Path, **config: Any) -> Path:
    """Write a Llama of one layer whose weights are all zero."""
    shapes = {f"model.layers.0.{name}.weight": shape for name, shape in LAYER.items()}
    shapes |= {
        "model.embed_tokens.weight": [WORDS, WIDTH],
        "model.norm.weight": [WIDTH],
        "lm_head.weight": [WORDS, WIDTH],
    }
    header, position = {}, 0
    for name, shape in shapes.items():
        size = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    values = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "vocab_size": WORDS,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
        **config,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(position))
    return folder


async def test_a_real_engine_starts_from_memory_dies_and_starts_again(
    make_agent: Callable[..., Any], make_spec: Callable[..., Any], tmp_path: Path
) -> None:
    agent = make_agent(kind="vllm", kv_cache_bytes=32 << 20, stop_with_agent=True)
    report = await agent.start(within_s=200.0)
    assert report.engine.startswith("vllm ")
    assert "LlamaForCausalLM" in report.architectures
    digest = (await agent.add(write_llama(tmp_path / "llama"))).digest
    spec = make_spec(digest, devices=CPU)
    await agent.start_replica(spec)
    status = await agent.replica_in("ready", within_s=60.0)
    # Its parameters are saved, and read into memory for the next start.
    await agent.controller.until(lambda r: len(r.loads) == 2, within_s=60.0)
    os.kill(status.pid, signal.SIGKILL)
    assert "signal 9" in (await agent.replica_in("failed")).error
    await agent.stop_replica(spec)
    report = await agent.controller.until(lambda r: not r.replicas)
    assert Tier.DRAM in {residency.tier for residency in report.residencies}
    await agent.start_replica(make_spec(digest, id=ReplicaId("rep-2"), generation=2, devices=CPU))
    status = await agent.replica_in("ready", within_s=60.0)
    assert "loading" not in status.phases_s
    assert "memfd:" in Path(f"/proc/{status.pid}/maps").read_text()  # it uses the saved ones where they lie
    unknown = AddCheckpointCommand(
        epoch=1,
        operation=OperationId("op-2"),
        name=CheckpointName("odd"),
        source=str(write_llama(tmp_path / "odd", architectures=["OddForCausalLM"])),
    )
    with pytest.raises(UnsupportedCheckpoint, match="OddForCausalLM"):
        [progress async for progress in agent.client.add_checkpoint(unknown)]
    assert await agent.kill(signal.SIGTERM) == 0
    assert start_ticks(status.pid) is None
