from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from edge_dkm.errors import BrokerError, UsageError
from edge_dkm.mqtt import await_connack, check_files, open_link
from edge_dkm.settings import MqttSettings, TlsSettings
from tests.broker import Mosquitto

pytestmark = pytest.mark.broker

Key = ec.EllipticCurvePrivateKey
NOW = datetime.datetime.now(datetime.UTC)


@dataclass
class Pki:
    """A certificate authority in a folder."""

    folder: Path
    key: Key
    certificate: x509.Certificate

    @classmethod
    def create(cls, folder: Path, name: str = "ca") -> Pki:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
        )
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        certificate = (
            builder.not_valid_before(NOW - datetime.timedelta(days=1))
            .not_valid_after(NOW + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(True, None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return cls(folder, key, certificate)

    def issue(self, name: str, *, days: int = 1, host: str = "127.0.0.1") -> tuple[Path, Path]:
        """Certificate and key files; negative `days`: expired."""
        key = ec.generate_private_key(ec.SECP256R1())
        start, end = sorted((NOW - datetime.timedelta(days=2), NOW + datetime.timedelta(days=days)))
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(self.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(end)
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(host))]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        paths = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        paths[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return paths


@pytest.fixture
def broker(tmp_path: Path, start_broker: Callable[..., Mosquitto]) -> Callable[..., Mosquitto]:
    """Starts a TLS broker with the given certificate; `demand` asks clients for one of theirs."""
    tmp_path.chmod(0o755)

    def start(ca: Path, certificate: tuple[Path, Path], demand: bool = False) -> Mosquitto:
        for path in (ca, *certificate):
            path.chmod(0o644)
        extra = f"cafile {ca}\ncertfile {certificate[0]}\nkeyfile {certificate[1]}\nallow_anonymous true\nrequire_certificate {'true' if demand else 'false'}\n"
        return start_broker(extra)

    return start


def connect(port: int, **tls: Path) -> bool:
    settings = MqttSettings(host="127.0.0.1", port=port, tls=TlsSettings(**tls))
    link = open_link(settings, "st1", clean=True)
    try:
        await_connack(link, settings)
        return link.connected
    finally:
        link.client.disconnect()


def test_a_broker_with_a_certificate_of_the_right_authority_is_trusted(
    tmp_path: Path, broker: Callable[..., Mosquitto]
) -> None:
    ca = Pki.create(tmp_path / "pki")
    running = broker(ca.folder / "ca.pem", ca.issue("broker"))
    assert connect(running.port, ca=ca.folder / "ca.pem")


def test_a_client_certificate_is_shown_where_it_is_demanded(tmp_path: Path, broker: Callable[..., Mosquitto]) -> None:
    ca = Pki.create(tmp_path / "pki")
    running = broker(ca.folder / "ca.pem", ca.issue("broker"), demand=True)
    certificate, key = ca.issue("st1")
    assert connect(running.port, ca=ca.folder / "ca.pem", cert=certificate, key=key)
    with pytest.raises(BrokerError):
        connect(running.port, ca=ca.folder / "ca.pem")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("authority", "certificate is not valid"),
        ("expired", "certificate has expired"),
        ("host", "IP address mismatch"),
    ],
)
def test_a_wrong_certificate_ends_the_connection_and_is_called_what_it_is(
    tmp_path: Path, broker: Callable[..., Mosquitto], case: str, message: str
) -> None:
    ca, other = Pki.create(tmp_path / "pki"), Pki.create(tmp_path / "other")
    certificate = {
        "authority": lambda: other.issue("broker"),
        "expired": lambda: ca.issue("broker", days=-1),
        "host": lambda: ca.issue("broker", host="10.9.9.9"),
    }
    running = broker(ca.folder / "ca.pem", certificate[case]())
    with pytest.raises(BrokerError, match=message):
        connect(running.port, ca=ca.folder / "ca.pem")


def test_tls_to_a_plain_port_is_an_error_and_never_falls_back(mosquitto: Mosquitto, tmp_path: Path) -> None:
    ca = Pki.create(tmp_path / "pki")
    with pytest.raises(BrokerError, match="TLS|closed|cannot be reached"):
        connect(mosquitto.port, ca=ca.folder / "ca.pem")


def test_files_that_cannot_be_used_stop_the_start(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    for ca in (tmp_path / "ca.pem", tmp_path / "nope.pem"):
        with pytest.raises(UsageError, match=r"mqtt\.tls: .* cannot be used"):
            check_files(MqttSettings(host="h", tls=TlsSettings(ca=ca)))
