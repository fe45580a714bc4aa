"""What was decided is decided again, from what was recorded of it."""

from __future__ import annotations

import json
from random import Random

import pytest

from sllm.core.plain import to_plain
from sllm.errors import InvalidConfiguration
from sllm.scheduler.plan import Plan
from sllm.sim.policies import POLICIES, ours
from sllm.sim.replay import differences, read_record
from sllm.sim.spec import Failure


@pytest.fixture
def recorded(world, tmp_path):
    """Every plan of a simulated cluster with little room, one node of which is lost; its snapshots, and the file."""
    seen = []

    def decide(snapshot, now, rng):
        plan = ours(snapshot, now, rng)
        seen.append((snapshot, now, plan))
        return plan

    requests = [(float(n), f"m{n % 4}", 7) for n in range(40)]
    models = [world.model(f"m{n}", on=("a", "b"), keep_alive_s=2) for n in range(4)]
    failures = (Failure(node="a", at=20, for_s=15),)
    world.run([world.node("a"), world.node("b")], models, world.arrivals(*requests), decide, failures=failures)
    path = tmp_path / "record.jsonl"
    lines = [{"now": now, "snapshot": to_plain(snapshot), "plan": to_plain(plan)} for snapshot, now, plan in seen]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return seen, path


def test_snapshots_come_back_as_they_were(recorded):
    seen, path = recorded
    read = list(read_record(path))
    assert len(read) == len(seen) > 40
    assert [(r.snapshot, r.now) for r in read] == [(snapshot, now) for snapshot, now, _ in seen]


def test_the_same_code_decides_the_same(recorded):
    assert list(differences(recorded[1], ours)) == []


def test_another_policy_shows_where_it_differs(recorded):
    found = list(differences(recorded[1], POLICIES["random"]))
    assert found
    before, plan = found[0]
    assert before.plan != plan
    assert to_plain(POLICIES["random"](before.snapshot, before.now, Random(0))) == plan
    assert sum(1 for _ in differences(recorded[1], lambda snapshot, now, rng: Plan())) > 0


def test_a_line_that_was_being_written_is_left_out(recorded):
    seen, path = recorded
    whole = path.read_text()
    path.write_text(whole + whole.splitlines()[0][:100])
    assert len(list(read_record(path))) == len(seen)


@pytest.mark.parametrize("text", ["{}\n", "no JSON\n", '{"now": 1, "snapshot": {}, "plan": {}}\n', "[]\n"])
def test_what_is_no_record_names_the_line(tmp_path, text):
    path = tmp_path / "r.jsonl"
    path.write_text(text)
    with pytest.raises(InvalidConfiguration, match=r"r\.jsonl:1 is no plan of this version"):
        list(read_record(path))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InvalidConfiguration, match="cannot read"):
        list(read_record(tmp_path / "none"))
