"""`sllm checkpoint convert`, and `show` and `verify` with --path: no cluster, no controller, no torch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sllm.loader import save

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo-model"


@pytest.fixture
def converted(ask, tmp_path):
    folder = tmp_path / "made"
    assert ask("checkpoint", "convert", str(DEMO), str(folder)).code == 0
    return folder


def test_a_folder_is_converted_with_progress_on_stderr(ask, tmp_path):
    answer = ask("checkpoint", "convert", str(DEMO), str(tmp_path / "made"))
    assert answer.out == f"{tmp_path / 'made'}: 38 tensors, 7.0 MiB\n"
    assert "convert demo-model: copying 100%" in answer.err


def test_as_json_it_says_what_was_made(ask, tmp_path):
    data = ask("checkpoint", "convert", str(DEMO), str(tmp_path / "made"), "-o", "json").json
    assert data["layout"] == "hf"
    assert data["architecture"] == "LlamaForCausalLM"
    assert data["digest"].startswith("sha256:")
    assert "config.json" in data["execution_files"]


def test_converting_again_gives_the_same_digest(ask, converted, tmp_path):
    again = ask("checkpoint", "convert", str(DEMO), str(tmp_path / "again"), "-o", "json").json
    assert ask("checkpoint", "show", "--path", str(converted), "-o", "json").json["digest"] == again["digest"]


def test_show_lists_the_tensors_in_load_order(ask, converted):
    data = ask("checkpoint", "show", "--path", str(converted), "-o", "json").json
    offsets = [tensor["offset"] for tensor in data["tensors"]]
    assert len(offsets) == data["tensor_count"]
    assert offsets == sorted(offsets)
    names = ask("checkpoint", "show", "--path", str(converted), "-o", "name").out.splitlines()
    assert names == [tensor["name"] for tensor in data["tensors"]]
    assert "bfloat16" in ask("checkpoint", "show", "--path", str(converted)).out


def test_verify_says_what_it_has_read(ask, converted):
    told = ask("checkpoint", "show", "--path", str(converted), "-o", "json").json
    chunks, files = -(-told["size_bytes"] // told["chunk_bytes"]), len(told["execution_files"])
    line = ask("checkpoint", "verify", "--path", str(converted)).out
    assert re.fullmatch(rf"{converted}: in order, {chunks} chunks, {files} files, [0-9.]+ MiB\n", line), line
    assert ask("checkpoint", "verify", "--path", str(converted), "--deep").out == f"{line.strip()}, every sha256\n"


@pytest.mark.parametrize("depth", [[], ["--deep"]], ids=["chunks", "deep"])
def test_verify_finds_a_flipped_bit_and_names_the_chunk(ask, converted, depth):
    assert ask("checkpoint", "verify", "--path", str(converted), *depth).code == 0
    partition = converted / "partition-000.bin"
    content = bytearray(partition.read_bytes())
    content[3 << 20] ^= 1
    partition.write_bytes(content)
    answer = ask("checkpoint", "verify", "--path", str(converted), *depth)
    assert answer.code == 2
    assert "chunk 3 (" in answer.err
    assert "hint:" in answer.err


def test_a_source_that_is_no_model_is_refused_and_nothing_is_made(ask, tmp_path):
    (tmp_path / "empty").mkdir()
    answer = ask("checkpoint", "convert", str(tmp_path / "empty"), str(tmp_path / "made"))
    assert answer.code == 2
    assert "no safetensors" in answer.err
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("verb", ["show", "verify"])
def test_a_name_and_a_path_exclude_each_other(ask, verb):
    for arguments in ([], ["demo", "--path", "/somewhere"]):
        answer = ask("checkpoint", verb, *arguments)
        assert answer.code == 2
        assert "--path" in answer.err


def test_verify_in_the_cluster_says_which_nodes_and_how_thoroughly(ask, controller):
    ask("checkpoint", "verify", "m", "--node", "n1", "--deep")
    request = controller.asked[0]
    assert (request.name, request.nodes, request.deep) == ("m", ("n1",), True)


def test_converting_needs_neither_torch_nor_grpc(tmp_path):
    program = (
        "import sys; from sllm.cli.app import run; "
        f"code = run(['checkpoint', 'convert', {str(DEMO)!r}, {str(tmp_path / 'made')!r}]); "
        "print(code, sorted({'torch', 'grpc', 'vllm'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.splitlines()[-1] == "0 []"


@pytest.mark.parametrize(
    "arguments",
    [
        ("convert", "", "made"),
        ("convert", str(DEMO), ""),
        ("show", "--path", ""),
        ("verify", "--path", ""),
        ("add", "demo", ""),
    ],
)
def test_an_empty_path_is_not_the_working_directory(ask, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    answer = ask("checkpoint", *arguments)
    assert answer.code == 2
    assert "an empty path is no folder" in answer.err
    assert "hint: name one" in answer.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["name", "json", "table"])
def test_what_a_checkpoint_says_does_not_reach_the_terminal_raw(ask, tmp_path, form):
    save({"w\x1b[2J\x9b31m\u202e": torch.zeros(1)}, tmp_path / "c", source="\x9d0;title\x07")
    answer = ask("checkpoint", "show", "--path", str(tmp_path / "c"), "-o", form)
    assert answer.code == 0
    assert "[2J" in answer.out
    assert "".join(answer.out.split("\n")).isprintable()
    if form == "json":
        assert answer.json["tensors"][0]["name"] == "w\x1b[2J\x9b31m\u202e"
