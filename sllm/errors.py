"""The only exception tree of sllm.

    SllmError                       internal: a defect of ours
    ├── InvalidArgument             the caller's input is wrong and would stay wrong
    │   ├── InvalidConfiguration    a configuration file or setting is wrong
    │   ├── InvalidCheckpoint       a checkpoint's files are wrong (truncated, inconsistent, hostile)
    │   │   ├── ManifestMissing         there is no manifest: not a checkpoint, or half a one
    │   │   ├── ManifestMalformed       it is not what the format says a manifest is
    │   │   ├── ManifestCorrupt         it is not what was written: its digest does not match
    │   │   ├── TensorMisplaced         a tensor would lie outside its partition, or unaligned
    │   │   ├── TensorMisdescribed      a tensor's size contradicts its dtype, shape and stride
    │   │   ├── PartitionMissing        a partition's file is not there, or is no regular file
    │   │   ├── PartitionTruncated      a partition's file has another length than its manifest says
    │   │   ├── ChunkCorrupt            bytes of a partition are not those that were written
    │   │   ├── ExecutionFileDamaged    an execution file is missing, or not what was written
    │   │   └── CheckpointUnreadable    the disk does not give the bytes back
    │   └── UnsupportedCheckpoint   the files are fine, but nothing here can serve them
    │       ├── FormatTooNew            a later version wrote it
    │       ├── UnknownDtype            a tensor's dtype is none that this version knows
    │       └── StaleLayout             a runtime layout that was made for another engine or setting
    ├── NotFound                    the thing named does not exist
    ├── Conflict                    the thing exists already, or is in a state that forbids this
    │   └── StaleGeneration         a fenced-off owner tried to act
    ├── Unauthenticated             no valid identity was shown
    ├── PermissionDenied            the identity may not do this
    ├── CapacityExceeded            it can never fit (memory, devices, disk)
    ├── QueueFull                   it does not fit right now: try again after `retry_after_s`
    ├── Unavailable                 a process cannot be reached, is shutting down, or has nothing to give just now
    ├── DeadlineExceeded            the time given ran out
    ├── OperationFailed             long work ended in failure
    │   └── EngineFailed            an engine did not start, or died
    └── Cancelled                   somebody asked for the work to stop

Every class has a `reason`: a stable upper-case word that names it on the wire. `OUTCOMES` is the one table from
reason to gRPC status, HTTP status, OpenAI error type and exit code of the CLI.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


class SllmError(Exception):
    """Base of all errors of sllm.

    `message` says what was attempted and what went wrong, in one line; `hint` says what to do about it;
    `retry_after_s` is set where trying again later makes sense.
    """

    reason: ClassVar[str] = "INTERNAL"
    default_hint: ClassVar[str] = ""

    def __init__(self, message: str, *, hint: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.default_hint
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message


class InvalidArgument(SllmError):
    reason = "INVALID_ARGUMENT"


class InvalidConfiguration(InvalidArgument):
    reason = "INVALID_CONFIGURATION"


class InvalidCheckpoint(InvalidArgument):
    reason = "INVALID_CHECKPOINT"
    default_hint = "the files are damaged or incomplete: copy them again from where they came"


class UnsupportedCheckpoint(InvalidArgument):
    reason = "UNSUPPORTED_CHECKPOINT"


_ADD_AGAIN = "add the checkpoint again: sllm checkpoint add"


class ManifestMissing(InvalidCheckpoint):
    reason = "MANIFEST_MISSING"
    default_hint = "make one with `sllm checkpoint convert`, or name the folder that has manifest.json"


class ManifestMalformed(InvalidCheckpoint):
    reason = "MANIFEST_MALFORMED"
    default_hint = _ADD_AGAIN


class ManifestCorrupt(InvalidCheckpoint):
    reason = "MANIFEST_CORRUPT"
    default_hint = _ADD_AGAIN


class TensorMisplaced(InvalidCheckpoint):
    reason = "TENSOR_MISPLACED"
    default_hint = _ADD_AGAIN


class TensorMisdescribed(InvalidCheckpoint):
    reason = "TENSOR_MISDESCRIBED"
    default_hint = _ADD_AGAIN


class PartitionMissing(InvalidCheckpoint):
    reason = "PARTITION_MISSING"
    default_hint = _ADD_AGAIN


class PartitionTruncated(InvalidCheckpoint):
    reason = "PARTITION_TRUNCATED"
    default_hint = _ADD_AGAIN


class ChunkCorrupt(InvalidCheckpoint):
    reason = "CHUNK_CORRUPT"
    default_hint = _ADD_AGAIN


class ExecutionFileDamaged(InvalidCheckpoint):
    reason = "EXECUTION_FILE_DAMAGED"
    default_hint = _ADD_AGAIN


class CheckpointUnreadable(InvalidCheckpoint):
    reason = "CHECKPOINT_UNREADABLE"
    default_hint = "the disk reports errors: see the kernel's log, and add the checkpoint again elsewhere"


class FormatTooNew(UnsupportedCheckpoint):
    reason = "FORMAT_TOO_NEW"
    default_hint = "upgrade sllm on this machine"


class UnknownDtype(UnsupportedCheckpoint):
    reason = "UNKNOWN_DTYPE"
    default_hint = "upgrade sllm and torch on this machine"


class StaleLayout(UnsupportedCheckpoint):
    reason = "STALE_LAYOUT"
    default_hint = "it is made anew from the checkpoint's other layout"


class NotFound(SllmError):
    reason = "NOT_FOUND"


class Conflict(SllmError):
    reason = "CONFLICT"


class StaleGeneration(Conflict):
    reason = "STALE_GENERATION"


class Unauthenticated(SllmError):
    reason = "UNAUTHENTICATED"


class PermissionDenied(SllmError):
    reason = "PERMISSION_DENIED"


class CapacityExceeded(SllmError):
    reason = "CAPACITY_EXCEEDED"


class QueueFull(SllmError):
    reason = "QUEUE_FULL"


class Unavailable(SllmError):
    reason = "UNAVAILABLE"


class DeadlineExceeded(SllmError):
    reason = "DEADLINE_EXCEEDED"


class OperationFailed(SllmError):
    reason = "OPERATION_FAILED"


class EngineFailed(OperationFailed):
    reason = "ENGINE_FAILED"


class Cancelled(SllmError):
    reason = "CANCELLED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one reason looks from outside. `grpc` is the name of a grpc.StatusCode (this module imports nothing)."""

    grpc: str
    http: int
    openai_type: str
    exit_code: int


