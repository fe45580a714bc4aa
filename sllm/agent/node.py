"""The parts of a running agent, put together; and the report they add up to."""

from __future__ import annotations

import logging
import secrets

import psutil

from sllm.agent.changes import Changes
from sllm.agent.checkpoints import Checkpoints
from sllm.agent.devices.base import DeviceSource
from sllm.agent.folders import Folders
from sllm.agent.inventory import Facts, Identity, report
from sllm.agent.launching import Launcher
from sllm.agent.probing import first_probe
from sllm.agent.records import Records
from sllm.agent.replicas import Replicas
from sllm.agent.scratch import Scratch
from sllm.agent.store.base import StoreRunner
from sllm.agent.survey import Seen, Survey
from sllm.agent.warm.base import Warm
from sllm.agent.weights import Weights
from sllm.config import AgentConfig, StoreConfig
from sllm.core.grant import POOL_BLOCK_BYTES
from sllm.core.ids import NodeName
from sllm.core.node import LoadReport, NodeReport
from sllm.core.residency import Tier, TierUsage
from sllm.errors import InvalidConfiguration, SllmError
from sllm.loader.store import SsdStore
from sllm.rpc.transport import Tls
from sllm.version import VERSION

log = logging.getLogger(__name__)

_DRAM_SHARE = 4  # of the free memory, one part in so many is the pool, where the configuration does not say


class LocalNode:
    """Make it in the event loop. `changes` is notified, by these parts and by `warm`, when there is news to report."""

    def __init__(
        self,
        config: AgentConfig,
        tls: Tls | None,
        folders: Folders,
        *,
        store_process: StoreRunner,
        devices: DeviceSource,
        warm: Warm,
        changes: Changes,
    ) -> None:
        self.config = config
        self.changes = changes
        self.warm = warm
        self.store = SsdStore(folders.checkpoints, config.store.ssd_bytes)
        self.weights = Weights(store_process, self.store, changes.notify)
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
        self._probe: LoadReport | None = None

    async def _architectures(self) -> tuple[str, ...]:
        try:
            return (await self.warm.ready()).architectures
        except SllmError:
            return ()  # not known: a start will tell

    async def measure_disk(self) -> None:
        """Report a short measurement of the disk as soon as there is a checkpoint to read."""
        try:
            self._probe = await first_probe(self.store, self.changes, self.config.store.read_threads)
        except SllmError as error:
            log.warning("the disk is not measured: %s", error)
        else:
            self.changes.notify()

    def report(self, address: str) -> NodeReport:
        """Return the node as it is now."""
        return report(self._identity(address), self._facts())

    async def close(self, *, stop_hosts: bool) -> None:
        """Stop all that this process runs; engine hosts and the store process are left running unless `stop_hosts`."""
        await self.checkpoints.close()
        if stop_hosts:
            await self.replicas.stop_all()
        else:
            await self.replicas.detach_all()
        await self.warm.close()
        self.records.close()
        await self.weights.close(stop=stop_hosts)
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
        return Facts(
            revision=self.changes.revision,
            warm=self.warm.about,
            devices=self.survey.devices(),
            holders=self.replicas.leases.holders,
            stored=self.store.entries(),
            damaged=self.store.damaged(),
            in_memory=self.weights.in_memory,
            replicas=self.replicas.statuses(),
            ssd=TierUsage(
                tier=Tier.SSD,
                capacity_bytes=self.survey.seen.ssd_capacity_bytes,
                used_bytes=self.store.used_bytes,
            ),
            dram=self.weights.usage,
            loads=self.weights.loads,
            probe=self._probe,
        )


def pool_bytes(config: StoreConfig) -> int:
    """Return the size of the pool, in whole blocks: what the configuration says, or a share of the free memory.

    Raises InvalidConfiguration for more memory than the machine has: filling it would end other processes.
    """
    memory = psutil.virtual_memory()
    if config.dram_bytes > memory.total:
        raise InvalidConfiguration(f"store.dram_bytes is {config.dram_bytes}, the machine has {memory.total}")
    wanted = config.dram_bytes or int(memory.available) // _DRAM_SHARE
    return max(1, wanted // POOL_BLOCK_BYTES) * POOL_BLOCK_BYTES
