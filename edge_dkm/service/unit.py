"""`edge-dkm service install`: writes a hardened systemd unit for one line and says what to type next. systemd itself need not be there."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from edge_dkm.errors import EdgeError, UsageError
from edge_dkm.placeholders import read_outline

UNITS = Path("etc/systemd/system")
VAR_LIB = Path("/var/lib")
HOMES = (Path("/home"), Path("/root"), Path("/run/user"))
TEMPORARY = (Path("/tmp"), Path("/var/tmp"))
CAMERAS, GPIO = "char-video4linux", "char-gpiochip"
# What a device profile's providers need besides cameras; written from documentation, as those profiles are.
_INTEL = ("char-drm", "char-accel")
_NVIDIA = ("char-nvidia", "char-nvidia-frontend", "char-nvidia-uvm")
PROVIDER_DEVICES = {"openvino": _INTEL, "openvino_bf16": _INTEL, "cuda": _NVIDIA, "tensorrt": _NVIDIA}


@dataclass(frozen=True)
class ServiceOptions:
    """What a unit is made of. All paths are absolute; `reads` are files outside the state that the line needs (model, TLS files)."""

    station: str
    line: Path
    state: Path
    working_dir: Path
    command: tuple[str, ...]
    user: str = "edge-dkm"
    name: str | None = None
    reads: tuple[Path, ...] = ()
    devices: tuple[str, ...] = (CAMERAS,)
    groups: tuple[str, ...] = ()
    memory_max: str = "75%"
    variables: tuple[str, ...] = ()  # that the line file asks of the environment

    @property
    def unit(self) -> str:
        """`edge-dkm-<station>.service` unless named."""
        name = self.name or f"edge-dkm-{self.station}"
        return name if name.endswith(".service") else f"{name}.service"

    @property
    def environment_file(self) -> Path:
        """Where the service finds `${NAME}`s of the line file."""
        return Path("/etc/edge-dkm") / f"{self.station}.env"


@dataclass(frozen=True)
class Installed:
    """The unit's path, whether it was written (or was the same already), and the commands to type next."""

    path: Path
    is_written: bool
    next_steps: tuple[str, ...]

    def text(self) -> str:
        """For people."""
        head = f"unit      {self.path} {'written' if self.is_written else 'is up to date'}"
        return "\n".join([head, "next", *(f"  {step}" for step in self.next_steps)])


def read_options(line: str | Path, user: str = "edge-dkm", name: str | None = None) -> ServiceOptions:
    """The options for a line file, as seen from the working folder, which the service gets too.

    Raises:
        ConfigError: the line file is not right.
        UsageError: station or state come from the environment.
    """
    outline = read_outline(line)
    settings = outline.settings
    has_usb = any(camera.source.startswith("usb:") for camera in settings.cameras.values())
    has_gpio = _has_kind(settings.model_dump(), "gpio")
    models = [settings.model, *(camera.model for camera in settings.cameras.values())]
    tls = settings.mqtt.tls
    files = [*models, *((tls.ca, tls.cert, tls.key) if tls else ())]
    return ServiceOptions(
        station=settings.station,
        line=_absolute(outline.path),
        state=_absolute(settings.state),
        working_dir=Path.cwd(),
        command=_command(),
        user=user,
        name=name,
        reads=tuple(_absolute(Path(file)) for file in files if file is not None),
        devices=(CAMERAS, *PROVIDER_DEVICES.get(settings.device, ()), *((GPIO,) if has_gpio else ())),
        groups=(*(("video",) if has_usb else ()), *(("gpio",) if has_gpio else ())),
        variables=outline.variables,
    )


HARDENING = """\
NoNewPrivileges=yes
CapabilityBoundingSet=
ProtectSystem=strict
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectProc=invisible
# No ProtectClock: it forbids to ask whether the clock is synchronised. Setting the clock needs a capability that is gone already.
# No MemoryDenyWriteExecute: onnxruntime's providers compile kernels at run time.
LockPersonality=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
UMask=0077
# AF_NETLINK: the resolver asks which addresses this machine has.
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
"""


