"""Explanations and dry runs as tables and as JSON: what was predicted beside what came, and why other nodes lost."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sllm.cli.options import Where
from sllm.cli.output import Table, emit
from sllm.cli.rows import Row, request_row
from sllm.cli.session import ask
from sllm.cli.units import size_text, time_text
from sllm.core.replica import StartPhase
from sllm.core.startup import Basis, Estimate, Part

if TYPE_CHECKING:
    from sllm.core.decision import Candidate, Decision, DeploymentPlan, Explanation
    from sllm.rpc.control import ControlClient

NONE = "-"
BAR = 16  # characters: both waterfalls fit into 80 columns
PHASES = tuple(phase.value for phase in StartPhase if phase is not StartPhase.READY)


def preview(where: Where, question: Callable[[ControlClient], Awaitable[DeploymentPlan]]) -> None:
    """Print what a change would do, and when it would be ready."""
    plan = ask(where, question)
    names = [start.node for start in plan.starts]
    emit(where.output, tables=_plan_tables(plan), data=plan_object(plan), names=names)


def tables(found: Explanation) -> tuple[Table, ...]:
    """What it is; the newest start as a waterfall, with its candidates; all starts; where the next one would be."""
    parts = [_facts(found)]
    if found.decisions:
        newest = found.decisions[0]
        parts += [_waterfall(newest), candidates(newest.candidates, f"CANDIDATES OF {newest.replica}", newest.omitted)]
    if len(found.decisions) > 1:
        parts.append(_starts(found.decisions))
    parts.append(candidates(found.candidates, "IF A REPLICA WERE STARTED NOW"))
    return tuple(parts)


def explanation_object(found: Explanation) -> Row:
    """Return the object of `sllm explain`."""
    return {
        "deployment": found.deployment,
        "waits_for": found.waits_for,
        "request": request_row(found.request) if found.request else None,
        "held_at": _date(found.held_at),
        "granted_at": _date(found.granted_at),
        "decisions": [_decision_object(decision) for decision in found.decisions],
        "candidates": [_candidate_object(candidate) for candidate in found.candidates],
    }


def plan_object(plan: DeploymentPlan) -> Row:
    """Return the object of a dry run of deploy or scale."""
    starts = [
        {"node": s.node, "devices": list(s.devices), "why": s.why, "estimate": estimate_object(s.estimate)}
        for s in plan.starts
    ]
    return {
        "deployment": plan.deployment,
        "revision": plan.revision,
        "ready_s": plan.ready_s,
        "waits_for": plan.waits_for,
        "starts": starts,
        "stops": [asdict(stop) for stop in plan.stops],
        "candidates": [_candidate_object(candidate) for candidate in plan.candidates],
    }


def estimate_object(estimate: Estimate | None) -> Row | None:
    if estimate is None:
        return None
    parts = {
        name: {"seconds": part.seconds, "basis": part.basis.value, "observations": part.observations}
        for name, part in estimate.parts.items()
    }
    return {
        "total_s": estimate.total_s,
        "guessed": estimate.guessed,
        "parts": parts,
        "phases_s": estimate.phases_s,
        "tier": estimate.tier.name.lower(),
        "size_bytes": estimate.size_bytes,
        "ahead_bytes": estimate.ahead_bytes,
    }


def _decision_object(decision: Decision) -> Row:
    return {
        "replica": decision.replica,
        "deployment": decision.deployment,
        "revision": decision.revision,
        "node": decision.node,
        "devices": list(decision.devices),
        "priority": decision.priority.name.lower(),
        "decided_at": time_text(decision.decided_at),
        "why": decision.why,
        "estimate": estimate_object(decision.estimate),
        "candidates": [_candidate_object(candidate) for candidate in decision.candidates],
        "omitted": decision.omitted,
        "state": decision.state.value if decision.state else None,
        "phases_s": dict(decision.phases_s),
        "measured_s": _measured_s(decision),
        "ready_at": _date(decision.ready_at),
        "error": decision.error,
    }


def _candidate_object(candidate: Candidate) -> Row:
    return {
        "node": candidate.node,
        "taken": candidate.refused == "",
        "refused": candidate.refused,
        "waits_on": candidate.waits_on.value if candidate.waits_on else None,
        "estimate": estimate_object(candidate.estimate),
    }


def _measured_s(decision: Decision) -> float | None:
    """What the whole start took; None: it did not come to its end."""
    return sum(decision.phases_s.values()) if decision.ready_at is not None and decision.phases_s else None


def _date(at: float | None) -> str | None:
    return None if at is None else time_text(at)


# -- tables


def _facts(found: Explanation) -> Table:
    facts = [("waits for", found.waits_for or NONE)]
    if request := found.request:
        facts.append(("request", f"{request.id}, {request.state.value}"))
        facts.append(("replica", f"{request.replica} on {request.node}" if request.replica else NONE))
    if found.held_at is not None:
        facts.append(("held at", _date(found.held_at) or NONE))
    if found.granted_at is not None and found.held_at is not None:
        facts.append(("granted at", f"{_date(found.granted_at)}, after {found.granted_at - found.held_at:.2f} s"))
    return Table(columns=("DEPLOYMENT", found.deployment), rows=tuple(facts))


def _plan_tables(plan: DeploymentPlan) -> tuple[Table, ...]:
    guess = "~" if any(start.estimate and start.estimate.guessed for start in plan.starts) else ""
    facts = (
        ("revision", str(plan.revision)),
        ("ready in", f"{guess}{_seconds(plan.ready_s)}" if plan.starts else "(nothing would be started)"),
        ("waits for", plan.waits_for or NONE),
    )
    starts = Table(
        title="WOULD BE STARTED",
        columns=("NODE", "DEVICES", "WHY"),
        rows=tuple((start.node, ", ".join(start.devices), start.why) for start in plan.starts),
    )
    stops = Table(
        title="WOULD BE STOPPED",
        columns=("REPLICA", "DEPLOYMENT", "NODE", "WHY"),
        rows=tuple((stop.replica, stop.deployment, stop.node, stop.why) for stop in plan.stops),
    )
    next_one = candidates(plan.candidates, "IF A REPLICA WERE STARTED NOW")
    return (Table(columns=("DEPLOYMENT", plan.deployment), rows=facts), starts, stops, next_one)


def _waterfall(decision: Decision) -> Table:
    """The phases of a start, each beginning where the one before it ends: as predicted, and as they came."""
    predicted = decision.estimate.phases_s if decision.estimate else {}
    came = decision.phases_s
    scale = max(sum(predicted.values()), sum(came.values()))
    bars = _bars(predicted, scale), _bars(came, scale)
    rows = [
        (phase, _seconds(predicted.get(phase)), bars[0][phase], _seconds(came.get(phase)), bars[1][phase])
        for phase in PHASES
    ]
    outcome = "as it came" if decision.ready_at is not None else decision.error or "so far"
    total = ("all", _sum(predicted), "", _sum(came), outcome)
    when = f" at {time_text(decision.decided_at)}" if decision.decided_at else ""
    return Table(
        title=f"START OF {decision.replica} ON {decision.node}{when}",
        columns=("PHASE", "PREDICTED", "", "MEASURED", ""),
        rows=(*rows, total),
    )


def _bars(phases_s: Mapping[str, float], scale: float) -> dict[str, str]:
    bars, before = {}, 0.0
    for phase in PHASES:
        seconds = phases_s.get(phase, 0.0)
        begin = min(round(BAR * before / scale), BAR - 1) if scale else 0
        length = max(1, round(BAR * (before + seconds) / scale) - begin) if scale and seconds else 0
        # What is blank at the beginning of a cell is not printed.
        bars[phase] = ("·" * begin + "█" * length).ljust(BAR, "·") if phases_s else ""
        before += seconds
    return bars


def candidates(found: Iterable[Candidate], title: str, omitted: int = 0) -> Table:
    rows = [_candidate(candidate) for candidate in found]
    if omitted:
        rows.append((f"and {omitted} more", *[""] * 7))
    return Table(
        title=title,
        columns=("NODE", "READY IN", "QUEUED", "WARMING", "FORKING", "LOADING", "BUILDING", "WHY NOT"),
        rows=tuple(rows),
        empty="(no node holds the checkpoint, or it is not known)",
    )


def _candidate(candidate: Candidate) -> tuple[str, ...]:
    estimate = candidate.estimate
    if estimate is None:
        return (candidate.node, *[NONE] * 6, candidate.refused)
    guess = "~" if estimate.guessed else ""
    reads = f" (reads {size_text(estimate.size_bytes)} from {estimate.tier.name})" if estimate.size_bytes else ""
    why = candidate.refused or "taken"
    return (
        candidate.node,
        f"{guess}{estimate.total_s:.2f} s",
        *(_part(part) for part in estimate.parts.values()),
        f"{why}{reads}",
    )


def _part(part: Part) -> str:
    """A guess is marked as one; so is what was measured of something alike."""
    mark = {Basis.GUESSED: "~", Basis.SIMILAR: "≈"}.get(part.basis, "")
    return f"{mark}{part.seconds:.2f}"


def _starts(decisions: Iterable[Decision]) -> Table:
    return Table(
        title="LAST STARTS",
        columns=("REPLICA", "NODE", "DECIDED", "PREDICTED", "MEASURED", "OUTCOME"),
        rows=tuple(_start(decision) for decision in decisions),
    )


def _start(decision: Decision) -> tuple[str, ...]:
    estimate, measured_s = decision.estimate, _measured_s(decision)
    guess = "~" if estimate and estimate.guessed else ""
    state = decision.state.value if decision.state else "gone"
    return (
        decision.replica,
        decision.node,
        time_text(decision.decided_at) or NONE,
        f"{guess}{_seconds(estimate.total_s)}" if estimate else NONE,
        _seconds(measured_s),
        f"{state}: {decision.error}" if decision.error else state,
    )


def _seconds(seconds: float | None) -> str:
    return NONE if seconds is None else f"{seconds:.2f} s"


def _sum(phases_s: Mapping[str, Any]) -> str:
    return _seconds(sum(phases_s.values()) if phases_s else None)
