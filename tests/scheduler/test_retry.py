from __future__ import annotations

from dataclasses import replace

import pytest

from sllm.core.node import NodeState
from sllm.core.residency import Residency, ResidencyState, Tier
from sllm.core.snapshot import Policy
from sllm.errors import EngineFailed, InvalidCheckpoint, StaleLayout, UnsupportedCheckpoint, all_errors
from sllm.scheduler.retry import (
    COOL_DOWN_S,
    OF_ONE_NODE,
    PERMANENT,
    damage,
    failed,
    forgiven,
    hindered,
    refusal,
    succeeded,
)

POLICY = Policy(start_backoff_s=1.0, max_start_failures=3)


def fail(view, now, reason="ENGINE_FAILED", revision=1, node="a", holders=("a",), ready_at=None):
    return failed(
        view,
        node,
        revision,
        error="out of cheese",
        reason=reason,
        now=now,
        policy=POLICY,
        holders=frozenset(holders),
        ready_at=ready_at,
    )


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


def test_every_way_in_which_a_checkpoint_can_be_wrong_is_told_from_what_may_pass():
    for kind in all_errors():
        if issubclass(kind, InvalidCheckpoint):
            assert kind.reason in OF_ONE_NODE
        elif issubclass(kind, UnsupportedCheckpoint) and kind is not StaleLayout:
            assert kind.reason in PERMANENT
    assert not PERMANENT & OF_ONE_NODE
    assert {"ENGINE_FAILED", "UNAVAILABLE", "STALE_LAYOUT"}.isdisjoint(PERMANENT | OF_ONE_NODE)


QUARANTINED = Residency(checkpoint="m", digest="m", tier=Tier.SSD, state=ResidencyState.QUARANTINED, size_bytes=1)


def test_requests_are_refused_while_every_copy_is_damaged(make):
    def damaged(name):
        node = make.node(name)
        return replace(node, report=replace(node.report, residencies=(QUARANTINED,)))

    view = make.deployment()
    error = damage(view, [damaged("b"), damaged("a")])
    assert isinstance(error, EngineFailed)
    assert error.message == "app: every copy of checkpoint 'm' is damaged, on a, b"
    assert damage(view, [damaged("b"), make.node("a")]) is None
    assert damage(view, []) is None, "a node that holds it may be about to register"
    dead = replace(damaged("b"), state=NodeState.DEAD)
    assert damage(view, [dead]) is None


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
    assert succeeded(fail(make.deployment(), 0.0), 1, 0.0).failures is None


def test_what_happens_to_an_earlier_revision_does_not_count(make):
    view = make.deployment(number=2)
    assert fail(view, 0.0, revision=1) is view
    assert hindered(view, "a", 1, error="", reason="", now=0.0, policy=POLICY) is view
    assert succeeded(fail(view, 0.0, revision=2), 1, 0.0).failures is not None


def test_an_unreachable_node_delays_but_does_not_count(make):
    view = hindered(make.deployment(), "a", 1, error="gone", reason="UNAVAILABLE", now=5.0, policy=POLICY)
    assert (view.failures.count, view.failures.retry_at, view.failures.nodes) == (0, 7.0, {"a"})
    assert refusal(view, 5.0) is None


@pytest.mark.parametrize("reason", sorted(OF_ONE_NODE))
def test_trouble_of_one_node_gives_up_only_when_all_that_hold_the_checkpoint_had_it(make, reason):
    view = fail(make.deployment(), 0.0, reason, node="a", holders="ab")
    assert (view.failures.given_up, view.failures.retry_at) == (False, 1.0)
    view = fail(view, 1.0, reason, node="b", holders="ab")
    assert (view.failures.given_up, view.failures.retry_at) == (True, 1.0 + COOL_DOWN_S)


def test_what_dies_soon_after_it_became_ready_again_and_again_is_given_up(make):
    view, waits, now = make.deployment(), [], 100.0
    for _ in range(3):
        view = succeeded(view, 1, now)
        assert view.failures is None
        view = fail(view, now + 1.0, ready_at=now)
        waits.append((view.failures.retry_at - now - 1.0, view.failures.given_up))
        now = view.failures.retry_at
    assert waits == [(1.0, False), (2.0, False), (4.0, True)]


def test_what_lasted_starts_a_new_count_when_it_dies(make):
    view = succeeded(fail(fail(make.deployment(), 0.0), 1.0), 1, 10.0)
    lasting = fail(view, 10.0 + POLICY.stable_after_s, ready_at=10.0)
    assert lasting.failures.count == 1
    assert fail(view, 9.0 + POLICY.stable_after_s, ready_at=10.0).failures.count == 3


def test_a_replica_that_lasted_does_not_answer_for_one_that_did_not(make):
    view = succeeded(fail(fail(make.deployment(), 90.0), 91.0), 1, 95.0)
    assert fail(view, 100.0, ready_at=10.0).failures.count == 1


def test_what_is_forgiven_counts_no_more(make):
    view = forgiven(succeeded(fail(fail(make.deployment(), 0.0), 1.0), 1, 2.0))
    assert fail(view, 3.0, ready_at=2.0).failures.count == 1
