"""Names and ids: their types, their grammar, and how ids are made from given randomness."""

from __future__ import annotations

import re
from typing import NewType

from sllm.errors import InvalidArgument

NodeName = NewType("NodeName", str)
CheckpointName = NewType("CheckpointName", str)
DeploymentName = NewType("DeploymentName", str)
DeviceId = NewType("DeviceId", str)
ReplicaId = NewType("ReplicaId", str)  # rep-…
RequestId = NewType("RequestId", str)  # req-…
OperationId = NewType("OperationId", str)  # op-…
MigrationId = NewType("MigrationId", str)  # mig-…

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_NAME = re.compile(_PART)
_DEPLOYMENT_NAME = re.compile(rf"{_PART}(/{_PART})?")
_MAX_NAME_LENGTH = 128


def _checked(kind: str, grammar: re.Pattern[str], value: str, hint: str) -> str:
    if len(value) > _MAX_NAME_LENGTH or not grammar.fullmatch(value):
        raise InvalidArgument(f"{value[:_MAX_NAME_LENGTH]!r} is not a {kind} name", hint=hint)
    return value


_HINT = f"use letters, digits, '.', '_' and '-', beginning with a letter or digit, at most {_MAX_NAME_LENGTH} long"


def node_name(value: str) -> NodeName:
    """Check a node name. Raises InvalidArgument."""
    return NodeName(_checked("node", _NAME, value, _HINT))


def checkpoint_name(value: str) -> CheckpointName:
    """Check a checkpoint name. Raises InvalidArgument."""
    return CheckpointName(_checked("checkpoint", _NAME, value, _HINT))


def deployment_name(value: str) -> DeploymentName:
    """Check a deployment name (an OpenAI model id, which may have one slash). Raises InvalidArgument."""
    return DeploymentName(_checked("deployment", _DEPLOYMENT_NAME, value, f"{_HINT}; one '/' is allowed"))


def make_id(prefix: str, entropy: bytes) -> str:
    """Make an id such as `rep-1f0c…` from at least 6 random bytes that the caller drew."""
    if len(entropy) < 6:
        raise ValueError("an id needs at least 6 bytes of entropy")
    return f"{prefix}-{entropy.hex()}"
