"""Errors across the wire: `SllmError` <-> gRPC status plus one binary trailer that carries reason and hint."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import grpc

from sllm.errors import DeadlineExceeded, SllmError, Unavailable, error_from, outcome_of
from sllm.rpc import common_pb2

DETAIL_KEY = "sllm-error-bin"


def status_of(error: BaseException) -> grpc.StatusCode:
    """Return the gRPC status code for any exception."""
    return cast(grpc.StatusCode, grpc.StatusCode[outcome_of(error).grpc])


def detail_of(error: SllmError) -> common_pb2.ErrorDetail:
    """Return the message that carries an error, also inside token frames."""
    return common_pb2.ErrorDetail(
        reason=error.reason, message=error.message, hint=error.hint, retry_after_s=error.retry_after_s
    )


def error_of(detail: common_pb2.ErrorDetail) -> SllmError:
    """Rebuild the error that `detail_of` packed."""
    retry_after_s = detail.retry_after_s if detail.HasField("retry_after_s") else None
    return error_from(detail.reason, detail.message, hint=detail.hint, retry_after_s=retry_after_s)


def trailer_of(error: SllmError) -> tuple[tuple[str, bytes], ...]:
    """Return the trailing metadata for a failed call."""
    return ((DETAIL_KEY, detail_of(error).SerializeToString()),)


def from_rpc_error(error: grpc.aio.AioRpcError, peer: str) -> SllmError:
    """Turn what a failed call raised into our own error. `peer` says whom the call went to."""
    trailers = cast(Iterable[tuple[str, Any]], error.trailing_metadata() or ())
    for key, value in trailers:
        if key == DETAIL_KEY:
            return error_of(common_pb2.ErrorDetail.FromString(value))
    return _without_detail(error, peer)


def _without_detail(error: grpc.aio.AioRpcError, peer: str) -> SllmError:
    code, text = error.code(), error.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE:
        return Unavailable(f"cannot reach {peer}: {text}", hint="is it running, and is the address right?")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(f"{peer} did not answer in time")
    return SllmError(f"{peer} answered {code.name}: {text}")
