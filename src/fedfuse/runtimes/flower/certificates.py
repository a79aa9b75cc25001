"""Certificates and keys of a federation, made once and never overwritten."""

from __future__ import annotations

import datetime
import ipaddress
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedfuse.core.cohort import check_client_id
from fedfuse.core.errors import ConfigError
from fedfuse.core.files import write_atomically, write_private
from fedfuse.core.sealing import SigningKey
from fedfuse.runtimes.flower.trust import SIGNING_SUFFIX, Member, ServerFiles, read_members


def make_certificates(folder: Path, clients: Sequence[str], hosts: Sequence[str], *, valid_days: int = 365) -> None:
    """Make what a federation needs and what is not there yet; nothing is ever overwritten.

    Args:
        folder: a certificate authority, the server's certificate and the list of clients come here, and a folder for
            each client with all that it is to be given.
        clients: names of new clients.
        hosts: names and addresses that clients reach the server by; the loopback address is always among them.
        valid_days: how long certificates hold.

    Raises:
        ConfigError: a client has keys already, a name cannot be used, or the folder cannot be written.
    """
    files = ServerFiles(folder)
    for name in clients:
        check_client_id(name)
        if (folder / name).exists():
            raise ConfigError(
                f'there are keys of "{name}" already',
                where=str(folder / name),
                fix="leave this client out, or delete its folder and its entry in clients.json to make new keys",
            )
    if not files.ca.exists():
        _make_authority(files, valid_days)
    if not files.certificate.exists():
        if not hosts:
            raise ConfigError(
                "the server's certificate needs the names that clients reach it by",
                where="--host",
                fix="give --host fed.example.org, or an address such as --host 192.0.2.7",
            )
        _make_server_certificate(files, hosts, valid_days)
    known = read_members(folder) if files.members.exists() else {}
    for name in clients:
        known[name] = _make_client(files, name)
        # After each client, so that a crash leaves no keys that the list does not know.
        _write_members(files, known)


def _make_authority(files: ServerFiles, valid_days: int) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedfuse certificate authority")])
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        _builder(name, name, key, valid_days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    write_private(files.ca_key, _pem(key))
    write_atomically(files.ca, certificate.public_bytes(serialization.Encoding.PEM))


def _make_server_certificate(files: ServerFiles, hosts: Sequence[str], valid_days: int) -> None:
    authority = x509.load_pem_x509_certificate(files.ca.read_bytes())
    signer = serialization.load_pem_private_key(files.ca_key.read_bytes(), password=None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    names = [_general_name(host) for host in dict.fromkeys([*hosts, "localhost", "127.0.0.1", "::1"])]
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedfuse server")])
    certificate = (
        _builder(name, authority.subject, key, valid_days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()),
            critical=False,
        )
        .sign(signer, hashes.SHA256())
    )
    write_private(files.key, _pem(key))
    write_atomically(files.certificate, certificate.public_bytes(serialization.Encoding.PEM))


def _make_client(files: ServerFiles, name: str) -> Member:
    """Two keys in the client's own folder: one opens the connection, one signs what the client says."""
    folder = files.folder / name
    node = ec.generate_private_key(ec.SECP384R1())
    private = node.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    signing = SigningKey.generate()
    write_private(folder / f"{name}.key", private)
    signing.save(folder / f"{name}.key{SIGNING_SUFFIX}")
    write_atomically(folder / "ca.pem", files.ca.read_bytes())
    public = node.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return Member(public.decode("ascii"), signing.public_key)


def _write_members(files: ServerFiles, members: Mapping[str, Member]) -> None:
    table = {
        name: {"node_key": member.node_key, "signing_key": member.signing_key}
        for name, member in sorted(members.items())
    }
    write_atomically(files.members, json.dumps(table, indent=1).encode())


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, valid_days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    end = now + datetime.timedelta(days=valid_days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # Clocks differ.
        .not_valid_before(min(now, end) - datetime.timedelta(hours=1))
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        return x509.DNSName(host)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
