"""What starts of one checkpoint take on one kind of device, from the phases of its last starts. Pure.

Reading overlaps the engine's construction, so one start shows only the longer of the two: starts that read little
show the `whole` construction, those that wait for their last byte show the `rest` of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from sllm.core.replica import StartPhase
from sllm.core.startup import Level, StartTimes
from sllm.scheduler.levels import KEPT, Window, faded_mean

LITTLE = 0.1  # of what follows the fork: reading that takes no more of it is all hidden
WAITS = 1.1  # a start that takes so many times the whole construction has waited for its last byte


@dataclass(frozen=True, slots=True, kw_only=True)
class _Built:
    """What followed the fork of one start; `number` counts them."""

    number: int
    loading_s: float
    building_s: float

    @property
    def both_s(self) -> float:
        return self.loading_s + self.building_s


def _kept() -> deque[_Built]:
    return deque(maxlen=KEPT)


@dataclass(slots=True)
class StartWindow:
    """Mutable, for one owner."""

    _count: int = 0
    _grant: Window = field(default_factory=Window)
    _fork: Window = field(default_factory=Window)
    _hidden: deque[_Built] = field(default_factory=_kept)  # that read little, or nothing
    _read: deque[_Built] = field(default_factory=_kept)

    def observe(self, phases_s: Mapping[str, float], *, idle: bool, warm: bool) -> None:
        """Take in a start that became ready. `idle`: its node's loading queue was known to be empty, so that what it
        waited was not the queue. `warm`: its node is known to have had a warm process."""
        if idle and StartPhase.QUEUED.value in phases_s:
            self._grant.observe(phases_s[StartPhase.QUEUED.value])
        if warm and StartPhase.FORKING.value in phases_s:
            self._fork.observe(phases_s[StartPhase.FORKING.value])
        self._count += 1
        loading_s, building_s = phases_s.get(StartPhase.LOADING.value, 0.0), phases_s[StartPhase.BUILDING.value]
        built = _Built(number=self._count, loading_s=loading_s, building_s=building_s)
        (self._hidden if loading_s <= LITTLE * built.both_s else self._read).append(built)

    @property
    def times(self) -> StartTimes:
        whole = self._whole_level()
        rest = self._rest_level(whole) if whole else None
        return StartTimes(grant=self._grant.level, fork=self._fork.level, whole=whole, rest=rest)

    def _whole_level(self) -> Level | None:
        """Where every start had to read, the construction takes no longer than they did."""
        if not self._hidden:
            return Level(value=_mean(b.both_s for b in self._read), observations=0) if self._read else None
        about = _mean(b.both_s for b in self._hidden)
        # Reading that made a start no longer was hidden too.
        alike = [*self._hidden, *(b for b in self._read if b.both_s <= WAITS * about)]
        alike.sort(key=lambda b: b.number)
        return Level(value=_mean(b.both_s for b in alike), observations=len(alike))

    def _rest_level(self, whole: Level) -> Level | None:
        """Where no start is known to have waited for its last byte, the rest takes no longer than it did in them."""
        if not self._read:
            return None
        waited = [b.building_s for b in self._read if b.both_s > WAITS * whole.value]
        if whole.observations and waited:
            return Level(value=_mean(waited), observations=len(waited))
        # Not the mean of what was left: that is the small difference of two that vary.
        took, loading = _mean(b.both_s for b in self._read), _mean(b.loading_s for b in self._read)
        return Level(value=max(0.0, took - loading), observations=0)


def _mean(values: Iterable[float]) -> float:
    return faded_mean([(value, 1.0) for value in values])
