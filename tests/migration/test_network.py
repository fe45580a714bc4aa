"""The whole protocol in a small simulated network: whatever is lost, doubled, delayed or dies, the reader sees every
token once, in order (paper §5.3).

The machines and the journal are the real ones. Engines are a counter: token p of the request is always TOKENS[p].
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sllm.core.ids import RequestId
from sllm.core.migration import OVER, RecomputeCost, Round
from sllm.core.tokens import TokenOutput
from sllm.errors import EngineFailed, Unavailable
from sllm.gateway.journal import Journal
from sllm.migration import destination, source
from sllm.migration.destination import Answer, Asked, Closing, Compute, Computed, Destination, Drop
from sllm.migration.policy import MAX_ROUNDS, Progress
from sllm.migration.source import (
    Advanced,
    Begin,
    CalledOff,
    HandOver,
    Phase,
    Recompute,
    RequestEnded,
    RoundEnded,
    RoundFailed,
    Source,
    StopRecompute,
    TimeOver,
    Waited,
)

REQUEST = RequestId("req-1")
PROMPT = list(range(40))
TOKENS = [1000 + 7 * p for p in range(60)]
HOSTS = 3
INTERVAL_S = 0.1
COST = RecomputeCost(per_token_s=0.01, fixed_s=0.0, observations=5)  # ten times as fast as decoding: rounds pay


@dataclass(frozen=True)
class Frame:
    """What a host tells the reader of one stream: a token, or (`target`) that it goes on elsewhere."""

    stream: int
    position: int
    target: int | None = None


@dataclass
class Host:
    """`running` has the next position of each stream; `keys` the rounds being computed for others, by caller."""

    running: dict[int, int] = field(default_factory=dict)
    destination: Destination = field(default_factory=Destination)
    keys: dict[int, int] = field(default_factory=dict)
    incarnation: int = 0


@dataclass
class Migration:
    """At its source: a machine, the stream it moves, and the round's key at the destination."""

    machine: Source
    host: int
    incarnation: int
    stream: int
    target: int
    key: int | None = None
    asked_tokens: int = 0


