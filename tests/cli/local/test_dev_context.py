"""The context `dev`, written and taken back."""

from __future__ import annotations

from pathlib import Path

import pytest

from sllm.cli.context import Context, Contexts, load, save
from sllm.cli.local.dev_context import dev_context
from sllm.cli.local.lock import locked

OURS = Context(controller="127.0.0.1:1", ca="/s/ca", certificate="/s/c", key="/s/k")
OTHER = Context(controller="127.0.0.1:2", ca="/t/ca", certificate="/t/c", key="/t/k")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "home" / "config.toml"


def test_the_context_of_another_cluster_is_put_back(path):
    before = Contexts(current="dev", contexts={"dev": OTHER})
    save(path, before)
    with dev_context(path, OURS) as current:
        assert current
        assert load(path).contexts["dev"] == OURS
    assert load(path) == before


def test_what_a_killed_cluster_on_the_same_state_left_is_not_put_back(path):
    save(path, Contexts(current="dev", contexts={"dev": OURS}))
    with dev_context(path, OURS):
        pass
    assert not path.exists()


def test_what_a_killed_cluster_on_another_state_left_is_not_put_back(path, tmp_path):
    (tmp_path / "lock").write_text("4711")
    left = Context(controller="127.0.0.1:3", ca=str(tmp_path / "pki" / "ca.pem"), certificate="/c", key="/k")
    save(path, Contexts(current="dev", contexts={"dev": left}))
    with dev_context(path, OURS):
        pass
    assert not path.exists()


def test_the_context_of_a_cluster_that_runs_is_put_back(path, tmp_path):
    runs = Context(controller="127.0.0.1:3", ca=str(tmp_path / "pki" / "ca.pem"), certificate="/c", key="/k")
    before = Contexts(current="dev", contexts={"dev": runs})
    save(path, before)
    with locked(tmp_path), dev_context(path, OURS):
        pass
    assert load(path) == before


def test_a_context_that_was_added_meanwhile_stays(path):
    added = Context(controller="new:1")
    with dev_context(path, OURS):
        now = load(path)
        save(path, Contexts(current="new", contexts={**now.contexts, "new": added}))
    assert load(path) == Contexts(current="new", contexts={"new": added})


def test_it_is_taken_back_after_an_error_too(path):
    with pytest.raises(RuntimeError), dev_context(path, OURS):
        raise RuntimeError
    assert not path.parent.exists()
