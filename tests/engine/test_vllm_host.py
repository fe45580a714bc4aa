"""The real thing: engine hosts with vLLM, forked from one warm process, on a tiny random Llama."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from sllm.core.launch import Launch
from sllm.core.replica import ReplicaState
from sllm.core.tokens import AbortRequests, FinishReason, OpenStream, TokenOutput, TokenRequest
from sllm.errors import InvalidArgument
from sllm.linux import start_ticks
from sllm.loader import load, save
from sllm.rpc.engine import EngineClient, HostStatus, StopRequest, TokenStream

pytestmark = [pytest.mark.vllm, pytest.mark.e2e]

Make = Callable[..., Any]
PROMPT = [5, 17, 30, 44, 90, 100, 101, 102]


@dataclass
class Running:
    """An engine host that is up, a client of it and a token stream."""

    client: EngineClient
    stream: TokenStream
    launch: Launch
    pid: int
    status: HostStatus

    def send(self, stream_id: int, params: Any, prompt: list[int] | None = None) -> None:
        request = TokenRequest(
            stream_id=stream_id,
            request_id=f"req-{stream_id}",  # type: ignore[arg-type]
            token_ids=PROMPT if prompt is None else prompt,
            sampling_params=msgspec.json.encode(params),
        )
        self.stream.send(request)


@pytest.fixture(scope="module")
def warm_vllm(start_warm: Make) -> Any:
    """The operator names plugins of vLLM, and not ours."""
    return start_warm("vllm", VLLM_PLUGINS="another")


@pytest.fixture
async def fork(
    warm_vllm: Any, make_launch: Make, tiny_weights: Path, settled: Make
) -> AsyncIterator[Callable[..., Any]]:
    """Return a coroutine function that forks a host and waits until it is ready or has failed."""
    running: list[Running] = []

    async def start(folder: Path = tiny_weights, **changes: Any) -> Running:
        changes = {"engine_args": {"dtype": "float32"}, "execution_dir": str(folder), "weights": folder, **changes}
        launch = make_launch(**changes)
        record = await warm_vllm.fork(launch)
        client = EngineClient(record.address, None, peer="engine host")
        status = await settled(client, launch.nonce)
        opening = OpenStream(protocol_version=1, gateway="g", generation=launch.spec.generation)
        running.append(Running(client, client.open_stream(opening), launch, record.pid, status))
        return running[-1]

    yield start
    for host in running:
        await host.stream.close()
        await host.client.close()
        if host.pid in warm_vllm.pids:
            os.kill(host.pid, signal.SIGTERM)
            assert await warm_vllm.exited(host.pid) == 0


def tokens(outputs: list[TokenOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def text(outputs: list[TokenOutput], folder: Path) -> str:
    from tokenizers import Tokenizer

    return str(Tokenizer.from_file(str(folder / "tokenizer.json")).decode(tokens(outputs)))


def greedy_by_transformers(folder: Path, count: int) -> list[int]:
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    made = list(PROMPT)
    with torch.no_grad():
        for _ in range(count):
            made.append(int(model(torch.tensor([made])).logits[0, -1].argmax()))
    return made[len(PROMPT) :]


async def test_a_greedy_answer_is_the_models_own(
    vllm: SimpleNamespace, fork: Make, collect: Make, tiny_llama: Path
) -> None:
    host = await fork()
    assert host.status.state is ReplicaState.READY
    assert set(host.status.phases_s) == {"building"}
    assert "memfd:" not in Path(f"/proc/{host.pid}/maps").read_text()  # copied, and given back
    host.send(1, vllm.sampling.SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True))
    outputs = (await collect(host.stream, 1))[1]
    assert tokens(outputs) == greedy_by_transformers(tiny_llama, 24)
    assert [output.position for output in outputs] == list(range(24))
    assert outputs[0].prefill.num_prompt_tokens == len(PROMPT)
    assert outputs[-1].finish.reason is FinishReason.LENGTH


async def test_it_serves_what_a_front_end_asks_for(
    vllm: SimpleNamespace, fork: Make, collect: Make, tiny_llama: Path
) -> None:
    params, structured = vllm.sampling.SamplingParams, vllm.sampling.StructuredOutputsParams
    host = await fork()

    # Logprobs: the sampled token first, then the candidates.
    host.send(1, params(temperature=0.0, max_tokens=5, ignore_eos=True, logprobs=3, prompt_logprobs=2))
    outputs = (await collect(host.stream, 1))[1]
    for output in outputs:
        assert (output.logprobs.num_rows, output.logprobs.width) == (1, 4)
        assert output.logprobs.token_ids[0] == output.token_ids[0] == output.logprobs.token_ids[1]
        assert output.logprobs.ranks == [1]
        assert sorted(output.logprobs.values[1:], reverse=True) == output.logprobs.values[1:]
    prompt = outputs[0].prompt_logprobs
    assert (prompt.num_rows, prompt.width) == (len(PROMPT) - 1, 3)
    assert prompt.token_ids[:: prompt.width] == PROMPT[1:]

    # Stop tokens, bad words, bias and the end token are the engine's to apply.
    plain = tokens(outputs)
    host.send(2, params(temperature=0.0, max_tokens=5, ignore_eos=True, stop_token_ids=[plain[2]]))
    stopped = (await collect(host.stream, 2))[2]
    assert tokens(stopped) == plain[:3]
    assert (stopped[-1].finish.reason, stopped[-1].finish.stop_token_id) == (FinishReason.STOP, plain[2])
    bad = params(temperature=0.0, max_tokens=5, ignore_eos=True)
    bad._bad_words_token_ids = [[plain[0]]]
    host.send(3, bad)
    assert plain[0] not in tokens((await collect(host.stream, 3))[3])
    ends = params(temperature=0.0, max_tokens=5, logit_bias={2: 100.0})
    ends.update_from_generation_config({}, 2)
    host.send(4, ends)
    assert (await collect(host.stream, 4))[4][-1].finish.reason is FinishReason.STOP

    # Seeded sampling is repeatable, also when long prompts arrive together.
    long = [3 + i % 200 for i in range(400)]
    for stream_id in range(10, 14):
        host.send(stream_id, params(seed=7, temperature=1.0, max_tokens=8, ignore_eos=True), long)
    seeded = await collect(host.stream, *range(10, 14))
    assert len({tuple(tokens(seeded[stream_id])) for stream_id in range(10, 14)}) == 1

    # The prefix cache works and says so; a salt keeps prompts apart.
    host.send(20, params(max_tokens=1), long)
    assert (await collect(host.stream, 20))[20][0].prefill.num_cached_tokens >= 128

    # Grammars: compiled in the host, with its own tokenizer.
    for stream_id, regex in ((30, "(yes|no)!"), (31, "[a-c]{4}")):
        grammar = params(temperature=1.0, seed=1, max_tokens=20, structured_outputs=structured(regex=regex))
        grammar.structured_outputs._backend = "xgrammar"
        grammar.update_from_generation_config({}, 2)
        host.send(stream_id, grammar)
    answers = await collect(host.stream, 30, 31)
    assert text(answers[30], tiny_llama) in ("yes!", "no!")
    assert set(text(answers[31], tiny_llama)) <= set("abc")
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    as_json = params(
        temperature=1.0,
        seed=1,
        max_tokens=200,
        structured_outputs=structured(json=schema, disable_any_whitespace=True),
    )
    as_json.structured_outputs._backend = "xgrammar"
    as_json.update_from_generation_config({}, 2)
    host.send(32, as_json)
    answer = (await collect(host.stream, 32))[32]
    assert json.loads(text(answer, tiny_llama)).keys() == {"a", "b"}, answer[-1].finish


async def test_what_it_refuses_harms_nobody(vllm: SimpleNamespace, fork: Make, collect: Make) -> None:
    params, structured = vllm.sampling.SamplingParams, vllm.sampling.StructuredOutputsParams
    host = await fork()
    host.send(1, params(max_tokens=100, temperature=0.0, ignore_eos=True))
    host.send(2, params(), [10_000_000])
    host.send(3, params(), [5] * 512)
    host.send(4, params(), [])
    host.send(5, params(stop_token_ids=[10_000]))
    wrong = params(structured_outputs=structured(regex="("))
    wrong.structured_outputs._backend = "xgrammar"
    host.send(6, wrong)
    host.stream.send(
        TokenRequest(
            stream_id=7,
            request_id="req-7",  # type: ignore[arg-type]
            token_ids=[5],
            num_output_tokens=1,
            sampling_params=b"{}",
        )
    )
    outputs = await collect(host.stream, *range(1, 8))
    for stream_id in range(2, 8):
        finish = outputs[stream_id][-1].finish
        assert (stream_id, finish.reason) == (stream_id, FinishReason.ERROR)
        assert isinstance(finish.error, InvalidArgument), finish.error
    assert len(tokens(outputs[1])) == 100


async def test_an_aborted_request_leaves_room_for_the_next(vllm: SimpleNamespace, fork: Make, collect: Make) -> None:
    params = vllm.sampling.SamplingParams
    host = await fork(capacity=1)
    endless = params(temperature=0.0, max_tokens=400, ignore_eos=True)
    host.send(1, endless)
    async with aclosing(host.stream.steps()) as steps:
        await anext(steps)
    host.stream.send(AbortRequests(stream_ids=[1]))
    host.send(2, params(temperature=0.0, max_tokens=3, ignore_eos=True))
    outputs = await collect(host.stream, 2)
    assert len(tokens(outputs[2])) == 3
    assert len(tokens(outputs.get(1, []))) < 399


@pytest.mark.parametrize(
    ("changes", "reason", "words"),
    [
        ({"engine_args": {"dtype": "float99"}}, "INVALID_ARGUMENT", "dtype"),
        ({"max_model_len": 100_000}, "INVALID_ARGUMENT", "max_model_len"),
        ({"kv_cache_bytes": 1024}, "CAPACITY_EXCEEDED", "memory"),
        ({"memory_bytes": 64 << 20, "kv_cache_bytes": 2 << 30}, "CAPACITY_EXCEEDED", "memory"),
    ],
    ids=["argument", "context", "kv-cache", "lease"],
)
async def test_a_build_that_cannot_work_is_told_with_its_reason(
    fork: Make, tmp_path: Path, changes: dict[str, Any], reason: str, words: str
) -> None:
    host = await fork(**changes)
    assert (host.status.state, host.status.error_reason) == (ReplicaState.FAILED, reason), host.status.error
    assert words in host.status.error
    assert "\n" not in host.status.error
    assert {path.name for path in tmp_path.iterdir()} == {f"{host.launch.spec.id}.json", "scratch"}
    assert list((tmp_path / "scratch").iterdir()) == []


async def test_a_missing_tensor_is_found(fork: Make, tiny_weights: Path, tmp_path_factory: Any) -> None:
    tensors = load(tiny_weights)
    tensors.popitem()
    less = tmp_path_factory.mktemp("less") / "tiny"
    save(tensors, less)
    host = await fork(less, execution_dir=str(tiny_weights))
    assert (host.status.state, host.status.error_reason) == (ReplicaState.FAILED, "INVALID_CHECKPOINT")


async def test_hosts_are_independent_of_each_other_and_leave_nothing_behind(
    vllm: SimpleNamespace, fork: Make, collect: Make, warm_vllm: Any, tmp_path: Path
) -> None:
    params = vllm.sampling.SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    one, two = await fork(id="rep-00000000000001"), await fork(id="rep-00000000000002")
    assert start_ticks(one.pid) > 0
    os.kill(one.pid, signal.SIGKILL)
    assert await warm_vllm.exited(one.pid) == -signal.SIGKILL
    two.send(1, params)
    assert len(tokens((await collect(two.stream, 1))[1])) == 4
    await two.stream.close()
    await two.client.stop(StopRequest())
    assert await warm_vllm.exited(two.pid) == 0
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"rep-00000000000001.json", "rep-00000000000002.json", "scratch"}
    assert list((tmp_path / "scratch").iterdir()) == []


async def test_it_listens_on_loopback_only(fork: Make) -> None:
    host = await fork()
    inodes = {
        os.readlink(f"/proc/{host.pid}/fd/{fd}").removeprefix("socket:[").removesuffix("]")
        for fd in os.listdir(f"/proc/{host.pid}/fd")
    }
    listening = "0A"
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{host.pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[9] in inodes and fields[3] == listening:
                assert _is_loopback(fields[1].partition(":")[0]), line


def _is_loopback(address: str) -> bool:
    """Take an address as /proc/net/tcp prints it: 32-bit words in the machine's byte order."""
    raw = b"".join(bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8))
    if len(raw) == 16 and raw[:12] == bytes(10) + b"\xff\xff":
        raw = raw[12:]
    return socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw) in ("127.0.0.1", "::1")


def test_the_warm_process_has_one_thread_and_knows_its_architectures(warm_vllm: Any) -> None:
    """A thread would not be copied by the fork, and what it holds at that moment would be held for ever."""
    assert len(os.listdir(f"/proc/{warm_vllm.process.pid}/task")) == 1
    assert "LlamaForCausalLM" in warm_vllm.ready["architectures"]
