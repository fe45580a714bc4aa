"""An order's requests: each begins once, so many at a time, and all are over in the end."""

from hypothesis import given, settings
from hypothesis import strategies as st

from sllm.core.ids import RequestId
from sllm.migration import coordinator
from sllm.migration.coordinator import CallOff, Coordinator, Opened, Over, Start, Stopped

A, B, C = (RequestId(f"req-{name}") for name in "abc")


def test_the_next_begins_when_one_is_over() -> None:
    state, effects = coordinator.step(coordinator.new([A, B, C], concurrency=2), Opened())
    assert effects == (Start(request=A), Start(request=B))
    state, effects = coordinator.step(state, Over(request=B))
    assert effects == (Start(request=C),)
    for request in (A, C):
        assert not state.is_over
        state, _ = coordinator.step(state, Over(request=request))
    assert state.is_over


def test_one_that_ends_while_it_waits_never_begins() -> None:
    state, _ = coordinator.step(coordinator.new([A, B], concurrency=1), Opened())
    state, effects = coordinator.step(state, Over(request=B))
    assert effects == ()
    state, effects = coordinator.step(state, Over(request=A))
    assert (effects, state.is_over) == ((), True)


def test_what_is_called_off_begins_nothing_more() -> None:
    state, _ = coordinator.step(coordinator.new([A, B, C], concurrency=1), Opened())
    state, effects = coordinator.step(state, Stopped())
    assert effects == (CallOff(request=A), CallOff(request=B), CallOff(request=C))
    state, effects = coordinator.step(state, Over(request=A))
    assert (effects, state.is_over) == ((), True)


def test_a_request_that_is_named_twice_moves_once() -> None:
    assert coordinator.new([A, A, B], concurrency=4).waiting == (A, B)


@settings(deadline=None)
@given(
    names=st.lists(st.integers(0, 9), unique=True, max_size=10),
    concurrency=st.integers(-1, 5),
    data=st.data(),
)
def test_in_any_order_each_begins_at_most_once_and_the_bound_holds(
    names: list[int], concurrency: int, data: st.DataObject
) -> None:
    requests = [RequestId(f"req-{name}") for name in names]
    state: Coordinator = coordinator.new(requests, concurrency=concurrency)
    state, effects = coordinator.step(state, Opened())
    begun = [effect.request for effect in effects if isinstance(effect, Start)]
    while not state.is_over:
        assert len(state.moving) <= max(1, concurrency)
        left = sorted({*state.moving, *state.waiting})
        if data.draw(st.booleans()):
            state, effects = coordinator.step(state, Over(request=data.draw(st.sampled_from(left))))
        else:
            state, effects = coordinator.step(state, Stopped())
            for request in sorted(state.moving):
                state, _ = coordinator.step(state, Over(request=request))
        begun += [effect.request for effect in effects if isinstance(effect, Start)]
    assert len(begun) == len(set(begun))
