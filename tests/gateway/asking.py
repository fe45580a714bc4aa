"""What is asked of the gateway over the fake front end, and what a stream has said."""

import json
from typing import Any

COMPLETIONS = "/v1/completions"
ASKED = {"model": "m", "prompt": "xy"}
STREAMED = {**ASKED, "stream": True}
TEXT = "Hello there."
SUFFIXES = ["", "ab", "abcd"]
CHOICES = {**STREAMED, "n": 3, "suffixes": SUFFIXES}


async def events_of(cluster: Any, body: dict[str, Any]) -> list[str]:
    """Ask, and return the events of the stream as they came, without comments."""
    answer = await cluster.http.post(COMPLETIONS, json=body)
    assert answer.status_code == 200, answer.text
    return [line for line in answer.text.splitlines() if line.startswith("data: ")]


def texts_of(lines: list[str]) -> list[str]:
    """Return the text of each choice of a stream that is whole."""
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    texts = [""] * 3
    for event in events[:-1]:
        document = json.loads(event)
        texts[document["choice"]] += document["text"]
    return texts
