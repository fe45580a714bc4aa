"""Scenarios: what is written is what is simulated, and every mistake is named with its file and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from sllm.errors import InvalidConfiguration
from sllm.sim.scenario import read_scenario
from sllm.sim.spec import Failure
from sllm.sim.workload import generate

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "scenarios"
NODES = """
[[nodes]]
name = "n"
count = 3
devices = 2
device_memory_bytes = 1000
dram_bytes = 5000
ssd_bandwidth_bps = 10
dram_bandwidth_bps = 100
"""
MODELS = """
[[models]]
name = "m"
count = 4
size_bytes = 1000
copies = 2
fork_s = 1
build_s = 2
prefill_token_s = 0.001
token_s = 0.01
"""
ARRIVALS = '[arrivals]\nkind = "poisson"\nrate_rps = 2\nrequests = 50\n'
LENGTHS = '[lengths]\nkind = "constant"\nprompt = 10\noutput = 20\n'
WHOLE = NODES + MODELS + ARRIVALS + LENGTHS
TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:04.5,7,3\n2023-11-16 18:17:03.5000000,4808,10\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "s.toml"
    path.write_text(text)
    return path


def test_groups_become_nodes_and_models_with_copies_in_turns(tmp_path):
    failure = '[[failures]]\nnode = "n-2"\nat_s = 5\nfor_s = 1\n'
    cluster = read_scenario(written(tmp_path, WHOLE + failure)).cluster
    assert [node.name for node in cluster.nodes] == ["n-1", "n-2", "n-3"]
    assert [model.nodes for model in cluster.models] == [
        ("n-1", "n-2"),
        ("n-2", "n-3"),
        ("n-3", "n-1"),
        ("n-1", "n-2"),
    ]
    assert cluster.models[3].deployment.name == "m-4"
    assert (cluster.models[3].timing.fork_s, cluster.models[3].timing.build_s) == (1, 2)
    assert cluster.failures == (Failure(node="n-2", at=5, for_s=1),)


def test_without_a_number_of_copies_every_node_has_one(tmp_path):
    cluster = read_scenario(written(tmp_path, WHOLE.replace("copies = 2\n", ""))).cluster
    assert set(cluster.models[0].nodes) == {"n-1", "n-2", "n-3"}


def test_a_trace_is_replayed_in_the_order_of_its_times(tmp_path):
    (tmp_path / "t.csv").write_text(TRACE)
    arrivals = '[arrivals]\nkind = "trace"\nfile = "t.csv"\nspeed = 2.0\n'
    rows = read_scenario(written(tmp_path, NODES + MODELS + arrivals)).workload.arrivals
    assert [(row.at, row.prompt_tokens, row.output_tokens) for row in rows] == [(0, 4808, 10), (0.5, 7, 3)]


def test_another_trace_replaces_arrivals_and_lengths(tmp_path):
    (tmp_path / "t.csv").write_text(TRACE)
    scenario = read_scenario(written(tmp_path, WHOLE), trace=tmp_path / "t.csv")
    assert [a.prompt_tokens for a in generate(scenario.workload, 1)] == [4808, 7]


def test_lengths_are_drawn_from_a_file(tmp_path):
    (tmp_path / "l.csv").write_text("in,out\n1,2\n3,4\n")
    lengths = '[lengths]\nkind = "file"\nfile = "l.csv"\nprompt_column = "in"\noutput_column = "out"\n'
    workload = read_scenario(written(tmp_path, NODES + MODELS + ARRIVALS + lengths)).workload
    pairs = {(a.prompt_tokens, a.output_tokens) for a in generate(workload, 1)}
    assert pairs == {(1, 2), (3, 4)}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_example_can_be_read(path):
    scenario = read_scenario(path)
    assert len(generate(scenario.workload, 1)) >= 100


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (WHOLE + "typo = 1\n", "unknown key 'lengths.constant.typo'"),
        (WHOLE.replace("devices = 2", "devises = 2"), "nodes.0"),
        (WHOLE.replace("count = 3", 'count = "three"'), "nodes.0.count"),
        (WHOLE.replace('kind = "poisson"', 'kind = "weekly"'), "arrivals"),
        (WHOLE.replace("rate_rps = 2", "rate_rps = 0"), "arrivals.poisson.rate_rps"),
        (WHOLE.replace("token_s = 0.01", "token_s = 0"), "models.0.token_s"),
        (WHOLE.replace("copies = 2", "copies = 4"), "models.0.copies: 4 copies, and there are 3 nodes"),
        (WHOLE.replace("size_bytes = 1000", "size_bytes = 1001"), "models.0: no node has 1 devices with 1001 bytes"),
        (WHOLE.replace('name = "m"', 'name = "a b"'), "models.0.name"),
        (WHOLE.replace("copies = 2", "min_replicas = 9"), "models.0"),
        (WHOLE + NODES, "nodes: the name 'n-1' is given twice"),
        (WHOLE + '[[failures]]\nnode = "n-9"\nat_s = 1\n', "failures.0.node: there is no node 'n-9'"),
        (WHOLE + 2 * '[[failures]]\nnode = "n-1"\nat_s = 1\n', "failures.1.at_s: 'n-1' has failed before"),
        (NODES + MODELS + ARRIVALS, r"[lengths] is needed where arrivals are 'poisson'"),
        (NODES + MODELS + LENGTHS + '[arrivals]\nkind = "trace"\nfile = "t.csv"\n', "leave [lengths] out"),
        (NODES + MODELS + '[arrivals]\nkind = "trace"\nfile = "none.csv"\n', "none.csv: No such file"),
        ("nodes = [", "not TOML"),
        ("", "arrivals"),
    ],
)
def test_a_mistake_is_named_with_its_file(tmp_path, text, named):
    path = written(tmp_path, text)
    with pytest.raises(InvalidConfiguration) as caught:
        read_scenario(path)
    assert named in caught.value.message
    assert str(path) in caught.value.message


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a,b\n1,2\n", "has no column 'TIMESTAMP'"),
        (TRACE + "yesterday,1,2\n", "t.csv:4: 'yesterday' is not a time"),
        (TRACE + "2023-11-16 18:17:05,-1,2\n", "t.csv:4: '-1' is not a number of tokens"),
        (TRACE + f"2023-11-16 18:17:05,{'1' * 9999},2\n", "is not a number of tokens"),
        (TRACE + "2023-11-16 18:17:05,1\n", "t.csv:4: '' is not a number of tokens"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "has no requests"),
        ("", "has no column"),
    ],
)
def test_a_mistake_in_a_trace_is_named_with_its_line(tmp_path, text, named):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InvalidConfiguration) as caught:
        read_scenario(written(tmp_path, WHOLE), trace=tmp_path / "t.csv")
    assert named in caught.value.message
