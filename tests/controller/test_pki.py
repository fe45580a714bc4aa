"""The certificate authority: what it signs, and that it is what both ends of a connection accept."""

from __future__ import annotations

import asyncio
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from sllm.controller.pki import (
    AUTHORITY_LIFETIME,
    IDENTITY_LIFETIME,
    SERVER_NAME,
    Credentials,
    Role,
    expires_before,
    issue,
    make_authority,
)
from sllm.errors import InvalidConfiguration, Unavailable
from sllm.rpc import control, transport

NOW = datetime.now(UTC).replace(microsecond=0)
AUTHORITY = make_authority(now=NOW)


def certificate(credentials: Credentials) -> x509.Certificate:
    return x509.load_pem_x509_certificate(credentials.certificate)


def test_the_authority_may_sign_certificates_and_no_further_authority():
    constraints = certificate(AUTHORITY).extensions.get_extension_for_class(x509.BasicConstraints).value
    assert constraints.ca
    assert constraints.path_length == 0
    assert certificate(AUTHORITY).not_valid_after_utc == NOW + AUTHORITY_LIFETIME


def test_a_certificate_names_its_role_and_owner_and_is_signed_by_the_authority():
    issued = certificate(issue(AUTHORITY, Role.NODE, "node-1", now=NOW))
    issued.verify_directly_issued_by(certificate(AUTHORITY))
    names = issued.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://sllm/node/node-1"]
    assert names.get_values_for_type(x509.DNSName) == [SERVER_NAME] == [transport.TLS_SERVER_NAME]
    usages = issued.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(usages) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    assert issued.not_valid_after_utc == NOW + IDENTITY_LIFETIME


def test_a_long_name_is_kept_whole_where_it_counts():
    name = "n" * 128
    names = certificate(issue(AUTHORITY, Role.NODE, name, now=NOW)).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert names.value.get_values_for_type(x509.UniformResourceIdentifier) == [f"spiffe://sllm/node/{name}"]


def test_a_certificate_does_not_outlive_its_authority():
    late = NOW + AUTHORITY_LIFETIME - timedelta(days=1)
    issued = certificate(issue(AUTHORITY, Role.GATEWAY, "gateway", now=late))
    assert issued.not_valid_after_utc == NOW + AUTHORITY_LIFETIME


def test_expiry_is_told():
    assert not expires_before(AUTHORITY, NOW + AUTHORITY_LIFETIME - timedelta(seconds=1))
    assert expires_before(AUTHORITY, NOW + AUTHORITY_LIFETIME)


def test_every_key_is_new():
    keys = {issue(AUTHORITY, Role.NODE, "node-1", now=NOW).key for _ in range(3)}
    assert len(keys) == 3


def test_a_key_is_never_shown():
    assert "KEY" not in repr(AUTHORITY)


@pytest.mark.parametrize(
    "damaged",
    [
        Credentials(certificate=b"", key=b""),
        Credentials(certificate=AUTHORITY.certificate, key=b"no key"),
        Credentials(certificate=AUTHORITY.certificate[:80], key=AUTHORITY.key),
        Credentials(certificate=AUTHORITY.certificate, key=make_authority(now=NOW).key),
    ],
)
def test_a_damaged_authority_signs_nothing(damaged):
    with pytest.raises(InvalidConfiguration, match="damaged"):
        issue(damaged, Role.NODE, "node-1", now=NOW)


def test_openssl_accepts_the_chain_strictly(tmp_path: Path):
    issued = issue(AUTHORITY, Role.CONTROLLER, "controller", now=NOW)
    (tmp_path / "c.pem").write_bytes(issued.certificate)
    (tmp_path / "c.key").write_bytes(issued.key)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "c.pem", tmp_path / "c.key")
    client = ssl.create_default_context(cadata=AUTHORITY.certificate.decode())
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    _handshake(client, server)


def _handshake(client_context: ssl.SSLContext, server_context: ssl.SSLContext) -> None:
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(to_client, to_server, server_hostname=SERVER_NAME)
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    ends, rounds = [client, server], 0
    while ends and rounds < 10:
        rounds += 1
        for end in list(ends):
            try:
                end.do_handshake()
                ends.remove(end)
            except ssl.SSLWantReadError:
                pass
    assert not ends


class _Control:
    """Answers one question; the others are never asked."""

    def __getattr__(self, name: str):
        async def answer(request: object) -> control.RequestList:
            return control.RequestList()

        return answer


def _tls(authority: Credentials, role: Role) -> transport.Tls:
    issued = issue(authority, role, "x", now=NOW)
    return transport.Tls(ca=AUTHORITY.certificate, certificate=issued.certificate, key=issued.key)


async def test_two_members_of_a_cluster_can_talk_and_a_stranger_cannot():
    stranger = make_authority(now=NOW)
    server, port = await transport.serve(
        [control.handlers(_Control())], "127.0.0.1:0", _tls(AUTHORITY, Role.CONTROLLER)
    )
    member = control.ControlClient(f"127.0.0.1:{port}", _tls(AUTHORITY, Role.OPERATOR), peer="the controller")
    other = control.ControlClient(f"127.0.0.1:{port}", _tls(stranger, Role.OPERATOR), peer="the controller")
    try:
        assert await member.list_requests(control.Empty()) == control.RequestList()
        with pytest.raises(Unavailable):
            await other.list_requests(control.Empty())
    finally:
        await asyncio.gather(member.close(), other.close())
        await server.stop(0)
