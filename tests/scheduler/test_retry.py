from __future__ import annotations

import pytest

from sllm.core.snapshot import Policy
from sllm.errors import EngineFailed
from sllm.scheduler.retry import COOL_DOWN_S, PERMANENT, failed, hindered, refusal, succeeded

POLICY = Policy(start_backoff_s=1.0, max_start_failures=3)


def fail(view, now, reason="ENGINE_FAILED", revision=1):
    return failed(view, "a", revision, error="out of cheese", reason=reason, now=now, policy=POLICY)


def test_waits_twice_as_long_after_each_failure_and_gives_up_at_the_limit(make):
    view, waits = make.deployment(), []
    for _ in range(4):
        view = fail(view, 10.0)
        waits.append((view.failures.retry_at - 10.0, view.failures.given_up))
    assert waits == [(1.0, False), (2.0, False), (4.0, True), (8.0, True)]


def test_the_cool_down_is_bounded(make):
    view = make.deployment()
    for _ in range(200):
        view = fail(view, 0.0)
    assert view.failures.retry_at == COOL_DOWN_S


@pytest.mark.parametrize("reason", sorted(PERMANENT))
def test_gives_up_at_once_on_what_would_stay_wrong(make, reason):
    view = fail(make.deployment(), 0.0, reason)
    assert view.failures.given_up


def test_requests_are_refused_with_the_engines_reason_until_the_cool_down_is_over(make):
    view = fail(make.deployment(), 0.0, "UNSUPPORTED_CHECKPOINT")
    error = refusal(view, 100.0)
    assert isinstance(error, EngineFailed)
    assert "out of cheese" in error.message
    assert error.retry_after_s == COOL_DOWN_S - 100.0
    assert refusal(view, COOL_DOWN_S) is None


def test_requests_are_held_while_it_is_tried_again(make):
    assert refusal(fail(make.deployment(), 0.0), 0.5) is None
    assert refusal(make.deployment(), 0.5) is None


def test_a_success_wipes_the_slate(make):
    assert succeeded(fail(make.deployment(), 0.0), 1).failures is None


def test_what_happens_to_an_earlier_revision_does_not_count(make):
    view = make.deployment(number=2)
    assert fail(view, 0.0, revision=1) is view
    assert hindered(view, "a", 1, error="", reason="", now=0.0, policy=POLICY) is view
    assert succeeded(fail(view, 0.0, revision=2), 1).failures is not None


def test_an_unreachable_node_delays_but_does_not_count(make):
    view = hindered(make.deployment(), "a", 1, error="gone", reason="UNAVAILABLE", now=5.0, policy=POLICY)
    assert (view.failures.count, view.failures.retry_at, view.failures.nodes) == (0, 7.0, {"a"})
    assert refusal(view, 5.0) is None