def render_unit(options: ServiceOptions) -> str:
    """The unit's text.

    Raises:
        UsageError: a name or path that cannot stand in a unit.
    """
    _check(options)
    line, state = _quoted(str(options.line)), _quoted(f"-{options.state}")
    command = " ".join(_quoted(word) for word in options.command)
    return f"""# Written by `edge-dkm service install`; your own changes belong into `systemctl edit {options.unit}`.
[Unit]
Description=Inspection line {options.station}
# Neither network-online nor time-sync: a line inspects and keeps its results without either.
After=network.target
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
# `:` keeps systemd from expanding $ in the paths.
ExecStart=:{command} run {line}
WorkingDirectory={_percent(str(options.working_dir))}
User={options.user}
{_groups(options.groups)}EnvironmentFile=-{_percent(str(options.environment_file))}
# If the watchdog ends the process, each thread's stack goes to the journal.
Environment=PYTHONFAULTHANDLER=1

# READY=1 comes when the model has proven itself and the outbox is open; a first start may build an engine.
TimeoutStartSec=300
WatchdogSec=30
Restart=always
RestartSec=2
# No RestartPreventExitStatus: exit 2 (settings) and 3 (model) do not heal by starting again, but they heal by the file that is corrected,
# the mount that comes late or the driver that loads, and then nobody has to be there. A start that fails costs about a second
# of processor time; RestartMaxDelaySec is left out since its delay would never shrink again after a good run.
TimeoutStopSec=15
# The line ends its own cameras; what is left after the main process goes too.
KillMode=mixed
OOMPolicy=stop
MemoryMax={options.memory_max}
# No core dump: it would hold frames and passwords, and delay the restart.
LimitCORE=0

{_folders(options, state)}
{HARDENING}{_devices(options.devices)}

[Install]
WantedBy=multi-user.target
"""


