"""Which replica a request goes to."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from sllm.core.ids import NodeName, ReplicaId
from sllm.core.route import RouteTarget
from sllm.gateway.balancer import choose, is_stranded


def target(name: str, *, capacity: int = 4, revision: int = 1) -> RouteTarget:
    return RouteTarget(
        replica=ReplicaId(name),
        node=NodeName("n"),
        address="127.0.0.1:1",
        generation=1,
        revision=revision,
        capacity=capacity,
    )


def accepts_all(revision: int) -> bool:
    return True


A, B = target("rep-a"), target("rep-b")


def test_prefers_the_least_loaded() -> None:
    assert choose([A, B], {A.replica: 2, B.replica: 1}, accepts=accepts_all) == B


def test_load_is_relative_to_capacity() -> None:
    small, large = target("rep-a", capacity=4), target("rep-b", capacity=40)
    assert choose([small, large], {small.replica: 1, large.replica: 5}, accepts=accepts_all) == large


def test_equally_loaded_replicas_are_taken_in_order_of_name() -> None:
    assert choose([B, A], {}, accepts=accepts_all) == A


def test_prefers_the_newest_revision_over_an_idle_old_one() -> None:
    new = target("rep-z", revision=2)
    assert choose([A, new], {new.replica: 3}, accepts=accepts_all) == new


def test_never_sends_to_a_revision_that_the_request_was_not_made_for() -> None:
    new = target("rep-z", revision=2)
    assert choose([new, A], {}, accepts=lambda revision: revision == 1) == A
    assert choose([new], {}, accepts=lambda revision: revision == 1) is None


def test_a_replica_that_failed_the_request_before_is_avoided() -> None:
    assert choose([A, B], {}, accepts=accepts_all, avoid={A.replica}) == B
    assert choose([A], {}, accepts=accepts_all, avoid={A.replica}) is None


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 6)), max_size=5))
def test_a_full_replica_is_never_chosen_and_one_with_room_always_is(replicas: list[tuple[int, int]]) -> None:
    targets = [target(f"rep-{i}", capacity=capacity) for i, (capacity, _) in enumerate(replicas)]
    load = {t.replica: running for t, (_, running) in zip(targets, replicas, strict=True)}
    chosen = choose(targets, load, accepts=accepts_all)
    if chosen is None:
        assert all(load[t.replica] >= t.capacity for t in targets)
    else:
        assert load[chosen.replica] < chosen.capacity


def test_a_request_is_stranded_when_its_revision_was_replaced_and_is_gone(a_route: Any) -> None:
    def accepts_1(revision: int) -> bool:
        return revision == 1

    new = target("rep-z", revision=2)
    assert is_stranded(a_route("m", new, revision=2), accepts_1)
    assert not is_stranded(a_route("m", new, A, revision=2), accepts_1), "an old replica is still there"
    assert not is_stranded(a_route("m", revision=2), accepts_1), "who will serve is not known yet"
    assert not is_stranded(a_route("m", new, revision=1), accepts_1), "its own revision is the one wanted"
