"""A client's stream, recorded whole, so that two answers can be compared token by token."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from e2e.cluster import Cluster

TIMEOUT_S = 120


@dataclass(slots=True)
class Choice:
    """`logprobs` has one entry per token, as the server wrote it; `calls` are name and arguments of each tool call."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    calls: dict[int, str] = field(default_factory=dict)
    finish: str | None = None
    stop: Any = None


@dataclass(slots=True)
class Answer:
    """`error` is an error event; `done` tells whether the stream came to its `[DONE]`."""

    choices: dict[int, Choice] = field(default_factory=dict)
    usage: Any = None
    error: Any = None
    done: bool = False

    @property
    def tokens(self) -> int:
        return sum(len(choice.token_ids) for choice in self.choices.values())


Watcher = Callable[[str, Answer], None]


def record(cluster: Cluster, path: str, body: dict[str, Any], watch: Watcher = lambda request, answer: None) -> Answer:
    """Ask for a stream and return all that came. `watch(request_id, answer so far)` is called after every event."""
    extra = {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
    request = urllib.request.Request(
        cluster.base_url + path,
        data=json.dumps({**body, **extra}).encode(),
        headers={"content-type": "application/json"},
    )
    answer = Answer()
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        request_id = response.headers["x-request-id"]
        for event in _events(response):
            _take(answer, event)
            watch(request_id, answer)
    return answer


def _events(lines: Iterator[bytes]) -> Iterator[Any]:
    for line in lines:
        if line.startswith(b"data: "):
            data = line.removeprefix(b"data: ").strip()
            yield None if data == b"[DONE]" else json.loads(data)


def _take(answer: Answer, event: Any) -> None:
    if event is None:
        answer.done = True
        return
    answer.error = event.get("error") or answer.error
    answer.usage = event.get("usage") or answer.usage
    for part in event.get("choices", ()):
        choice = answer.choices.setdefault(part["index"], Choice())
        delta = part.get("delta") or {}
        choice.text += part.get("text") or delta.get("content") or ""
        choice.token_ids += part.get("token_ids") or ()
        choice.logprobs += _logprobs(part.get("logprobs"))
        for call in delta.get("tool_calls") or ():
            function = call.get("function") or {}
            said = (function.get("name") or "") + (function.get("arguments") or "")
            choice.calls[call["index"]] = choice.calls.get(call["index"], "") + said
        choice.finish = part.get("finish_reason") or choice.finish
        choice.stop = part.get("stop_reason") or choice.stop


def _logprobs(found: Any) -> list[Any]:
    if not found:
        return []
    if "content" in found:  # of a chat
        return list(found["content"] or ())
    return list(zip(found["tokens"], found["token_logprobs"], found["top_logprobs"] or [], strict=False))
