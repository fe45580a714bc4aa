"""Front ends come and go with the route table."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from sllm.core.route import RouteTable
from sllm.errors import NotFound, OperationFailed, Unavailable
from sllm.gateway.frontends import FrontEnds
from sllm.gateway.routes import Routes

COMPLETIONS = "/v1/completions"
ASKED = {"model": "m", "prompt": "x"}


class FrontEnd:
    def __init__(self, recipe: Any) -> None:
        self.recipe = recipe
        self.healthy = True
        self.closed = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        self.closed = True


class Builder:
    def __init__(self) -> None:
        self.made: list[FrontEnd] = []
        self.building = self.most_building = self.tries = 0
        self.problem: Exception | None = None

    async def __call__(self, recipe: Any, sources: tuple[str, ...]) -> FrontEnd:
        self.tries += 1
        self.building += 1
        self.most_building = max(self.building, self.most_building)
        await asyncio.sleep(0)
        self.building -= 1
        if self.problem is not None:
            raise self.problem
        self.made.append(FrontEnd(recipe))
        return self.made[-1]


@pytest.fixture
def builder() -> Builder:
    return Builder()


@pytest.fixture
def routes() -> Routes:
    return Routes(source=None, gateway="g")  # type: ignore[arg-type]  # tables are given by hand


@pytest.fixture
def front_ends(routes: Routes, builder: Builder) -> FrontEnds:
    return FrontEnds(routes, builder, limit=3)


def give(routes: Routes, *table: Any) -> None:
    routes._take(RouteTable(epoch=1, revision=1, routes=table))


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_are_made_when_routes_appear_one_at_a_time(
    front_ends: FrontEnds, routes: Routes, builder: Builder, a_route: Any
) -> None:
    give(routes, a_route("a"), a_route("b"), a_route("c"))
    await settle()
    assert [f.recipe.deployment for f in builder.made] == ["a", "b", "c"]
    assert builder.most_building == 1


async def test_scaling_and_replicas_make_no_new_one(
    front_ends: FrontEnds, routes: Routes, builder: Builder, a_route: Any
) -> None:
    give(routes, a_route("a"))
    await settle()
    give(routes, a_route("a", revision=2, sources=("agent:1",)))
    await settle()
    with front_ends.use("a") as lease:  # type: ignore[arg-type]
        assert await lease.front_end() is builder.made[0]
        assert lease.accepts(2)
    assert len(builder.made) == 1


@pytest.mark.parametrize(
    "change", [{"digest": "sha256-2"}, {"engine_args": {"dtype": "float32"}}, {"max_model_len": 9}]
)
async def test_what_a_front_end_depends_on_makes_a_new_one(
    front_ends: FrontEnds, routes: Routes, builder: Builder, a_route: Any, change: dict[str, Any]
) -> None:
    give(routes, a_route("a"))
    await settle()
    give(routes, a_route("a", revision=2, **change))
    await settle()
    old, new = builder.made
    assert (old.closed, new.closed) == (True, False)


async def test_an_old_one_ends_after_its_last_request(
    front_ends: FrontEnds, routes: Routes, builder: Builder, a_route: Any
) -> None:
    give(routes, a_route("a"))
    with front_ends.use("a") as lease:  # type: ignore[arg-type]
        old = await lease.front_end()
        give(routes, a_route("a", revision=2, digest="sha256-2"))
        await settle()
        assert not builder.made[0].closed
        with front_ends.use("a") as other:  # type: ignore[arg-type]
            assert await other.front_end() is not old
    await settle()
    assert builder.made[0].closed


async def test_a_deleted_deployment_closes_its_own(
    front_ends: FrontEnds, routes: Routes, builder: Builder, a_route: Any
) -> None:
    give(routes, a_route("a"))
    await settle()
    give(routes)
    await settle()
    assert builder.made[0].closed
    with pytest.raises(NotFound), front_ends.use("a"):  # type: ignore[arg-type]
        pass


async def test_one_that_failed_is_tried_again_when_there_are_other_sources(
    front_ends: FrontEnds, routes: Routes, builder: Builder, a_route: Any
) -> None:
    builder.problem = Unavailable("no node")
    give(routes, a_route("a"))
    await settle()
    for _ in range(2):
        with front_ends.use("a") as lease, pytest.raises(OperationFailed, match="no node"):  # type: ignore[arg-type]
            await lease.front_end()
    assert builder.tries == 1
    builder.problem = None
    give(routes, a_route("a", sources=("agent:1",)))
    with front_ends.use("a") as lease:  # type: ignore[arg-type]
        assert await lease.front_end() is builder.made[0]


async def test_one_that_is_not_healthy_is_made_anew(
    front_ends: FrontEnds, routes: Routes, builder: Builder, a_route: Any
) -> None:
    give(routes, a_route("a"))
    await settle()
    builder.made[0].healthy = False
    with front_ends.use("a") as lease:  # type: ignore[arg-type]
        assert await lease.front_end() is builder.made[1]
    await settle()
    assert builder.made[0].closed


async def use(front_ends: FrontEnds, name: Any) -> Any:
    with front_ends.use(name) as lease:
        return await lease.front_end()


def still_open(builder: Builder) -> list[str]:
    return [f.recipe.deployment for f in builder.made if not f.closed]


async def test_of_more_than_the_limit_the_longest_unused_is_closed_and_made_again_on_use(
    front_ends: FrontEnds, routes: Routes, builder: Builder, a_route: Any
) -> None:
    table = [a_route(name) for name in "abcd"]
    give(routes, *table)
    await settle()
    assert still_open(builder) == ["a", "b", "c"]
    for name, left in (("a", "abc"), ("b", "abc"), ("d", "abd"), ("c", "bdc"), ("c", "bdc"), ("a", "dca")):
        await use(front_ends, name)
        await settle()
        assert still_open(builder) == list(left)
    give(routes, *table)
    await settle()
    assert still_open(builder) == ["d", "c", "a"], "a route alone is no use"


async def test_what_is_in_use_is_not_closed(
    front_ends: FrontEnds, routes: Routes, builder: Builder, a_route: Any
) -> None:
    give(routes, *[a_route(name) for name in "abcd"])
    with front_ends.use("a"), front_ends.use("b"), front_ends.use("c"):  # type: ignore[arg-type]
        await use(front_ends, "d")
        assert still_open(builder) == ["a", "b", "c", "d"]
    await settle()
    assert len(still_open(builder)) == 3


async def test_names_the_checkpoints_that_it_may_need(
    front_ends: FrontEnds, routes: Routes, builder: Builder, a_route: Any
) -> None:
    give(routes, a_route("a", digest="old"))
    with front_ends.use("a") as lease:  # type: ignore[arg-type]
        await lease.front_end()
        give(routes, a_route("a", revision=2, digest="new"))
        assert front_ends.digests() == {"old", "new"}
    give(routes, a_route("a", revision=2, digest="new"))
    assert front_ends.digests() == {"new"}


async def test_the_files_of_a_deleted_deployment_go(cluster: Any, a_route: Any, tmp_path: Path) -> None:
    execution = tmp_path / "gateway" / "execution"
    for name in ("sha256-1", "sha256-2"):
        (execution / name).mkdir()
    await cluster.publish(a_route("m"), a_route("n", digest="sha256-2"))
    assert {p.name for p in execution.iterdir()} == {"sha256-1", "sha256-2"}
    await cluster.publish(a_route("m"))
    assert {p.name for p in execution.iterdir() if p.name.startswith("sha256")} == {"sha256-1"}


async def test_while_old_replicas_serve_requests_are_tokenised_for_them(cluster: Any, a_route: Any) -> None:
    _, old = await cluster.host("rep-1")
    await cluster.publish(a_route("m", old))
    assert (await cluster.http.post(COMPLETIONS, json=ASKED)).json()["digest"] == "sha256-1"
    await cluster.publish(a_route("m", old, revision=2, digest="sha256-2"))
    assert (await cluster.http.post(COMPLETIONS, json=ASKED)).json()["digest"] == "sha256-1"
    _, new = await cluster.host("rep-2", revision=2)
    await cluster.publish(a_route("m", old, new, revision=2, digest="sha256-2"))
    assert (await cluster.http.post(COMPLETIONS, json=ASKED)).json()["digest"] == "sha256-2"
    await cluster.publish(a_route("m", new, revision=2, digest="sha256-2"))
    assert [f.closed for f in cluster.builder.made] == [True, False]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_held_over_a_redeploy_is_tokenised_anew(cluster: Any, a_route: Any, stream: bool) -> None:
    full, old = await cluster.host("rep-1", capacity=1)
    full.go.clear()
    await cluster.publish(a_route("m", old))
    first = asyncio.create_task(cluster.http.post(COMPLETIONS, json=ASKED))
    await full.until_running(1)
    held = asyncio.create_task(cluster.http.post(COMPLETIONS, json={**ASKED, "stream": stream}))
    await cluster.controller.until_waiting(1)
    # The old replica drains: it is no target any more, but what runs on it goes on.
    host, new = await cluster.host("rep-2", revision=2)
    await cluster.publish(a_route("m", new, revision=2, digest="sha256-2"))
    answer = await held
    assert answer.status_code == 200
    assert len(host.requests) == 1
    full.go.set()
    assert (await first).json()["digest"] == "sha256-1"
