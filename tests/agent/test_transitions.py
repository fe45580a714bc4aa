"""How a replica's status changes, row by row, and what never happens in any order of events."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm.agent.transitions import (
    ACCEPTED,
    Event,
    Failed,
    HostFound,
    HostReported,
    PhaseBegan,
    StopAsked,
    Tracked,
    step,
)
from sllm.core.ids import CheckpointName, DeploymentName, DeviceId, ReplicaId
from sllm.core.replica import ReplicaSpec, ReplicaState, ReplicaStatus, StartPhase
from sllm.errors import CapacityExceeded, EngineFailed
from sllm.rpc.engine import HostStatus

REPLICA = ReplicaId("rep-1")
SPEC = ReplicaSpec(
    id=REPLICA,
    deployment=DeploymentName("story"),
    revision=1,
    generation=1,
    checkpoint=CheckpointName("demo"),
    digest="sha256:0",
    devices=(DeviceId("cpu-0"),),
    capacity=1,
    max_model_len=1,
)


def tracked(state: ReplicaState = ReplicaState.STARTING, **changes: Any) -> Tracked:
    return Tracked(status=ReplicaStatus(spec=SPEC, state=state, **changes), phase_since=0.0)


def said(state: ReplicaState, phase: StartPhase = StartPhase.BUILDING, **changes: Any) -> HostReported:
    return HostReported(status=HostStatus(replica=REPLICA, state=state, phase=phase, **changes))


def test_a_start_goes_through_its_phases_and_their_seconds_add_up() -> None:
    now = tracked()
    for seconds, event in [
        (1.0, PhaseBegan(phase=StartPhase.FORKING)),
        (2.0, HostFound(address="127.0.0.1:1", pid=7)),
        (2.0, said(ReplicaState.STARTING, StartPhase.LOADING)),
        (4.0, said(ReplicaState.STARTING, StartPhase.LOADING, progress=0.5)),
        (5.0, said(ReplicaState.STARTING)),
        (9.0, said(ReplicaState.READY, StartPhase.READY)),
    ]:
        now = step(now, event, seconds, wall=1000.0 + seconds)
    status = now.status
    assert status.state is ReplicaState.READY
    assert status.phases_s == {"queued": 1.0, "forking": 1.0, "loading": 3.0, "building": 4.0}
    assert (status.ready_at, status.progress, status.pid, status.address) == (1009.0, 1.0, 7, "127.0.0.1:1")


def test_a_phase_begins_with_no_progress() -> None:
    now = step(tracked(progress=0.7), PhaseBegan(phase=StartPhase.FORKING), 1.0, wall=0.0)
    assert now.status.progress == 0.0


def test_the_hosts_own_seconds_count() -> None:
    now = step(tracked(), said(ReplicaState.READY, StartPhase.READY, phases_s={"building": 0.25}), 9.0, wall=0.0)
    assert now.status.phases_s["building"] == 0.25


def test_a_serving_replica_reports_its_load() -> None:
    now = step(
        tracked(ReplicaState.READY), said(ReplicaState.READY, running=3, waiting=2, memory_bytes=9), 1.0, wall=0.0
    )
    assert (now.status.running, now.status.waiting, now.status.memory_bytes) == (3, 2, 9)


@pytest.mark.parametrize("state", [ReplicaState.STARTING, ReplicaState.READY])
def test_a_host_that_failed_gives_its_reason(state: ReplicaState) -> None:
    now = step(
        tracked(state), said(ReplicaState.FAILED, error="no kernel", error_reason="ENGINE_FAILED"), 1.0, wall=0.0
    )
    assert (now.status.state, now.status.error, now.status.error_reason) == (
        ReplicaState.FAILED,
        "no kernel",
        "ENGINE_FAILED",
    )


def test_a_failure_of_ours_keeps_its_reason() -> None:
    now = step(tracked(), Failed(error=CapacityExceeded("too big")), 1.0, wall=0.0)
    assert (now.status.error, now.status.error_reason) == ("too big", "CAPACITY_EXCEEDED")


@pytest.mark.parametrize(
    ("state", "drain_s", "expected"),
    [
        (ReplicaState.STARTING, 60.0, ReplicaState.STOPPING),
        (ReplicaState.READY, 60.0, ReplicaState.DRAINING),
        (ReplicaState.READY, 0.0, ReplicaState.STOPPING),
        (ReplicaState.DRAINING, 0.0, ReplicaState.STOPPING),
        (ReplicaState.DRAINING, 5.0, ReplicaState.DRAINING),
        (ReplicaState.FAILED, 60.0, ReplicaState.STOPPING),
    ],
)
def test_only_what_serves_drains(state: ReplicaState, drain_s: float, expected: ReplicaState) -> None:
    assert step(tracked(state), StopAsked(drain_s=drain_s), 1.0, wall=0.0).status.state is expected


@pytest.mark.parametrize("state", [ReplicaState.DRAINING, ReplicaState.STOPPING])
def test_a_late_word_does_not_undo_a_stop(state: ReplicaState) -> None:
    for event in (
        said(ReplicaState.READY, StartPhase.READY),
        said(ReplicaState.FAILED, error="x"),
        Failed(error=EngineFailed("died")),
    ):
        assert step(tracked(state), event, 1.0, wall=0.0).status.state is state


def test_a_host_told_to_end_by_somebody_else_is_on_its_way_out() -> None:
    assert (
        step(tracked(ReplicaState.READY), said(ReplicaState.DRAINING), 1.0, wall=0.0).status.state
        is ReplicaState.DRAINING
    )


events: st.SearchStrategy[Event] = st.one_of(
    st.builds(PhaseBegan, phase=st.sampled_from(StartPhase)),
    st.just(HostFound(address="127.0.0.1:1", pid=1)),
    st.builds(said, st.sampled_from(ReplicaState), st.sampled_from(StartPhase)),
    st.builds(StopAsked, drain_s=st.sampled_from([0.0, 1.0])),
    st.just(Failed(error=EngineFailed("died"))),
)


@given(st.lists(events, max_size=20))
def test_in_any_order_of_events(sequence: list[Event]) -> None:
    now = tracked()
    stopped = False
    for seconds, event in enumerate(sequence, start=1):
        before = now
        now = step(now, event, float(seconds), wall=0.0)
        if not isinstance(event, ACCEPTED[before.status.state]):
            assert now is before
        stopped = stopped or isinstance(event, StopAsked)
        if stopped:  # what was told to stop never serves or starts again
            assert now.status.state in (ReplicaState.DRAINING, ReplicaState.STOPPING)
        if before.status.state is not ReplicaState.STARTING:
            assert now.status.state is not ReplicaState.STARTING
        assert all(phase_s >= 0 for phase_s in now.status.phases_s.values())
        assert now.status.spec is SPEC
