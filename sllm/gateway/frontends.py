"""The front ends, one per deployment: made when its route appears, remade when a redeploy changes what it depends on.
Of more than a limit the longest unused are closed, and made again when they are asked for.

While replicas of two revisions serve, two front ends of a deployment may live side by side, because tokens made for
one may mean nothing to the other. A front end that is no longer wanted is closed when its requests are over.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from sllm.core.ids import DeploymentName
from sllm.core.route import Route
from sllm.errors import NotFound, OperationFailed, SllmError
from sllm.gateway.front_end import Builder, FrontEnd, Recipe
from sllm.gateway.routes import Routes

log = logging.getLogger(__name__)

_BUILD_AGAIN_S = 5.0


@dataclass(slots=True, eq=False)
class _Build:
    task: asyncio.Task[FrontEnd]
    sources: tuple[str, ...]
    ended_at: float = 0.0
    used: int = 0  # a number that grows with each use of any


@dataclass(slots=True, eq=False)
class _Slot:
    """The front ends of one deployment. `recipes` maps each revision seen to its recipe."""

    wanted: Recipe
    sources: tuple[str, ...] = ()
    serving: frozenset[int] = frozenset()
    recipes: dict[int, Recipe] = field(default_factory=dict)
    builds: dict[Recipe, _Build] = field(default_factory=dict)
    users: Counter[Recipe] = field(default_factory=Counter)
    deleted: bool = False

    def pick(self, revision: int | None) -> Recipe:
        """Return the recipe for a new request: that of `revision` if it is asked for, else of what serves now."""
        if revision in self.recipes:
            return self.recipes[revision]
        served = {self.recipes[r] for r in self.serving if r in self.recipes}
        if self.wanted in served:
            return self.wanted
        return next((recipe for recipe in [*self.builds, *self.recipes.values()] if recipe in served), self.wanted)

    def accepts(self, recipe: Recipe, revision: int) -> bool:
        return self.recipes.get(revision) == recipe

    def is_needed(self, recipe: Recipe) -> bool:
        if self.users[recipe] > 0:
            return True
        if self.deleted:
            return False
        return recipe == self.wanted or any(self.recipes.get(r) == recipe for r in self.serving)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A front end to use, once it is made, and which revisions its tokens are good for."""

    accepts: Callable[[int], bool]
    build: asyncio.Task[FrontEnd]

    @property
    def is_made(self) -> bool:
        return self.build.done()

    async def front_end(self) -> FrontEnd:
        """Raises why it could not be made."""
        return await asyncio.shield(self.build)


