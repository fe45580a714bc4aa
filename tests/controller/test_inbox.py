from __future__ import annotations

import asyncio

import pytest

from sllm.controller.inbox import Inbox
from sllm.errors import Unavailable


async def test_what_a_writer_that_ends_did_not_come_to_is_refused():
    inbox = Inbox()
    waiting = [asyncio.ensure_future(inbox.submit(event)) for event in ("one", "two")]
    await asyncio.sleep(0)
    batch = await inbox.batch()
    assert next(batch).event == "one"
    inbox.close()
    with pytest.raises(Unavailable, match="stopping"):
        await waiting[1]
    waiting[0].cancel()


async def test_what_comes_while_a_batch_is_handled_is_left_for_the_next():
    inbox = Inbox()
    inbox.post("one")
    batch = await inbox.batch()
    inbox.post("two")
    assert [envelope.event for envelope in batch] == ["one"]
    assert [envelope.event for envelope in await inbox.batch()] == ["two"]
