"""What is learnt of startup times, and how well starts are foretold by it."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sllm.core.device import DeviceKind
from sllm.core.node import LoadReport
from sllm.core.replica import ReplicaState
from sllm.core.residency import Tier
from sllm.core.startup import Basis, Level
from sllm.scheduler import estimator as estimators
from sllm.scheduler.estimate import GUESSED_WARMING_S, Start, estimate, in_words
from sllm.scheduler.estimator import Estimator

GB = 1_000_000_000
CPU = DeviceKind.CPU
SEEDS = st.integers(0, 2**32)


def load(number: int, seconds: float, size_bytes: int = GB, digest: str = "m") -> LoadReport:
    return LoadReport(number=number, digest=digest, size_bytes=size_bytes, tier=Tier.SSD, queue_s=0.0, read_s=seconds)


def start_of(name: str = "a", *, size_bytes: int = 0, ahead_bytes: int = 0, digest: str = "m", warm: bool = True):
    tier = Tier.SSD if size_bytes else Tier.DRAM
    return Start(
        node=name, warm=warm, kind=CPU, digest=digest, tier=tier, size_bytes=size_bytes, ahead_bytes=ahead_bytes
    )


@pytest.fixture
def bench(make):
    return Teacher(make)


class Teacher:
    """Tells an estimator of loads and starts."""

    def __init__(self, make) -> None:
        self.make, self.estimator, self.number = make, Estimator(), 0

    def reads(self, *seconds: float, on: str = "a", size_bytes: int = GB, incarnation: str = "", digest="m") -> None:
        for each in seconds:
            self.number += 1
            report = self.make.node(on).report
            report = replace(report, loads=(load(self.number, each, size_bytes, digest),))
            self.estimator.reported(replace(report, incarnation=incarnation or report.incarnation), 0.0)

    def starts(self, foretold=None, digest: str = "m", **phases_s: float) -> None:
        status = self.make.replica("x").status
        spec = replace(status.spec, digest=digest)
        status = replace(status, spec=spec, state=ReplicaState.READY, phases_s=phases_s)
        self.estimator.started(status, CPU, estimate=foretold)

    def foretells(self, start, now: float = 0.0):
        return estimate(self.estimator.learnt(now), start)


# -- reading


def test_nothing_learnt_is_a_guess_and_says_so(bench):
    foretold = bench.foretells(start_of(size_bytes=GB, warm=False))
    assert foretold.guessed
    assert {part.basis for part in foretold.parts.values()} == {Basis.GUESSED}
    assert {part.observations for part in foretold.parts.values()} == {0}
    assert foretold.warming.seconds == GUESSED_WARMING_S
    assert in_words(foretold).startswith("about ")


def test_a_bandwidth_is_of_a_node_and_stands_in_for_others_that_have_none(bench):
    bench.reads(0.5, 0.5, on="a")
    learnt = bench.estimator.learnt(0.0)
    assert learnt.reading == {("a", Tier.SSD): Level(value=0.5 / GB, observations=2)}
    bench.starts(queued=0.0, forking=0.0, building=0.0)
    own = bench.foretells(start_of("a", size_bytes=4 * GB)).loading
    other = bench.foretells(start_of("b", size_bytes=4 * GB)).loading
    assert (own.seconds, own.basis, own.observations) == (pytest.approx(2.0), Basis.MEASURED, 2)
    assert (other.seconds, other.basis) == (pytest.approx(2.0), Basis.SIMILAR)
    bench.reads(4.0, 4.0, 4.0, on="b")
    assert bench.foretells(start_of("b", size_bytes=GB)).loading.seconds == pytest.approx(4.0)
    assert bench.foretells(start_of("a", size_bytes=GB)).loading.seconds == pytest.approx(0.5)


def test_a_load_is_counted_once_however_often_it_is_reported(bench):
    report = replace(bench.make.node("a").report, loads=(load(1, 0.5), load(2, 0.5)))
    for _ in range(3):
        bench.estimator.reported(report, 0.0)
    bench.estimator.reported(replace(report, loads=(load(2, 0.5), load(3, 0.5))), 0.0)
    assert bench.estimator.learnt(0.0).reading["a", Tier.SSD].observations == 3
    bench.estimator.reported(replace(report, incarnation="a-2", loads=(load(1, 0.5),)), 0.0)
    assert bench.estimator.learnt(0.0).reading["a", Tier.SSD].observations == 4, "another agent counts anew"


def test_a_probe_of_the_disk_stands_in_until_there_are_loads(bench):
    """It is one measurement, of the node's own disk, however often it is reported; its size is no checkpoint's."""
    report = replace(bench.make.node("a").report, probe=load(0, 0.1, GB // 10))
    for _ in range(3):
        bench.estimator.reported(report, 0.0)
    learnt = bench.estimator.learnt(0.0)
    assert learnt.reading["a", Tier.SSD] == Level(value=1 / GB, observations=1)
    assert learnt.load_bytes == {}
    bench.estimator.reported(replace(report, loads=(load(1, 20.0, 10 * GB),)), 0.0)
    found = bench.estimator.learnt(0.0).reading["a", Tier.SSD]
    assert (found.value * GB, found.observations) == (pytest.approx(2.0, rel=0.02), 2)


def test_a_load_without_size_or_time_teaches_nothing(bench):
    bench.reads(0.0)
    bench.reads(1.0, size_bytes=0)
    assert bench.estimator.learnt(0.0).reading == {}


def test_small_loads_hardly_change_what_large_ones_have_told(bench):
    bench.reads(10.0, size_bytes=10 * GB)
    bench.reads(0.1, 0.1, 0.1, size_bytes=10_000_000)  # mostly overhead: a tenth of the bandwidth
    assert bench.foretells(start_of(size_bytes=10 * GB)).loading.seconds == pytest.approx(10.0, rel=0.15)


@given(SEEDS)
@settings(deadline=None)
def test_an_outlier_does_not_move_the_estimate_much(make, seed):
    """Whichever of the loads it is, the first one too, and however slow."""
    rng = random.Random(seed)
    bench, slow = Teacher(make), rng.randrange(8)
    bench.reads(*(rng.uniform(10, 1000) if number == slow else rng.uniform(0.95, 1.05) for number in range(8)))
    assert bench.estimator.learnt(0.0).reading["a", Tier.SSD].value * GB == pytest.approx(1.0, rel=0.25)


def test_a_disk_that_has_become_slower_is_believed_after_four_loads(bench):
    bench.reads(*[1.0] * 20)
    bench.reads(*[3.0] * 3)
    assert bench.estimator.learnt(0.0).reading["a", Tier.SSD].value * GB < 1.5
    bench.reads(3.0)
    assert bench.estimator.learnt(0.0).reading["a", Tier.SSD].value * GB > 2.0
    bench.reads(*[3.0] * 3)
    assert bench.estimator.learnt(0.0).reading["a", Tier.SSD].value * GB == pytest.approx(3.0)


# -- starts


def test_reading_is_hidden_behind_the_fork_and_the_construction(bench):
    bench.reads(*[1.0] * 3)
    for _ in range(3):
        bench.starts(queued=0.01, forking=0.25, building=2.0)  # from DRAM
        bench.starts(queued=0.01, forking=0.25, loading=3.75, building=0.5)  # 4 GB: 4 s, of which 0.25 s are hidden
    cold = bench.foretells(start_of(size_bytes=4 * GB))
    assert cold.phases_s == pytest.approx({"queued": 0.02, "forking": 0.25, "loading": 3.75, "building": 0.5})
    assert bench.foretells(start_of()).building.seconds == pytest.approx(2.0), "nothing is to be read"
    small = bench.foretells(start_of(size_bytes=GB))
    assert (small.loading.seconds, small.building.seconds) == pytest.approx((0.75, 1.25)), "all of it is hidden"
    assert bench.foretells(start_of(size_bytes=GB // 5)).loading.seconds == 0, "it comes before the fork has ended"


def test_without_a_start_that_read_nothing_of_the_construction_is_thought_to_be_hidden(bench):
    bench.reads(1.0)
    bench.starts(queued=0.0, forking=0.0, building=2.0)
    foretold = bench.foretells(start_of(size_bytes=GB))
    assert (foretold.loading.seconds, foretold.building.seconds) == pytest.approx((1.0, 2.0))
    assert foretold.building.basis is Basis.SIMILAR
    bench.starts(queued=0.0, forking=0.0, loading=1.0, building=1.0)
    assert bench.foretells(start_of(size_bytes=GB)).total_s == pytest.approx(2.0 + 0.02)


def test_what_only_starts_that_read_have_told_bounds_those_that_do_not(bench):
    bench.reads(1.0)
    bench.starts(queued=0.0, forking=0.0, loading=4.0, building=1.0)
    assert bench.foretells(start_of(size_bytes=4 * GB)).total_s == pytest.approx(5.0 + 0.02)
    warm = bench.foretells(start_of()).building
    assert (warm.seconds, warm.basis, warm.observations) == (5.0, Basis.SIMILAR, 0)


def test_another_checkpoint_on_devices_of_the_kind_is_better_than_a_guess(bench):
    bench.starts(queued=0.0, forking=0.25, building=2.0)
    foretold = bench.foretells(start_of(digest="other"))
    assert (foretold.building.seconds, foretold.building.basis) == (2.0, Basis.SIMILAR)
    elsewhere = estimate(bench.estimator.learnt(0.0), replace(start_of(), kind=DeviceKind.CUDA))
    assert elsewhere.building.basis is Basis.GUESSED, "of another kind nothing is known"


def test_a_replica_that_was_found_running_teaches_nothing(bench):
    bench.starts(queued=0.0, building=2.0)
    bench.starts()
    assert bench.estimator.learnt(0.0).starts == {}


def test_the_queue_is_what_is_to_be_read_before(bench):
    bench.reads(0.5)
    foretold = bench.foretells(start_of(size_bytes=GB, ahead_bytes=6 * GB))
    bench.starts(foretold, queued=3.5, forking=0.0, loading=0.5, building=1.0)
    again = bench.foretells(start_of(size_bytes=GB, ahead_bytes=6 * GB))
    assert again.queued.seconds == pytest.approx(3.0 + 0.02), "a wait in the queue is not learnt as one without"
    assert bench.foretells(start_of(ahead_bytes=6 * GB)).queued.seconds == 0.02, "what is in DRAM waits for no turn"
    free = bench.foretells(start_of())
    bench.starts(free, queued=0.1, forking=0.0, building=1.0)
    assert bench.foretells(start_of()).queued.seconds == pytest.approx(0.1)


def test_waiting_for_a_warm_process_is_learnt_from_reports_and_gets_shorter(bench):
    cold, warm = (bench.make.node("a", warm=warm).report for warm in (False, True))
    bench.estimator.reported(cold, 100.0)
    bench.estimator.reported(cold, 103.0)
    assert bench.foretells(start_of(warm=False), 104.0).warming.seconds == GUESSED_WARMING_S - 4
    bench.estimator.reported(warm, 108.0)
    bench.estimator.reported(cold, 200.0)
    here = bench.foretells(start_of(warm=False), 202.0).warming
    assert (here.seconds, here.basis) == (6.0, Basis.MEASURED)
    assert bench.foretells(start_of("b", warm=False), 202.0).warming.basis is Basis.SIMILAR
    assert bench.foretells(start_of(warm=False), 300.0).warming.seconds == 0, "it is late"
    assert bench.foretells(start_of(), 202.0).warming.basis is Basis.REPORTED
    bench.estimator.forget("a")
    assert bench.estimator.learnt(300.0).cold_s == {}


def test_what_was_learnt_does_not_change_under_who_has_it(bench):
    bench.reads(1.0)
    before = bench.estimator.learnt(0.0)
    copies = dict(before.reading), dict(before.starts), dict(before.load_bytes)
    bench.reads(2.0, on="b", digest="n")
    bench.starts(queued=0.0, forking=0.0, building=1.0)
    assert (before.reading, before.starts, before.load_bytes) == copies
    assert bench.estimator.learnt(0.0).load_bytes == {("a", "m"): GB, ("b", "n"): GB}


def test_memory_is_bounded(bench, monkeypatch):
    monkeypatch.setattr(estimators, "KEPT_NODES", 2)
    monkeypatch.setattr(estimators, "KEPT_CHECKPOINTS", 2)
    for name in "abc":
        bench.reads(1.0, on=name, digest=name)
        bench.starts(digest=name, queued=0.0, forking=0.0, building=1.0)
    learnt = bench.estimator.learnt(0.0)
    assert {node for node, _ in learnt.reading} == {"b", "c"}
    assert [digest for digest, _ in learnt.starts] == ["b", "c"]
    assert len(learnt.load_bytes) == 2


# -- how wrong it is


def test_the_error_is_of_starts_that_were_not_guessed(bench):
    assert bench.estimator.error.p50 is None
    bench.starts(bench.foretells(start_of()), queued=0.0, forking=0.0, building=1.0)
    assert (bench.estimator.error.count, bench.estimator.error.guessed) == (0, 1)
    foretold = bench.foretells(start_of())
    for slower in (1.0, 1.25, 2.0):
        bench.starts(foretold, queued=0.0, forking=0.0, building=foretold.total_s * slower)
    error = bench.estimator.error
    assert (error.count, error.guessed) == (3, 1)
    assert (error.p50, error.p95) == pytest.approx((0.2, 0.5))


@dataclass
class NoisyNode:
    """A node as it might be: what it takes is its own, and differs from time to time."""

    rng: random.Random
    sigma: float = 0.05

    def __post_init__(self) -> None:
        self.bandwidth = self.rng.uniform(0.3, 8) * GB
        self.fork, self.whole = self.rng.uniform(0.05, 0.5), self.rng.uniform(0.3, 20)
        self.rest = self.rng.uniform(0.1, 0.9) * self.whole
        self.size_bytes = int(self.rng.uniform(0.1, 60) * GB)

    def noisy(self, seconds: float) -> float:
        return seconds * math.exp(self.rng.gauss(0, self.sigma))

    def start(self, bench: Teacher, *, in_memory: bool) -> None:
        foretold = bench.foretells(start_of(size_bytes=0 if in_memory else self.size_bytes))
        fork, whole, rest = self.noisy(self.fork), self.noisy(self.whole), self.noisy(self.rest)
        phases_s = {"queued": self.noisy(0.01), "forking": fork, "building": whole}
        if not in_memory:
            read = self.noisy(self.size_bytes / self.bandwidth)
            bench.reads(read, size_bytes=self.size_bytes)
            loading = max(0.0, read - fork)
            phases_s |= {"loading": loading, "building": max(rest, whole - loading)}
        bench.starts(foretold, **phases_s)


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_after_five_starts_the_median_error_is_within_a_tenth(make, seed):
    node, bench = NoisyNode(random.Random(seed)), Teacher(make)
    for _ in range(5):
        node.start(bench, in_memory=False)
    learnt = len(bench.estimator._errors)
    for _ in range(21):
        node.start(bench, in_memory=False)
    assert statistics.median(list(bench.estimator._errors._last)[learnt:]) <= 0.10


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_starts_from_memory_and_from_ssd_are_foretold_side_by_side(make, seed):
    node, bench = NoisyNode(random.Random(seed)), Teacher(make)
    for number in range(10):
        node.start(bench, in_memory=number % 2 == 0)
    learnt = len(bench.estimator._errors)
    for number in range(30):
        node.start(bench, in_memory=number % 2 == 0)
    assert statistics.median(list(bench.estimator._errors._last)[learnt:]) <= 0.10


def test_words_name_the_largest_part(bench):
    bench.reads(*[1.0] * 3)
    for _ in range(3):
        bench.starts(queued=0.0, forking=0.25, loading=3.75, building=0.5)
    assert in_words(bench.foretells(start_of(size_bytes=4 * GB))) == "about 4.52 s, of which 3.75 s loading from SSD"
    bench.starts(bench.foretells(start_of()), queued=0.0, forking=0.25, building=0.5)
    assert in_words(bench.foretells(start_of())) == "0.75 s, of which 0.50 s building"
