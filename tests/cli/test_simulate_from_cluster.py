"""`sllm simulate --from-cluster`: the cluster is asked once, over real gRPC, and what-if is simulated."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sllm.core.ids import NodeName
from sllm.errors import Unavailable
from sllm.rpc.control import Empty

WORKLOAD = """
[arrivals]
kind = "poisson"
rate_rps = 1
requests = 30

[lengths]
kind = "constant"
prompt = 10
output = 50
"""


def simulate(ask, *args: str):
    return ask("simulate", "--from-cluster", "--policy", "ours", *args, "-o", "json")


def test_the_cluster_is_asked_once_and_nothing_is_changed(ask, controller):
    answer = simulate(ask, "--rate", "1", "--requests", "20")
    assert answer.code == 0
    (row,) = answer.json
    assert (row["policy"], row["requests"]) == ("ours", 20), "the open request is not counted"
    assert controller.asked == [Empty()]


def test_assumptions_are_told_beside_the_answer(ask):
    answer = simulate(ask, "--rate", "1")
    assert "note: nothing was read on node-1 yet: 1.0 GB/s is assumed of its SSD\n" in answer.err
    assert "a token is assumed to take 0.03 s (--token-time)" in answer.err
    assert "a token" not in simulate(ask, "--rate", "1", "--token-time", "0.1").err


def test_one_more_node_shortens_what_one_fewer_lengthens(ask, controller):
    (node,), (deployment,) = controller.description.nodes, controller.description.deployments
    nodes = tuple(replace(node, report=replace(node.report, name=NodeName(name))) for name in ("n1", "n2"))
    wish = replace(deployment.deployment.spec, max_replicas=8, target_concurrency=1)
    busy = replace(deployment, deployment=replace(deployment.deployment, spec=wish))
    controller.description = replace(controller.description, nodes=nodes, deployments=(busy,))
    load = ("--rate", "1.2", "--requests", "200", "--output-tokens", "400")
    (now,), (more,), (fewer,) = (
        simulate(ask, *load, *args).json for args in ((), ("--add-node", "n1"), ("--node-down", "n2"))
    )
    assert now["requests"] == more["requests"] == fewer["requests"] == 200
    assert more["mean_s"] < now["mean_s"] < fewer["mean_s"]


def test_a_scenario_file_says_what_is_asked_of_it(ask, tmp_path):
    path = tmp_path / "asked.toml"
    path.write_text(WORKLOAD)
    (row,) = simulate(ask, str(path)).json
    assert row["requests"] == 30
    assert simulate(ask, str(path)).out == simulate(ask, str(path)).out


def test_a_trace_says_it_too(ask, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,48,10\n2023-11-16 18:15:47,7,3\n")
    (row,) = simulate(ask, "--trace", str(path)).json
    assert row["requests"] == 2


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("--from-cluster",), "what is asked of the cluster?"),
        (("--from-cluster", "--rate", "0"), "the options: arrivals.poisson.rate_rps"),
        (("--from-cluster", "--rate", "1", "--cv", "-1"), "the options: arrivals.gamma.cv"),
        (("--from-cluster", "--rate", "1", "--output-tokens", "0"), "the options: lengths.constant.output"),
        (("--from-cluster", "--rate", "1", "--token-time", "0"), "--token-time 0.0"),
        (("--from-cluster", "--rate", "1", "--deployment", "x"), "the cluster has no deployment 'x'"),
        (("--from-cluster", "--rate", "1", "--add-node", "x"), "the cluster has no ready node 'x'"),
        (("--from-cluster", "--rate", "1", "--node-down", "node-1"), "every node is down"),
        (("--from-cluster", "--rate", "1", "--trace", "t.csv"), "--rate and t.csv both say"),
        (("s.toml", "--add-node", "a"), "--add-node needs --from-cluster"),
        (("s.toml", "--rate", "1"), "--rate needs --from-cluster: a scenario says this itself"),
        ((), "what is to be simulated?"),
    ],
)
def test_a_mistake_is_one_line(ask, args, named):
    answer = ask("simulate", *args)
    assert answer.code in (2, 3)
    assert named in answer.err
    assert answer.out == ""


def test_a_whole_scenario_is_refused_because_the_nodes_are_the_clusters(ask, tmp_path):
    path = tmp_path / "whole.toml"
    path.write_text(WORKLOAD + '[[nodes]]\nname = "n"\n')
    answer = ask("simulate", str(path), "--from-cluster")
    assert (answer.code, "unknown key 'nodes'" in answer.err) == (2, True)


def test_a_cluster_that_does_not_answer_is_an_error(ask, controller):
    controller.error = Unavailable("not now")
    answer = ask("simulate", "--from-cluster", "--rate", "1")
    assert answer.code != 0
    assert "not now" in answer.err
