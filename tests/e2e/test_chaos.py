"""Kills and stops of every kind of process at every step of a migration: no token is lost, none is repeated.

Every run has one fault, and is not over before that has struck in the middle of streams that are being moved. Runs go
through all faults in an order drawn anew for each round of them: a sample runs in CI; `make test-chaos` runs them all,
many times. Each run prints what it did; SLLM_CHAOS_SEED repeats it.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from e2e.cluster import DEMO_MODEL, Cluster, running
from e2e.operator import Operator
from e2e.streams import Answer, record

from sllm.errors import SllmError

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3600)]

SEED = int(os.environ.get("SLLM_CHAOS_SEED", "1"))
RUNS = int(os.environ.get("SLLM_CHAOS_RUNS", "8"))
STREAMS = 3
TOKENS = 500
PATIENCE_S = 60.0  # until the fault strikes
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
    gets it, at some token of the first stream."""

    kind: signal.Signals
    process: str = ""
    failpoint: str = ""

    def __str__(self) -> str:
        return f"{self.kind.name} " + (f"at {self.failpoint}" if self.failpoint else f"to the {self.process}")


FAULTS = (
    *(Fault(kind=kind, failpoint=failpoint) for kind in SIGNALS for failpoint in FAILPOINTS),
    *(Fault(kind=kind, process=process) for kind in SIGNALS for process in PROCESSES),
)


def fault_of(number: int) -> Fault:
    """Return the fault of a run: each comes once in every len(FAULTS) runs."""
    lap, place = divmod(number, len(FAULTS))
    return random.Random(SEED * 1_000_003 + lap).sample(FAULTS, len(FAULTS))[place]


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
    # Recomputing costs so much that rounds pay, however slow the machine makes decoding: faults wait for them.
    environment = {"SLLM_FAKE_TOKEN_S": "0.004", "SLLM_FAKE_PREFILL_S": "0.0005", "SLLM_FAILPOINT": f"@{armed}"}
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
    """Streams, one after the other on each of several connections, that are moved to and fro until the fault has struck
    and those that it met are over."""

    def __init__(self, arena: Arena, fault: Fault, generator: random.Random) -> None:
        self._arena = arena
        self._fault = fault
        self._random = generator
        self._after = generator.randrange(1, TOKENS - 50)
        self._over = threading.Event()
        self._striking = threading.Lock()
        self._struck = threading.Event()
        self._stopped: list[psutil.Process] = []
        self.answers: list[tuple[int, Answer]] = []
        self.moved = 0

    def go(self) -> None:
        if self._fault.failpoint:
            self._arena.armed.write_text(f"{self._fault.failpoint} {self._fault.kind.name.removeprefix('SIG')}")
        with ThreadPoolExecutor(STREAMS + 1) as pool:
            mover = pool.submit(self._move)
            streams = [pool.submit(self._stream, number) for number in range(STREAMS)]
            wait(streams)
            self._over.set()
            for process in self._stopped:  # nobody may have ended it
                with suppress(psutil.Error):
                    process.resume()
        for future in (mover, *streams):
            future.result()

    @property
    def has_struck(self) -> bool:
        return not self._arena.armed.exists() if self._fault.failpoint else self._struck.is_set()

    def _stream(self, number: int) -> None:
        def watch(_: str, answer: Answer) -> None:
            if number == 0 and self._fault.process and self.moved and answer.tokens >= self._after:
                self._strike()

        give_up_at = time.monotonic() + PATIENCE_S
        while True:
            struck = self.has_struck  # of streams that began before it, those that it met are whole, too
            self.answers.append((number, record(self._arena.cluster, "/completions", self._arena.body(number), watch)))
            if struck or time.monotonic() > give_up_at:
                return

    def _move(self) -> None:
        operator = self._arena.operator
        while not self._over.wait(self._random.uniform(0.0, 0.1)):
            with suppress(SllmError):  # the controller may be the one that was hit
                nodes, replicas = operator.nodes(), operator.ready("chaos")
                if replicas and len(nodes) > 1:  # a controller that has just begun may know fewer
                    source = self._random.choice(replicas)
                    node = self._random.choice([name for name in nodes if name != source.node])
                    self.moved += operator.moves_all(source.status.spec.id, node)

    def _strike(self) -> None:
        with self._striking:
            victim = None
            with suppress(psutil.NoSuchProcess):  # its end has not been reported yet: the next token strikes another
                victim = None if self._struck.is_set() else self._victim()
            if victim is not None:
                self._stopped.append(victim)
                victim.send_signal(self._fault.kind)
                self._struck.set()

    def _victim(self) -> psutil.Process | None:
        cluster = self._arena.cluster
        if self._fault.process == "controller":
            return cluster.role("controller")
        busiest_first = self._fault.process.startswith("source")
        replicas = self._arena.operator.ready("chaos")
        replicas.sort(key=lambda row: row.status.running, reverse=busiest_first)
        if not replicas:
            return None
        if self._fault.process.endswith("agent"):
            return cluster.role(replicas[0].node)
        return psutil.Process(replicas[0].status.pid)


def settled(cluster: Cluster) -> Callable[[], bool]:
    def check() -> bool:
        nodes = cluster.json("nodes")
        return len(cluster.replicas("chaos", "ready")) >= 2 and all(n["state"] == "ready" and n["warm"] for n in nodes)

    return check


@pytest.mark.parametrize("number", range(RUNS))
def test_whatever_dies_no_token_is_lost_or_repeated(arena: Arena, number: int) -> None:
    fault = fault_of(number)
    arena.cluster.until(settled(arena.cluster), "the cluster has recovered", timeout_s=120)
    run = Run(arena, fault, random.Random(f"{SEED} {number}"))
    run.go()
    has_struck = run.has_struck
    arena.armed.unlink(missing_ok=True)
    print(f"seed {SEED}, run {number}: {fault}; {run.moved} moves done, {len(run.answers)} streams")
    for stream, answer in run.answers:
        assert answer.error is None, answer.error
        assert answer == arena.expected[stream]
    assert has_struck, "nothing came to where the fault was to strike"
