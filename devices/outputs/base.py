"""What every kind of output offers: one signal that says OK or NG. NG is what silence means.

A kind implements `_open`, `_write`, `_beat` and `_release`; this class sees to it that NG is the first word on every new connection,
that nothing is believed that was not acknowledged, and that a connection that failed once is never used again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

from pydantic import Field

from configs import Settings
from devices.errors import DeviceError

Signal = Literal["ok", "ng", "unknown"]


class OutputSettings(Settings):
    """`kind` is the key in OUTPUTS. `ok`: the verdicts that count as OK; `error` and `reject` never can.

    `hold_ms`: an OK falls back to NG after that many milliseconds; null: it stands until the next trigger. `heartbeat_s`: how often
    the heartbeat changes, where the kind has one.
    """

    kind: str
    ok: tuple[Literal["pass", "review"], ...] = ("pass",)
    hold_ms: int | None = Field(None, ge=1)
    heartbeat_s: float = Field(1.0, gt=0, le=60)


class OutputError(DeviceError):
    """An output that cannot be written. `code` is stable, the text is for people.

    O-LOST: no connection, or it broke · O-TIMEOUT: no answer · O-REFUSED: the other side says no · O-NODEV: no such device ·
    O-EXTRA: an optional package is not installed · O-ERROR: anything else.
    """

    exit_code = 2  # it ends a command only at the start, as a setting that cannot be met

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code} {message}")
        self.code, self.detail = code, message


def missing_package(kind: str, package: str, error: ImportError) -> OutputError:
    """O-EXTRA; the extra is named as the kind."""
    text = f"output kind {kind} needs {package}, which is not installed: pip install 'edge-dkm[{kind}]' ({error})"
    return OutputError("O-EXTRA", text)


class Output:
    """One output, used by one thread. The constructor checks what can be checked without a connection; the first write connects.

    `signal` is what the other side last acknowledged; `unknown` after a failure. Every call may block for the kind's timeout.
    """

    Settings: ClassVar[type[OutputSettings]]

    def __init__(self, settings: OutputSettings) -> None:
        self.settings = settings
        self.signal: Signal = "unknown"
        self.is_open = False
        self._beats = False

    @property
    def has_heartbeat(self) -> bool:
        """Whether `beat` does anything."""
        return False

    def set_ok(self) -> None:
        """Writes OK and waits for the acknowledgement.

        Raises:
            OutputError: it was not acknowledged; what the other side now shows is unknown.
        """
        self._set(True)

    def set_ng(self) -> None:
        """The same for NG."""
        self._set(False)

    def beat(self) -> None:
        """Changes the heartbeat; only on a connection that stands."""
        if self.has_heartbeat and self.is_open:
            self._beats = not self._beats
            self._guarded(lambda: self._beat(self._beats))

    def close(self) -> None:
        """Leaves NG where the connection stands, and lets it go. Raises nothing; may be called more than once."""
        try:
            if self.is_open:
                self._set(False)
        except OutputError:
            pass  # it was dropped with the error
        finally:
            self._drop()

    def _set(self, is_ok: bool) -> None:
        self.signal = "unknown"
        self._guarded(lambda: self._open_and_write(is_ok))
        self.signal = "ok" if is_ok else "ng"

    def _open_and_write(self, is_ok: bool) -> None:
        if not self.is_open:
            self._open()
            self.is_open = True
            self._write(False)  # whatever an earlier connection or run has left there
            if not is_ok:
                return
        self._write(is_ok)

    def _guarded(self, act: Callable[[], None]) -> None:
        """Calls `act`; a failure drops the connection, for a late answer on it could be taken for that of the next request."""
        try:
            act()
        except Exception as error:
            self._drop()
            if isinstance(error, OutputError):
                raise
            raise OutputError("O-ERROR", f"{self}: {type(error).__name__}: {error}") from error

    def _drop(self) -> None:
        self.is_open = False
        self.signal = "unknown"
        try:
            self._release()
        except Exception:  # noqa: BLE001 (nothing is left to be done about a connection that is given up)
            return

    def _open(self) -> None:
        raise TypeError(f"{type(self).__name__} has no _open")

    def _write(self, is_ok: bool) -> None:
        raise TypeError(f"{type(self).__name__} has no _write")

    def _beat(self, value: bool) -> None:
        """Writes the heartbeat."""

    def _release(self) -> None:
        """Lets go of the connection; it may be half open or not there."""

    def __str__(self) -> str:
        return self.settings.kind
