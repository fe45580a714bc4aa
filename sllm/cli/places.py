"""Closing and opening a node, or one device of it."""

from __future__ import annotations

from sllm.cli.failures import reported
from sllm.cli.options import Where
from sllm.cli.output import emit_line
from sllm.cli.session import ask, new_request_id
from sllm.core.ids import DeviceId, NodeName, node_name
from sllm.errors import InvalidArgument


def close_or_open(place: str, where: Where, *, cordoned: bool) -> None:
    from sllm.rpc.control import CordonRequest

    with reported(where.output):
        node, device = parsed(place)
        request = CordonRequest(request_id=new_request_id(), node=node, device=device, cordoned=cordoned)
    ask(where, lambda client: client.cordon(request))
    emit_line(
        where.output,
        line=f"{place} {'cordoned' if cordoned else 'uncordoned'}",
        data={"node": node, "device": device, "cordoned": cordoned},
        name=place,
    )


def parsed(place: str) -> tuple[NodeName, DeviceId | None]:
    """Return what NODE or NODE/DEVICE names; a device's id may have a slash of its own. Raises InvalidArgument."""
    node, slash, device = place.partition("/")
    if slash and not device:
        raise InvalidArgument(f"{place!r} names no device", hint="write NODE, or NODE/DEVICE")
    return node_name(node), DeviceId(device) if slash else None