class FrontEnds:
    """Makes, hands out and closes front ends, following the route table."""

    def __init__(self, routes: Routes, build: Builder, *, limit: int) -> None:
        self._routes = routes
        self._build = build
        self._limit = limit
        self._uses = itertools.count(1)
        self._slots: dict[DeploymentName, _Slot] = {}
        self._one_at_a_time = asyncio.Lock()
        self._closing: set[asyncio.Task[None]] = set()
        routes.subscribe(self._on_routes)

    @contextmanager
    def use(self, deployment: DeploymentName, revision: int | None = None) -> Iterator[Lease]:
        """Give a front end of a deployment. Raises NotFound."""
        slot = self._slots.get(deployment)
        if slot is None:
            raise NotFound(f"the model {deployment!r} does not exist")
        recipe = slot.pick(revision)
        slot.users[recipe] += 1
        try:
            build = self._started(slot, recipe)
            build.used = next(self._uses)
            self._evict()
            yield Lease(build=build.task, accepts=lambda other: slot.accepts(recipe, other))
        finally:
            slot.users[recipe] -= 1
            self._sweep(deployment, slot)
            self._evict()

    def digests(self) -> set[str]:
        """Return the checkpoints that front ends are, or may be, made from."""
        recipes = (recipe for slot in self._slots.values() for recipe in [*slot.recipes.values(), *slot.builds])
        return {recipe.digest for recipe in recipes}

    async def close(self) -> None:
        """Close all."""
        for deployment, slot in list(self._slots.items()):
            slot.deleted = True
            slot.users.clear()
            self._sweep(deployment, slot)
        if self._closing:
            await asyncio.wait(self._closing)

    def _on_routes(self) -> None:
        routes = {route.deployment.spec.name: route for route in self._routes.all()}
        for deployment, route in routes.items():
            slot = self._slots.get(deployment)
            if slot is None or slot.deleted:
                slot = self._slots[deployment] = _Slot(wanted=Recipe.of(route))
            self._update(slot, route)
        for deployment, slot in list(self._slots.items()):
            slot.deleted = deployment not in routes
            self._sweep(deployment, slot)

    def _update(self, slot: _Slot, route: Route) -> None:
        slot.wanted = Recipe.of(route)
        slot.recipes[route.deployment.revision] = slot.wanted
        slot.serving = frozenset(target.revision for target in route.targets)
        slot.sources = route.sources
        keep = {route.deployment.revision, *slot.serving}
        slot.recipes = {revision: recipe for revision, recipe in slot.recipes.items() if revision in keep}
        if slot.builds or self._count() < self._limit:
            self._started(slot, slot.wanted)

    def _started(self, slot: _Slot, recipe: Recipe) -> _Build:
        """Return the build of a recipe, begun now if there is none or the last one is of no use."""
        build = slot.builds.get(recipe)
        if build is None or self._is_stale(build, slot):
            if build is not None:
                self._discard(build)
            task = asyncio.create_task(self._make(recipe, slot.sources))
            build = slot.builds[recipe] = _Build(task, slot.sources)
            task.add_done_callback(_ended(build))
        return build

    def _is_stale(self, build: _Build, slot: _Slot) -> bool:
        if not build.task.done():
            return False
        if build.task.cancelled():
            return True
        if build.task.exception() is None:
            return not build.task.result().healthy
        waited_s = asyncio.get_running_loop().time() - build.ended_at
        return build.sources != slot.sources or waited_s > _BUILD_AGAIN_S

    async def _make(self, recipe: Recipe, sources: tuple[str, ...]) -> FrontEnd:
        async with self._one_at_a_time:
            try:
                return await self._build(recipe, sources)
            except SllmError as error:
                reason = error.message
                problem = OperationFailed(
                    f"the front end of {recipe.deployment!r} could not be made: {reason}",
                    hint=error.hint,
                    retry_after_s=_BUILD_AGAIN_S,
                )
                log.error("%s", problem.message)
                raise problem from error

    def _sweep(self, deployment: DeploymentName, slot: _Slot) -> None:
        for recipe in [recipe for recipe in slot.builds if not slot.is_needed(recipe)]:
            self._discard(slot.builds.pop(recipe))
        if slot.deleted and not slot.builds and self._slots.get(deployment) is slot:
            del self._slots[deployment]

    def _count(self) -> int:
        return sum(len(slot.builds) for slot in self._slots.values())

    def _evict(self) -> None:
        """Close the longest unused while there are more than the limit. Those in use stay."""
        excess = self._count() - self._limit
        if excess <= 0:
            return
        idle = [
            (build.used, slot, recipe)
            for slot in self._slots.values()
            for recipe, build in slot.builds.items()
            if not slot.users[recipe]
        ]
        for _, slot, recipe in sorted(idle, key=lambda row: row[0])[:excess]:
            log.info("the front end of %s is closed: others were used since", recipe.deployment)
            self._discard(slot.builds.pop(recipe))

    def _discard(self, build: _Build) -> None:
        task = asyncio.create_task(_close(build))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


def _ended(build: _Build) -> Callable[[asyncio.Task[FrontEnd]], None]:
    def note(task: asyncio.Task[FrontEnd]) -> None:
        build.ended_at = task.get_loop().time()
        if not task.cancelled():
            task.exception()  # whoever waits for it gets it; nobody may

    return note


async def _close(build: _Build) -> None:
    build.task.cancel()
    try:
        front_end = await build.task
    except (asyncio.CancelledError, Exception):  # it was never made; whoever waited for it knows why
        return
    await front_end.close()
