"""Brings open requests to replicas: at once where there is room, else when there is; and to other replicas when theirs
hands them over (a planned move), turns them away or is lost.

Wherever a request goes on, it goes on from its journals: the tokens that have come are in them, and nothing else of the
old replica is needed. What failures mean is decided in `recovery`. Requests of this gateway that wait for a deployment
are served in order, those that have had tokens first: room that a finished request leaves goes to the first of them
without asking the controller.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterable

from sllm.core.ids import DeploymentName, ReplicaId, RequestId
from sllm.core.route import Route, RouteTarget
from sllm.errors import EngineFailed, NotFound, OperationFailed, SllmError, Unavailable
from sllm.gateway.balancer import choose, is_stranded
from sllm.gateway.connection import Connection
from sllm.gateway.connections import Connections
from sllm.gateway.hold import Hold
from sllm.gateway.open_requests import OpenRequests
from sllm.gateway.recovery import Trouble, Verdict, trouble_of
from sllm.gateway.request import OpenRequest, Sequence
from sllm.gateway.routes import Routes

log = logging.getLogger(__name__)

_MAX_RESTARTS = 3
_ASK_AGAIN_S = 1.0


class Dispatcher:
    """Counts how many requests run on each replica; `requests` are all that are open.

    A request that has lost its replica has `recover_timeout_s` to go on elsewhere.
    """

    def __init__(self, *, routes: Routes, connections: Connections, hold: Hold, recover_timeout_s: float) -> None:
        self._routes = routes
        self._connections = connections
        self._hold = hold
        self._recover_timeout_s = recover_timeout_s
        self.requests = OpenRequests()
        self._held: dict[DeploymentName, dict[RequestId, OpenRequest]] = {}
        self._load: Counter[ReplicaId] = Counter()
        self._reached: dict[DeploymentName, Route] = {}
        self._draining: SllmError | None = None
        routes.subscribe(self._on_routes)

    # --- a request's life ------------------------------------------------------------------

    def open(self, request: OpenRequest) -> None:
        self.requests.add(request)

    def submit(self, sequence: Sequence) -> None:
        """Take a sequence that a front end wants run. What goes wrong comes as its output, never as an exception."""
        request = sequence.request
        if self._draining is not None:
            self.fail(request, self._draining)
        if request.is_over:
            sequence.put_failure()
            return
        request.add(sequence)
        if request.target is not None:
            self._run(request, request.target, [sequence])
        elif request.asking is None:
            self._place_or_hold(request)

    def abort(self, sequences: Iterable[Sequence]) -> None:
        """Stop sequences that their front end wants no more of."""
        for sequence in sequences:
            if sequence.connection is not None:
                sequence.connection.abort([sequence])
            sequence.request.remove(sequence)
            self._settle(sequence.request)

    def close(self, request: OpenRequest) -> None:
        """The answer is over, or its client is gone: free at once all that the request holds."""
        if request.closed:
            return
        request.closed = True
        self._stop(request)
        self.requests.remove(request)

    def fail(self, request: OpenRequest, error: SllmError) -> None:
        """End a request with an error: its sequences end as failed, its front end passes that on."""
        if not request.is_over:
            level = logging.WARNING if isinstance(error, OperationFailed) else logging.INFO
            log.log(level, "%s for %r failed: %s", request.id, request.deployment, error.message)
            request.failure = error
            self._stop_as_failed(request)

    async def drain(self, *, within_s: float) -> None:
        """Fail what waits, let run what runs, fail what still runs when the time is over."""
        error = self._draining = Unavailable("the gateway is shutting down", retry_after_s=1.0)
        for request in [r for held in self._held.values() for r in held.values()]:
            self.fail(request, error)
        try:
            await asyncio.wait_for(self.requests.none_left(), within_s)
        except TimeoutError:
            log.warning("%d requests were still running after %.0f s", len(self.requests), within_s)
            for request in self.requests.unfinished():
                self.fail(request, error)

    # --- Listener ----------------------------------------------------------------------------

    def finished(self, sequence: Sequence) -> None:
        sequence.request.remove(sequence)
        self._settle(sequence.request)

    def failed(self, sequence: Sequence, connection: Connection, error: SllmError) -> None:
        request, target = sequence.request, connection.target
        if request.is_over or request.target is None or sequence.connection is not None:
            return  # with another of its sequences this request is past that replica already
        trouble = trouble_of(error, broken=connection.broken, reached=connection.reached)
        if connection.broken:
            error = EngineFailed(f"{target.replica} on {target.node} was lost: {error.message}")
        self._recover(request, target, trouble, error)

    def moved(self, request: OpenRequest, connection: Connection, target: RouteTarget) -> None:
        source = request.target
        if request.is_over or source is None or source.replica != connection.target.replica:
            return
        if target.revision != source.revision and not request.accepts(target.revision):
            error = EngineFailed(f"it was moved to {target.replica}, which serves another revision")
            self._recover(request, source, Trouble.DIED, error)
            return
        log.info("%s goes on on %s, not on %s", request.id, target.replica, source.replica)
        self._take_off(request)
        request.interrupted()
        self._place(request, target)
        self._offer_room(request.deployment)

    # --- placing -----------------------------------------------------------------------------

    def _place_or_hold(self, request: OpenRequest) -> None:
        held = self._held.get(request.deployment)
        target = None if held else self._room_for(request)
        if target is not None:
            self._place(request, target)
            return
        self._held.setdefault(request.deployment, {})[request.id] = request
        request.phase = "waiting for a replica"
        request.asking = asyncio.create_task(self._ask(request))

    def _room_for(self, request: OpenRequest) -> RouteTarget | None:
        route = self._routes.get(request.deployment)
        if route is None:
            return None
        return choose(route.targets, self._load, accepts=request.accepts, avoid=request.avoid)

    def _place(self, request: OpenRequest, target: RouteTarget) -> None:
        self._unhold(request)
        self._run(request, target, list(request.sequences.values()))

    def _run(self, request: OpenRequest, target: RouteTarget, sequences: list[Sequence]) -> None:
        if request.target is None:
            request.place(target)
            self.requests.placed()
            self._load[target.replica] += 1
            self._reach(request.deployment)
        connection = self._connections.to(target, self)
        for sequence in sequences:
            connection.start(sequence)

    def _reach(self, deployment: DeploymentName) -> None:
        """Have a stream to each of its replicas: who has to go on elsewhere must not wait for handshakes first."""
        route = self._routes.get(deployment)
        if route is None or route is self._reached.get(deployment):
            return
        self._reached[deployment] = route
        for target in route.targets:
            self._connections.to(target, self)

    async def _ask(self, request: OpenRequest) -> None:
        try:
            target = await self._hold.acquire(request)
            if target.replica in request.avoid:
                # The controller does not know yet what happened to it. It may also have been a passing trouble.
                await self._routes.changed(within_s=_ASK_AGAIN_S)
                request.avoid.clear()
                target = await self._hold.acquire(request)
        except SllmError as error:
            self.fail(request, error)
        except Exception:
            log.exception("asking for a replica for %s failed", request.id)
            self.fail(request, SllmError("asking for a replica failed"))
        else:
            if request.accepts(target.revision):
                self._place(request, target)
            else:
                self._restart(request, target.revision)

    def _recover(self, request: OpenRequest, lost: RouteTarget, trouble: Trouble, error: SllmError) -> None:
        """Have a request go on elsewhere that cannot where it runs, or end it with `error`."""
        verdict = request.troubles.add(trouble, request.output_tokens)
        if verdict is Verdict.FAIL:
            self.fail(request, _last_word(request, trouble, error))
            return
        log.info("%s goes on elsewhere, not on %s: %s", request.id, lost.replica, error.message)
        if verdict is Verdict.GO_ON_AFRESH:
            request.deadline = asyncio.get_running_loop().time() + self._recover_timeout_s
        request.avoid.add(lost.replica)
        request.interrupted()
        self._take_off(request)
        self._place_or_hold(request)
        self._offer_room(request.deployment)

    def _restart(self, request: OpenRequest, revision: int) -> None:
        """Only replicas of another revision are there: its tokens mean nothing to them. It must be tokenised anew."""
        if request.output_tokens:
            gone = f"{request.deployment!r} was replaced: no replica of revision {revision} can go on with this answer"
            self.fail(request, Unavailable(gone, retry_after_s=1.0))
            return
        if request.restarts == _MAX_RESTARTS:
            self.fail(request, Unavailable(f"{request.deployment!r} is being replaced", retry_after_s=1.0))
            return
        request.restarts += 1
        request.restart, request.revision = True, revision
        self._stop_as_failed(request)

    # --- giving back -------------------------------------------------------------------------

    def _stop(self, request: OpenRequest) -> list[Sequence]:
        self._unhold(request)
        stopped = list(request.sequences.values())
        self._release(request)
        for sequence in stopped:
            request.remove(sequence)
        return stopped

    def _stop_as_failed(self, request: OpenRequest) -> None:
        """Let its front end end its answer; why is in the request."""
        for sequence in self._stop(request):
            sequence.put_failure()

    def _release(self, request: OpenRequest) -> None:
        """Take a request off its replica for good."""
        if self._take_off(request):
            self._offer_room(request.deployment)

    def _take_off(self, request: OpenRequest) -> bool:
        """Take a request off its replica, if it is on one; its sequences are not forgotten."""
        running: dict[Connection, list[Sequence]] = {}
        for sequence in request.sequences.values():
            if sequence.connection is not None:
                running.setdefault(sequence.connection, []).append(sequence)
        for connection, sequences in running.items():
            connection.abort(sequences)
        if request.target is None:
            return False
        replica, request.target = request.target.replica, None
        self._load[replica] -= 1
        if not self._load[replica]:
            del self._load[replica]
        return True

    def _settle(self, request: OpenRequest) -> None:
        if not request.sequences:
            self._unhold(request)
            self._release(request)

    def _unhold(self, request: OpenRequest) -> None:
        held = self._held.get(request.deployment, {})
        held.pop(request.id, None)
        if not held:
            self._held.pop(request.deployment, None)
        asking, request.asking = request.asking, None
        if asking is not None and asking is not asyncio.current_task():
            asking.cancel()

    def _offer_room(self, deployment: DeploymentName) -> None:
        held = self._held.get(deployment, {}).values()
        for request in sorted(held, key=lambda each: each.output_tokens == 0):
            target = self._room_for(request)
            if target is not None:
                self._place(request, target)
                continue
            route = self._routes.get(deployment)
            if route is not None and is_stranded(route, request.accepts):
                self._restart(request, route.deployment.revision)

    # --- routes ------------------------------------------------------------------------------

    def _on_routes(self) -> None:
        targets = {t.replica for route in self._routes.all() for t in route.targets}
        self._connections.keep(targets)
        self._reached = {}
        for deployment in {request.deployment for request in self.requests.unfinished()}:
            self._reach(deployment)
        for deployment in list(self._held):
            if self._routes.get(deployment) is None:
                for request in list(self._held[deployment].values()):
                    self.fail(request, NotFound(f"the model {deployment!r} was deleted"))
            else:
                self._offer_room(deployment)


def _last_word(request: OpenRequest, trouble: Trouble, error: SllmError) -> SllmError:
    """Return what its client is told of a request that goes on nowhere any more."""
    if trouble is Trouble.DIED:
        return EngineFailed(f"{error.message}; so ended {request.troubles.deaths} replicas in a row with this request")
    if trouble is Trouble.REFUSED:
        return Unavailable(f"{request.deployment!r}: {error.message}", retry_after_s=1.0)
    return error
