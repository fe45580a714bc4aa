"""How recomputes enter vLLM's scheduler: one at a time, behind requests, and beside them in pieces."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from sllm.core.tokens import Finish, FinishReason, Prefill, TokenRequest
from sllm.engine.base import Output
from sllm.errors import EngineFailed

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("vllm")]

BLOCK = 32


@dataclass
class Scheduler:
    """vLLM's, as far as it is asked: how many requests run and wait, and how much of a prompt is cached."""

    running: int = 0
    waiting: int = 0
    max_num_running_reqs: int = 8
    cached: int = 0
    entered: list[Any] = field(default_factory=list)

    @property
    def kv_cache_manager(self) -> Scheduler:
        return self

    def get_request_counts(self) -> tuple[int, int]:
        return self.running, self.waiting

    def get_computed_blocks(self, request: Any) -> tuple[None, int, int]:
        return None, min(self.cached, (request.num_tokens - 1) // BLOCK * BLOCK), 0

    def done(self) -> Output:
        """Say that what entered last has been computed."""
        request = self.entered[-1]
        cached = self.get_computed_blocks(request)[1]
        self.cached = request.num_tokens // BLOCK * BLOCK
        return Output(
            key=request.key,
            token_ids=[7],
            finish=Finish(reason=FinishReason.LENGTH),
            prefill=Prefill(num_prompt_tokens=request.num_tokens, num_cached_tokens=cached),
        )


def recomputes(scheduler: Scheduler, *, whole: bool = False) -> Any:
    from sllm.engine.vllm_recompute import Entrance, Recomputes

    def prepare(key: int, request: TokenRequest, params: Any) -> Any:
        assert params.max_tokens == 1
        return SimpleNamespace(key=key, num_tokens=len(request.token_ids))

    return Recomputes(Entrance(prepare=prepare, enter=scheduler.entered.append), block_size=BLOCK, whole=whole)


def played(held: Any, scheduler: Scheduler) -> tuple[list[int], Output]:
    """Let it be computed to its end: the sizes of its pieces, and what came of it."""
    sizes: list[int] = []
    while True:
        held.enter(scheduler)
        sizes.append(scheduler.entered[-1].num_tokens)
        output = held.strip(scheduler.done())
        if output is not None:
            return sizes, output


def test_beside_requests_it_enters_in_pieces_each_of_which_finds_those_before_in_the_cache() -> None:
    scheduler = Scheduler(running=2, cached=64)
    held = recomputes(scheduler)
    held.hold(5, list(range(500)), "")
    sizes, output = played(held, scheduler)
    assert sizes == [192, 320, 448, 500]
    assert output == Output(
        key=5,
        token_ids=[],
        finish=Finish(reason=FinishReason.LENGTH),
        prefill=Prefill(num_prompt_tokens=500, num_cached_tokens=64),
    )
    assert not held.held


def test_alone_a_short_one_enters_at_once() -> None:
    scheduler = Scheduler()
    held = recomputes(scheduler)
    held.hold(5, list(range(500)), "")
    assert played(held, scheduler)[0] == [500]


def test_alone_a_long_one_keeps_who_comes_next_waiting_for_a_piece_only() -> None:
    scheduler = Scheduler()
    held = recomputes(scheduler)
    held.hold(5, list(range(3000)), "")
    assert played(held, scheduler)[0] == [1024, 2048, 3000]


def test_a_scheduler_that_divides_prompts_itself_gets_the_whole() -> None:
    scheduler = Scheduler(running=2)
    held = recomputes(scheduler, whole=True)
    held.hold(5, list(range(5000)), "")
    assert played(held, scheduler)[0] == [5000]


def test_what_ends_with_a_piece_is_not_divided_further() -> None:
    scheduler = Scheduler(running=2)
    held = recomputes(scheduler)
    held.hold(5, list(range(256)), "")
    assert played(held, scheduler)[0] == [128, 256]


@pytest.mark.parametrize("busy", [{"waiting": 1}, {"running": 8}])
def test_requests_go_first_also_between_pieces(busy: dict[str, int]) -> None:
    scheduler = Scheduler(running=2)
    held = recomputes(scheduler)
    held.hold(5, list(range(500)), "")
    held.enter(scheduler)
    assert held.strip(scheduler.done()) is None
    for name, value in busy.items():
        setattr(scheduler, name, value)
    held.enter(scheduler)
    assert len(scheduler.entered) == 1
    assert held.held, "it is not forgotten"


def test_one_enters_at_a_time() -> None:
    scheduler = Scheduler()
    held = recomputes(scheduler)
    held.hold(5, list(range(64)), "")
    held.hold(6, list(range(64)), "")
    held.enter(scheduler)
    held.enter(scheduler)
    assert len(scheduler.entered) == 1
    output = held.strip(scheduler.done())
    assert output is not None
    assert output.key == 5
    held.enter(scheduler)
    assert len(scheduler.entered) == 2


def test_a_piece_under_way_is_dropped_with_its_recompute() -> None:
    scheduler = Scheduler(running=1)
    held = recomputes(scheduler)
    held.hold(5, list(range(500)), "")
    held.hold(6, list(range(10)), "")
    held.enter(scheduler)
    assert held.forget([6, 1]) == []
    assert held.forget([5]) == [scheduler.entered[0].key]
    late = scheduler.done()
    assert held.strip(late) == late, "the engine's last word of it is nobody's"
    held.enter(scheduler)
    assert len(scheduler.entered) == 1


def test_a_failed_piece_is_the_end_of_it() -> None:
    scheduler = Scheduler(running=1)
    held = recomputes(scheduler)
    held.hold(5, list(range(500)), "")
    held.enter(scheduler)
    failed = scheduler.done()
    failed.finish = Finish(reason=FinishReason.ERROR, error=EngineFailed("no memory"))
    output = held.strip(failed)
    assert output is not None
    assert (output.key, output.finish) == (5, failed.finish)
    assert not held.held


def test_pieces_are_never_taken_for_requests() -> None:
    scheduler = Scheduler(running=1)
    held = recomputes(scheduler)
    held.hold(5, list(range(500)), "")
    played(held, scheduler)
    keys = [request.key for request in scheduler.entered]
    assert len(set(keys)) == len(keys)
    assert all(key < 0 for key in keys), "the host counts its own upwards"


def test_one_that_the_engine_does_not_take_ends_with_its_error_and_lets_the_next_in() -> None:
    from sllm.engine.vllm_recompute import Entrance, Recomputes

    scheduler = Scheduler()

    def enter(request: Any) -> None:
        if request.num_tokens == 13:
            raise EngineFailed("not this one")
        scheduler.entered.append(request)

    def prepare(key: int, request: TokenRequest, params: Any) -> Any:
        return SimpleNamespace(key=key, num_tokens=len(request.token_ids))

    held = Recomputes(Entrance(prepare=prepare, enter=enter), block_size=BLOCK, whole=False)
    held.hold(5, list(range(13)), "")
    held.hold(6, list(range(14)), "")
    output = held.enter(scheduler)
    assert output is not None
    assert output.finish is not None
    assert (output.key, output.finish.reason) == (5, FinishReason.ERROR)
    assert held.enter(scheduler) is None
    assert [request.num_tokens for request in scheduler.entered] == [14]
