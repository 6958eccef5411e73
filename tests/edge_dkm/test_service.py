from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from configs import ConfigError
from edge_dkm.errors import EdgeError, UsageError
from edge_dkm.placeholders import read_outline
from edge_dkm.service.unit import ServiceOptions, install, read_options, render_unit
from edge_dkm.settings import load_line

LINE = """
version: 1
station: st4
model: m.onnx
cameras: {top: {source: "SOURCE"}}
mqtt: {host: 127.0.0.1, username: a, password: "${MQTT_PASS}"}
state: STATE
"""


@pytest.fixture
def write_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "line.yaml"
    text = LINE.replace("SOURCE", "rtsp://${CAM_USER}:${CAM_PASS}@10.0.0.7/ch1").replace(
        "STATE", "/var/lib/edge-dkm/st4"
    )
    path.write_text(text)
    return path


def options(**changes: object) -> ServiceOptions:
    base = ServiceOptions(
        station="st4",
        line=Path("/etc/edge-dkm/line.yaml"),
        state=Path("/var/lib/edge-dkm/st4"),
        working_dir=Path("/etc/edge-dkm"),
        command=("/opt/edge-dkm/bin/edge-dkm",),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def values(unit: str, key: str) -> list[str]:
    return [line.partition("=")[2] for line in unit.splitlines() if line.partition("=")[0] == key]


PROMISED = {
    "Type": "notify",
    "NotifyAccess": "main",
    "WatchdogSec": "30",
    "Restart": "always",
    "RestartSec": "2",
    "StartLimitIntervalSec": "0",
    "TimeoutStopSec": "15",
    "KillMode": "mixed",
    "OOMPolicy": "stop",
    "MemoryMax": "75%",
    "ProtectSystem": "strict",
    "ReadWritePaths": '"-/var/lib/edge-dkm/st4"',
    "StateDirectory": '"edge-dkm/st4"',
    "NoNewPrivileges": "yes",
    "RestrictAddressFamilies": "AF_UNIX AF_INET AF_INET6 AF_NETLINK",
    "DeviceAllow": "char-video4linux rw",
    "EnvironmentFile": "-/etc/edge-dkm/st4.env",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "User": "edge-dkm",
    "ExecStart": ':"/opt/edge-dkm/bin/edge-dkm" run "/etc/edge-dkm/line.yaml"',
}


def test_the_unit_says_what_was_promised() -> None:
    unit = render_unit(options())
    assert {key: values(unit, key) for key in PROMISED} == {key: [value] for key, value in PROMISED.items()}
    assert values(unit, "RestartPreventExitStatus") == []


@pytest.fixture
def verify(tmp_path: Path) -> object:
    """What systemd itself says against a unit."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")

    def complaints(unit: str) -> str:
        path = tmp_path / "edge-dkm-test.service"
        path.write_text(unit)
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(path)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.stderr if "edge-dkm" in done.stderr or done.returncode else ""

    return complaints


def runnable(folder: Path) -> ServiceOptions:
    """With a program and a line that exist."""
    folder.mkdir(parents=True, exist_ok=True)
    program, line = folder / "edge-dkm", folder / "line.yaml"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    line.write_text("")
    return options(command=(str(program),), line=line, working_dir=folder, state=folder / "state", user="root")


def test_systemd_finds_nothing_wrong_with_it(verify: object, tmp_path: Path) -> None:
    assert verify(render_unit(runnable(tmp_path))) == ""  # type: ignore[operator]
    full = replace(runnable(tmp_path), groups=("video",), devices=("char-video4linux", "char-nvidia", "/dev/gpiochip0"))
    assert verify(render_unit(replace(full, state=Path("/var/lib/edge dkm/5%")))) == ""  # type: ignore[operator]


@pytest.mark.parametrize("name", ["two words", "100% sure", "$HOME", "%h", "ümlaut", "a;b", "#x"])
def test_systemd_reads_back_the_very_paths_that_were_meant(verify: object, tmp_path: Path, name: str) -> None:
    assert verify(render_unit(runnable(tmp_path / name))) == ""  # type: ignore[operator]


@pytest.mark.parametrize("old", ['"/', "%%"])
def test_control_without_quoting_or_doubling_systemd_would_complain(verify: object, tmp_path: Path, old: str) -> None:
    unit = render_unit(runnable(tmp_path / "two %h words"))
    assert verify(unit) == ""  # type: ignore[operator]
    bad = unit.replace('"', "") if old == '"/' else unit.replace("%%", "%")
    assert "edge-dkm" in verify(bad)  # type: ignore[operator]


def test_homes_and_temporary_folders_stay_in_sight_only_where_the_line_lies_there() -> None:
    for path in (Path("/home/pi/line.yaml"), Path("/root/line.yaml")):
        assert values(render_unit(options(line=path)), "ProtectHome") == ["read-only"]
    assert values(render_unit(options(reads=(Path("/home/pi/m.onnx"),))), "ProtectHome") == ["read-only"]
    assert values(render_unit(options(command=("/tmp/venv/bin/edge-dkm",))), "PrivateTmp") == ["no"]


def test_a_state_outside_var_lib_is_made_by_hand_and_said_so(tmp_path: Path) -> None:
    elsewhere = options(state=Path("/data/line 4"))
    assert values(render_unit(elsewhere), "StateDirectory") == []
    assert "sudo install -d -m 700 -o edge-dkm '/data/line 4'" in install(elsewhere, tmp_path).next_steps


def test_a_line_file_is_read_without_its_secrets_and_they_are_asked_for(write_line: Path, tmp_path: Path) -> None:
    found = read_options(write_line)
    assert (found.station, found.state, found.line) == ("st4", Path("/var/lib/edge-dkm/st4"), write_line)
    assert found.variables == ("CAM_USER", "CAM_PASS", "MQTT_PASS") and found.working_dir == tmp_path
    assert found.reads == (tmp_path / "m.onnx",) and Path(found.command[0]).is_file() and found.groups == ()
    done = install(found, tmp_path / "root")
    assert done.path == tmp_path / "root/etc/systemd/system/edge-dkm-st4.service"
    assert "CAM_USER=... CAM_PASS=... MQTT_PASS=..." in done.text()
    assert "sudo systemctl enable --now edge-dkm-st4.service" in done.next_steps


def test_a_usb_camera_needs_the_video_group_and_a_relative_state_is_that_of_the_working_folder(
    write_line: Path, tmp_path: Path
) -> None:
    text = LINE.replace("SOURCE", "usb:0").replace("STATE", "state/../state/st4")
    write_line.write_text(text)
    found = read_options(write_line, user="pi", name="inspection")
    assert (found.groups, found.state, found.unit) == (("video",), tmp_path / "state/st4", "inspection.service")
    assert values(render_unit(found), "SupplementaryGroups") == ["video"]
    assert values(render_unit(found), "User") == ["pi"]


def test_a_station_can_be_asked_without_knowing_its_secrets(write_line: Path) -> None:
    with pytest.raises(ConfigError, match="CAM_USER, which is not set"):  # control
        load_line(write_line)
    assert read_outline(write_line).settings.state == Path("/var/lib/edge-dkm/st4")
    assert read_outline(write_line, ["state=/elsewhere"]).settings.state == Path("/elsewhere")


@pytest.mark.parametrize("key", ["station", "state"])
def test_what_the_unit_is_named_by_cannot_come_from_the_environment(write_line: Path, key: str) -> None:
    lines = [
        f"{key}: ${{NAME}}" if line.startswith(f"{key}:") else line for line in write_line.read_text().splitlines()
    ]
    write_line.write_text("\n".join(lines))
    with pytest.raises(UsageError, match=rf"line.yaml:\d {key} is \$\{{NAME\}}, expected it written out"):
        read_options(write_line)


def test_a_wrong_line_file_is_refused_before_anything_is_written(write_line: Path) -> None:
    write_line.write_text(write_line.read_text().replace("model:", "modell:"))
    with pytest.raises(ConfigError, match="modell"):
        read_options(write_line)


def test_a_second_time_changes_nothing_and_a_unit_that_differs_is_kept(tmp_path: Path) -> None:
    first = install(options(), tmp_path)
    assert first.is_written and not install(options(), tmp_path).is_written
    first.path.write_text(first.path.read_text() + "# mine\n")
    with pytest.raises(UsageError, match="is there and differs.*--force"):
        install(options(), tmp_path)
    assert first.path.read_text().endswith("# mine\n")
    assert install(options(), tmp_path, force=True).is_written
    assert first.path.read_text() == render_unit(options())
    assert [path.name for path in first.path.parent.iterdir()] == [first.path.name]


def test_a_folder_that_cannot_be_written_says_how_else(tmp_path: Path) -> None:
    (tmp_path / "etc").write_text("")
    with pytest.raises(EdgeError, match="cannot be written: Not a directory; run it with sudo, or with --print"):
        install(options(), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "a/b"},
        {"name": "../x"},
        {"user": "root\nExecStart=/bin/sh"},
        {"user": "a b"},
        {"line": Path("/x\n[Service]/line.yaml")},
        {"state": Path("/x\\y")},
        {"state": Path("relative")},
        {"working_dir": Path("/ends with ")},
        {"command": ("/it's/edge-dkm",)},  # systemd itself refuses quotes there
        {"memory_max": "lots"},
        {"devices": ("char-x rw\nUser=root",)},
        {"groups": ("a b",)},
    ],
    ids=str,
)
def test_what_would_write_other_lines_into_the_unit_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        render_unit(options(**changes))
