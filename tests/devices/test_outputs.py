"""Outputs against pymodbus' own Modbus TCP server; GPIO only where the kernel has a simulated chip (gpio-sim)."""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from devices.outputs import OUTPUTS, AnyOutput, OutputError, open_output
from devices.outputs.base import OutputSettings
from devices.outputs.gpio import GpioSettings
from devices.outputs.modbus import ModbusOutput, ModbusSettings
from devices.outputs.requirements import output_problem
from tests.plc import Plc

COIL, HEARTBEAT = 5, 7


@pytest.fixture
def plc() -> Iterator[Plc]:
    machine = Plc()
    yield machine
    machine.close()


def output_for(plc: Plc, **options: object) -> ModbusOutput:
    settings = {"host": "127.0.0.1", "port": plc.port, "coil": COIL, "timeout_s": 5.0, **options}
    return ModbusOutput(ModbusSettings.model_validate(settings))


def parse(**options: object) -> OutputSettings:
    return TypeAdapter(AnyOutput).validate_python(options)


def test_ok_is_a_coil_that_is_true_and_ng_one_that_is_false(plc: Plc) -> None:
    output = output_for(plc)
    output.set_ok()
    assert (plc.coil(COIL), output.signal) == (True, "ok")
    output.set_ng()
    assert (plc.coil(COIL), output.signal) == (False, "ng")
    output.close()


def test_inverted_it_is_the_other_way_round(plc: Plc) -> None:
    output = output_for(plc, invert=True)
    output.set_ng()
    assert plc.coil(COIL) is True
    output.set_ok()
    assert plc.coil(COIL) is False
    output.close()
    assert plc.coil(COIL) is True


def test_the_constructor_connects_to_nothing() -> None:
    settings = ModbusSettings(host="192.0.2.1", coil=0, timeout_s=0.1)
    assert ModbusOutput(settings).signal == "unknown"


def test_every_connection_begins_with_ng(plc: Plc) -> None:
    output = output_for(plc)
    output.set_ok()
    plc.drop_connections()
    with pytest.raises(OutputError, match="O-LOST"):
        output.set_ok()
    output.set_ok()
    output.close()
    assert plc.values(COIL) == [False, True, False, True, False]


def test_closing_leaves_ng(plc: Plc) -> None:
    output = output_for(plc)
    output.set_ok()
    output.close()
    output.close()
    assert plc.coil(COIL) is False


def test_the_heartbeat_changes_with_every_beat(plc: Plc) -> None:
    output = output_for(plc, heartbeat_coil=HEARTBEAT)
    output.beat()  # not connected: no beat connects, NG does
    output.set_ng()
    for _ in range(3):
        output.beat()
    output.close()
    assert plc.values(HEARTBEAT) == [True, False, True]
    assert plc.values(COIL) == [False, False]


def test_without_a_heartbeat_coil_a_beat_writes_nothing(plc: Plc) -> None:
    output = output_for(plc)
    output.set_ng()
    output.beat()
    assert not output.has_heartbeat
    output.close()
    assert {coil for coil, _ in plc.written} == {COIL}


def test_nobody_there_is_o_lost_with_the_reason(plc: Plc) -> None:
    plc.stop()
    output = output_for(plc)
    with pytest.raises(OutputError, match=rf"O-LOST modbus 127\.0\.0\.1:{plc.port} cannot be reached: .*refused") as e:
        output.set_ng()
    assert (e.value.code, output.signal, output.is_open) == ("O-LOST", "unknown", False)


def test_no_answer_is_o_timeout_and_the_connection_is_given_up(plc: Plc) -> None:
    output = output_for(plc, timeout_s=0.2)
    output.set_ng()
    plc.hold()
    with pytest.raises(OutputError, match="O-TIMEOUT"):
        output.set_ok()
    assert (output.signal, output.is_open) == ("unknown", False)
    output.close()


def test_a_coil_that_the_plc_does_not_have_is_o_refused(plc: Plc) -> None:
    output = output_for(plc, coil=4000)
    with pytest.raises(
        OutputError, match="O-REFUSED .* refuses to write coil 4000 of unit 1 .*exception 2.*check coil"
    ):
        output.set_ng()


def answering_with(answer: bytes) -> tuple[socket.socket, threading.Thread]:
    """A server for one connection that gives the first request the tail `answer` to its own transaction number."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(ConnectionResetError):  # which is how our side hangs up
            request = connection.recv(64)
            connection.sendall(request[:2] + answer)
            connection.recv(64)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return listener, thread


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (struct.pack(">HHBBHH", 0, 6, 1, 5, COIL, 0xFF00), "O-REFUSED"),  # NG was written, "it is on" comes back
        (b"\x00\x00\x00\x06\x01", "O-TIMEOUT"),  # half an answer
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "O-"),
    ],
)
def test_an_answer_that_does_not_confirm_what_was_written_is_an_error(answer: bytes, code: str) -> None:
    listener, thread = answering_with(answer)
    port = listener.getsockname()[1]
    output = ModbusOutput(ModbusSettings(host="127.0.0.1", port=port, coil=COIL, timeout_s=0.3))
    with pytest.raises(OutputError, match=code):
        output.set_ng()
    assert output.signal == "unknown"
    thread.join(10)
    listener.close()


def give_up_on_a_dead_machine() -> bytes:
    """What comes of a request that gets no answer; raises ConnectionResetError if the machine's side is told to forget the connection."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    output = ModbusOutput(ModbusSettings(host="127.0.0.1", port=port, coil=COIL, timeout_s=0.2))
    with pytest.raises(OutputError, match="O-TIMEOUT"):
        output.set_ok()
    connection, _ = listener.accept()
    connection.settimeout(5)
    received = b""
    with connection, listener:
        while piece := connection.recv(64):
            received += piece
    return received


