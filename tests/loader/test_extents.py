"""Free space: taken and given back."""

from __future__ import annotations

import pytest

from sllm.core.grant import Extent
from sllm.loader.memory.extents import FreeSpace

ALL = (Extent(0, 80),)


def test_takes_the_smallest_hole_that_fits_and_else_few_large_ones() -> None:
    space = FreeSpace((Extent(0, 40), Extent(50, 10), Extent(70, 20)), 10)
    assert space.take(20) == (Extent(70, 20),)
    assert space.take(50) == (Extent(0, 40), Extent(50, 10))
    with pytest.raises(ValueError, match="10 bytes of 0 free"):
        space.take(10)


def test_one_piece_is_had_or_nothing_is_taken() -> None:
    space = FreeSpace((Extent(0, 40), Extent(50, 20)), 10)
    assert space.largest_bytes == 40
    assert space.take_piece(50) is None
    assert space.size_bytes == 60
    assert space.take_piece(20) == Extent(50, 20)
    assert space.take_piece(10) == Extent(0, 10)
    assert space.extents == (Extent(10, 30),)


def test_memory_that_comes_back_is_merged_with_its_neighbours() -> None:
    space = FreeSpace(ALL, 10)
    assert space.take(80) == ALL
    assert (space.extents, space.largest_bytes) == ((), 0)
    for number in (0, 2, 1):
        space.give_back(Extent(number * 10, 10))
    space.give_back(Extent(30, 50))
    assert space.extents == ALL


@pytest.mark.parametrize("extent", [Extent(10, 10), Extent(0, 80), Extent(70, 20)])
def test_memory_cannot_come_back_twice(extent: Extent) -> None:
    space = FreeSpace(ALL, 10)
    with pytest.raises(AssertionError):
        space.give_back(extent)


@pytest.mark.parametrize("extent", [Extent(40, 10), Extent(35, 10), Extent(0, 5), Extent(0, 0), Extent(70, 20)])
def test_what_is_not_free_or_no_whole_units_cannot_be_removed(extent: Extent) -> None:
    space = FreeSpace((Extent(0, 40), Extent(50, 30)), 10)
    with pytest.raises(ValueError, match="is not free"):
        space.remove([extent])
    assert space.size_bytes == 70
