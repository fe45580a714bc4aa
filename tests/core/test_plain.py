"""Values go to JSON and come back as they were, whatever a snapshot holds."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sllm.core.device import DeviceKind
from sllm.core.node import Cordon
from sllm.core.plain import from_plain, to_plain
from sllm.core.residency import Tier
from sllm.core.snapshot import Failures
from sllm.core.startup import Learnt, Level, StartTimes
from sllm.scheduler.plan import DrainReplica, Plan, StopReplica

if TYPE_CHECKING:
    from somewhere import Nowhere

levels = st.builds(Level, value=st.floats(allow_nan=False), observations=st.integers())
times = st.builds(StartTimes, grant=st.none() | levels, fork=st.none() | levels)
names = st.text(max_size=6)
learnts = st.builds(
    Learnt,
    reading=st.dictionaries(st.tuples(names, st.sampled_from(Tier)), levels, max_size=3),
    reading_anywhere=st.dictionaries(st.sampled_from(Tier), levels, max_size=3),
    starts=st.dictionaries(st.tuples(names, st.sampled_from(DeviceKind)), times, max_size=3),
    starts_of_kind=st.dictionaries(st.sampled_from(DeviceKind), times, max_size=2),
    cold_s=st.dictionaries(names, st.floats(allow_nan=False), max_size=3),
    load_bytes=st.dictionaries(st.tuples(names, names), st.integers(), max_size=3),
)


@settings(deadline=None)
@given(learnts)
def test_what_is_learnt_comes_back_exactly(learnt):
    again = from_plain(Learnt, json.loads(json.dumps(to_plain(learnt))))
    assert again == learnt
    assert all(isinstance(tier, Tier) for tier in again.reading_anywhere)


def test_sets_are_in_an_order_that_no_hash_changes():
    cordon = Cordon(devices=frozenset({"b", "a", "c"}))
    assert to_plain(cordon)["devices"] == ["a", "b", "c"]
    assert from_plain(Cordon, to_plain(cordon)) == cordon


@dataclass(frozen=True)
class Derived:
    value: int
    made_of_it: Nowhere | None = field(default=None, compare=False)


def test_what_is_no_part_of_a_value_is_left_out():
    plain = to_plain(Derived(1, made_of_it="much"))
    assert plain == {"is": "Derived", "value": 1}
    assert from_plain(Derived, plain).made_of_it is None


def test_actions_that_have_the_same_fields_are_told_apart():
    plan = Plan(actions=(DrainReplica(replica="r", why="w"), StopReplica(replica="r", why="w")))
    assert from_plain(Plan, json.loads(json.dumps(to_plain(plan)))) == plan


@pytest.mark.parametrize("wrong", [{}, None, 7, {"revision": "x"}, {"is": "Failures", "revision": 1}])
def test_what_is_no_such_value_is_one_error(wrong):
    with pytest.raises(ValueError):
        from_plain(Failures, wrong)
