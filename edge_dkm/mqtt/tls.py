"""TLS towards the broker: the context that checks certificate and host name, and what a failed handshake means, each cause with its own code.

There is no way round the checks and no fall-back to plain text: with `mqtt.tls` set, nothing is sent before the handshake has succeeded.
"""

from __future__ import annotations

import contextlib
import ssl
from typing import Any

from edge_dkm.clock import rfc3339, utc_now
from edge_dkm.errors import UsageError
from edge_dkm.settings import MqttSettings

# OpenSSL's X509_V_ERR numbers, as SSLCertVerificationError.verify_code gives them.
NOT_YET_VALID, EXPIRED, WRONG_HOST, WRONG_IP = 9, 10, 62, 64
PLAIN_SIGNS = (
    "WRONG_VERSION_NUMBER",
    "RECORD_LAYER_FAILURE",
    "PACKET_LENGTH_TOO_LONG",
    "HTTP_REQUEST",
    "UNEXPECTED_EOF",
)


class BrokerSocket(ssl.SSLSocket):
    """Remembers why it broke: with TLS 1.3 a refused client certificate shows at the first read, where the MQTT library swallows the reason."""

    failure: ssl.SSLError | None = None

    def recv(self, *arguments: Any) -> bytes:
        try:
            return super().recv(*arguments)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError, ssl.SSLEOFError):
            raise
        except ssl.SSLError as error:
            self.failure = self.failure or error
            raise

    def send(self, *arguments: Any) -> int:
        try:
            return super().send(*arguments)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except OSError as error:
            with contextlib.suppress(OSError, ValueError):  # the alert may lie unread behind the reset
                self.recv(1)
            if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
                self.failure = self.failure or error
            raise


class BrokerContext(ssl.SSLContext):
    """Remembers the socket of a handshake: the MQTT library forgets to close it where the handshake fails (paho-mqtt 2.2.0)."""

    sslsocket_class = BrokerSocket
    _last: ssl.SSLSocket | None = None

    def wrap_socket(self, *arguments: Any, **options: Any) -> ssl.SSLSocket:
        self._last = super().wrap_socket(*arguments, **options)
        return self._last

    @property
    def has_begun(self) -> bool:
        """Whether there was a TCP connection to speak TLS on."""
        return self._last is not None

    def failure(self) -> ssl.SSLError | None:
        """Why TLS broke after the handshake, or None."""
        return getattr(self._last, "failure", None)

    def close_last(self) -> None:
        """Closes the socket of the last handshake."""
        if self._last is not None:
            self._last.close()


def tls_context(settings: MqttSettings) -> BrokerContext:
    """The context of `mqtt.tls`.

    Raises:
        UsageError: a file cannot be used.
    """
    tls = settings.tls
    if tls is None:
        raise UsageError("mqtt.tls is not set")
    try:
        context = BrokerContext(ssl.PROTOCOL_TLS_CLIENT)  # checks certificate and host name
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if tls.ca is not None:
            context.load_verify_locations(tls.ca)
        else:
            context.load_default_certs()
        if tls.cert is not None and tls.key is not None:
            context.load_cert_chain(tls.cert, tls.key)
    except (OSError, ssl.SSLError) as error:
        files = ", ".join(str(path) for path in (tls.ca, tls.cert, tls.key) if path)
        raise UsageError(
            f"mqtt.tls: {files} cannot be used: {getattr(error, 'strerror', None) or error}; expected PEM files that this user may read"
        ) from None
    return context


def tls_failure(error: OSError) -> tuple[str, str]:
    """(code, text) of a handshake that failed, or of TLS that broke before the broker accepted us."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _certificate_failure(error)
    reason = getattr(error, "reason", None) or error.strerror or str(error)
    # A broker on a plain port takes our first words for damaged MQTT: it hangs up, waits for more, or answers in plain text.
    if not isinstance(error, ssl.SSLError) or any(sign in reason for sign in PLAIN_SIGNS):
        text = f"TLS: it does not speak TLS on this port ({reason}); nothing was sent in plain text. Is mqtt.port the TLS port?"
        return "M-TLS-PLAIN", text
    if "ALERT" in reason and ("CERTIFICATE" in reason or "UNKNOWN_CA" in reason):
        return (
            "M-TLS-CLIENT",
            f"TLS: it wants a valid certificate of this station that it trusts ({reason}); set mqtt.tls.cert and key",
        )
    if "HANDSHAKE_FAILURE" in reason:
        text = f"TLS: no common cipher, or it wants a certificate of this station ({reason}); set mqtt.tls.cert and key where it does"
        return "M-TLS-CLIENT", text
    if "UNSUPPORTED_PROTOCOL" in reason or "PROTOCOL_VERSION" in reason:
        return "M-TLS-VERSION", f"TLS: no common version or cipher ({reason}); TLS 1.2 is the least we speak"
    return "M-TLS", f"TLS: {reason}"


def _certificate_failure(error: ssl.SSLCertVerificationError) -> tuple[str, str]:
    text = f"its certificate is not valid: {error.verify_message}"
    clock = f" (this device's clock says {rfc3339(utc_now())}; is it synchronised?)"
    if error.verify_code == EXPIRED:
        return "M-TLS-EXPIRED", text + clock
    if error.verify_code == NOT_YET_VALID:
        return "M-TLS-EARLY", text + clock
    if error.verify_code in {WRONG_HOST, WRONG_IP}:
        return "M-TLS-HOST", text
    return "M-TLS-CA", f"{text}; does mqtt.tls.ca hold the authority that signed it?"