class Network(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.hosts = [Host() for _ in range(HOSTS)]
        self.channel: list[tuple[int, int, Frame]] = []  # host, its incarnation, what it sent
        self.journal = Journal(prompt=PROMPT)
        self.stream = 0  # the reader's current stream: an older one's frames mean nothing
        self.at = 0
        self.done = False
        self.migrations: list[Migration] = []
        self.keys = 0
        self.dropped: set[int] = set()
        self.begun: set[int] = set()
        self.ended: set[int] = set()
        self.resume(0)

    # --- the reader (gateway) ---

    def resume(self, host: int) -> None:
        """Send prompt, parameters and output so far to a host, under a new stream id."""
        self.stream += 1
        self.at = host
        self.hosts[host].running[self.stream] = len(self.journal.tokens)
        self.arrive(host)

    def recover(self, *, aborted: bool = True) -> None:
        """Go on at another host. The old one is told to stop, which may not come to it."""
        old, stream = self.at, self.stream
        if aborted and self.hosts[old].running.pop(stream, None) is not None:
            self.tell(old, stream, RequestEnded())
        self.resume((old + 1) % HOSTS)

    def read(self, frame: Frame) -> None:
        if frame.stream != self.stream or self.done:
            return
        if frame.target is not None:
            if frame.position == len(self.journal.tokens):
                self.resume(frame.target)
            else:
                self.recover()
            return
        output = TokenOutput(stream_id=frame.stream, position=frame.position, token_ids=[TOKENS[frame.position]])
        try:
            self.journal.accept(output)
        except EngineFailed:
            self.recover()
        self.done = len(self.journal.tokens) == len(TOKENS)

    # --- hosts ---

    @rule(steps=st.integers(1, 8))
    def decode(self, steps: int) -> None:
        for _ in range(steps):
            self.now += INTERVAL_S
            for host in range(HOSTS):
                self.step_engine(host)

    def step_engine(self, host: int) -> None:
        for stream, position in list(self.hosts[host].running.items()):
            if position < len(TOKENS):
                self.send(host, Frame(stream, position))
                self.hosts[host].running[stream] = position + 1
                self.advanced(host, stream)
            else:
                del self.hosts[host].running[stream]
                self.tell(host, stream, RequestEnded())

    def send(self, host: int, frame: Frame) -> None:
        self.channel.append((host, self.hosts[host].incarnation, frame))

    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        """Any frame under way may come next: later ones too."""
        if self.channel:
            index = data.draw(st.integers(0, len(self.channel) - 1))
            self.read(self.channel.pop(index)[2])

    @rule(frames=st.integers(1, 8))
    def deliver_in_order(self, frames: int) -> None:
        for _ in range(min(frames, len(self.channel))):
            self.read(self.channel.pop(0)[2])

    @rule(data=st.data(), twice=st.booleans())
    def lose_or_double(self, data: st.DataObject, twice: bool) -> None:
        if self.channel:
            index = data.draw(st.integers(0, len(self.channel) - 1))
            if twice:
                self.channel.append(self.channel[index])
            else:
                self.channel.pop(index)

    @rule(
        kind=st.sampled_from(["silence", "call off", "calls break", "death", "no tokens"]),
        host=st.integers(0, HOSTS - 1),
        lucky=st.booleans(),
    )
    def fail(self, kind: str, host: int, lucky: bool) -> None:
        """One rule for all, or nothing would live long enough to be migrated."""
        match kind:
            case "silence":
                self.notice_silence(aborted=lucky)
            case "call off":
                self.call_off(late=lucky)
            case "calls break":
                self.break_calls(host, computed=lucky)
            case "no tokens":
                self.wait(host)
            case "death":
                self.die(host, sent_arrives=lucky)

    def die(self, host: int, sent_arrives: bool) -> None:
        """It is restarted at once, and knows nothing. What it had sent may still come, or not."""
        before, self.hosts[host] = self.hosts[host], Host(incarnation=self.hosts[host].incarnation + 1)
        self.ended |= {key for _, key in before.destination.rounds}
        if not sent_arrives:
            self.channel = [entry for entry in self.channel if (entry[0], entry[1]) != (host, before.incarnation)]
        for migration in self.migrations:
            if migration.host == host:  # its outstanding call breaks: the destination notices
                self.stop_round(migration)
                migration.machine, _ = source.step(migration.machine, CalledOff(), self.now)
            elif migration.target == host and migration.machine.phase is Phase.ROUND:
                self.apply(migration, RoundFailed(error=Unavailable("it died")))
        if self.at == host and not self.done:
            self.recover()

    def wait(self, host: int) -> None:
        """Sources there have waited for tokens for as long as they would."""
        for migration in self.migrations:
            if migration.host == host:
                self.apply(migration, Waited(progress=self.progress(migration)))

    def notice_silence(self, aborted: bool) -> None:
        """The reader's host makes no sign of life: the reader goes elsewhere, though it may only be slow."""
        if not self.done:
            self.recover(aborted=aborted)

    # --- migrations ---

    @rule(step=st.integers(1, HOSTS - 1), twice=st.sampled_from([False, False, False, True]))
    def migrate(self, step: int, twice: bool) -> None:
        """An order for the request, where it runs; `twice`: also if it is being carried out already."""
        host, to = self.at, (self.at + step) % HOSTS
        streams = list(self.hosts[host].running)
        under_way = any(m.stream in streams and m.machine.phase is not Phase.OVER for m in self.migrations)
        if not streams or (under_way and not twice):
            return
        machine = source.new(cost=COST, block_size=4, deadline=self.now + 3.0)
        migration = Migration(machine, host, self.hosts[host].incarnation, streams[-1], to)
        self.migrations.append(migration)
        self.apply(migration, Begin(progress=self.progress(migration)))

    @rule()
    def compute(self) -> None:
        """Each destination's engine is done with its oldest round; its answer arrives."""
        for at in range(HOSTS):
            if self.hosts[at].destination.rounds:
                self.answer(at, self.hosts[at].destination.rounds[0][1])

    def answer(self, at: int, key: int) -> None:
        self.step_destination(at, Computed(key=key))
        for migration in self.migrations:
            if migration.key == key and migration.machine.phase is Phase.ROUND:
                migration.key = None
                tokens = migration.asked_tokens
                answer = Round(tokens=tokens, cached_tokens=0, seconds=COST.per_token_s * tokens)
                self.apply(migration, RoundEnded(round=answer, progress=self.progress(migration)))

    def break_calls(self, at: int, computed: bool) -> None:
        """The network between hosts fails: sources hear nothing of their rounds there, done or not."""
        for migration in self.migrations:
            if migration.target == at and migration.machine.phase is Phase.ROUND and migration.key is not None:
                if computed:
                    key, migration.key = migration.key, None
                    self.step_destination(at, Computed(key=key))
                else:
                    self.stop_round(migration)
                self.apply(migration, RoundFailed(error=Unavailable("the connection broke")))

    def call_off(self, late: bool) -> None:
        for migration in self.migrations:
            self.apply(migration, TimeOver() if late else CalledOff())

    def progress(self, migration: Migration) -> Progress:
        position = self.hosts[migration.host].running.get(migration.stream, len(TOKENS))
        return Progress(prompt_tokens=len(PROMPT), output_tokens=position, interval_s=INTERVAL_S)

    def advanced(self, host: int, stream: int) -> None:
        """A step has been sent: a migration that waits for tokens learns it."""
        for migration in self.migrations:
            if (migration.host, migration.stream) == (host, stream):
                self.apply(migration, Advanced(progress=self.progress(migration)))

    def tell(self, host: int, stream: int, event: source.Event) -> None:
        for migration in self.migrations:
            if (migration.host, migration.stream) == (host, stream):
                self.apply(migration, event)

    def apply(self, migration: Migration, event: source.Event) -> None:
        alive = self.hosts[migration.host].incarnation == migration.incarnation
        migration.machine, effects = source.step(migration.machine, event, self.now)
        for effect in effects:
            match effect:
                case Recompute():
                    self.keys += 1
                    migration.key, migration.asked_tokens = self.keys, effect.tokens
                    self.step_destination(migration.target, Asked(request=REQUEST, key=self.keys))
                case StopRecompute():
                    self.stop_round(migration)
                case HandOver() if alive:
                    self.hand_over(migration)

    def hand_over(self, migration: Migration) -> None:
        position = self.hosts[migration.host].running.pop(migration.stream, None)
        if position is not None:
            self.send(migration.host, Frame(migration.stream, position, target=migration.target))

    def stop_round(self, migration: Migration) -> None:
        """The call is ended: the destination drops the round, if it is still that one."""
        key, migration.key = migration.key, None
        host = self.hosts[migration.target]
        if key is not None and host.destination.key_of(REQUEST) == key:
            self.step_destination(migration.target, destination.Arrived(request=REQUEST))

    def arrive(self, host: int) -> None:
        self.step_destination(host, destination.Arrived(request=REQUEST))

    def step_destination(self, host: int, event: destination.Event) -> None:
        self.hosts[host].destination, effects = destination.step(self.hosts[host].destination, event)
        for effect in effects:
            match effect:
                case Compute():
                    self.begun.add(effect.key)
                case Answer():
                    self.ended.add(effect.key)
                case Drop():
                    self.ended.add(effect.key)
                    for migration in self.migrations:
                        if migration.key == effect.key:
                            migration.key = None
                            self.apply(migration, RoundFailed(error=Unavailable("dropped")))

    # --- what must hold ---

    @invariant()
    def the_reader_has_a_gapless_prefix(self) -> None:
        assert self.journal.tokens == TOKENS[: len(self.journal.tokens)]

    @invariant()
    def rounds_are_given_back(self) -> None:
        under_way = {key for host in self.hosts for _, key in host.destination.rounds}
        assert self.begun - self.ended == under_way

    @invariant()
    def what_is_over_holds_nothing(self) -> None:
        under_way = {key for host in self.hosts for _, key in host.destination.rounds}
        for migration in self.migrations:
            if migration.machine.phase is Phase.OVER:
                assert migration.machine.outcome in OVER
                assert migration.key not in under_way

    @invariant()
    def a_stream_has_one_owner(self) -> None:
        """Two hosts may run the request for a while, but never under one stream id: the reader tells them apart."""
        owned = [stream for host in self.hosts for stream in host.running]
        assert len(owned) == len(set(owned))

    @invariant()
    def rounds_are_bounded(self) -> None:
        assert all(migration.machine.rounds <= MAX_ROUNDS for migration in self.migrations)

    def teardown(self) -> None:
        """When the network is kind again, the answer comes to its end."""
        for host in range(HOSTS):
            self.step_destination(host, Closing())
        for _ in range(3 * len(TOKENS)):
            if self.done:
                break
            self.channel = [entry for entry in self.channel if entry[2].stream == self.stream]
            if not self.channel and self.stream not in self.hosts[self.at].running:
                self.recover()  # what was lost is noticed by silence
            self.decode(1)
            self.deliver_in_order(len(self.channel))
        assert self.journal.tokens == TOKENS


Network.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None, print_blob=True)
TestNetwork = Network.TestCase
