"""Kills and stops of every kind of process at every step of a migration: no token is lost, none is repeated.

A sample runs in CI; `make test-chaos` runs them all. Each run prints what it did; SLLM_CHAOS_SEED repeats it.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from e2e.cluster import DEMO_MODEL, Cluster, running
from e2e.operator import Operator
from e2e.streams import Answer, record

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3600)]

SEED = int(os.environ.get("SLLM_CHAOS_SEED", "1"))
RUNS = int(os.environ.get("SLLM_CHAOS_RUNS", "8"))
STREAMS = 3
TOKENS = 500
BODY: dict[str, Any] = {"model": "chaos", "prompt": "Python is", "max_tokens": TOKENS, "ignore_eos": True}
PROCESSES = ("source engine", "destination engine", "source agent", "destination agent", "controller")
SIGNALS = (signal.SIGKILL, signal.SIGSTOP)
FAILPOINTS = (
    "migrate-begin",
    "round-sent",
    "round-answered",
    "before-handover",
    "after-handover",
    "recompute-begun",
    "recompute-done",
)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """`failpoint` names the step of the protocol at which the engine that comes to it gets the signal; else `process`
    gets it once the first stream has `after` tokens."""

    kind: signal.Signals
    process: str = ""
    failpoint: str = ""
    after: int = 0

    def __str__(self) -> str:
        return f"{self.kind.name} at {self.failpoint or f'token {self.after} to the {self.process}'}"


def draw(generator: random.Random) -> Fault:
    kind = generator.choice(SIGNALS)
    if generator.random() < 0.5:
        return Fault(kind=kind, failpoint=generator.choice(FAILPOINTS))
    return Fault(kind=kind, process=generator.choice(PROCESSES), after=generator.randrange(1, TOKENS - 50))


@dataclass(frozen=True)
class Arena:
    cluster: Cluster
    operator: Operator
    armed: Path
    expected: list[Answer]

    def body(self, stream: int) -> dict[str, Any]:
        return {**BODY, "seed": stream}


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    armed = tmp_path_factory.mktemp("failpoint") / "armed"
    environment = {"SLLM_FAKE_TOKEN_S": "0.004", "SLLM_FAKE_PREFILL_S": "0.00005", "SLLM_FAILPOINT": f"@{armed}"}
    folder = tmp_path_factory.mktemp("chaos")
    settings = ["controller.stable_after_s=0"]
    with running(folder, engine="fake", nodes=3, environment=environment, settings=settings) as cluster:
        cluster.cli("checkpoint", "add", "demo", str(DEMO_MODEL), "--all")
        arguments = ["--min", "2", "--max", "3", "--keep-alive", "10m", "--max-model-len", "1024"]
        cluster.cli("deploy", "chaos", "--checkpoint", "demo", *arguments)
        with Operator(cluster) as operator:
            expected = [record(cluster, "/completions", {**BODY, "seed": n}) for n in range(STREAMS)]
            assert all(answer.done and answer.tokens == TOKENS for answer in expected)
            yield Arena(cluster, operator, armed, expected)


class Run:
    """One run: streams, migrations to and fro, one fault."""

    def __init__(self, arena: Arena, fault: Fault, generator: random.Random) -> None:
        self._arena = arena
        self._fault = fault
        self._random = generator
        self._over = threading.Event()
        self._struck = threading.Event()
        self._stopped: list[psutil.Process] = []
        self.answers: list[Answer | None] = [None] * STREAMS
        self.moved = 0

    def go(self) -> None:
        if self._fault.failpoint:
            self._arena.armed.write_text(f"{self._fault.failpoint} {self._fault.kind.name.removeprefix('SIG')}")
        workers = [threading.Thread(target=self._stream, args=(n,)) for n in range(STREAMS)]
        mover = threading.Thread(target=self._move)
        for thread in (*workers, mover):
            thread.start()
        for thread in workers:
            thread.join()
        self._over.set()
        mover.join()
        self._arena.armed.unlink(missing_ok=True)
        for process in self._stopped:  # nobody may have ended it
            with suppress(psutil.Error):
                process.resume()

    def _stream(self, number: int) -> None:
        def watch(_: str, answer: Answer) -> None:
            if number == 0 and self._fault.process and answer.tokens >= self._fault.after:
                self._strike()

        self.answers[number] = record(self._arena.cluster, "/completions", self._arena.body(number), watch)

    def _move(self) -> None:
        operator, cluster = self._arena.operator, self._arena.cluster
        while not self._over.wait(self._random.uniform(0.0, 0.1)):
            with suppress(AssertionError):  # the controller may be the one that was hit
                replicas = cluster.replicas("chaos", "ready")
                nodes = [node["name"] for node in cluster.json("nodes")]
                if replicas:
                    source = self._random.choice(replicas)
                    node = self._random.choice([name for name in nodes if name != source["node"]])
                    self.moved += operator.try_to_move_all(source["id"], node)

    def _strike(self) -> None:
        if self._struck.is_set():
            return
        self._struck.set()
        victim = self._victim()
        if victim is not None:
            self._stopped.append(victim)
            victim.send_signal(self._fault.kind)

    def _victim(self) -> psutil.Process | None:
        cluster = self._arena.cluster
        if self._fault.process == "controller":
            return cluster.role("controller")
        replicas = cluster.replicas("chaos", "ready")
        busy = sorted(replicas, key=lambda r: r["running"], reverse=self._fault.process.startswith("source"))
        if not busy:
            return None
        if self._fault.process.endswith("agent"):
            return cluster.role(busy[0]["node"])
        return psutil.Process(busy[0]["pid"])


def settled(cluster: Cluster) -> Callable[[], bool]:
    def check() -> bool:
        nodes = cluster.json("nodes")
        return len(cluster.replicas("chaos", "ready")) >= 2 and all(n["state"] == "ready" and n["warm"] for n in nodes)

    return check


@pytest.mark.parametrize("number", range(RUNS))
def test_whatever_dies_no_token_is_lost_or_repeated(arena: Arena, number: int) -> None:
    generator = random.Random(SEED * 1_000_003 + number)
    fault = draw(generator)
    print(f"seed {SEED}, run {number}: {fault}")
    arena.cluster.until(settled(arena.cluster), "the cluster has recovered", timeout_s=120)
    run = Run(arena, fault, generator)
    run.go()
    for answer, expected in zip(run.answers, arena.expected, strict=True):
        assert answer is not None, "a stream that cannot even be read"
        assert answer.error is None, answer.error
        assert answer == expected
