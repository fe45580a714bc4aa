"""The end: what runs is finished, what waits is refused, nothing is cut short silently."""

import asyncio
from typing import Any

import pytest

from sllm.errors import Conflict
from sllm.gateway import main
from sllm.gateway.server import address_of, listen

COMPLETIONS = "/v1/completions"
ASKED = {"model": "m", "prompt": "x"}


async def test_running_requests_finish_and_held_ones_are_refused(cluster: Any, a_route: Any) -> None:
    host, target = await cluster.host(capacity=1)
    host.go.clear()
    await cluster.publish(a_route("m", target))
    running = asyncio.create_task(cluster.http.post(COMPLETIONS, json={**ASKED, "stream": True}))
    await host.until_running(1)
    held = asyncio.create_task(cluster.http.post(COMPLETIONS, json=ASKED))
    await cluster.controller.until_waiting(1)
    cluster.stop.set()
    refused = await held
    assert (refused.status_code, refused.json()["error"]["message"]) == (503, "the gateway is shutting down")
    host.go.set()
    assert (await running).text.count('"text"') == len("Hello there.") + 1
    await cluster.serving


async def test_what_runs_too_long_ends_with_an_error(
    cluster: Any, a_route: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "DRAIN_S", 0.05)
    host, target = await cluster.host()
    host.go.clear()
    await cluster.publish(a_route("m", target))
    asking = asyncio.create_task(cluster.http.post(COMPLETIONS, json=ASKED))
    await host.until_running(1)
    cluster.stop.set()
    assert (await asking).status_code == 503
    await cluster.serving
    await host.until_running(0)


async def test_the_last_report_is_empty(cluster: Any, a_route: Any) -> None:
    cluster.stop.set()
    await cluster.serving
    reports = []
    while not cluster.controller.reports.empty():
        reports.append(cluster.controller.reports.get_nowait())
    assert reports[-1].requests == ()
    (incarnation,) = {report.incarnation for report in reports}
    assert len(incarnation) == 16


async def test_a_taken_port_is_said_at_once() -> None:
    taken = listen("127.0.0.1:0")
    with taken, pytest.raises(Conflict, match="cannot listen on") as refused:
        listen(address_of(taken))
    assert "another port" in refused.value.hint
