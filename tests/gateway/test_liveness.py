"""When an engine host counts as dead: by what it said and when it was due, on a clock that is an argument."""

import pytest

from sllm.errors import EngineFailed, Unavailable
from sllm.gateway.liveness import Liveness


@pytest.fixture
def liveness() -> Liveness:
    return Liveness(silence_s=8.0, stall_s=60.0, now=100.0)


def test_a_silent_host_is_dead_when_its_word_was_due(liveness: Liveness) -> None:
    liveness.heard(1, 102.0)
    assert liveness.due_at == 110.0
    assert liveness.problem(109.9) is None
    problem = liveness.problem(110.0)
    assert isinstance(problem, Unavailable)
    assert problem.message == "it gave no sign of life for 8 s"


def test_an_engine_that_makes_no_step_is_dead_though_its_host_speaks(liveness: Liveness) -> None:
    liveness.heard(1, 101.0)
    for now in range(102, 162, 2):
        assert liveness.problem(now) is None
        liveness.heard(1, now)
    assert liveness.due_at == 161.0
    problem = liveness.problem(161.0)
    assert isinstance(problem, EngineFailed)
    assert problem.message == "its engine made no step for 60 s"


def test_the_first_step_may_take_five_times_as_long(liveness: Liveness) -> None:
    for now in range(102, 400, 2):
        liveness.heard(0, now)
    assert liveness.problem(399.9) is None
    problem = liveness.problem(400.0)
    assert problem is not None
    assert problem.message == "its engine made no step for 300 s"


def test_a_slow_engine_that_steps_is_alive(liveness: Liveness) -> None:
    for step in range(1, 20):
        for beat in range(25):
            now = 100.0 + step * 50 + beat * 2
            liveness.heard(step, now)
            assert liveness.problem(now) is None


def test_time_without_requests_does_not_count(liveness: Liveness) -> None:
    liveness.heard(1, 101.0)
    liveness.begin(1000.0)
    assert liveness.problem(1007.9) is None
    assert liveness.problem(1008.0) is not None


def test_who_looks_too_late_has_stood_still_itself_and_looks_once_more(liveness: Liveness) -> None:
    liveness.heard(1, 101.0)
    assert liveness.problem(150.0) is None
    assert liveness.due_at == 158.0
    assert liveness.problem(158.0) is not None
