"""Certificates and keys: what is made, what is refused, and how a server is trusted."""

from __future__ import annotations

import json
import socket
import ssl
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from fedfuse.core.errors import ConfigError
from fedfuse.core.sealing import SigningKey
from fedfuse.runtimes.flower.certificates import make_certificates
from fedfuse.runtimes.flower.trust import (
    Distrust,
    check_client_files,
    check_server_files,
    node_key_bytes,
    probe_server,
    read_members,
)


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trust") / "certs"
    make_certificates(folder, ["a", "b"], ["fed.example.org", "192.0.2.7"])
    return folder


@contextmanager
def tls_server(folder: Path | None, host: str = "127.0.0.1") -> Iterator[int]:
    """Accepts connections on the loopback address, with TLS where there is a certificate."""
    with socket.create_server((host, 0)) as listener:
        context = None
        if folder is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(folder / "server.pem", folder / "server.key")

        def accept() -> None:
            with suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    if context is None:
                        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                    else:
                        context.wrap_socket(connection, server_side=True).close()

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            # Wakes the thread if nobody came.
            with suppress(OSError), socket.create_connection(listener.getsockname(), timeout=1):
                pass
            thread.join()


def test_private_files_are_their_owners_only(certs: Path) -> None:
    private = [*certs.rglob("*.key"), *certs.rglob("*.signing")]
    assert sorted(path.relative_to(certs).as_posix() for path in private) == [
        "a/a.key",
        "a/a.key.signing",
        "b/b.key",
        "b/b.key.signing",
        "ca.key",
        "server.key",
    ]
    assert {stat.S_IMODE(path.stat().st_mode) for path in private} == {0o600}


def test_the_certificate_names_hosts_addresses_and_the_loopback(certs: Path) -> None:
    certificate = x509.load_pem_x509_certificate((certs / "server.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fed.example.org", "localhost"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["192.0.2.7", "127.0.0.1", "::1"]


def test_a_client_gets_both_keys_and_the_list_their_public_parts(certs: Path) -> None:
    member = read_members(certs)["a"]
    private = serialization.load_ssh_private_key((certs / "a" / "a.key").read_bytes(), password=None)
    public = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    assert node_key_bytes(member.node_key, "a") == public
    assert SigningKey.load(certs / "a" / "a.key.signing").public_key == member.signing_key
    assert (certs / "a" / "ca.pem").read_bytes() == (certs / "ca.pem").read_bytes()
    check_client_files(certs / "a" / "ca.pem", certs / "a" / "a.key")
    check_server_files(certs)


def test_new_clients_are_added_and_nothing_is_overwritten(tmp_path: Path) -> None:
    make_certificates(tmp_path, ["a"], ["localhost"])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    make_certificates(tmp_path, ["c"], [])
    assert list(read_members(tmp_path)) == ["a", "c"]
    before.pop(tmp_path / "clients.json")
    assert all(path.read_bytes() == content for path, content in before.items())
    with pytest.raises(ConfigError) as caught:
        make_certificates(tmp_path, ["a"], [])
    assert str(caught.value) == (
        'there are keys of "a" already\n'
        f"  where: {tmp_path / 'a'}\n"
        "  fix:   leave this client out, or delete its folder and its entry in clients.json to make new keys"
    )


def test_the_first_time_needs_a_host(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the server's certificate needs the names that clients reach it by"):
        make_certificates(tmp_path, ["a"], [])


@pytest.mark.parametrize("name", ["../a", "", "a b", ".a"])
def test_names_that_are_no_ids_make_no_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="is no client id"):
        make_certificates(tmp_path / "certs", [name], ["localhost"])
    assert not (tmp_path / "certs").exists()


def test_an_expired_certificate_is_named_with_its_day(tmp_path: Path) -> None:
    make_certificates(tmp_path, ["a"], ["localhost"], valid_days=-1)
    with pytest.raises(ConfigError) as caught:
        check_server_files(tmp_path)
    assert caught.value.what.startswith("the certificate expired on 20")
    assert caught.value.fix == f"delete server.pem and server.key, then: fedfuse certs {tmp_path} --host HOST"


def test_a_missing_certificate_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check_server_files(tmp_path)
    assert caught.value.what == "a file of the server's certificate is missing"
    assert caught.value.where == str(tmp_path / "ca.pem")


def test_damaged_files_are_refused(certs: Path, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="the file holds no certificate"):
        check_client_files(tmp_path / "x", certs / "a" / "a.key")
    with pytest.raises(ConfigError, match="the file holds no key of a node"):
        check_client_files(certs / "ca.pem", tmp_path / "x")
    with pytest.raises(ConfigError, match="cannot read the node's key: No such file or directory"):
        check_client_files(certs / "ca.pem", tmp_path / "y")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the list of clients: No such file or directory"),
        ("{", "this is no list of clients"),
        ("[]", "this is no list of clients"),
        ('{"a": {"node_key": "x"}}', "this is no list of clients"),
        (json.dumps({"a": {"node_key": "x", "signing_key": "00" * 32}}), "'x' is no public key of a node"),
        (json.dumps({"a": {"node_key": "x", "signing_key": "zz"}}), "'zz' is no public key"),
        (json.dumps({"a b": {"node_key": "x", "signing_key": "00" * 32}}), "'a b' is no client id"),
    ],
)
def test_a_list_that_cannot_be_used(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "clients.json").write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_members(tmp_path)
    assert caught.value.what == message


def test_a_server_with_the_right_certificate_is_trusted(certs: Path) -> None:
    with tls_server(certs) as port:
        assert probe_server("127.0.0.1", port, certs / "ca.pem") == ""


def test_a_connection_that_is_cut_in_the_first_words_is_tried_again(certs: Path) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]

    def cut() -> None:
        connection, _ = listener.accept()
        with connection:
            # All of it: what is left unread would be told as a reset.
            connection.recv(65536)

    thread = threading.Thread(target=cut)
    thread.start()
    with listener:
        reason = probe_server("127.0.0.1", port, certs / "ca.pem")
        thread.join(5)
    assert reason == f"127.0.0.1:{port} does not answer: the connection was cut"


def test_a_server_that_is_away_may_come(certs: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    reason = probe_server("127.0.0.1", port, certs / "ca.pem")
    assert reason == f"127.0.0.1:{port} does not answer: Connection refused"


@pytest.mark.parametrize(
    ("valid_days", "hosts", "use_other_ca", "message"),
    [
        (-1, ["127.0.0.1"], False, "the server's certificate has expired"),
        (9, ["127.0.0.1"], True, "the server's certificate is not signed by this ca.pem: "),
    ],
)
def test_distrust_is_told_apart(
    tmp_path: Path, certs: Path, valid_days: int, hosts: list[str], use_other_ca: bool, message: str
) -> None:
    make_certificates(tmp_path, [], hosts, valid_days=valid_days)
    ca = (certs if use_other_ca else tmp_path) / "ca.pem"
    with tls_server(tmp_path) as port, pytest.raises(Distrust) as caught:
        probe_server("127.0.0.1", port, ca)
    assert caught.value.what.startswith(message)


def test_another_host_and_no_tls_are_told_apart(certs: Path) -> None:
    with tls_server(certs, "127.0.0.2") as port, pytest.raises(Distrust) as caught:
        probe_server("127.0.0.2", port, certs / "ca.pem")
    assert caught.value.what.startswith("the server's certificate is for another host: ")
    with tls_server(None) as port, pytest.raises(Distrust) as caught:
        probe_server("127.0.0.1", port, certs / "ca.pem")
    assert caught.value.what == "the server does not speak TLS"
