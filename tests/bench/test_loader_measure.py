"""The parts of the loader's bench that could flatter or wrong a loader unseen."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

# On the path only for these imports: bench/gateway.py would hide the tests of that name from whoever comes later.
sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))
from loader_measure import PAGE_BYTES, Sample, digest, stretches, touch
from loader_report import Goal, best_of, ratio

sys.path.pop()

Spans = st.lists(st.tuples(st.integers(1, 60 * PAGE_BYTES), st.integers(1, 3 * PAGE_BYTES)), min_size=1, max_size=20)


@given(Spans)
def test_exactly_the_pages_that_hold_a_part_of_a_tensor_are_touched(spans: list[tuple[int, int]]) -> None:
    held = {page for start, size in spans for page in range(start // PAGE_BYTES, (start + size - 1) // PAGE_BYTES + 1)}
    touched = [
        page for start, end in stretches(sorted(spans)) for page in range(start // PAGE_BYTES, end // PAGE_BYTES)
    ]
    assert sorted(touched) == sorted(held)


def test_touching_reads_the_tensors() -> None:
    pages = torch.zeros(8 * PAGE_BYTES, dtype=torch.uint8)
    offset = -pages.data_ptr() % PAGE_BYTES  # the first byte of a page
    pages[offset + 3 * PAGE_BYTES] = 7
    assert touch({"a": pages[offset : offset + PAGE_BYTES], "b": pages[offset + 2 * PAGE_BYTES :]}) >= 7


def test_a_digest_tells_apart_names_dtypes_shapes_and_bytes_but_not_orders() -> None:
    a, b = torch.arange(6), torch.zeros(2)
    assert digest({"a": a, "b": b}) == digest({"b": b, "a": a})
    others = [
        {"a": b, "b": a},
        {"a": a.reshape(2, 3), "b": b},
        {"a": a, "b": b.view(torch.int32)},
        {"a": a, "b": b + 1},
        {"a": a},
    ]
    assert digest({"a": a, "b": b}) not in {digest(other) for other in others}


def sample(seconds: float) -> Sample:
    return Sample(seconds=seconds, cpu_s=0)


def test_a_ratio_compares_within_rounds_because_machines_drift() -> None:
    samples = {"slow": [sample(2), sample(20), sample(6)], "fast": [sample(1), sample(10), sample(2)]}
    assert ratio(samples, "slow", "fast") == 2
    assert best_of(samples, ["slow", "fast"]) == "fast"


@pytest.mark.parametrize(("at_least", "value", "met"), [(True, 2, True), (True, 0.9, False), (False, 0.9, True)])
def test_a_goal_is_a_floor_or_a_ceiling(at_least: bool, value: float, met: bool) -> None:
    assert Goal(what="x", target=1, value=value, at_least=at_least).met is met
