"""`sllm simulate`: answers in every form, mistakes in one line, and what is done when it is interrupted."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCENARIO = """
[[nodes]]
name = "n"
count = 2
devices = 2
device_memory_bytes = 20_000_000_000
dram_bytes = 40_000_000_000
ssd_bandwidth_bps = 5_000_000_000
dram_bandwidth_bps = 20_000_000_000

[[models]]
name = "m"
count = 6
size_bytes = 10_000_000_000
target_concurrency = 1
keep_alive_s = 2
build_s = 0.1
prefill_token_s = 0.0001
token_s = 0.02

[arrivals]
kind = "poisson"
rate_rps = 1
requests = 40

[lengths]
kind = "constant"
prompt = 10
output = 50
"""
KEYS = {"policy", "seed", "requests", "mean_s", "p50_s", "p95_s", "p99_s", "timeouts", "cold_starts", "migrations"}
KEYS |= {"max_s", "refused", "starts", "resumed", "stopped_busy", "tier_mix", "device_hours", "simulated_s", "events"}
KEYS |= {"plans", "cdf", "estimator"}


@pytest.fixture
def scenario(tmp_path: Path) -> str:
    path = tmp_path / "small.toml"
    path.write_text(SCENARIO)
    return str(path)


def test_json_has_a_row_for_each_policy_and_seed(sllm, scenario):
    answer = sllm("simulate", scenario, "--policy", "ours", "--policy", "random", "--seeds", "2", "-o", "json")
    assert answer.code == 0
    rows = json.loads(answer.out)
    assert [(row["policy"], row["seed"]) for row in rows] == [("ours", 1), ("random", 1), ("ours", 2), ("random", 2)]
    for row in rows:
        assert set(row) == KEYS
        assert row["requests"] == 40
        assert row["p50_s"] <= row["p95_s"] <= row["p99_s"] <= row["max_s"]
        assert sum(row["tier_mix"].values()) == pytest.approx(1)
        assert row["cdf"][-1] == [1.0, row["max_s"]]
        assert row["device_hours"] > 0
        estimated = row["estimator"]["count"] + row["estimator"]["guessed"]
        assert (estimated > 0) == (row["policy"] == "ours")
    assert "simulate small: random, seed 2" in answer.err


def test_the_same_command_gives_the_same_numbers(sllm, scenario):
    assert sllm("simulate", scenario, "-o", "json").out == sllm("simulate", scenario, "-o", "json").out


def test_a_table_has_means_only_over_several_seeds(sllm, scenario):
    once = sllm("simulate", scenario).out
    assert [line.split()[0] for line in once.splitlines()[2:]] == [
        "ours",
        "no-migration",
        "random",
        "locality",
        "preemption",
    ]
    twice = sllm("simulate", scenario, "--policy", "ours", "--seeds", "2").out
    assert "MEANS OVER SEEDS" in twice
    assert twice.splitlines()[-1].startswith("ours    2 ")


def test_names_are_those_of_the_runs(sllm, scenario):
    assert sllm("simulate", scenario, "--policy", "locality", "-o", "name").out == "locality/1\n"


def test_a_trace_takes_the_place_of_the_arrivals(sllm, scenario, tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n")
    (row,) = json.loads(sllm("simulate", scenario, "--trace", str(trace), "--policy", "ours", "-o", "json").out)
    assert row["requests"] == 1
    assert row["p50_s"] == pytest.approx(2.1)


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (["--policy", "best"], "there is no policy 'best'"),
        (["--seeds", "0"], "--seeds 0: at least one run is needed"),
        (["--trace", "/none.csv"], "cannot read /none.csv: No such file or directory"),
        (["--plot", "x.svg"], "x.svg: a plot is a .png file"),
        (["--plot", "/none/x.png"], "/none is not a folder"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_run(sllm, scenario, args, error):
    answer = sllm("simulate", scenario, *args)
    assert answer.code == 2
    assert answer.out == ""
    assert error in answer.err.splitlines()[0]
    assert "seed" not in answer.err.replace("--seeds", "")


def test_a_scenario_that_is_not_there(sllm):
    answer = sllm("simulate", "/none/x.toml")
    assert answer.code == 2
    assert "cannot read configuration /none/x.toml" in answer.err


def test_a_plot_is_drawn_or_what_is_missing_is_said(sllm, scenario, tmp_path):
    path = tmp_path / "x.png"
    answer = sllm("simulate", scenario, "--policy", "ours", "--plot", str(path))
    if find_spec("matplotlib") is None:
        assert answer.code == 2
        assert "plots need matplotlib" in answer.err
        assert "pip install 'sllm[plot]'" in answer.err
    else:
        assert answer.code == 0
        assert path.read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_command_prints_what_is_done(scenario):
    # Who runs the tests in the background has told their children to ignore it.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from sllm.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(
        [*command, "simulate", scenario, "--policy", "ours", "--seeds", "100000", "-o", "json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "seed 3" in line:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130
    assert "interrupted" in err
    rows = json.loads(out)
    assert [row["seed"] for row in rows[:2]] == [1, 2]
