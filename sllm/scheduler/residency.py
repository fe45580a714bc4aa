"""Where checkpoints are to lie before anybody asks: in the memory of which nodes, and on whose disks beside those that
have them. By popularity times reload cost, with hysteresis (docs/decisions/0018-residency-by-popularity.md). Pure.

What a node evicts when a start needs its memory is its own choice (`sllm.loader.tiers`), and no checkpoint leaves a
disk by itself (docs/decisions/0009-what-is-evicted.md).
"""

from __future__ import annotations

from sllm.core.snapshot import Snapshot
from sllm.scheduler.interest import interests
from sllm.scheduler.prefetching import prefetches
from sllm.scheduler.residency_plan import Recent, ResidencyPlan
from sllm.scheduler.spreading import copies

EVERY_S = 5.0
"""Between two decisions. What they rest on changes with each request, and only slowly."""


def enabled(snapshot: Snapshot) -> bool:
    """True if the policy allows anything that is decided here."""
    return snapshot.policy.prefetch or snapshot.policy.max_copies > 1


def decide(snapshot: Snapshot, recent: Recent, now: float, *, copying: bool = False) -> ResidencyPlan:
    """Return what is to be read ahead and copied now. `copying`: copies are being made or removed; one at a time is.

    The same arguments give the same plan.
    """
    if not snapshot.settled or not enabled(snapshot) or not snapshot.popularity:
        return ResidencyPlan()
    found, policy = interests(snapshot, now), snapshot.policy
    return ResidencyPlan(
        prefetches=prefetches(snapshot, found, recent, now) if policy.prefetch else (),
        copies=copies(snapshot, found, recent, now) if policy.max_copies > 1 and not copying else (),
    )
