"""TLS between the processes of one cluster: certificates made from the cluster secret. No sockets, no gRPC.

Whoever holds the secret derives the same certificate authority and signs itself a certificate with a key of its own,
in memory. So both ends of a connection prove that they hold the secret, one process needs nothing from another, and no
key is ever stored or sent. The certificates say that a process belongs to the cluster; who it is, the protocols
inside say.
"""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from baton.auth import derive

SERVER_NAME: Final = "baton.cluster"
"""The name in every certificate: clients expect it, whatever address they dialled."""
_NOT_BEFORE: Final = datetime(2000, 1, 1)
_NOT_AFTER: Final = datetime(9999, 12, 31, 23, 59, 59)  # RFC 5280, 4.1.2.5: it has no good expiration date
_P256_ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


@dataclass(frozen=True, slots=True)
class ClusterIdentity:
    """What one process shows to others of its cluster, and how it knows them. PEM."""

    authority_pem: bytes
    certificate_pem: bytes
    private_key_pem: bytes = field(repr=False)


def make_identity(secret: bytes) -> ClusterIdentity:
    """A fresh key and certificate for this process, under the authority that `secret` defines."""
    # Slow to import, and needed only where the cluster is encrypted.
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def certificate(subject: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        key_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
        return (
            x509.CertificateBuilder(subject_name=subject, issuer_name=authority_name, public_key=key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(_NOT_BEFORE)
            .not_valid_after(_NOT_AFTER)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(key_id, critical=False)
        )

    def usage(*, signs_certificates: bool) -> x509.KeyUsage:
        others = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "crl_sign")
        rest = dict.fromkeys((*others, "encipher_only", "decipher_only"), False)
        return x509.KeyUsage(digital_signature=not signs_certificates, key_cert_sign=signs_certificates, **rest)

    seed = derive(secret, "certificate authority v1") + derive(secret, "certificate authority v1, more")
    authority_key = ec.derive_private_key(int.from_bytes(seed) % (_P256_ORDER - 1) + 1, ec.SECP256R1())
    authority_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "baton cluster authority")])
    authority = (
        certificate(authority_name, authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage(signs_certificates=True), critical=True)
        .sign(authority_key, SHA256())
    )
    key = ec.generate_private_key(ec.SECP256R1())
    purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    leaf = (
        certificate(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, SERVER_NAME)]), key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(SERVER_NAME)]), critical=False)
        .sign(authority_key, SHA256())
    )
    private_key_pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return ClusterIdentity(authority.public_bytes(Encoding.PEM), leaf.public_bytes(Encoding.PEM), private_key_pem)


def ssl_context(identity: ClusterIdentity, *, server_side: bool) -> ssl.SSLContext:
    """TLS 1.3 with certificates on both sides; a peer that is not of the cluster fails the handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=identity.authority_pem.decode())
    if server_side:
        context.num_tickets = 0  # connections live long: nobody resumes a session
    fd = os.memfd_create("baton-identity", os.MFD_CLOEXEC)  # the library takes nothing but a file
    try:
        os.write(fd, identity.certificate_pem + identity.private_key_pem)
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
    return context
