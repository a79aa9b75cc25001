"""Who may speak as the server and who as which client: the list of clients, and whether a certificate holds."""

from __future__ import annotations

import datetime
import json
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedfuse.core.cohort import check_client_id
from fedfuse.core.errors import ConfigError, FedfuseError
from fedfuse.core.sealing import check_public_key

SIGNING_SUFFIX = ".signing"
"""The signing key lies beside the node's key, under its name and this."""


class Distrust(FedfuseError):
    """The server's certificate cannot be trusted."""


@dataclass(frozen=True)
class Member:
    """A client on the server's list.

    Args:
        node_key: public key of its SuperNode, as OpenSSH writes it.
        signing_key: public key of its signatures, in hexadecimal.
    """

    node_key: str
    signing_key: str


@dataclass(frozen=True)
class ServerFiles:
    """What the server keeps.

    Args:
        folder: where everything is.
    """

    folder: Path

    @property
    def ca(self) -> Path:
        """The certificate that clients check the server's with."""
        return self.folder / "ca.pem"

    @property
    def ca_key(self) -> Path:
        """The key that makes more server certificates."""
        return self.folder / "ca.key"

    @property
    def certificate(self) -> Path:
        """The server's certificate."""
        return self.folder / "server.pem"

    @property
    def key(self) -> Path:
        """The server's key."""
        return self.folder / "server.key"

    @property
    def members(self) -> Path:
        """The list of the clients that may join, with their public keys."""
        return self.folder / "clients.json"


def read_members(folder: Path) -> dict[str, Member]:
    """The clients that may join, by name.

    Args:
        folder: that ``fedfuse certs`` made.

    Raises:
        ConfigError: there is no such list, or it is damaged.
    """
    path = ServerFiles(folder).members
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        found = {str(name): Member(str(keys["node_key"]), str(keys["signing_key"])) for name, keys in table.items()}
    except OSError as error:
        raise ConfigError(
            f"cannot read the list of clients: {error.strerror}",
            where=str(path),
            fix="make it with fedfuse certs",
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(
            "this is no list of clients",
            where=str(path),
            fix='write {"NAME": {"node_key": "...", "signing_key": "..."}}, or make it with fedfuse certs',
        ) from None
    for name, member in found.items():
        check_client_id(name)
        check_public_key(member.signing_key, f"{path}: {name}: signing_key")
        node_key_bytes(member.node_key, f"{path}: {name}: node_key")
    return dict(sorted(found.items()))


def node_key_bytes(text: str, where: str) -> bytes:
    """A SuperNode's public key as Flower wants it.

    Args:
        text: a line of an OpenSSH public key.
        where: what it is about, for the message.

    Raises:
        ConfigError: it is no elliptic-curve key.
    """
    try:
        key = serialization.load_ssh_public_key(text.encode())
    except (ValueError, UnicodeEncodeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(
            f"{text!r:.60} is no public key of a node", where=where, fix="give the line that fedfuse certs wrote"
        )
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def check_server_files(folder: Path) -> ServerFiles:
    """See that the server's certificate is there and holds today.

    Args:
        folder: that ``fedfuse certs`` made.

    Returns:
        The files.

    Raises:
        ConfigError: a file is missing, damaged, or out of date.
    """
    files = ServerFiles(folder)
    for path in (files.ca, files.certificate, files.key):
        if not path.is_file():
            raise ConfigError(
                "a file of the server's certificate is missing",
                where=str(path),
                fix=f"fedfuse certs {folder} --clients NAME,NAME --host HOST, or --insecure for a trial",
            )
    _check_dates(files.certificate, f"delete server.pem and server.key, then: fedfuse certs {folder} --host HOST")
    _check_dates(files.ca, "make new certificates with fedfuse certs in another folder")
    return files


def check_client_files(ca: Path, key: Path) -> None:
    """See that what a client was given is whole.

    Args:
        ca: the certificate to check the server's with.
        key: the node's private key.

    Raises:
        ConfigError: a file is missing, damaged, or out of date.
    """
    _check_dates(ca, "ask the server's operator for a new ca.pem")
    try:
        private = serialization.load_ssh_private_key(key.read_bytes(), password=None)
    except OSError as error:
        raise ConfigError(
            f"cannot read the node's key: {error.strerror}",
            where=str(key),
            fix="name the .key file that you were given",
        ) from None
    except (ValueError, TypeError):
        private = None
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise ConfigError(
            "the file holds no key of a node", where=str(key), fix="name the .key file that fedfuse certs made"
        )


def probe_server(host: str, port: int, ca: Path, *, timeout_s: float = 10.0) -> str:
    """Try to reach a server and to trust it.

    Args:
        host: its name or address.
        port: its port.
        ca: the certificate to check the server's with.
        timeout_s: longest wait.

    Returns:
        Empty if all is well; why it cannot be reached now, if that may pass.

    Raises:
        Distrust: its certificate cannot be trusted; that does not pass by waiting.
    """
    where = f"{host}:{port}"
    try:
        context = ssl.create_default_context(cafile=str(ca))
        with (
            socket.create_connection((host, port), timeout=timeout_s) as plain,
            context.wrap_socket(plain, server_hostname=host),
        ):
            return ""
    except ssl.SSLCertVerificationError as error:
        raise _distrust(error, where) from None
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
        # A network that breaks in the middle of the first words says nothing of whom they were with.
        return f"{where} does not answer: the connection was cut"
    except ssl.SSLError:
        raise Distrust(
            "the server does not speak TLS",
            where=where,
            fix="check the address; join --insecure only if the operator says that it is a trial",
        ) from None
    except OSError as error:
        return f"{where} does not answer: {error.strerror or error}"


def _distrust(error: ssl.SSLCertVerificationError, where: str) -> Distrust:
    """What a failed check means and what mends it."""
    if error.verify_code == 10:
        return Distrust(
            "the server's certificate has expired", where=where, fix="ask the operator to renew it with fedfuse certs"
        )
    if error.verify_code in (62, 64):
        return Distrust(
            f"the server's certificate is for another host: {error.verify_message}",
            where=where,
            fix="use the name that the operator gave to fedfuse certs --host",
        )
    return Distrust(
        f"the server's certificate is not signed by this ca.pem: {error.verify_message}",
        where=where,
        fix="check the address, and ask the operator for the ca.pem of this server",
    )


def _check_dates(path: Path, fix: str) -> None:
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read the certificate: {error.strerror}", where=str(path), fix=fix) from None
    except ValueError:
        raise ConfigError("the file holds no certificate", where=str(path), fix=fix) from None
    now = datetime.datetime.now(datetime.UTC)
    if now > certificate.not_valid_after_utc:
        raise ConfigError(
            f"the certificate expired on {certificate.not_valid_after_utc:%Y-%m-%d}", where=str(path), fix=fix
        )
    if now < certificate.not_valid_before_utc:
        raise ConfigError(
            f"the certificate holds from {certificate.not_valid_before_utc:%Y-%m-%d} only",
            where=str(path),
            fix="set this machine's clock",
        )
