"""The parts of a running agent, put together; and the report they add up to."""

from __future__ import annotations

import secrets

import psutil

from sllm.agent.changes import Changes
from sllm.agent.checkpoints import Checkpoints
from sllm.agent.devices.base import DeviceSource
from sllm.agent.folders import Folders
from sllm.agent.inventory import Facts, Identity, InMemory, report
from sllm.agent.launching import Launcher
from sllm.agent.records import Records
from sllm.agent.replicas import Replicas
from sllm.agent.scratch import Scratch
from sllm.agent.survey import Seen, Survey
from sllm.agent.warm.base import Warm
from sllm.agent.weights import Weights
from sllm.config import AgentConfig, StoreConfig
from sllm.core.ids import NodeName
from sllm.core.node import NodeReport
from sllm.core.residency import Tier, TierUsage
from sllm.errors import SllmError
from sllm.loader.memory.pool import Pool
from sllm.loader.store import SsdStore
from sllm.rpc.transport import Tls
from sllm.version import VERSION

_DRAM_SHARE = 4  # of the free memory, one part in so many is the pool, where the configuration does not say


class LocalNode:
    """Make it in the event loop. `changes` is notified, by these parts and by `warm`, when there is news to report."""

    def __init__(
        self,
        config: AgentConfig,
        tls: Tls | None,
        folders: Folders,
        *,
        pool: Pool,
        devices: DeviceSource,
        warm: Warm,
        changes: Changes,
    ) -> None:
        self.config = config
        self.changes = changes
        self.warm = warm
        self.store = SsdStore(folders.checkpoints, config.store.ssd_bytes)
        self.weights = Weights(pool, self.store, changes.notify)
        self.records = Records(folders.run)
        store = self.store
        self.survey = Survey(
            lambda: Seen(devices=devices.probe(), ssd_capacity_bytes=store.capacity_bytes), changes.notify
        )
        launcher = Launcher(
            config=config,
            tls=tls,
            warm=warm,
            records=self.records,
            scratch=Scratch(folders.scratch / "replicas"),
            log_folder=folders.log,
        )
        self.replicas = Replicas(launcher, self.weights, self.store, self.survey.devices, self.changes.notify)
        self.checkpoints = Checkpoints(
            self.store,
            self.weights,
            config.sources.roots,
            architectures=self._architectures,
            using=self.replicas.using,
            on_change=self.changes.notify,
        )
        self._incarnation = secrets.token_hex(8)

    async def _architectures(self) -> tuple[str, ...]:
        try:
            return (await self.warm.ready()).architectures
        except SllmError:
            return ()  # not known: a start will tell

    def report(self, address: str) -> NodeReport:
        """Return the node as it is now."""
        return report(self._identity(address), self._facts())

    async def close(self, *, stop_hosts: bool) -> None:
        """Stop all that this process runs; engine hosts are left running unless `stop_hosts`."""
        await self.checkpoints.close()
        if stop_hosts:
            await self.replicas.stop_all()
        else:
            await self.replicas.detach_all()
        await self.warm.close()
        self.records.close()
        self.weights.close()
        self.survey.close()

    def _identity(self, address: str) -> Identity:
        return Identity(
            name=NodeName(self.config.name),
            incarnation=self._incarnation,
            address=address,
            version=VERSION,
            engine=self.config.engine.kind,
        )

    def _facts(self) -> Facts:
        pool = self.weights.pool
        return Facts(
            revision=self.changes.revision,
            warm=self.warm.about,
            devices=self.survey.devices(),
            holders=self.replicas.leases.holders,
            stored=self.store.entries(),
            damaged=self.store.damaged(),
            in_memory=tuple(
                InMemory(digest=held.digest, size_bytes=held.size_bytes, ready=held.ready) for held in pool.regions()
            ),
            replicas=self.replicas.statuses(),
            ssd=TierUsage(
                tier=Tier.SSD,
                capacity_bytes=self.survey.seen.ssd_capacity_bytes,
                used_bytes=self.store.used_bytes,
            ),
            dram=TierUsage(tier=Tier.DRAM, capacity_bytes=pool.budget_bytes, used_bytes=pool.used_bytes),
        )


def open_pool(config: StoreConfig) -> Pool:
    """Return an empty pool with the budget that the configuration gives it."""
    return Pool(config.dram_bytes or _available_bytes() // _DRAM_SHARE, _available_bytes)


def _available_bytes() -> int:
    return int(psutil.virtual_memory().available)
