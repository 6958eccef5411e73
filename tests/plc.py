"""A PLC for tests: pymodbus' own Modbus TCP server on localhost, in a thread of its own."""

from __future__ import annotations

import asyncio
import socket
import threading

from pymodbus.client import ModbusTcpClient
from pymodbus.constants import ExcCodes
from pymodbus.server import ModbusTcpServer
from pymodbus.simulator import DataType, SimData, SimDevice

WRITE_COIL = 5
COILS = 64


class Plc:
    """Coils 0..63 of unit 1. `written` holds (coil, value) of every request that was carried out, in order.

    `hold()` makes it accept requests and answer none until `release()`; `forbid` is a coil that it refuses to write.
    """

    def __init__(self, initial: bool = False) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.initial = initial
        self.forbid: int | None = None
        self.written: list[tuple[int, bool]] = []
        self.held: list[tuple[int, bool]] = []
        self._loop = asyncio.new_event_loop()
        self._free = asyncio.Event()
        self._free.set()
        self._server: ModbusTcpServer | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, name="plc", daemon=True)
        self._thread.start()
        self.start()

    def start(self) -> None:
        """Listens, with all coils at their initial value, as after a power cycle."""
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)

    async def _start(self) -> None:
        block = [SimData(0, values=[self.initial] * COILS, datatype=DataType.BITS)]
        other = [SimData(0, count=16, values=False, datatype=DataType.BITS)]
        registers = [SimData(0, count=1, values=0, datatype=DataType.REGISTERS)]
        device = SimDevice(1, simdata=(block, other, registers, registers), action=self._on_request)
        self._server = ModbusTcpServer(device, address=("127.0.0.1", self.port))
        await self._server.serve_forever(background=True)

    async def _on_request(
        self, function: int, _start: int, address: int, _count: int, _now: list[int], values: list[int] | None
    ) -> ExcCodes | None:
        if function != WRITE_COIL or values is None:
            return None
        if address == self.forbid:
            return ExcCodes.ILLEGAL_ADDRESS
        self.held.append((address, bool(values[0])))
        await self._free.wait()
        self.written.append((address, bool(values[0])))
        return None

    def hold(self) -> None:
        """Takes writes and carries them out no more; reads still work."""
        self._loop.call_soon_threadsafe(self._free.clear)
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self._loop).result(10)
        self.held.clear()

    def release(self) -> None:
        """Carries out what it was sent meanwhile, and answers again."""
        self._loop.call_soon_threadsafe(self._free.set)

    def stop(self) -> None:
        """Power off: the listener and every connection close."""
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)

    async def _stop(self) -> None:
        if self._server is not None:
            await self._server.shutdown()
            self._server = None
        await asyncio.sleep(0.01)  # the transports close in the loop's next turns

    def drop_connections(self) -> None:
        """Closes the connections and goes on listening, as a PLC does with idle ones."""
        asyncio.run_coroutine_threadsafe(self._drop(), self._loop).result(10)

    async def _drop(self) -> None:
        if self._server is not None:
            for connection in list(self._server.active_connections.values()):
                connection.close()
        await asyncio.sleep(0.01)

    def coil(self, number: int) -> bool:
        """As another Modbus client reads it."""
        client = ModbusTcpClient("127.0.0.1", port=self.port, timeout=5)
        try:
            client.connect()
            return bool(client.read_coils(number, count=1, device_id=1).bits[0])
        finally:
            client.close()

    def values(self, coil: int) -> list[bool]:
        """What was written to one coil, in order."""
        return [value for number, value in self.written if number == coil]

    def close(self) -> None:
        """Ends the server and its thread."""
        self.release()
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
