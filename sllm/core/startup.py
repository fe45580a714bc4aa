"""Startup time: what is learnt of it, and the estimate of one start, part by part.

Startup time is queue + activation (paper §5.1). Every number says how it is known: nothing that is guessed looks as if
it had been measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, TypeVar

from sllm.core.device import DeviceKind
from sllm.core.ids import NodeName
from sllm.core.replica import StartPhase
from sllm.core.residency import Tier

K = TypeVar("K")


class Basis(StrEnum):
    """How a number is known, the best first."""

    REPORTED = "reported"  # its node says that there is nothing to wait for
    MEASURED = "measured"
    SIMILAR = "similar"  # measured of what is alike: on other nodes, of other checkpoints, or as a bound
    GUESSED = "guessed"  # nobody has measured anything like it


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of an estimate. `observations`: how many measurements it rests on; 0 if it is reported or guessed."""

    seconds: float
    basis: Basis
    observations: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a start is expected to take; the parts follow each other and add up.

    `queued`: until its load's turn has come and it is granted. `warming`: until the node's warm process can fork.
    `loading`: reading that goes on after the fork; reading begins with the grant, so what of it passes meanwhile
    is not waited for. `building`: what of the engine's construction is left then. `size_bytes` are to be read from
    `tier` (0: all of them are in memory) after `ahead_bytes` of other loads.
    """

    queued: Part
    warming: Part
    forking: Part
    loading: Part
    building: Part
    tier: Tier
    size_bytes: int
    ahead_bytes: int = 0

    @property
    def parts(self) -> dict[str, Part]:
        """The parts by name, in order."""
        return {
            "queued": self.queued,
            "warming": self.warming,
            "forking": self.forking,
            "loading": self.loading,
            "building": self.building,
        }

    @property
    def total_s(self) -> float:
        # Written out: a placement compares thousands of these.
        load_s = self.queued.seconds + self.loading.seconds
        return load_s + self.warming.seconds + self.forking.seconds + self.building.seconds

    @property
    def guessed(self) -> bool:
        """True if a part of it is."""
        return (
            self.queued.basis is Basis.GUESSED
            or self.warming.basis is Basis.GUESSED
            or self.forking.basis is Basis.GUESSED
            or self.loading.basis is Basis.GUESSED
            or self.building.basis is Basis.GUESSED
        )

    @property
    def phases_s(self) -> dict[str, float]:
        """The same seconds by the phases that a replica reports: forking there has the wait for the warm process."""
        return {
            StartPhase.QUEUED.value: self.queued.seconds,
            StartPhase.FORKING.value: self.warming.seconds + self.forking.seconds,
            StartPhase.LOADING.value: self.loading.seconds,
            StartPhase.BUILDING.value: self.building.seconds,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """A quantity as it is learnt. `observations`: how many measurements of it there were; 0: it is only bounded."""

    value: float
    observations: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StartTimes:
    """What starts take besides queue and reading, in seconds; None: not known.

    `grant`: before the fork, though nothing is queued. `fork`: with a warm process. `whole`: the engine's construction
    when all bytes are there. `rest`: what of it is left after the last byte, however long that took to come.
    """

    grant: Level | None = None
    fork: Level | None = None
    whole: Level | None = None
    rest: Level | None = None

    def over(self, earlier: StartTimes) -> StartTimes:
        """These, and what only `earlier` has."""
        return StartTimes(
            grant=self.grant or earlier.grant,
            fork=self.fork or earlier.fork,
            whole=self.whole or earlier.whole,
            rest=self.rest or earlier.rest,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Learnt:
    """All that is learnt of startup times. Immutable, a part of each snapshot.

    `reading` is in seconds per byte, by node and tier; `starts` are by checkpoint (its digest) and kind of device;
    `warming` is what a warm process takes to come, in seconds, and `cold_s` how long it has been awaited by now on
    nodes that have none. What ends in `_anywhere` or `_of_kind` stands in where nothing of its own is known.
    `load_bytes`: what the last load of a checkpoint on a node has read, in whatever layout.
    """

    reading: Mapping[tuple[NodeName, Tier], Level] = field(default_factory=dict)
    reading_anywhere: Mapping[Tier, Level] = field(default_factory=dict)
    starts: Mapping[tuple[str, DeviceKind], StartTimes] = field(default_factory=dict)
    starts_of_kind: Mapping[DeviceKind, StartTimes] = field(default_factory=dict)
    warming: Mapping[NodeName, Level] = field(default_factory=dict)
    warming_anywhere: Level | None = None
    cold_s: Mapping[NodeName, float] = field(default_factory=dict)
    load_bytes: Mapping[tuple[NodeName, str], int] = field(default_factory=dict)

    def over(self, earlier: Learnt) -> Learnt:
        """All that is learnt here, and what was known `earlier` of the rest."""
        return Learnt(
            reading={**earlier.reading, **self.reading},
            reading_anywhere={**earlier.reading_anywhere, **self.reading_anywhere},
            starts=_over(self.starts, earlier.starts),
            starts_of_kind=_over(self.starts_of_kind, earlier.starts_of_kind),
            warming={**earlier.warming, **self.warming},
            warming_anywhere=self.warming_anywhere or earlier.warming_anywhere,
            cold_s=self.cold_s,
            load_bytes={**earlier.load_bytes, **self.load_bytes},
        )


def _over(these: Mapping[K, StartTimes], earlier: Mapping[K, StartTimes]) -> dict[K, StartTimes]:
    return {**earlier, **{key: times.over(earlier.get(key, StartTimes())) for key, times in these.items()}}


NOTHING_LEARNT: Final = Learnt()


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimatorError:
    """How wrong estimates were: |predicted - measured| / measured, median and 95th percentile, of the last `count`
    starts that became ready (None: there was none). Starts that were estimated by a guess are counted apart."""

    count: int = 0
    p50: float | None = None
    p95: float | None = None
    guessed: int = 0
