"""A coil of a PLC by Modbus TCP; `output: {kind: modbus, host: 10.0.0.5, coil: 0}`.

The coil is true for OK alone, so that a PLC that starts with cleared coils, a broken wire and a program that never ran all say NG.
"""

from __future__ import annotations

import logging
import socket
import struct
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from devices.outputs.base import Output, OutputError, OutputSettings, missing_package

if TYPE_CHECKING:
    from pymodbus.client import ModbusTcpClient

RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # struct linger: on, zero seconds


class ModbusSettings(OutputSettings):
    """`coil` and `heartbeat_coil` count from 0, as the protocol does (manuals that count from 1 call coil 0 "00001").

    `invert`: the coil is true for NG (not fail-safe: a dead network then reads as OK, unless the PLC watches the heartbeat).
    `timeout_s`: for connecting and for each answer.
    """

    kind: Literal["modbus"] = "modbus"
    host: str = Field(min_length=1)
    port: int = Field(502, ge=1, le=65535)
    unit: int = Field(1, ge=0, le=255)
    coil: int = Field(ge=0, le=65535)
    heartbeat_coil: int | None = Field(None, ge=0, le=65535)
    invert: bool = False
    timeout_s: float = Field(0.5, gt=0, le=10)

    @model_validator(mode="after")
    def _two_coils(self) -> ModbusSettings:
        if self.heartbeat_coil == self.coil:
            raise ValueError(f"heartbeat_coil is {self.coil}, expected another coil than coil")
        return self


class ModbusOutput(Output):
    """Function code 5, one connection."""

    Settings = ModbusSettings
    settings: ModbusSettings

    def __init__(self, settings: OutputSettings) -> None:
        super().__init__(settings)
        try:
            from pymodbus.client import ModbusTcpClient
        except ImportError as error:
            raise missing_package("modbus", "pymodbus", error) from error
        # It logs every failed request as an error of its own; whoever calls us tells it once per change.
        logging.getLogger("pymodbus").setLevel(logging.CRITICAL)
        self._make_client = ModbusTcpClient
        self._client: ModbusTcpClient | None = None

    @property
    def has_heartbeat(self) -> bool:
        return self.settings.heartbeat_coil is not None

    def _open(self) -> None:
        address = (self.settings.host, self.settings.port)
        # retries=0: pymodbus would send a request again that may be stale by then.
        client = self._make_client(
            self.settings.host, port=self.settings.port, timeout=self.settings.timeout_s, retries=0
        )
        try:
            # Its own connect() keeps the reason to itself.
            client.socket = socket.create_connection(address, timeout=self.settings.timeout_s)
        except TimeoutError as error:
            raise OutputError(
                "O-TIMEOUT", f"{self} does not answer within timeout_s {self.settings.timeout_s}"
            ) from error
        except OSError as error:
            raise OutputError("O-LOST", f"{self} cannot be reached: {error}") from error
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A request that was given up must not be delivered later, when the network is back: closing throws away what was not sent.
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        self._client = client

    def _write(self, is_ok: bool) -> None:
        self._write_coil(self.settings.coil, is_ok != self.settings.invert)

    def _beat(self, value: bool) -> None:
        if self.settings.heartbeat_coil is not None:
            self._write_coil(self.settings.heartbeat_coil, value)

    def _write_coil(self, coil: int, value: bool) -> None:
        from pymodbus import ModbusException
        from pymodbus.exceptions import ModbusIOException

        if self._client is None:
            raise OutputError("O-LOST", f"{self} is not connected")
        try:
            answer = self._client.write_coil(coil, value, device_id=self.settings.unit)
        except ModbusIOException as error:
            raise OutputError("O-TIMEOUT", f"{self}, coil {coil}: {error.string}") from error
        except (ModbusException, OSError) as error:
            raise OutputError("O-LOST", f"{self}, coil {coil}: the connection broke ({error})") from error
        if answer.isError():
            code = getattr(answer, "exception_code", "?")
            raise OutputError(
                "O-REFUSED",
                f"{self} refuses to write coil {coil} of unit {self.settings.unit} (Modbus exception {code}); "
                "check coil and unit, and that the PLC lets us write there",
            )
        if answer.bits[:1] != [value]:
            raise OutputError(
                "O-REFUSED", f"{self}, coil {coil}: {value} was written, the answer says {answer.bits[:1]}"
            )

    def _release(self) -> None:
        client, self._client = self._client, None
        if client is not None and client.socket is not None:
            client.socket.close()

    def __str__(self) -> str:
        return f"modbus {self.settings.host}:{self.settings.port}"
