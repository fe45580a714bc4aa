"""Learns from reports what starts take, and keeps how wrong its estimates were. In memory, bounded.

It is told of every report and of every start that became ready; what it has learnt is a value (`Learnt`) that goes
into snapshots. It sees no clock. After a restart of its process the reports of nodes, which have their last loads and
the phases of what runs there, teach it anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Generic, TypeVar

from sllm.core.device import DeviceKind
from sllm.core.ids import NodeName
from sllm.core.node import LoadReport, NodeReport
from sllm.core.prediction import PredictionErrors
from sllm.core.replica import ReplicaStatus, StartPhase
from sllm.core.residency import Tier
from sllm.core.startup import Estimate, EstimatorError, Learnt, Level, StartTimes
from sllm.core.table import Table
from sllm.scheduler.levels import Window
from sllm.scheduler.start_times import StartWindow

KEPT_NODES = 20_000
KEPT_CHECKPOINTS = 20_000
NOT_EVEN_PROBED = -1  # a probe has the number 0, the first load 1

K = TypeVar("K", bound=str | tuple[str, str | int])
V = TypeVar("V")


class Estimator:
    """Mutable, for one owner; what `learnt` returns is not."""

    def __init__(self) -> None:
        self._learnt = Learnt()
        self._levels: _Kept[tuple[NodeName, Tier], Level] = _Kept()
        self._times: _Kept[tuple[str, DeviceKind], StartTimes] = _Kept()
        self._load_bytes: _Kept[tuple[NodeName, str], int] = _Kept()
        self._loads_seen: dict[NodeName, tuple[str, int]] = {}
        self._reading: dict[tuple[NodeName, Tier], Window] = {}
        self._reading_anywhere: dict[Tier, Window] = {}
        self._starts: dict[tuple[str, DeviceKind], StartWindow] = {}
        self._starts_of_kind: dict[DeviceKind, StartWindow] = {}
        self._cold_since: dict[NodeName, float] = {}
        self._warming: dict[NodeName, Window] = {}
        self._warming_anywhere = Window()
        self._errors = PredictionErrors()
        self._guessed = 0

    def learnt(self, now: float) -> Learnt:
        """All that is known by now."""
        if not self._cold_since:
            return self._learnt
        return replace(self._learnt, cold_s={node: now - since for node, since in self._cold_since.items()})

    @property
    def error(self) -> EstimatorError:
        p50, p95 = self._errors.quantiles or (None, None)
        return EstimatorError(count=len(self._errors), p50=p50, p95=p95, guessed=self._guessed)

    def reported(self, report: NodeReport, now: float) -> None:
        """Take in a node's report: its loads since the last one, and whether its warm process is there."""
        incarnation, seen = self._loads_seen.get(report.name, ("", NOT_EVEN_PROBED))
        if incarnation != report.incarnation:
            seen = NOT_EVEN_PROBED
        told = (report.probe, *report.loads) if report.probe else report.loads
        for load in told:
            if load.number > seen:
                self._loaded(report.name, load)
        last = max((load.number for load in told), default=seen)
        _put(self._loads_seen, report.name, (report.incarnation, max(seen, last)), KEPT_NODES)
        self._warmed(report, now)

    def forget(self, node: NodeName) -> None:
        """A node died: it is not waited for. What was learnt of it holds when it comes back."""
        self._cold_since.pop(node, None)

    def started(self, status: ReplicaStatus, kind: DeviceKind, *, estimate: Estimate | None) -> None:
        """Take in a start that became ready, with what it was estimated to take (None: nobody here did).

        One whose phases are not all known, because its agent found it running, teaches nothing.
        """
        phases_s = status.phases_s
        if StartPhase.FORKING.value not in phases_s or StartPhase.BUILDING.value not in phases_s:
            return
        if estimate is not None:
            self._judge(estimate, sum(phases_s.values()))
        idle = estimate is not None and not estimate.ahead_bytes
        warm = estimate is None or estimate.warming.seconds == 0
        key = (status.spec.digest, kind)
        of_it = self._starts.get(key) or _put(self._starts, key, StartWindow(), KEPT_CHECKPOINTS)
        of_kind = self._starts_of_kind.setdefault(kind, StartWindow())
        for window in (of_it, of_kind):
            window.observe(phases_s, idle=idle, warm=warm)
        self._learnt = replace(
            self._learnt,
            starts=self._times.enter(key, of_it.times, KEPT_CHECKPOINTS),
            starts_of_kind={**self._learnt.starts_of_kind, kind: of_kind.times},
        )

    def _judge(self, estimate: Estimate, measured_s: float) -> None:
        if estimate.guessed:
            self._guessed += 1
        elif measured_s > 0:
            self._errors.note(estimate.total_s, measured_s)

    def _loaded(self, node: NodeName, load: LoadReport) -> None:
        if load.size_bytes <= 0 or load.read_s <= 0:
            return
        key, pace, learnt = (node, load.tier), load.read_s / load.size_bytes, self._learnt
        here = self._reading.get(key) or _put(self._reading, key, Window(), KEPT_NODES)
        anywhere = self._reading_anywhere.setdefault(load.tier, Window())
        # Of a large load less is overhead: it says more of the bandwidth.
        weight = load.size_bytes
        self._learnt = replace(
            learnt,
            reading=self._levels.enter(key, here.observe(pace, weight), KEPT_NODES),
            reading_anywhere={**learnt.reading_anywhere, load.tier: anywhere.observe(pace, weight)},
        )
        if load.number:  # a probe reads a part only
            load_bytes = self._load_bytes.enter((node, load.digest), load.size_bytes, KEPT_CHECKPOINTS)
            self._learnt = replace(self._learnt, load_bytes=load_bytes)

    def _warmed(self, report: NodeReport, now: float) -> None:
        """Time the wait for a warm process, from the first report without one to the first with one."""
        node = report.name
        if not report.warm:
            self._cold_since.setdefault(node, now)
        elif node in self._cold_since:
            seconds = now - self._cold_since.pop(node)
            here = self._warming.get(node) or _put(self._warming, node, Window(), KEPT_NODES)
            warming = _with(self._learnt.warming, node, here.observe(seconds), KEPT_NODES)
            anywhere = self._warming_anywhere.observe(seconds)
            self._learnt = replace(self._learnt, warming=warming, warming_anywhere=anywhere)


class _Kept(Generic[K, V]):
    """What is learnt of many, each time with one more entry: nobody who has the mapping sees it change."""

    def __init__(self) -> None:
        self._table: Table[K, V] = Table()
        self._order: dict[K, None] = {}

    def enter(self, key: K, value: V, kept: int) -> Mapping[K, V]:
        """Return all, as it is now; of more than `kept` the first to have come goes."""
        if key not in self._order and len(self._order) >= kept:
            first = next(iter(self._order))
            del self._order[first], self._table[first]
        self._order[key] = None
        self._table[key] = value
        return self._table.view()


def _with(mapping: Mapping[K, V], key: K, value: V, kept: int) -> dict[K, V]:
    """A copy with one more entry; nobody who has the mapping sees it change."""
    copy = dict(mapping)
    _put(copy, key, value, kept)
    return copy


def _put(mapping: dict[K, V], key: K, value: V, kept: int) -> V:
    """Enter a value; of more than `kept` the first to have come goes."""
    if key not in mapping and len(mapping) >= kept:
        del mapping[next(iter(mapping))]
    mapping[key] = value
    return value
