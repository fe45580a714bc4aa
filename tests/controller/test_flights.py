from __future__ import annotations

from typing import Any

import pytest

from sllm.controller.flights import REST_S, Flights
from sllm.core.migration import MigrationOrder, MigrationReport, MigrationState
from sllm.core.route import RouteTarget
from sllm.errors import DeadlineExceeded, QueueFull, SllmError, Unavailable

TARGET = RouteTarget(replica="rep-t", node="b", address="b:1", generation=2, revision=1, capacity=4)
ORDER = MigrationOrder(id="mig-1", replica="rep-s", generation=1, target=TARGET, requests=("r1", "r2"))


def begun() -> Flights:
    flights = Flights()
    flights.begin(ORDER, "op-1")
    return flights


def report(request: str, state: MigrationState, **fields: Any) -> MigrationReport:
    return MigrationReport(migration="mig-1", request=request, state=state, **fields)


def test_what_is_in_an_order_is_moving_until_it_is_over():
    flights = begun()
    assert flights.moving() == {"r1": "rep-t", "r2": "rep-t"}
    flights.report(report("r1", MigrationState.ROUNDS))
    flights.report(report("r2", MigrationState.MOVED))
    assert flights.moving() == {"r1": "rep-t"}
    assert flights.busy(0.0) == {"rep-s"}


def test_a_source_that_is_empty_may_have_the_next_order_at_once():
    flights = begun()
    for request in ORDER.requests:
        flights.report(report(request, MigrationState.MOVED))
    flights.end("mig-1", None, 0.0)
    assert flights.busy(0.0) == frozenset()
    assert flights.next_rest_over() is None


def test_one_that_may_have_something_left_rests():
    flights = begun()
    flights.report(report("r1", MigrationState.MOVED))
    flights.report(report("r2", MigrationState.FINISHED))
    flights.end("mig-1", None, 10.0)
    assert flights.busy(10.0 + REST_S / 2) == {"rep-s"}
    assert flights.next_rest_over() == 10.0 + REST_S
    assert flights.busy(10.0 + REST_S) == frozenset()


def test_a_failure_names_its_destination_and_its_error():
    flights = begun()
    flights.report(report("r1", MigrationState.FAILED, error="no answer", error_reason="UNAVAILABLE"))
    tally = flights.tally("op-1")
    assert tally.tried == {"r1": ("rep-t",)}
    assert isinstance(tally.errors["r1"], Unavailable)


@pytest.mark.parametrize("error", [QueueFull("too many rounds"), DeadlineExceeded("no time left")])
def test_what_passes_says_nothing_against_a_destination(error: SllmError):
    flights = begun()
    flights.report(report("r1", MigrationState.FAILED, error=error.message, error_reason=error.reason))
    tally = flights.tally("op-1")
    assert tally.tried == {}
    assert isinstance(tally.errors["r1"], type(error))
    flights.end("mig-1", None, 0.0)
    assert flights.next_rest_over() == REST_S


def test_what_has_moved_says_what_it_took():
    flights = begun()
    flights.report(report("r1", MigrationState.ROUNDS, rounds=1, sent_bytes=400))
    flights.report(report("r1", MigrationState.MOVED, rounds=2, sent_bytes=900))
    flights.report(report("r2", MigrationState.FINISHED, rounds=1, sent_bytes=500))
    tally = flights.tally("op-1")
    assert (tally.rounds, tally.sent_bytes) == (2, 900)


def test_orders_that_are_not_carried_out_are_counted_in_a_row():
    flights = Flights()
    for error in (Unavailable("away"), Unavailable("away"), None):
        flights.begin(ORDER, "op-1")
        flights.end("mig-1", error, 0.0)
        assert flights.tally("op-1").refusal is error
    assert flights.tally("op-1").refused == 0


def test_a_job_that_has_ended_is_forgotten_with_its_orders():
    flights = begun()
    flights.report(report("r1", MigrationState.MOVED))
    assert flights.drop("op-1") == ["mig-1"]
    assert flights.report(report("r2", MigrationState.MOVED)) is None
    assert (flights.moving(), flights.busy(0.0), flights.tally("op-1").moved) == ({}, frozenset(), set())
    flights.end("mig-1", None, 0.0)
    assert flights.next_rest_over() is None
