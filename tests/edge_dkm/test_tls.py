"""TLS towards a real Mosquitto: each cause has its own code, and nothing ever goes out in plain text."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from configs import load_text
from edge_dkm.errors import BrokerError, UsageError
from edge_dkm.mqtt import link as mqtt_module
from edge_dkm.mqtt import publisher as publisher_module
from edge_dkm.mqtt import tls as tls_module
from edge_dkm.mqtt.link import await_connack, check_files, open_link
from edge_dkm.settings import LineSettings, MqttSettings, TlsSettings
from tests.broker import Mosquitto
from tests.stations import Station
from tests.waiting import wait_until

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

    def issue(
        self, name: str, *, days: tuple[int, int] = (-2, 1), host: str = "127.0.0.1", dns: str | None = None
    ) -> tuple[Path, Path]:
        """Certificate and key files; `days`: valid from and until, seen from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        start, end = (NOW + datetime.timedelta(days=day) for day in days)
        who: x509.GeneralName = x509.DNSName(dns) if dns else x509.IPAddress(ip_address(host))
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(self.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(end)
            .add_extension(x509.SubjectAlternativeName([who]), critical=False)
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


Start = Callable[..., Mosquitto]


@pytest.fixture
def ca(tmp_path: Path) -> Pki:
    """The authority that the station trusts."""
    return Pki.create(tmp_path / "pki")


@pytest.fixture
def broker(tmp_path: Path, start_broker: Start) -> Start:
    """Starts a TLS broker with the given certificate; `demand` asks clients for one of theirs."""
    tmp_path.chmod(0o755)

    def start(ca: Path, certificate: tuple[Path, Path], demand: bool = False) -> Mosquitto:
        for path in (ca, *certificate):
            path.chmod(0o644)
        extra = f"cafile {ca}\ncertfile {certificate[0]}\nkeyfile {certificate[1]}\nallow_anonymous true\nrequire_certificate {'true' if demand else 'false'}\n"
        return start_broker(extra)

    return start


def connect(port: int, host: str = "127.0.0.1", **tls: Path) -> bool:
    settings = MqttSettings(
        host=host, port=port, tls=TlsSettings(**tls) if tls else None, username="st1", password="pass-word-1"
    )
    link = open_link(settings, "st1", clean=True)
    try:
        await_connack(link, settings)
        return link.connected
    finally:
        link.client.disconnect()


def failure(port: int, host: str = "127.0.0.1", **tls: Path) -> BrokerError:
    with pytest.raises(BrokerError) as caught:
        connect(port, host, **tls)
    return caught.value


class Listener:
    """Accepts, records what comes and answers with `answer` or nothing; then hangs up, or keeps silent for good."""

    def __init__(self, answer: bytes = b"", hangs_up: bool = True) -> None:
        self.received: list[bytes] = []
        self.at_s: list[float] = []
        self.answer, self._hangs_up = answer, hangs_up
        self._closed = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._socket.getsockname()[1])
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            self.at_s.append(time.monotonic())
            with client, contextlib.suppress(OSError):
                client.settimeout(2)
                self.received.append(client.recv(65536))
                client.sendall(self.answer)
                if not self._hangs_up:
                    self._closed.wait(20)

    def close(self) -> None:
        self._closed.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(10)


@pytest.fixture
def listen() -> Iterator[Callable[..., Listener]]:
    """Starts listeners; closed at the end."""
    running: list[Listener] = []

    def start(answer: bytes = b"", hangs_up: bool = True) -> Listener:
        running.append(Listener(answer, hangs_up))
        return running[-1]

    yield start
    for listener in running:
        listener.close()


