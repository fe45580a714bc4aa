"""Python's garbage collector, held off."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator

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


@pytest.mark.parametrize("enabled", [True, False])
def test_a_child_forked_while_another_thread_holds_it_off_has_the_setting_of_before(enabled: bool) -> None:
    (gc.enable if enabled else gc.disable)()
    within, forked = threading.Event(), threading.Event()

    def hold() -> None:
        with held_off():
            within.set()
            forked.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    within.wait()
    child = _in_child(lambda: gc.isenabled() is enabled)
    forked.set()
    holder.join()
    assert child
    assert gc.isenabled() == enabled


def test_a_child_forked_within_can_hold_it_off_itself() -> None:
    with held_off():
        assert _in_child(_holds_off)
        assert not gc.isenabled()
    assert gc.isenabled()


def _holds_off() -> bool:
    with held_off():
        held = not gc.isenabled()
    return held and gc.isenabled()


def _in_child(true: Callable[[], bool]) -> bool:
    """Return whether something holds in a child of this process."""
    pid = os.fork()
    if pid == 0:
        os._exit(0 if true() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
