"""What `edge-dkm check` and `doctor` look at: one line per thing, with what is wrong and what to do."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from devices.errors import CameraError, DeviceError
from devices.profile import shipped_profiles
from devices.providers import available_providers, installed_builds, is_installed
from devices.settings import CameraSettings
from devices.sources import mask, open_source
from edge_dkm.errors import EdgeError, UsageError
from edge_dkm.framing import frame_problem
from edge_dkm.inspector import Inspector
from edge_dkm.models import load_models
from edge_dkm.mqtt.broker_probe import probe
from edge_dkm.mqtt.embedded_broker import embedded_kind, find_mosquitto
from edge_dkm.settings import EMBEDDED, LineSettings

OPENCV_BUILDS = ("opencv-python", "opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless")
REQUIRED = ("numpy", "paho-mqtt", "pydantic", "pyyaml", "cryptography")
MIN_FREE_MB = 500


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `exit_code` 0: it is all right."""

    what: str
    detail: str
    exit_code: int = 0

    def text(self) -> str:
        """For people."""
        return f"{'ok  ' if self.exit_code == 0 else 'FAIL'} {self.what:<14}{self.detail}"


def check_line(settings: LineSettings) -> Iterator[Finding]:
    """Settings are valid already; models, each camera against its model, and the broker follow."""
    yield Finding("settings", f"station {settings.station}, topics {settings.base_topic}/...")
    inspectors: dict[str, Inspector] = {}
    try:
        inspectors = load_models(settings)
        one = next(iter(inspectors.values()))
        yield Finding(
            "model",
            f"{one.metadata.model_id} {one.file.sha256[:12]}, {one.metadata.n_clusters} clusters, golden images agree on {one.providers[0]}",
        )
        yield Finding("device", _device(settings.device, one))
    except (EdgeError, DeviceError) as error:
        yield _failed("model", error)
    for name, camera in settings.cameras.items():
        yield _camera(name, camera, inspectors.get(name))
    yield from _broker(settings)


def _device(name: str, inspector: Inspector) -> str:
    """The profile, and what really runs under it."""
    runtime, ran = inspector.runtime, inspector.ran
    mark = "" if runtime.run_here else " (never run by this project)"
    why = f"; {ran.asked} was asked for: {ran.why}" if ran.why else ""
    return f"{name}: {runtime.device}{mark}, {inspector.precision} on {', '.join(ran.actual)}{why}"


def _camera(name: str, camera: CameraSettings, inspector: Inspector | None) -> Finding:
    what = f"camera {name}"
    try:
        source = open_source(camera)
        try:
            frame = next(iter(source), None)
        finally:
            source.close()
        if frame is None or frame.fault is not None:
            raise CameraError(
                "C-LOST",
                f"{mask(camera.source)} gives no usable frame"
                + (f": {frame.fault.detail}" if frame and frame.fault else ""),
            )
        height, width = frame.image.shape[:2]
        if camera.roi is not None and (camera.roi[0] + camera.roi[2] > width or camera.roi[1] + camera.roi[3] > height):
            raise CameraError(
                "C-ROI", f"roi {','.join(map(str, camera.roi))} does not lie inside its frames of {width}x{height}"
            )
        problem = frame_problem(name, camera, inspector.metadata.input, (width, height)) if inspector else None
        if problem is not None:
            raise UsageError(problem)
    except (EdgeError, DeviceError) as error:
        return _failed(what, error)
    return Finding(what, f"{mask(camera.source)}, frames of {width}x{height}")


def _broker(settings: LineSettings) -> Iterator[Finding]:
    mqtt = settings.mqtt
    try:
        if mqtt.host == EMBEDDED:
            yield Finding("broker", f"embedded on port {mqtt.effective_port}: {embedded_kind()}")
        else:
            yield from (Finding(*one) for one in probe(settings))
    except EdgeError as error:
        yield _failed("broker", error)


def _failed(what: str, error: Exception) -> Finding:
    return Finding(what, str(error), int(getattr(error, "exit_code", 1)))


def examine() -> Iterator[Finding]:
    """What `doctor` reports of this machine."""
    yield Finding(
        "python", f"{platform.python_version()} on {platform.platform()}", 0 if sys.version_info >= (3, 11) else 1
    )
    for name in REQUIRED:
        version = _version(name)
        yield Finding(name, version or f"not installed; pip install {name}", 0 if version else 1)
    builds = [f"{name} {version}" for name in OPENCV_BUILDS if (version := _version(name))]
    yield Finding(
        "opencv",
        " and ".join(builds)
        + (": they share the folder cv2 and overwrite each other; uninstall all but one" if len(builds) > 1 else ""),
        0 if len(builds) == 1 else 1,
    )
    runtimes = installed_builds()
    yield Finding(
        "onnxruntime",
        (" and ".join(runtimes) or "not installed; pip install onnxruntime")
        + (": they overwrite each other; uninstall all, then install one" if len(runtimes) > 1 else ""),
        0 if len(runtimes) == 1 else 1,
    )
    yield Finding("providers", ", ".join(available_providers()))
    profiles = shipped_profiles()
    marks = {name: "" if profile.run_here else " (never run by this project)" for name, profile in profiles.items()}
    here = [name + marks[name] for name, profile in profiles.items() if is_installed(profile)]
    missing = [name for name, profile in profiles.items() if not is_installed(profile)]
    yield Finding("devices", f"{', '.join(here)}; need another onnxruntime: {', '.join(missing) or 'none'}")
    yield Finding(
        "gstreamer", "yes" if _has_gstreamer() else "no: wheels of OpenCV come without it; RTSP goes through FFmpeg"
    )
    yield Finding("mosquitto", find_mosquitto() or "not installed: mqtt.host embedded falls back to amqtt (MQTT 3.1.1)")
    videos = sorted(str(path) for path in Path("/dev").glob("video*"))
    yield Finding("usb cameras", ", ".join(videos) or "none")
    free_mb = shutil.disk_usage(Path.cwd()).free // 1_000_000
    yield Finding("disk", f"{free_mb} MB free here", 0 if free_mb >= MIN_FREE_MB else 1)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _has_gstreamer() -> bool:
    import cv2

    return any("GStreamer" in line and "YES" in line for line in cv2.getBuildInformation().splitlines())
