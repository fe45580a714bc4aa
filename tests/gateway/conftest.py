"""Two kinds of cluster around the gateway under test: with plain front ends, and with vLLM's for what clients see."""

import json
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gateway.fake_processes import EOS, SPECIALS
from gateway.plain_front_end import PlainBuilder
from gateway.running import Cluster, make_route, running_cluster

from sllm.core.checkpoint import ExecutionFile
from sllm.core.route import Route
from sllm.gateway.dispatch import Dispatcher
from sllm.gateway.execution_files import ExecutionFiles


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    """A cluster whose gateway has plain front ends, and waits only briefly."""
    async with running_cluster(tmp_path, PlainBuilder, comment_after_s=0.05, comment_every_s=0.02) as running:
        yield running


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without weights, enough for a front end: configuration, byte tokenizer, chat template."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("model")
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    by_byte = _byte_alphabet()
    assert set(by_byte) == set(alphabet)
    vocabulary = {name: i for i, name in enumerate([*SPECIALS, *by_byte])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "pad_token": "<pad>",
                "model_max_length": 512,
                "chat_template": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
            }
        )
    )
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 32,
                "vocab_size": len(vocabulary),
                "max_position_embeddings": 512,
                "bos_token_id": 1,
                "eos_token_id": EOS,
                "torch_dtype": "float32",
            }
        )
    )
    return folder


def _byte_alphabet() -> list[str]:
    """Return GPT-2's printable stand-in for each byte, in byte order."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    stand_ins = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(stand_ins)) for b in range(256)]


def files_in(folder: Path) -> list[ExecutionFile]:
    return [ExecutionFile(path=p.name, content=p.read_bytes()) for p in sorted(folder.iterdir())]


@pytest.fixture(scope="session")
def vllm_builder() -> Callable[[ExecutionFiles, Dispatcher], Any]:
    """vLLM's front ends; the import is paid once."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sllm.gateway import vllm_frontend

        vllm_frontend.prepare()
    return vllm_frontend.VllmBuilder


@pytest.fixture
async def vllm_cluster(
    tmp_path: Path, model_folder: Path, vllm_builder: Callable[[ExecutionFiles, Dispatcher], Any]
) -> AsyncIterator[Cluster]:
    """A cluster whose gateway has vLLM's front ends; the agent holds the model `sha256-1`."""
    async with running_cluster(tmp_path, vllm_builder, comment_after_s=0.3, comment_every_s=0.02) as running:
        running.agent.files["sha256-1"] = files_in(model_folder)
        yield running


@pytest.fixture
def free_port() -> Iterator[int]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


@pytest.fixture
def a_route() -> Callable[..., Route]:
    """Makes routes: `a_route(NAME, *TARGETS, revision=…, digest=…, sources=…)`."""
    return make_route
