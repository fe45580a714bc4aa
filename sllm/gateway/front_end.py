"""What a front end is: what it depends on, how it is called, who makes it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol

from sllm.core.ids import DeploymentName
from sllm.core.route import Route

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All that a front end depends on. Two revisions with one recipe share a front end."""

    deployment: DeploymentName
    digest: str
    max_model_len: int
    engine_args: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, route: Route) -> Recipe:
        spec = route.deployment.spec
        return cls(
            deployment=spec.name,
            digest=route.deployment.digest,
            max_model_len=route.max_model_len,
            engine_args=tuple(sorted(spec.engine_args.items())),
        )


class FrontEnd(Protocol):
    """An ASGI application that serves one deployment. One that is not `healthy` any more is remade."""

    @property
    def healthy(self) -> bool: ...
    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None: ...
    async def close(self) -> None: ...


class Builder(Protocol):
    """Makes a front end. `sources` are agents that hold the execution files. Raises SllmError."""

    async def __call__(self, recipe: Recipe, sources: tuple[str, ...]) -> FrontEnd: ...