EXIT_OK = 0
EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_WAIT_TIMEOUT = 124
EXIT_INTERRUPTED = 130

_INVALID = Outcome(grpc="INVALID_ARGUMENT", http=400, openai_type="invalid_request_error", exit_code=EXIT_USAGE)
_FAILED = Outcome(grpc="ABORTED", http=503, openai_type="service_unavailable_error", exit_code=8)

# Ways in which a checkpoint's files can be wrong, or beyond this version: all the caller's input.
_CHECKPOINT_REASONS = (
    "INVALID_CHECKPOINT",
    "MANIFEST_MISSING",
    "MANIFEST_MALFORMED",
    "MANIFEST_CORRUPT",
    "TENSOR_MISPLACED",
    "TENSOR_MISDESCRIBED",
    "PARTITION_MISSING",
    "PARTITION_TRUNCATED",
    "CHUNK_CORRUPT",
    "EXECUTION_FILE_DAMAGED",
    "CHECKPOINT_UNREADABLE",
    "UNSUPPORTED_CHECKPOINT",
    "FORMAT_TOO_NEW",
    "UNKNOWN_DTYPE",
    "STALE_LAYOUT",
)

OUTCOMES: dict[str, Outcome] = {
    **dict.fromkeys(_CHECKPOINT_REASONS, _INVALID),
    "INTERNAL": Outcome(grpc="INTERNAL", http=500, openai_type="server_error", exit_code=EXIT_ERROR),
    "INVALID_ARGUMENT": _INVALID,
    "INVALID_CONFIGURATION": _INVALID,
    "NOT_FOUND": Outcome(grpc="NOT_FOUND", http=404, openai_type="invalid_request_error", exit_code=3),
    "CONFLICT": Outcome(grpc="FAILED_PRECONDITION", http=409, openai_type="conflict_error", exit_code=4),
    "STALE_GENERATION": Outcome(grpc="FAILED_PRECONDITION", http=409, openai_type="conflict_error", exit_code=4),
    "UNAUTHENTICATED": Outcome(grpc="UNAUTHENTICATED", http=401, openai_type="authentication_error", exit_code=5),
    "PERMISSION_DENIED": Outcome(grpc="PERMISSION_DENIED", http=403, openai_type="permission_error", exit_code=5),
    "CAPACITY_EXCEEDED": Outcome(grpc="OUT_OF_RANGE", http=503, openai_type="service_unavailable_error", exit_code=7),
    "QUEUE_FULL": Outcome(grpc="RESOURCE_EXHAUSTED", http=503, openai_type="service_unavailable_error", exit_code=7),
    "UNAVAILABLE": Outcome(grpc="UNAVAILABLE", http=503, openai_type="service_unavailable_error", exit_code=6),
    "DEADLINE_EXCEEDED": Outcome(
        grpc="DEADLINE_EXCEEDED", http=504, openai_type="timeout_error", exit_code=EXIT_WAIT_TIMEOUT
    ),
    "OPERATION_FAILED": _FAILED,
    "ENGINE_FAILED": _FAILED,
    "CANCELLED": Outcome(grpc="CANCELLED", http=499, openai_type="cancelled_error", exit_code=8),
}


def all_errors() -> list[type[SllmError]]:
    """Return every class that has a reason of its own, the base first."""
    found: list[type[SllmError]] = [SllmError]
    for cls in found:
        found.extend(each for each in cls.__subclasses__() if "reason" in vars(each))
    return found


def reasons_of(kind: type[SllmError]) -> frozenset[str]:
    """Return the reasons of a class and of all below it in this module."""
    return frozenset(cls.reason for cls in all_errors() if issubclass(cls, kind) and cls.__module__ == __name__)


def error_from(reason: str, message: str, *, hint: str = "", retry_after_s: float | None = None) -> SllmError:
    """Rebuild an error that crossed a wire; a reason this version does not know becomes a plain `SllmError`."""
    by_reason = {cls.reason: cls for cls in all_errors()}
    return by_reason.get(reason, SllmError)(message, hint=hint, retry_after_s=retry_after_s)


def outcome_of(error: BaseException) -> Outcome:
    """Return the row of `OUTCOMES` for any exception; what is not ours is INTERNAL."""
    reason = error.reason if isinstance(error, SllmError) else "INTERNAL"
    return OUTCOMES[reason]
