"""Whose request is whose: the open requests of an engine host, and the token streams that they came in on.

A request is one sequence, or several (n choices) with the same request id; each has a key and a stream id of its own.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from sllm.core.ids import RequestId
from sllm.core.pace import Pace
from sllm.core.route import RouteTarget
from sllm.core.tokens import Finish, FinishReason, Moved, StepOutputs, TokenOutput, TokenRequest
from sllm.engine.base import Output
from sllm.engine.connection import Connection
from sllm.errors import InvalidArgument, SllmError


@dataclass(slots=True)
class Sequence:
    """One open sequence. `token_ids` are prompt and output so far, four bytes each: what goes elsewhere if it moves."""

    connection: Connection
    stream_id: int
    request: RequestId
    cache_salt: str
    num_prompt_tokens: int
    token_ids: array[int]
    pace: Pace = field(default_factory=Pace)

    @property
    def position(self) -> int:
        """How many output tokens its gateway has been sent."""
        return len(self.token_ids) - self.num_prompt_tokens

    def advance(self, token_ids: list[int], now: float) -> None:
        self.token_ids.extend(token_ids)
        self.pace.advance(len(token_ids), now)


class Requests:
    """The table of open sequences. `new_key` gives a key that was never used before.

    `ended` is called when the last sequence of a request is gone, and may hand over others: so it is called only when
    all that goes with that request is gone, and what has been made of others is sent.
    """

    def __init__(self, new_key: Callable[[], int], ended: Callable[[RequestId], None] = lambda _: None) -> None:
        self._new_key = new_key
        self._ended = ended
        self._open: dict[int, Sequence] = {}
        self._by_request: dict[RequestId, dict[int, Sequence]] = {}
        self._connections: set[Connection] = set()

    def __len__(self) -> int:
        return len(self._open)

    def connect(self, gateway: str) -> Connection:
        connection = Connection(gateway)
        self._connections.add(connection)
        return connection

    def disconnect(self, connection: Connection) -> list[int]:
        """Forget a connection and its requests; return their keys, for the engine to abort."""
        self._connections.discard(connection)
        return self.drop(connection, list(connection.keys))

    def open(self, connection: Connection, request: TokenRequest) -> int:
        """Enter a request and return its key. Raises InvalidArgument if its stream id is in use."""
        if request.stream_id in connection.keys:
            raise InvalidArgument(f"gateway {connection.gateway!r} used stream id {request.stream_id} twice")
        key = self._new_key()
        sequence = Sequence(
            connection=connection,
            stream_id=request.stream_id,
            request=request.request_id,
            cache_salt=request.cache_salt,
            num_prompt_tokens=len(request.token_ids) - request.num_output_tokens,
            token_ids=array("I", request.token_ids),
        )
        self._open[key] = self._by_request.setdefault(request.request_id, {})[key] = sequence
        connection.keys[request.stream_id] = key
        return key

    def drop(self, connection: Connection, stream_ids: list[int]) -> list[int]:
        """Forget some requests of a connection; return the keys of those that were open."""
        keys = [connection.keys[stream_id] for stream_id in stream_ids if stream_id in connection.keys]
        self._tell_ended(self._forget(keys))
        return keys

    def _forget(self, keys: list[int]) -> list[RequestId]:
        """Return the requests of which nothing is left; `ended` is still to be told."""
        ended: list[RequestId] = []
        for key in keys:
            sequence = self._open.pop(key)
            del sequence.connection.keys[sequence.stream_id]
            others = self._by_request[sequence.request]
            del others[key]
            if not others:
                del self._by_request[sequence.request]
                ended.append(sequence.request)
        return ended

    def _tell_ended(self, requests: list[RequestId]) -> None:
        for request in requests:
            self._ended(request)

    # --- migration -------------------------------------------------------------------------

    @property
    def ids(self) -> tuple[RequestId, ...]:
        """The requests that are open, in order of arrival."""
        return tuple(self._by_request)

    def sequences(self, request: RequestId) -> tuple[Sequence, ...]:
        """Return what is open of a request: nothing if it is not, or not any more."""
        return tuple(self._by_request.get(request, {}).values())

    def hand_over(self, request: RequestId, target: RouteTarget, timestamp: float, steps: int) -> list[int]:
        """Tell its gateway, behind all that was sent before, that a request goes on at `target`, and forget it.

        Return the keys of its sequences, for the engine to abort: what a step under way still makes of them is
        dropped.
        """
        keys = list(self._by_request.get(request, {}))
        shares: dict[Connection, list[Moved]] = {}
        for sequence in self.sequences(request):
            moved = Moved(stream_id=sequence.stream_id, position=sequence.position, target=target)
            shares.setdefault(sequence.connection, []).append(moved)
        ended = self._forget(keys)
        for connection, moves in shares.items():
            connection.send(StepOutputs(moves=moves, timestamp=timestamp, steps=steps))
        self._tell_ended(ended)
        return keys

    # --- steps -----------------------------------------------------------------------------

    def deliver(self, outputs: list[Output], timestamp: float, steps: int) -> list[int]:
        """Hand each connection its share of the engine's step number `steps`; what nobody waits for any more is
        dropped.

        Return the keys of requests that ended because their gateway does not read, for the engine to abort.
        """
        shares: dict[Connection, list[TokenOutput]] = {}
        ended: list[RequestId] = []
        for output in outputs:
            sequence = self._open.get(output.key)
            if sequence is not None:
                shares.setdefault(sequence.connection, []).append(_advanced(sequence, output, timestamp))
                if output.finish is not None:
                    ended += self._forget([output.key])
        given_up: list[int] = []
        for connection, share in shares.items():
            messages = (StepOutputs(outputs=part, timestamp=timestamp, steps=steps) for part in _messages(share))
            if not all(connection.send(message) for message in messages):
                given_up += list(connection.keys.values())
        ended += self._forget(given_up)
        self._tell_ended(ended)
        return given_up

    def beat(self, timestamp: float, steps: int) -> None:
        """Give a sign of life to each gateway that has requests here and has heard nothing since the last beat."""
        for connection in self._connections:
            connection.beat(StepOutputs(timestamp=timestamp, steps=steps))

    def fail_all(self, error: SllmError, timestamp: float, steps: int) -> list[int]:
        """End every open request with `error`; return their keys."""
        keys = list(self._open)
        finish = Finish(reason=FinishReason.ERROR, error=error)
        self.deliver([Output(key=key, token_ids=[], finish=finish) for key in keys], timestamp, steps)
        return keys

    def close_all(self) -> None:
        """End every stream."""
        for connection in self._connections:
            connection.close()


def _advanced(sequence: Sequence, output: Output, now: float) -> TokenOutput:
    position = sequence.position
    sequence.advance(output.token_ids, now)
    return TokenOutput(
        stream_id=sequence.stream_id,
        position=position,
        token_ids=output.token_ids,
        finish=output.finish,
        logprobs=output.logprobs,
        prompt_logprobs=output.prompt_logprobs,
        prefill=output.prefill,
    )


def _messages(share: list[TokenOutput]) -> Iterator[list[TokenOutput]]:
    """Divide a step: outputs that may fill a message (see `sizes`) have one each."""
    yield from ([output] for output in share if output.prompt_logprobs is not None)
    if small := [output for output in share if output.prompt_logprobs is None]:
        yield small
