"""Certificates of a local cluster, in its state folder, readable by the owner alone."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from sllm.cli.private_files import write_private
from sllm.controller.pki import (
    IDENTITY_LIFETIME,
    Credentials,
    Role,
    expires_before,
    issue,
    make_authority,
)


def write_identities(pki: Path, nodes: tuple[str, ...], *, now: datetime) -> None:
    """Give every process of the cluster, and its operator, a new certificate.

    The authority is kept from one run to the next, so that what is left of an earlier run can still be talked to.
    """
    authority = _authority(pki, now)
    members = [(Role.CONTROLLER, "controller"), (Role.GATEWAY, "gateway"), (Role.OPERATOR, "operator")]
    for role, name in members + [(Role.NODE, node) for node in nodes]:
        _write(pki, name, issue(authority, role, name, now=now))


def _authority(pki: Path, now: datetime) -> Credentials:
    certificate, key = pki / "ca.pem", pki / "ca.key"
    if certificate.exists() and key.exists():
        kept = Credentials(certificate=certificate.read_bytes(), key=key.read_bytes())
        if not expires_before(kept, now + IDENTITY_LIFETIME):
            return kept
    made = make_authority(now=now)
    _write(pki, "ca", made)
    return made


def _write(pki: Path, name: str, credentials: Credentials) -> None:
    write_private(pki / f"{name}.key", credentials.key)
    write_private(pki / f"{name}.pem", credentials.certificate)