def test_what_was_given_up_is_not_delivered_later() -> None:
    """The kernel would otherwise go on sending an OK that nobody stands for any more."""
    with pytest.raises(ConnectionResetError):
        give_up_on_a_dead_machine()


def test_control_an_ordinary_close_goes_on_sending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("devices.outputs.modbus.RESET_ON_CLOSE", struct.pack("ii", 0, 0))
    assert give_up_on_a_dead_machine()[7:10] == struct.pack(">BH", 5, COIL)  # function code and coil


def test_settings_are_told_apart_by_kind() -> None:
    assert isinstance(parse(kind="modbus", host="plc", coil=3), ModbusSettings)
    assert isinstance(parse(kind="gpio", line=17), GpioSettings)
    assert set(OUTPUTS) == {"modbus", "gpio"}
    assert all(cls.Settings.model_fields["kind"].default == kind for kind, cls in OUTPUTS.items())


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"kind": "relay"}, "kind"),
        ({"kind": "modbus", "host": "plc"}, "coil"),
        ({"kind": "modbus", "host": "", "coil": 1}, "host"),
        ({"kind": "modbus", "host": "plc", "coil": 1, "heartbeat_coil": 1}, "heartbeat_coil is 1"),
        ({"kind": "modbus", "host": "plc", "coil": 1, "ok": ["reject"]}, "ok"),
        ({"kind": "modbus", "host": "plc", "coil": 1, "ok": ["error"]}, "ok"),
        ({"kind": "modbus", "host": "plc", "coil": 1, "hold_ms": 0}, "hold_ms"),
        ({"kind": "gpio", "line": 4, "heartbeat_line": 4}, "heartbeat_line is 4"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, object], word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        parse(**options)


def test_what_moves_parts_must_say_when_the_machine_looks() -> None:
    bare = parse(kind="modbus", host="plc", coil=1)
    held = parse(kind="modbus", host="plc", coil=1, hold_ms=300)
    forever = parse(kind="modbus", host="plc", coil=1, hold_ms=None)
    assert "free" in (output_problem(held, "free", 100) or "")
    assert "deadline_ms" in (output_problem(held, "part_present", None) or "")
    assert "hold_ms" in (output_problem(bare, "part_present", 100) or "")
    assert output_problem(held, "part_present", 100) is None
    assert output_problem(forever, "part_present", 100) is None


@pytest.mark.parametrize(
    ("kind", "package", "options"), [("modbus", "pymodbus", "host='plc', coil=1"), ("gpio", "gpiod", "line=1")]
)
def test_a_missing_package_is_named_with_the_extra_that_has_it(kind: str, package: str, options: str) -> None:
    program = f"""
import sys
sys.modules[{package!r}] = None
from devices.outputs import OUTPUTS, OutputError, open_output
try:
    open_output(OUTPUTS[{kind!r}].Settings({options}))
except OutputError as error:
    print(error, error.exit_code)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("O-EXTRA") and f"edge-dkm[{kind}]" in done.stdout and done.stdout.endswith(" 2\n")


def test_the_registry_loads_no_optional_package() -> None:
    program = "import sys, devices.outputs; print('pymodbus' in sys.modules, 'gpiod' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_gpio_chip_that_is_not_there_is_o_nodev(tmp_path: Path) -> None:
    pytest.importorskip("gpiod")
    output = open_output(GpioSettings(chip=str(tmp_path / "gpiochip9"), line=3))
    with pytest.raises(OutputError, match="O-NODEV .*gpiochip9.*gpiodetect"):
        output.set_ng()
    output.close()


def test_a_file_that_is_no_gpio_chip_is_o_refused(tmp_path: Path) -> None:
    pytest.importorskip("gpiod")
    (tmp_path / "gpiochip9").write_text("")
    output = open_output(GpioSettings(chip=str(tmp_path / "gpiochip9"), line=3))
    with pytest.raises(OutputError, match="O-REFUSED"):
        output.set_ng()


def simulated_chip() -> tuple[str, Path]:
    """(the device, its folder in sysfs) of a gpio-sim chip; skips where there is none."""
    gpiod = pytest.importorskip("gpiod")
    for path in sorted(Path("/dev").glob("gpiochip*")):
        with gpiod.Chip(str(path)) as chip:
            if "gpio-sim" in chip.get_info().label:
                found = next(Path("/sys/devices/platform").glob(f"gpio-sim.*/{path.name}"))
                return str(path), found
    pytest.skip("no gpio-sim chip in this kernel: the gpio output is not run here")


@pytest.mark.parametrize("active_low", [False, True])
def test_a_gpio_line_is_active_for_ok_alone(active_low: bool) -> None:
    chip, folder = simulated_chip()
    output = open_output(GpioSettings(chip=chip, line=1, heartbeat_line=2, active_low=active_low))

    def level(line: int) -> int:
        return int((folder / f"sim_gpio{line}" / "value").read_text())

    output.set_ng()
    assert level(1) == int(active_low)
    output.set_ok()
    assert level(1) == int(not active_low)
    output.beat()
    assert level(2) == int(not active_low)
    output.set_ng()
    assert level(1) == int(active_low)
    output.close()
