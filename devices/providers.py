"""Which execution providers this machine's onnxruntime has, and whether they are those a profile asks for."""

from __future__ import annotations

from importlib import metadata

import onnxruntime as ort

from devices.errors import ProviderError
from devices.profile import DeviceProfile

# The builds of onnxruntime; all of them install into the same folder and overwrite each other.
BUILDS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml", "onnxruntime-qnn")
_BUILD_OF = {
    "OpenVINOExecutionProvider": "onnxruntime-openvino",
    "CUDAExecutionProvider": "onnxruntime-gpu",
    "TensorrtExecutionProvider": "onnxruntime-gpu",
}


def available_providers() -> list[str]:
    """What this build offers, in its own order of preference."""
    return list(ort.get_available_providers())


def installed_builds() -> list[str]:
    """The onnxruntime distributions in this environment; more than one means that one has overwritten another's files."""
    found = []
    for name in BUILDS:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return found


def check_providers(profile: DeviceProfile, *, strict: bool) -> None:
    """Raises ProviderError where a provider of the profile is not installed (with `strict`), or two builds are installed at once."""
    builds = installed_builds()
    if len(builds) > 1:
        raise ProviderError(
            f"this environment has {' and '.join(builds)}, which overwrite each other's files; uninstall all, then install the one you need"
        )
    available = available_providers()
    missing = [provider for provider in profile.providers if provider not in available]
    if missing and strict:
        build = _BUILD_OF.get(missing[0], "an onnxruntime build with it")
        raise ProviderError(
            f"device asks for {missing[0]}, which is not installed (this onnxruntime has {', '.join(available)}); "
            f"replace onnxruntime by {build}, choose device: cpu, or set strict_provider: false"
        )
