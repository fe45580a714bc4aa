"""One order with all its requests: coordinator and sources together, whatever happens in whatever order."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from sllm.core.ids import RequestId
from sllm.core.migration import MigrationState, RecomputeCost, Round
from sllm.errors import Unavailable
from sllm.migration import coordinator, source
from sllm.migration.coordinator import CallOff, Coordinator, Opened, Over, Start, Stopped
from sllm.migration.policy import MAX_ROUNDS, Progress
from sllm.migration.source import (
    Advanced,
    Begin,
    CalledOff,
    HandOver,
    Phase,
    Recompute,
    Report,
    RequestEnded,
    RoundEnded,
    RoundFailed,
    Source,
    StopRecompute,
    TimeOver,
    Waited,
    Watch,
)

COST = RecomputeCost(per_token_s=0.002, fixed_s=0.01, observations=9)
DEADLINE = 5.0
LOST = Unavailable("it died")


@dataclass
class Request:
    machine: Source
    output: int
    called: bool = False  # a call to the destination is open
    watched: bool = False  # it waits for tokens
    handovers: int = 0
    last: list[MigrationState] = field(default_factory=list)

    def progress(self) -> Progress:
        return Progress(prompt_tokens=64, output_tokens=self.output, interval_s=0.02)


class World:
    """Does what the machines ask for; answers come when the test says so."""

    def __init__(self, outputs: list[int], concurrency: int) -> None:
        self.now = 0.0
        new = [source.new(cost=COST, block_size=16, deadline=DEADLINE) for _ in outputs]
        names = [RequestId(f"req-{number}") for number in range(len(outputs))]
        self.requests = {n: Request(m, o) for n, m, o in zip(names, new, outputs, strict=True)}
        self.coordinator: Coordinator = coordinator.new(names, concurrency=concurrency)
        self.coordinate(Opened(), CalledOff())

    def coordinate(self, event: coordinator.Event, why: source.Event) -> None:
        self.coordinator, effects = coordinator.step(self.coordinator, event)
        for effect in effects:
            match effect:
                case Start(request=name):
                    self.feed(name, Begin(progress=self.requests[name].progress()))
                case CallOff(request=name):
                    self.feed(name, why)

    def feed(self, name: RequestId, event: source.Event) -> None:
        request = self.requests[name]
        before = request.machine.phase
        request.machine, effects = source.step(request.machine, event, self.now)
        request.watched = request.watched and request.machine.phase is before
        for effect in effects:
            self.do(request, effect)
        if request.machine.phase is Phase.OVER and before is not Phase.OVER:
            self.coordinate(Over(request=name), CalledOff())

    def do(self, request: Request, effect: source.Effect) -> None:
        match effect:
            case Recompute():
                assert not request.called, "one round at a time"
                request.called = True
            case StopRecompute():
                assert request.called
                request.called = False
            case Watch():
                assert not request.watched
                request.watched = True
            case HandOver():
                assert not request.called
                request.handovers += 1
            case Report(state=state):
                request.last.append(state)

    def decode(self) -> None:
        self.now += 0.02
        for name, request in self.requests.items():
            request.output += 1
            if request.watched:
                self.feed(name, Advanced(progress=request.progress()))

    def wait(self, name: RequestId) -> None:
        """It makes no tokens for as long as they are waited for."""
        if self.requests[name].watched:
            self.feed(name, Waited(progress=self.requests[name].progress()))

    def answer(self, name: RequestId, seconds: float, *, breaks: bool) -> None:
        request = self.requests[name]
        if not request.called:
            return
        request.called = False
        tokens = request.machine.asked_tokens
        done = Round(tokens=tokens, cached_tokens=0, seconds=seconds)
        ended = RoundEnded(round=done, progress=request.progress(), round_trip_s=0.001)
        self.feed(name, RoundFailed(error=LOST) if breaks else ended)

    def stray(self, name: RequestId) -> None:
        """What comes too late for a request that is over."""
        request = self.requests[name]
        if request.machine.phase is not Phase.OVER:
            return
        done = Round(tokens=64, cached_tokens=0, seconds=0.1)
        late = (Advanced(progress=request.progress()), Waited(progress=request.progress()))
        for event in (RoundEnded(round=done, progress=request.progress()), RoundFailed(error=LOST), TimeOver(), *late):
            self.feed(name, event)

    def check(self) -> None:
        assert sum(request.called for request in self.requests.values()) <= self.coordinator.concurrency
        for request in self.requests.values():
            assert request.machine.rounds <= MAX_ROUNDS
            assert request.handovers == (request.machine.outcome is MigrationState.MOVED)
            if request.machine.phase is Phase.OVER:
                assert not request.called, "what is over has nothing computed"
                assert not request.watched
                assert request.last[-1] is request.machine.outcome


@settings(print_blob=True, deadline=None)
@given(outputs=st.lists(st.integers(0, 3000), min_size=1, max_size=6), concurrency=st.integers(1, 3), data=st.data())
def test_every_request_of_an_order_has_one_outcome_within_bounds(
    outputs: list[int], concurrency: int, data: st.DataObject
) -> None:
    world = World(outputs, concurrency)
    steps = data.draw(
        st.lists(st.sampled_from(["decode", "answer", "break", "wait", "ended", "stray", "stop", "late"]), max_size=40)
    )
    for step in steps:
        name = data.draw(st.sampled_from(sorted(world.requests)))
        match step:
            case "decode":
                world.decode()
            case "answer" | "break":
                world.answer(name, data.draw(st.floats(1e-4, 2.0)), breaks=step == "break")
            case "wait":
                world.wait(name)
            case "ended":
                world.feed(name, RequestEnded())
            case "stray":
                world.stray(name)
            case "stop":
                world.coordinate(Stopped(), CalledOff())
            case "late":
                world.coordinate(Stopped(), TimeOver())
        world.check()
    world.coordinate(Stopped(), TimeOver())
    world.check()
    assert world.coordinator.is_over
    assert all(request.machine.phase is Phase.OVER for request in world.requests.values())


@settings(deadline=None)
@given(
    outputs=st.lists(st.integers(0, 3000), min_size=1, max_size=6),
    concurrency=st.integers(1, 3),
    seconds=st.floats(1e-4, 2.0),
)
def test_left_alone_an_order_ends_in_as_many_rounds_as_are_allowed(
    outputs: list[int], concurrency: int, seconds: float
) -> None:
    world = World(outputs, concurrency)
    answers = 0
    while not world.coordinator.is_over:
        world.decode()
        for name in [name for name, request in world.requests.items() if request.called]:
            world.answer(name, seconds, breaks=False)
            answers += 1
        world.check()
    assert answers <= MAX_ROUNDS * len(outputs)
    assert all(request.machine.outcome is MigrationState.MOVED for request in world.requests.values())
