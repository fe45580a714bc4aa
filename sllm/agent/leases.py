"""Device leases: which replica has which device. Whole devices, one replica each."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from sllm.core.device import Device, DeviceState
from sllm.core.ids import DeviceId, ReplicaId
from sllm.errors import Conflict, NotFound


class Leases:
    """A replica has its devices from `take` to `release`; the caller releases when its process is gone, not before."""

    def __init__(self) -> None:
        self._holders: dict[DeviceId, ReplicaId] = {}

    @property
    def holders(self) -> Mapping[DeviceId, ReplicaId]:
        return self._holders

    def take(self, replica: ReplicaId, wanted: Sequence[DeviceId], devices: Collection[Device]) -> tuple[Device, ...]:
        """Lease all or none. Raises NotFound, Conflict."""
        by_id = {device.id: device for device in devices}
        for wish in wanted:
            self._check(wish, by_id)
        self._holders.update(dict.fromkeys(wanted, replica))
        return tuple(by_id[wish] for wish in wanted)

    def release(self, replica: ReplicaId) -> None:
        self._holders = {device: holder for device, holder in self._holders.items() if holder != replica}

    def _check(self, wish: DeviceId, by_id: Mapping[DeviceId, Device]) -> None:
        if wish not in by_id:
            raise NotFound(f"device {wish} is not on this node", hint=f"it has: {', '.join(by_id)}")
        if wish in self._holders:
            raise Conflict(f"device {wish} is leased to replica {self._holders[wish]}")
        if by_id[wish].state is DeviceState.LOST:
            raise Conflict(f"device {wish} is lost: its driver does not answer for it")
