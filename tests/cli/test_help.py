"""Help: complete, and fast because it imports little."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from sllm.cli.app import CHECKPOINT, COMMANDS

HEAVY = {"grpc", "google.protobuf", "torch", "vllm", "pydantic", "psutil", "rich", "cryptography", "asyncio"}
PATHS = [[name] for name, entry in COMMANDS.items() if not entry.commands] + [
    ["checkpoint", name] for name in CHECKPOINT
]


def imported_by(*args: str) -> set[str]:
    program = (
        "import sys, json, contextlib, io\n"
        "from sllm.cli.main import main\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        f"    main({list(args)!r})\n"
        "print(json.dumps(list(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


@pytest.mark.parametrize("args", [["--version"], ["--help"], []])
def test_version_and_help_import_nothing_heavy(args):
    assert imported_by(*args) & HEAVY == set()


def test_the_version_does_not_even_import_typer():
    assert "typer" not in imported_by("--version")


def test_importing_all_verbs_imports_neither_wire_nor_engine():
    program = (
        "import sys, importlib\n"
        "from sllm.cli.app import COMMANDS, CHECKPOINT\n"
        "for entry in [*COMMANDS.values(), *CHECKPOINT.values()]:\n"
        "    if entry.module: importlib.import_module(entry.module)\n"
        f"print(sorted({HEAVY - {'asyncio'}!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_every_command_has_a_summary_and_an_example_of_itself(sllm, path):
    answer = sllm(*path, "--help")
    assert answer.code == 0
    command = " ".join(["sllm", *path])
    lines = answer.out.splitlines()
    assert lines[0].startswith(f"Usage: {command} ")
    assert lines[2].strip().endswith(".")
    assert "Example:" in answer.out
    example = answer.out.split("Example:")[1].split()
    assert example[: len(path) + 1] == command.split()


def test_every_summary_fits_on_its_line(sllm):
    for entry in [*COMMANDS.values(), *CHECKPOINT.values()]:
        assert len(entry.summary) < 64
    assert max(len(line) for line in sllm("--help").out.splitlines()) <= 80


def test_no_arguments_is_help(sllm):
    assert sllm().out == sllm("--help").out
    assert sllm().code == 0


def test_help_lists_every_command(sllm):
    listed = [line.split()[0] for line in sllm("--help").out.split("Commands:\n")[1].splitlines()]
    assert listed == list(COMMANDS)
    assert "add" in sllm("checkpoint", "-h").out


@pytest.mark.parametrize("command", ["controller", "gateway", "agent"])
def test_processes_name_a_configuration_that_is_not_there(sllm, command):
    answer = sllm(command, "--config", "/none/x.toml")
    assert answer.code == 2
    assert "cannot read configuration /none/x.toml" in answer.err


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["stat"], "see `sllm --help`"),
        (["checkpoint"], "see `sllm checkpoint --help`"),
        (["deploy", "x"], "see `sllm deploy --help`"),
        (["nodes", "--colour"], "see `sllm nodes --help`"),
    ],
)
def test_a_usage_error_is_one_line_and_where_to_read(sllm, args, hint):
    answer = sllm(*args)
    assert answer.code == 2
    assert answer.out == ""
    first, second = answer.err.splitlines()
    assert first.startswith("error: ")
    assert second == f"hint: {hint}"


def test_a_mistyped_command_is_answered_with_the_near_one(sllm):
    assert "Did you mean 'status'?" in sllm("stats").err
