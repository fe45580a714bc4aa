from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm.core.popularity import LEAST_WINDOW_S, MEMORY_S, first_asked, product_falls_to


def asked_every(seconds, count):
    found = first_asked(1, 0.0)
    for number in range(1, count):
        found = found.asked(1, number * seconds)
    return found


@pytest.mark.parametrize("count", [60, 1000])
def test_the_rate_is_that_of_the_requests_whether_they_have_come_for_long_or_not(count):
    found = asked_every(4.0, count)
    assert found.rate_rps(found.at) == pytest.approx(1 / 4, rel=0.05)


def test_one_request_is_no_rate():
    assert first_asked(1, 7.0).rate_rps(7.0) == 1 / LEAST_WINDOW_S


def test_it_fades_when_nobody_asks():
    found = asked_every(1.0, 100)
    assert found.requests(found.at + MEMORY_S) == pytest.approx(found.requests(found.at) / math.e)


@given(
    first=st.lists(st.floats(0, 50), min_size=1, max_size=20),
    second=st.lists(st.floats(0, 50), min_size=1, max_size=20),
    level=st.floats(1e-6, 1.0),
)
def test_when_it_will_have_faded_can_be_said_in_advance(first, second, level):
    def built(steps):
        found, now = first_asked(1, 0.0), 0.0
        for step in steps:
            now += step
            found = found.asked(1, now)
        return found

    one, other = built(first), built(second)
    at = one.falls_to(level)
    assert one.rate_rps(at) == pytest.approx(level)
    both_at = product_falls_to(one, other, level)
    assert one.rate_rps(both_at) * other.rate_rps(both_at) == pytest.approx(level)
