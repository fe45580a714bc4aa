"""What the agent asks of devices."""

from __future__ import annotations

from typing import Protocol

from sllm.core.device import Device


class DeviceSource(Protocol):
    """`probe` returns every device as it is now: FREE, or LOST where the driver no longer answers for it.

    Ids and their order never change. Who has leased what is not this source's business.
    """

    def probe(self) -> tuple[Device, ...]: ...
