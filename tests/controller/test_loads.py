from __future__ import annotations

from sllm.controller.loads import FORGOTTEN_S, OVERDUE_S, Loads
from sllm.core.request import RequestRow, RequestState


def row(name, replica="rep-x", state=RequestState.RUNNING):
    return RequestRow(id=f"req-{name}", deployment="app", state=state, replica=replica)


def grant(loads, ticket, name, gateway="g"):
    loads.granted(ticket, gateway=gateway, row=row(name), now=0.0)


def test_counts_running_requests_of_all_gateways():
    loads = Loads()
    loads.report("g", "", (row("1"), row("2", "rep-y")), 0.0)
    loads.report("h", "", (row("3"), row("4", None, RequestState.HELD)), 0.0)
    assert loads.per_replica() == {"rep-x": 2, "rep-y": 1}


def test_a_report_replaces_the_one_before():
    loads = Loads()
    loads.report("g", "", (row("1"),), 0.0)
    loads.report("g", "", (), 1.0)
    assert loads.per_replica()["rep-x"] == 0


def test_a_grant_counts_until_its_gateway_reports_the_request():
    loads = Loads()
    grant(loads, 1, "1")
    assert loads.per_replica() == {"rep-x": 1}
    loads.report("g", "", (row("1"),), 1.0)
    assert loads.per_replica() == {"rep-x": 1}


def test_a_granted_request_is_listed_until_its_gateway_reports_it():
    loads = Loads()
    grant(loads, 1, "1")
    assert list(loads.rows()) == [row("1")]
    loads.report("g", "", (row("1"),), 1.0)
    assert list(loads.rows()) == [row("1")]


def test_a_report_that_was_under_way_does_not_take_a_grant_back():
    loads = Loads()
    grant(loads, 1, "1")
    loads.report("h", "", (), 1.0)
    loads.report("g", "", (), 1.0)
    assert loads.per_replica() == {"rep-x": 1}
    loads.report("g", "", (), 2.0)
    assert loads.per_replica()["rep-x"] == 0


def test_a_grant_that_nobody_took_does_not_count():
    loads = Loads()
    grant(loads, 1, "1")
    loads.released(1)
    assert loads.per_replica()["rep-x"] == 0


def test_is_fresh_while_every_gateway_reports():
    loads = Loads()
    assert not loads.fresh(0.0)
    loads.report("g", "", (), 0.0)
    loads.report("h", "", (), 3.0)
    assert loads.fresh(OVERDUE_S - 0.1)
    assert not loads.fresh(OVERDUE_S)


def test_a_gateway_that_is_gone_is_forgotten_with_its_requests():
    loads = Loads()
    loads.report("g", "", (row("1"),), 0.0)
    grant(loads, 1, "2", gateway="never-reported")
    loads.report("h", "", (), FORGOTTEN_S)
    loads.forget_silent(FORGOTTEN_S)
    assert loads.per_replica() == {}
    assert loads.fresh(FORGOTTEN_S)


def test_two_gateways_of_one_name_do_not_overwrite_each_other():
    loads = Loads()
    loads.report("g", "one", (row("1"),), 0.0)
    loads.report("g", "two", (), 1.0)
    assert loads.per_replica() == {"rep-x": 1}
    assert not loads.fresh(OVERDUE_S)


def test_reports_of_two_gateways_of_one_name_are_not_counted_together():
    loads = Loads()
    grant(loads, 1, "1")
    loads.report("g", "one", (), 1.0)
    loads.report("g", "two", (), 1.0)
    assert loads.per_replica() == {"rep-x": 1}


def test_a_gateway_that_has_left_is_forgotten_when_its_report_is_overdue():
    loads = Loads()
    loads.watched("g", begins=True)
    loads.report("g", "one", (row("1"),), 0.0)
    loads.watched("g", begins=False)
    loads.watched("g", begins=True)  # started anew
    loads.report("g", "two", (), OVERDUE_S)
    loads.forget_silent(OVERDUE_S - 0.1)
    assert loads.per_replica() == {"rep-x": 1}
    loads.forget_silent(OVERDUE_S)
    assert loads.per_replica() == {}
    assert loads.fresh(OVERDUE_S)


def test_a_silent_gateway_that_still_watches_is_not_forgotten_soon():
    loads = Loads()
    loads.watched("g", begins=True)
    loads.report("g", "one", (row("1"),), 0.0)
    loads.forget_silent(OVERDUE_S)
    assert loads.per_replica() == {"rep-x": 1}


def test_what_a_report_lacks_is_over():
    loads = Loads()
    loads.report("g", "", (row("1"), row("2")), 0.0)
    assert loads.report("h", "", (), 1.0) == ()
    assert loads.report("g", "", (row("2"),), 1.0) == (row("1"),)


def test_a_request_that_was_handed_over_counts_at_its_target_at_once():
    loads = Loads()
    loads.report("g", "", (row("1"), row("2")), 0.0)
    loads.moved("req-1", "rep-y")
    assert loads.per_replica() == {"rep-x": 1, "rep-y": 1}


def test_a_report_that_was_under_way_does_not_take_a_handover_back():
    loads = Loads()
    loads.report("g", "", (row("1"),), 0.0)
    loads.moved("req-1", "rep-y")
    loads.report("g", "", (row("1"),), 1.0)
    assert loads.per_replica()["rep-y"] == 1
    loads.report("g", "", (row("1"),), 2.0)
    assert loads.per_replica()["rep-x"] == 1, "it did not go on there"


def test_after_its_gateway_has_followed_the_report_holds_again():
    loads = Loads()
    loads.report("g", "", (row("1"),), 0.0)
    loads.moved("req-1", "rep-y")
    loads.report("g", "", (row("1", "rep-y"),), 1.0)
    loads.report("g", "", (row("1", "rep-z"),), 2.0)
    assert list(loads.rows()) == [row("1", "rep-z")]


def test_a_handed_over_request_that_is_held_is_held():
    loads = Loads()
    loads.report("g", "", (row("1"),), 0.0)
    loads.moved("req-1", "rep-y")
    loads.report("g", "", (row("1", None, RequestState.HELD),), 1.0)
    assert loads.per_replica() == {}


def test_a_handover_of_what_was_just_granted():
    loads = Loads()
    grant(loads, 1, "1")
    loads.moved("req-1", "rep-y")
    assert loads.per_replica() == {"rep-y": 1}


def test_a_handover_is_forgotten_with_its_gateway():
    loads = Loads()
    loads.report("g", "", (row("1"),), 0.0)
    loads.moved("req-1", "rep-y")
    loads.forget_silent(FORGOTTEN_S)
    loads.report("g", "", (row("1"),), FORGOTTEN_S)
    assert loads.per_replica() == {"rep-x": 1}


def test_a_report_is_news_of_each_request_once():
    loads = Loads()
    told = (row("1"), row("2", None, RequestState.HELD))
    assert loads.news("g", "", told, {}) == {"app": 2}
    loads.report("g", "", told, 0.0)
    assert loads.news("g", "", (row("2"), row("3")), {"app": 1}) == {"app": 1}


def test_what_began_and_ended_between_two_reports_is_news_too():
    loads = Loads()
    loads.report("g", "", (row("1"),), 0.0)
    assert loads.news("g", "", (), {"app": 3, "bee": 2}) == {"app": 2, "bee": 2}