def test_a_broker_with_a_certificate_of_the_right_authority_is_trusted(ca: Pki, broker: Start) -> None:
    running = broker(ca.folder / "ca.pem", ca.issue("broker"))
    assert connect(running.port, ca=ca.folder / "ca.pem")


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_a_client_certificate_is_shown_where_it_is_demanded_and_its_absence_is_said(
    ca: Pki, broker: Start, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    limit_version(monkeypatch, version)
    running = broker(ca.folder / "ca.pem", ca.issue("broker"), demand=True)
    certificate, key = ca.issue("st1")
    assert connect(running.port, ca=ca.folder / "ca.pem", cert=certificate, key=key)
    for _ in range(5):  # with TLS 1.3 the alert races with the reset that our first words cause
        error = failure(running.port, ca=ca.folder / "ca.pem")
        assert error.code == "M-TLS-CLIENT" and "set mqtt.tls.cert and key" in str(error)


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_a_client_certificate_that_the_broker_does_not_trust_is_said(
    tmp_path: Path, ca: Pki, broker: Start, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    limit_version(monkeypatch, version)
    running = broker(ca.folder / "ca.pem", ca.issue("broker"), demand=True)
    cases = [Pki.create(tmp_path / "other", "other").issue("st1"), ca.issue("late", days=(-9, -1))]
    for certificate, key in cases:
        error = failure(running.port, ca=ca.folder / "ca.pem", cert=certificate, key=key)
        assert error.code == "M-TLS-CLIENT" and "ALERT" in str(error)


def limit_version(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    make = tls_module.tls_context

    def limited(settings: MqttSettings) -> tls_module.BrokerContext:
        context = make(settings)
        context.maximum_version = getattr(tls_module.ssl.TLSVersion, version)
        return context

    monkeypatch.setattr(mqtt_module, "tls_context", limited)


@pytest.mark.parametrize(
    ("case", "code", "words"),
    [
        ("authority", "M-TLS-CA", "does mqtt.tls.ca hold the authority"),
        ("expired", "M-TLS-EXPIRED", "this device's clock says 20"),
        ("early", "M-TLS-EARLY", "this device's clock says 20"),
        ("address", "M-TLS-HOST", "IP address mismatch"),
        ("name", "M-TLS-HOST", "Hostname mismatch"),
    ],
)
def test_a_wrong_certificate_ends_the_connection_and_is_called_what_it_is(
    tmp_path: Path, ca: Pki, broker: Start, case: str, code: str, words: str
) -> None:
    certificate = {
        "authority": lambda: Pki.create(tmp_path / "other").issue("broker"),
        "expired": lambda: ca.issue("broker", days=(-2, -1)),
        "early": lambda: ca.issue("broker", days=(1, 2)),
        "address": lambda: ca.issue("broker", host="10.9.9.9"),
        "name": lambda: ca.issue("broker", dns="other.example"),
    }
    running = broker(ca.folder / "ca.pem", certificate[case]())
    error = failure(running.port, "localhost" if case == "name" else "127.0.0.1", ca=ca.folder / "ca.pem")
    assert error.code == code and words in str(error)


def test_the_system_authorities_do_not_vouch_for_a_plants_own(ca: Pki, broker: Start) -> None:
    running = broker(ca.folder / "ca.pem", ca.issue("broker"))
    settings = MqttSettings(host="127.0.0.1", port=running.port, tls=TlsSettings())
    with pytest.raises(BrokerError) as caught:
        open_link(settings, "st1", clean=True)
    assert caught.value.code == "M-TLS-CA"


def test_tls_to_a_plain_port_is_an_error_and_never_falls_back(
    mosquitto: Mosquitto, ca: Pki, listen: Callable[..., Listener]
) -> None:
    for port in (mosquitto.port, listen().port, listen(b"HTTP/1.1 400 Bad Request\r\n\r\n").port):
        error = failure(port, ca=ca.folder / "ca.pem")
        assert error.code == "M-TLS-PLAIN" and "nothing was sent in plain text" in str(error)


def test_plain_text_to_a_tls_port_says_what_is_missing(ca: Pki, broker: Start, listen: Callable[..., Listener]) -> None:
    alert = listen(bytes.fromhex("15030100020246"))
    error = failure(alert.port)
    assert error.code == "M-TLS-NEEDED" and "set mqtt.tls" in str(error)
    running = broker(ca.folder / "ca.pem", ca.issue("broker"))
    error = failure(running.port)
    assert "TLS" in str(error)  # Mosquitto hangs up without a word


def test_nothing_but_tls_goes_out_whatever_answers(ca: Pki, listen: Callable[..., Listener]) -> None:
    answers = [b"", b"\x20\x03\x00\x00\x00", b"HTTP/1.1 400 Bad Request\r\n\r\n", bytes.fromhex("15030100020246")]
    for answer in answers:
        listener = listen(answer)
        failure(listener.port, ca=ca.folder / "ca.pem")
        words = b"".join(listener.received)
        assert words[:2] == b"\x16\x03"  # a handshake record
        assert not any(secret in words for secret in (b"MQTT", b"pass-word-1", b"st1"))


def test_control_without_tls_the_password_is_there_to_be_read(listen: Callable[..., Listener]) -> None:
    listener = listen()
    failure(listener.port)
    assert b"MQTT" in listener.received[0] and b"pass-word-1" in listener.received[0]


def test_a_port_that_says_nothing_is_left_and_is_not_taken_for_a_plain_one(
    ca: Pki, listen: Callable[..., Listener], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mqtt_module, "CONNECT_TIMEOUT_S", 0.5)
    error = failure(listen(hangs_up=False).port, ca=ca.folder / "ca.pem")
    assert error.code == "M-OFFLINE" and "no answer within" in str(error)


def test_a_station_waits_longer_and_longer_between_its_attempts(
    tmp_path: Path, ca: Pki, monkeypatch: pytest.MonkeyPatch, listen: Callable[..., Listener]
) -> None:
    monkeypatch.setattr(publisher_module, "BACKOFF_FIRST_S", 0.1)
    listener = listen()
    text = f"""
station: st1
model: none.onnx
cameras: {{top: {{source: none}}}}
mqtt: {{host: 127.0.0.1, port: {listener.port}, tls: {{ca: '{ca.folder / "ca.pem"}'}}, username: st1, password: pass-word-1}}
"""
    station = Station(load_text(LineSettings, text, "line.yaml"), tmp_path / "outbox.db")
    try:
        station.commit(1, 3)
        wait_until(lambda: len(listener.at_s) >= 5)
        gaps = [later - earlier for earlier, later in itertools.pairwise(listener.at_s)]
        assert all(gap >= 0.7 * 0.1 * 2**n for n, gap in enumerate(gaps))
        assert station.problem.startswith("M-TLS-PLAIN") and station.outbox.status().rows == 3
        assert all(words[:2] == b"\x16\x03" for words in list(listener.received))
    finally:
        station.close()


def test_files_that_cannot_be_used_stop_the_start(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    for ca in (tmp_path / "ca.pem", tmp_path / "nope.pem"):
        with pytest.raises(UsageError, match=r"mqtt\.tls: .* cannot be used"):
            check_files(MqttSettings(host="h", tls=TlsSettings(ca=ca)))
