"""The cluster's certificate authority: makes keys and signs certificates. It keeps nothing; callers store the bytes.

A certificate names a role and a name (`spiffe://sllm/node/node-1`), never a host: nodes have no stable DNS names. All
of them also carry the one server name that clients check, `sllm.internal`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sllm.errors import InvalidConfiguration

SERVER_NAME = "sllm.internal"
AUTHORITY_LIFETIME = timedelta(days=3650)
IDENTITY_LIFETIME = timedelta(days=365)
# Clocks differ a little between servers: a certificate is valid from a moment ago.
_BACKDATED = timedelta(minutes=5)


class Role(StrEnum):
    CONTROLLER = "controller"
    GATEWAY = "gateway"
    NODE = "node"
    OPERATOR = "operator"


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes

    def __repr__(self) -> str:
        return "Credentials(…)"  # a key must never reach a log


def make_authority(*, now: datetime) -> Credentials:
    """Make a new certificate authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("sllm cluster authority")
    builder = (
        _builder(name, name, key.public_key(), now, now + AUTHORITY_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
    )
    return _signed(builder, key, key)


def issue(authority: Credentials, role: Role, name: str, *, now: datetime) -> Credentials:
    """Make a key and a certificate for `name` in `role`, good for both ends of a connection.

    Raises InvalidConfiguration if `authority` is not one.
    """
    issuer, issuer_key = _loaded(authority)
    key = ec.generate_private_key(ec.SECP256R1())
    expires = min(now + IDENTITY_LIFETIME, issuer.not_valid_after_utc)
    names = [x509.DNSName(SERVER_NAME), x509.UniformResourceIdentifier(f"spiffe://sllm/{role}/{name}")]
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    builder = (
        _builder(_name(f"{role}/{name}"), issuer.subject, key.public_key(), now, expires)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    return _signed(builder, key, issuer_key)


def expires_before(credentials: Credentials, moment: datetime) -> bool:
    """Return whether the certificate is no longer valid at `moment`. Raises InvalidConfiguration if it is none."""
    certificate, _ = _loaded(credentials)
    return certificate.not_valid_after_utc <= moment


def _loaded(credentials: Credentials) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    try:
        certificate = x509.load_pem_x509_certificate(credentials.certificate)
        key = serialization.load_pem_private_key(credentials.key, password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise ValueError("the key is not the certificate's")
    except (ValueError, TypeError) as error:
        raise InvalidConfiguration(f"the certificate authority's files are damaged: {error}") from error
    return certificate, key


def _name(common_name: str) -> x509.Name:
    # X.509 limits a common name to 64 characters; the URI beside it has the whole name.
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, expires: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(expires)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _signed(
    builder: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey, signer: ec.EllipticCurvePrivateKey
) -> Credentials:
    certificate = builder.sign(signer, hashes.SHA256())
    return Credentials(
        certificate=certificate.public_bytes(serialization.Encoding.PEM),
        key=key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
    )
