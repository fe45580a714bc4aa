"""Python's garbage collector, held off."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from sllm.loader.collector import held_off


@pytest.fixture(autouse=True)
def _enabled() -> Iterator[None]:
    gc.enable()
    yield
    gc.enable()


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_is_collected_within_and_the_setting_is_kept(enabled: bool) -> None:
    (gc.enable if enabled else gc.disable)()
    with held_off():
        assert not gc.isenabled()
    assert gc.isenabled() == enabled


def test_an_error_gives_the_setting_back_too() -> None:
    with pytest.raises(LookupError), held_off():
        raise LookupError
    assert gc.isenabled()


def test_the_collector_stays_off_until_the_last_of_several_is_done() -> None:
    one, other = held_off(), held_off()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert not gc.isenabled()
    other.__exit__(None, None, None)
    assert gc.isenabled()
