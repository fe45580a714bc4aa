"""Device leases."""

from __future__ import annotations

import pytest

from sllm.agent.devices.fake import FakeDevices
from sllm.agent.leases import Leases
from sllm.core.ids import DeviceId, ReplicaId
from sllm.errors import Conflict, NotFound

ONE, OTHER = ReplicaId("rep-1"), ReplicaId("rep-2")
A, B = DeviceId("fake-0"), DeviceId("fake-1")


def test_a_device_has_one_holder_until_it_is_released() -> None:
    leases, devices = Leases(), FakeDevices(2).probe()
    assert [device.id for device in leases.take(ONE, [A], devices)] == [A]
    with pytest.raises(Conflict, match="leased to replica rep-1"):
        leases.take(OTHER, [A], devices)
    leases.release(ONE)
    leases.take(OTHER, [A], devices)


def test_all_or_none_are_leased() -> None:
    leases, devices = Leases(), FakeDevices(2).probe()
    leases.take(ONE, [B], devices)
    with pytest.raises(Conflict):
        leases.take(OTHER, [A, B], devices)
    assert leases.holders == {B: ONE}


def test_a_device_must_be_there_and_not_lost() -> None:
    leases, devices = Leases(), FakeDevices(2)
    with pytest.raises(NotFound, match="fake-9"):
        leases.take(ONE, [DeviceId("fake-9")], devices.probe())
    devices.lose(A)
    with pytest.raises(Conflict, match="lost"):
        leases.take(ONE, [A], devices.probe())
