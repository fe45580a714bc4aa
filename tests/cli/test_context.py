"""Which cluster a command talks to."""

from __future__ import annotations

import socket
import stat
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from sllm.cli.context import Context, Contexts, load, resolve, save
from sllm.controller.pki import make_authority
from sllm.errors import InvalidConfiguration, NotFound

HERE = Context(controller="here:7700", ca="/ca", certificate="/cert", key="/key", gateway="here:8080")
THERE = Context(controller="there:7700")
BOTH = Contexts(current="here", contexts={"here": HERE, "there": THERE})


def chosen(contexts: Contexts = BOTH, context: str | None = None, controller: str | None = None, **env: str) -> Context:
    return resolve(contexts, context=context, controller=controller, env=env)


def test_the_current_context_is_taken():
    assert chosen() == HERE


def test_the_environment_goes_before_the_current_context():
    assert chosen(SLLM_CONTEXT="there") == THERE
    assert chosen(SLLM_CONTROLLER="other:1").controller == "other:1"


def test_a_flag_goes_before_the_environment():
    assert chosen(context="here", SLLM_CONTEXT="there") == HERE
    assert chosen(controller="flag:1", SLLM_CONTROLLER="env:1").controller == "flag:1"


def test_an_address_keeps_the_identity_of_the_context():
    assert chosen(controller="flag:1") == replace(HERE, controller="flag:1")


def test_an_address_needs_no_context():
    assert chosen(Contexts(), controller="flag:1") == Context(controller="flag:1")


def test_an_unknown_context_is_named_with_the_known_ones():
    with pytest.raises(NotFound, match="'nowhere'") as caught:
        chosen(context="nowhere")
    assert "here, there" in caught.value.hint


def test_a_current_context_that_is_gone_is_an_error_too():
    with pytest.raises(NotFound):
        chosen(Contexts(current="gone"))


def test_without_a_context_the_command_says_what_to_do(sllm):
    answer = sllm("status")
    assert answer.code == 2
    assert answer.out == ""
    assert answer.err == (
        "error: no cluster is configured: there is no current context\n"
        "hint: run `sllm dev` for a local cluster, or give --controller HOST:PORT\n"
    )


def test_contexts_survive_being_written(tmp_path: Path):
    path = tmp_path / "new" / "config.toml"
    save(path, BOTH)
    assert load(path) == BOTH
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert list(path.parent.iterdir()) == [path]


def test_no_contexts_left_is_no_file_left(tmp_path: Path):
    path = tmp_path / "config.toml"
    save(path, BOTH)
    save(path, Contexts())
    assert not path.exists()


@pytest.mark.parametrize(
    "text",
    [
        "current = ",
        "colour = 1",
        "[contexts.a]\n",
        '[contexts.a]\ncontroller = "c"\nextra = 1',
        '[contexts.a]\ncontroller = "c"\nca = "x"',
        "contexts = 3",
    ],
)
def test_a_file_that_is_not_right_is_named(sllm, home: Path, text: str):
    home.mkdir()
    (home / "config.toml").write_text(text)
    with pytest.raises(InvalidConfiguration, match=r"config\.toml"):
        load(home / "config.toml")
    assert sllm("status").code == 2


def test_a_command_uses_the_context_that_is_named(sllm, controller, home: Path):
    save(home / "config.toml", Contexts(contexts={"fake": Context(controller=controller.address)}))
    assert sllm("nodes", "--context", "fake", "-o", "name").out == "node-1\n"
    assert sllm("nodes", "-o", "name").code == 2


def test_an_unreachable_controller_exits_6_and_is_named(sllm):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        answer = sllm("status", "--controller", address)
    assert answer.code == 6
    assert answer.err.startswith(f"error: cannot reach the controller at {address}")
    assert "hint: is it running" in answer.err


def test_nothing_but_our_own_lines_is_on_stderr_when_the_controller_speaks_no_tls(controller, home: Path):
    (home / "pki").mkdir(parents=True)
    made = make_authority(now=datetime.now(UTC))
    (home / "pki" / "ca.pem").write_bytes(made.certificate)
    (home / "pki" / "ca.key").write_bytes(made.key)
    ca, key = str(home / "pki" / "ca.pem"), str(home / "pki" / "ca.key")
    wrong = Context(controller=controller.address, ca=ca, certificate=ca, key=key)
    save(home / "config.toml", Contexts(current="wrong", contexts={"wrong": wrong}))
    command = [sys.executable, "-m", "sllm.cli.main", "status"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 6
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["error", "hint"]


def test_a_certificate_that_is_not_there_is_named(sllm, home: Path):
    lost = Context(controller="127.0.0.1:1", ca="/none/ca", certificate="/none/c", key="/none/k")
    save(home / "config.toml", Contexts(current="lost", contexts={"lost": lost}))
    answer = sllm("status")
    assert answer.code == 2
    assert "cannot read /none/ca" in answer.err
