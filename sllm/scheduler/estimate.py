"""The estimated startup time of one start, from what is learnt and what its node reports (paper §5.1). Pure.

    startup = queue + warm process + fork + reading that is not hidden + what is left of the engine's construction

Reading begins when the load is granted and goes on through fork and construction; the construction waits only for the
tensors that it needs next. So the two are not added: after the fork a start takes as long as the construction alone
(`whole`), or, where reading is the longer, as what is left of the reading and then the `rest` of the construction.
"""

from __future__ import annotations

from dataclasses import dataclass

from sllm.core.device import DeviceKind
from sllm.core.ids import NodeName
from sllm.core.residency import Tier
from sllm.core.startup import Basis, Estimate, Learnt, Level, Part, StartTimes

# For what nobody has measured yet: orders of magnitude, marked as guesses wherever they are used.
GUESSED_BANDWIDTH_BPS = 1e9
GUESSED_WARMING_S = 10.0
GUESSED_GRANT_S = 0.02
GUESSED_FORK_S = 0.2
GUESSED_WHOLE_S = 2.0

_NOTHING = Part(seconds=0.0, basis=Basis.REPORTED)
_UNKNOWN = StartTimes()
_BASES = list(Basis)


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A start as it would be. `size_bytes` are to be read from `tier` (0: none), after `ahead_bytes` of others."""

    node: NodeName
    warm: bool
    kind: DeviceKind
    digest: str
    tier: Tier
    size_bytes: int
    ahead_bytes: int


def estimate(learnt: Learnt, start: Start) -> Estimate:
    """Return what the start is expected to take, part by part, and how each is known."""
    return Starts(learnt, start.digest, start.kind).estimate(start)


class Starts:
    """Estimates of the starts of one checkpoint on one kind of device."""

    def __init__(self, learnt: Learnt, digest: str, kind: DeviceKind) -> None:
        of_it = learnt.starts.get((digest, kind), _UNKNOWN)
        of_kind = learnt.starts_of_kind.get(kind, _UNKNOWN)
        self._learnt = learnt
        self._grant = _known(of_it.grant, of_kind.grant, GUESSED_GRANT_S)
        self._fork = _known(of_it.fork, of_kind.fork, GUESSED_FORK_S)
        self._whole = whole = _known(of_it.whole, of_kind.whole, GUESSED_WHOLE_S)
        # Without a start that was seen to read, none of the construction is thought to be hidden.
        bound = Part(seconds=whole.seconds, basis=max(whole.basis, Basis.SIMILAR, key=_BASES.index))
        self._rest = _learnt(of_it.rest, of_kind.rest if of_it.whole is None else None) or bound
        self._guessed = Basis.GUESSED in (self._grant.basis, self._fork.basis)

    def estimate(self, start: Start) -> Estimate:
        pace = seconds_per_byte(self._learnt, start.node, start.tier)
        grant = self._grant
        warming = _NOTHING if start.warm else _warming(self._learnt, start.node)
        # What is in the pool waits for no turn.
        waited = start.ahead_bytes if start.size_bytes else 0
        loading = _loading(start.size_bytes, pace, warming.seconds + self._fork.seconds)
        return Estimate(
            queued=_both(grant, pace, grant.seconds + waited * pace.seconds) if waited else grant,
            warming=warming,
            forking=self._fork,
            loading=loading,
            building=self._building(loading),
            tier=start.tier,
            size_bytes=start.size_bytes,
            ahead_bytes=waited,
        )

    def total_s(self, node: NodeName, *, warm: bool, size_bytes: int, ahead_bytes: int) -> tuple[float, bool]:
        """The same, summed up, and whether a part of it is guessed: what is compared of thousands of nodes. What is
        read comes from SSD."""
        warming_s, guessed = 0.0, self._guessed
        if not warm:
            warming = _warming(self._learnt, node)
            warming_s, guessed = warming.seconds, guessed or warming.basis is Basis.GUESSED
        queued_s, fork_s, whole = self._grant.seconds, self._fork.seconds, self._whole
        if not size_bytes:
            return queued_s + warming_s + fork_s + whole.seconds, guessed or whole.basis is Basis.GUESSED
        pace_s, known = _pace(self._learnt, node)
        loading_s = max(0.0, size_bytes * pace_s - (warming_s + fork_s))
        queued_s += ahead_bytes * pace_s
        left_s = whole.seconds - loading_s
        if loading_s and self._rest.seconds >= left_s:
            building_s, built = self._rest.seconds, self._rest.basis
        else:
            building_s, built = left_s, whole.basis
        guessed = guessed or not known or built is Basis.GUESSED
        return queued_s + loading_s + warming_s + fork_s + building_s, guessed

    def _building(self, loading: Part) -> Part:
        whole = self._whole
        if loading.seconds == 0:
            return whole
        left = whole.seconds - loading.seconds
        return self._rest if self._rest.seconds >= left else _both(whole, loading, left)


def seconds_per_byte(learnt: Learnt, node: NodeName, tier: Tier) -> Part:
    """What reading takes on a node."""
    return _known(learnt.reading.get((node, tier)), learnt.reading_anywhere.get(tier), 1 / GUESSED_BANDWIDTH_BPS)


def in_words(estimate: Estimate) -> str:
    """For example `1.9 s, of which 1.2 s loading from SSD`."""
    name, part = max(estimate.parts.items(), key=lambda item: item[1].seconds)
    about = "about " if estimate.guessed else ""
    where = f" from {estimate.tier.name}" if name == "loading" else ""
    return f"{about}{estimate.total_s:.2f} s, of which {part.seconds:.2f} s {name}{where}"


def _warming(learnt: Learnt, node: NodeName) -> Part:
    """What is left of the wait for the node's warm process."""
    whole = _known(learnt.warming.get(node), learnt.warming_anywhere, GUESSED_WARMING_S)
    left = max(0.0, whole.seconds - learnt.cold_s.get(node, 0.0))
    return Part(seconds=left, basis=whole.basis, observations=whole.observations)


def _loading(size_bytes: int, pace: Part, hidden_s: float) -> Part:
    if not size_bytes:
        return _NOTHING
    seconds = max(0.0, size_bytes * pace.seconds - hidden_s)
    return Part(seconds=seconds, basis=pace.basis, observations=pace.observations)


def _pace(learnt: Learnt, node: NodeName) -> tuple[float, bool]:
    """Seconds per byte from SSD, and whether that is known."""
    level = learnt.reading.get((node, Tier.SSD)) or learnt.reading_anywhere.get(Tier.SSD)
    return (level.value, True) if level is not None else (1 / GUESSED_BANDWIDTH_BPS, False)


def _known(own: Level | None, similar: Level | None, guess: float) -> Part:
    return _learnt(own, similar) or Part(seconds=guess, basis=Basis.GUESSED)


def _learnt(own: Level | None, similar: Level | None) -> Part | None:
    if own is not None:
        basis = Basis.MEASURED if own.observations else Basis.SIMILAR
        return Part(seconds=own.value, basis=basis, observations=own.observations)
    if similar is not None:
        return Part(seconds=similar.value, basis=Basis.SIMILAR, observations=similar.observations)
    return None


def _both(one: Part, other: Part, seconds: float) -> Part:
    """What rests on two: it is known no better than the one that is known worse."""
    basis = max(one.basis, other.basis, key=_BASES.index)
    return Part(seconds=seconds, basis=basis, observations=min(one.observations, other.observations))
