"""Workloads: what is drawn has the laws that it should have, and one law does not disturb another."""

from __future__ import annotations

import statistics
from collections import Counter
from itertools import pairwise
from random import Random

import pytest

from sllm.sim.noise import factor
from sllm.sim.workload import LogNormal, Renewal, Row, Workload, generate


def workload(*, count=4000, cv=1.0, exponent=1.0, lengths=(5, 7), **fields):
    arrivals = Renewal(requests=count, rate_rps=4.0, cv=cv, lengths=lambda rng: lengths)
    return Workload(arrivals=arrivals, models=["a", "b", "c", "d"], exponent=exponent, **fields)


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_gaps_have_the_mean_and_the_variation_asked_for(cv):
    times = [0.0, *(arrival.at for arrival in generate(workload(cv=cv), 1))]
    gaps = [after - before for before, after in pairwise(times)]
    assert statistics.fmean(gaps) == pytest.approx(0.25, rel=0.15)
    assert statistics.stdev(gaps) / statistics.fmean(gaps) == pytest.approx(cv, rel=0.15)


def test_popularity_follows_the_rank_and_the_seed_says_who_is_popular():
    counts = Counter(arrival.deployment for arrival in generate(workload(), 1))
    shares = [count / 4000 for _, count in counts.most_common()]
    harmonic = 1 + 1 / 2 + 1 / 3 + 1 / 4
    assert shares == pytest.approx([1 / rank / harmonic for rank in (1, 2, 3, 4)], abs=0.03)
    popular = {Counter(a.deployment for a in generate(workload(count=300), s)).most_common(1)[0][0] for s in range(9)}
    assert len(popular) > 1


def test_the_same_seed_gives_the_same_requests_and_another_one_others():
    assert generate(workload(), 1) == generate(workload(), 1)
    assert generate(workload(), 1) != generate(workload(), 2)


def test_times_stay_when_other_laws_change():
    changed = generate(workload(exponent=0.0, lengths=(1, 1), pace_cv=0.5), 1)
    assert [a.at for a in changed] == [a.at for a in generate(workload(), 1)]


def test_recorded_requests_keep_their_times_and_lengths():
    rows = [Row(0.0, 1, 2), Row(3.5, 4, 5)]
    found = generate(Workload(arrivals=rows, models=["a"], exponent=1.0), 1)
    assert [(a.at, a.prompt_tokens, a.output_tokens, a.deployment) for a in found] == [(0, 1, 2, "a"), (3.5, 4, 5, "a")]


def test_noise_has_mean_one_and_the_variation_asked_for():
    rng = Random(1)
    drawn = [factor(rng, 0.3) for _ in range(20000)]
    assert statistics.fmean(drawn) == pytest.approx(1, abs=0.01)
    assert statistics.stdev(drawn) == pytest.approx(0.3, rel=0.05)
    before = rng.getstate()
    assert factor(rng, 0.0) == 1.0
    assert rng.getstate() == before


def test_log_normal_lengths_have_their_median_and_stay_within_their_bounds():
    rng = Random(1)
    drawn = [LogNormal(median=100, sigma=1.0, least=20, most=500).draw(rng) for _ in range(5000)]
    assert statistics.median(drawn) == pytest.approx(100, rel=0.06)
    assert (min(drawn), max(drawn)) == (20, 500)