def install(options: ServiceOptions, root: Path = Path("/"), force: bool = False) -> Installed:
    """Writes the unit below `root`; a unit that is there and differs is replaced only with `force`.

    Raises:
        UsageError: a name or path that cannot stand in a unit, or a unit that differs.
        EdgeError: it cannot be written.
    """
    text = render_unit(options)
    path = root / UNITS / options.unit
    steps = _next_steps(options)
    try:
        present = path.read_text(encoding="utf-8", errors="replace") if path.exists() else None
        if present == text:
            return Installed(path, False, steps)
        if present is not None and not force:
            raise UsageError(
                f"{path} is there and differs; look at it, then --force replaces it, or --name gives the new one another name"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.new")
        beside.write_text(text, encoding="utf-8")
        beside.chmod(0o644)
        beside.replace(path)
    except OSError as error:
        raise EdgeError(
            f"{path} cannot be written: {error.strerror or error}; run it with sudo, or with --print and put the unit there yourself"
        ) from None
    return Installed(path, True, steps)


def _folders(options: ServiceOptions, state: str) -> str:
    lines = []
    if options.state.is_relative_to(VAR_LIB) and options.state != VAR_LIB:
        lines += [f"StateDirectory={_quoted(str(options.state.relative_to(VAR_LIB)))}", "StateDirectoryMode=0700"]
    lines += [f"ReadWritePaths={state}", "CacheDirectory=edge-dkm"]
    used = [options.line, options.state, options.working_dir, Path(options.command[0]), *options.reads]
    # An address family of folders is hidden only if the line itself lies elsewhere.
    lines.append(f"ProtectHome={'read-only' if _lies_in(used, HOMES) else 'yes'}")
    lines.append(f"PrivateTmp={'no' if _lies_in(used, TEMPORARY) else 'yes'}")
    return "\n".join(lines)


def _devices(devices: Iterable[str]) -> str:
    return "\n".join(["DevicePolicy=closed", *(f"DeviceAllow={device} rw" for device in devices)])


def _has_kind(value: object, kind: str) -> bool:
    """Whether a part of the settings, however deep, is of that kind."""
    if isinstance(value, dict):
        return value.get("kind") == kind or any(_has_kind(item, kind) for item in value.values())
    return isinstance(value, list | tuple) and any(_has_kind(item, kind) for item in value)


def _groups(groups: Iterable[str]) -> str:
    return "".join(f"SupplementaryGroups={group}\n" for group in groups)


def _next_steps(options: ServiceOptions) -> tuple[str, ...]:
    steps = []
    if options.user != "root":
        steps.append(
            f"id {options.user} || sudo useradd --system --no-create-home --shell /usr/sbin/nologin {options.user}"
        )
    if not options.state.is_relative_to(VAR_LIB):
        steps.append(f"sudo install -d -m 700 -o {options.user} {_shell(options.state)}")
    if options.variables:
        file = options.environment_file
        names = " ".join(f"{name}=..." for name in options.variables)
        steps.append(f"sudo install -D -m 600 /dev/null {file} && sudoedit {file}     # one line each: {names}")
    steps += [
        "sudo systemctl daemon-reload",
        f"sudo systemctl enable --now {options.unit}",
        f"systemctl status {options.unit}     # and: journalctl -u {options.unit} -f",
    ]
    return tuple(steps)


def _command() -> tuple[str, ...]:
    """This installation's `edge-dkm`. `-P`: the folder that the service starts in must not stand in for our packages."""
    script = Path(sys.executable).with_name("edge-dkm")
    return (str(script),) if script.is_file() else (sys.executable, "-P", "-m", "edge_dkm")


def _check(options: ServiceOptions) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_.][A-Za-z0-9_.-]{0,200}", options.unit):
        raise UsageError(
            f"--name is {options.name!r}, expected letters, digits, dot, dash and underscore; for a name like st1"
        )
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]{0,30}", options.user):
        raise UsageError(f"--user is {options.user!r}, expected the name of a user of this machine")
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?[KMGT%]?", options.memory_max):
        raise UsageError(f"memory_max is {options.memory_max!r}, expected bytes as 2G, or a share as 75%")
    if wrong := [
        device for device in (*options.devices, *options.groups) if not re.fullmatch(r"[A-Za-z0-9_/.-]+", device)
    ]:
        raise UsageError(
            f"{wrong[0]!r} stands as a device or group, expected a device node, a class as {CAMERAS}, or a group of this machine"
        )
    paths = [str(options.line), str(options.state), str(options.working_dir), *options.command]
    for path in paths:
        # A backslash or line end would be read as systemd's own; a name that is not UTF-8 cannot be written in a unit at all.
        if not path.isprintable() or "\\" in path or path != path.strip():
            raise UsageError(
                f"{path!r} cannot stand in a systemd unit (control characters, a backslash, spaces at an end); rename it"
            )
    if re.search("['\"]", options.command[0]):
        raise UsageError(
            f"{options.command[0]} cannot be started by systemd, which takes no quotes in a program's path; install it elsewhere"
        )
    for folder in (options.line, options.state, options.working_dir):
        if not folder.is_absolute():
            raise UsageError(f"{folder} is relative, expected an absolute path in a unit")


def _lies_in(paths: Iterable[Path], folders: Iterable[Path]) -> bool:
    return any(path.is_relative_to(folder) for path in paths for folder in folders)


def _absolute(path: Path) -> Path:
    return Path(os.path.normpath(path.absolute()))


def _percent(text: str) -> str:
    return text.replace("%", "%%")


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{_percent(escaped)}"'


def _shell(path: Path) -> str:
    return "'" + str(path).replace("'", "'\\''") + "'" if re.search(r"[^A-Za-z0-9_./-]", str(path)) else str(path)
