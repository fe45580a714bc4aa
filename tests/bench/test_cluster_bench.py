"""The cluster bench still runs, goes on where it was ended, and tells noise from difference."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

# On the path only for these imports: bench/gateway.py would hide the tests of that name from whoever comes later.
sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

from cluster_world import Configuration, scenario, tiny
from paired import ratio
from pieces import Pieces

sys.path.pop()

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.e2e
@pytest.mark.timeout(400)
def test_the_quick_run_tells_of_every_policy_and_writes_nothing(tmp_path):
    before = sorted((ROOT / "bench" / "results").iterdir())
    command = [sys.executable, ROOT / "bench" / "cluster.py", "--quick", "--seeds", "1", "--traces", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for said in ("no traces", "Startup latency", "Claims", "above a clairvoyant optimum", "preemption"):
        assert said in done.stdout
    assert sorted((ROOT / "bench" / "results").iterdir()) == before


def test_the_papers_cluster_is_as_published():
    made = scenario(Configuration("opt-30b", "gsm8k", 1.4, copies=2), 10, Path("nowhere"))
    assert [node.devices for node in made.cluster.nodes] == [4, 4, 4, 4]
    assert len(made.cluster.models) == 8
    assert {(m.deployment.devices, len(m.nodes)) for m in made.cluster.models} == {(2, 2)}


def test_a_tiny_cluster_is_the_same_for_the_same_seed():
    assert tiny("heavy", 3) == tiny("heavy", 3)
    assert tiny("heavy", 3) != tiny("heavy", 4)


def test_a_ratio_is_of_means_and_its_interval_is_paired():
    ours = [1.0, 100.0, 5.0, 20.0] * 5
    twice = ratio([2 * value for value in ours], ours)
    assert (twice.value, twice.low, twice.high) == (pytest.approx(2.0), pytest.approx(2.0), pytest.approx(2.0))
    noisy = ratio([3.0, 1.0] * 10, [1.0, 3.0] * 10)
    assert noisy.low < 1.0 < noisy.high
    assert ratio([0.0, 0.0], [0.0, 0.0]).value == 1.0


def test_pieces_are_found_again_and_those_of_other_settings_are_not(tmp_path):
    path = tmp_path / "folder" / "pieces.jsonl"
    pieces = Pieces(path, "requests=1")
    assert pieces.get("a") is None
    pieces.put("a", [1, 2])
    pieces.put("b", {"x": 1})
    pieces.put("a", [1, 2, 3])
    again = Pieces(path, "requests=1")
    assert (again.get("a"), again.get("b")) == ([1, 2, 3], {"x": 1})
    assert Pieces(path, "requests=2").get("a") is None
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 3
