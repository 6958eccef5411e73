"""Which execution providers this machine's onnxruntime has, and whether they are those a profile asks for."""

from __future__ import annotations

from importlib import metadata

import onnxruntime as ort

from devices.errors import ProviderError
from devices.profile import DeviceProfile, shipped_profiles

# The builds of onnxruntime; all of them install into the same folder and overwrite each other.
BUILDS = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-openvino",
    "onnxruntime-directml",
    "onnxruntime-qnn",
    "onnxruntime-rocm",
    "onnxruntime-migraphx",
    "onnxruntime-cann",
    "onnxruntime-training",
    "onnxruntime-windowsml",
    "ort-nightly",
    "ort-nightly-gpu",
)
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


def is_installed(profile: DeviceProfile) -> bool:
    """Whether this onnxruntime has all of the profile's providers; a driver may still be missing."""
    return set(profile.providers) <= set(available_providers())


def check_builds() -> None:
    """Raises ProviderError where two builds of onnxruntime are installed at once."""
    builds = installed_builds()
    if len(builds) > 1:
        raise ProviderError(
            f"this environment has {' and '.join(builds)}, which overwrite each other's files; uninstall all, then install the one you need"
        )


def check_providers(profile: DeviceProfile, *, strict: bool) -> None:
    """Raises ProviderError where a provider is unknown or (with `strict`) not installed, or two builds are installed at once."""
    check_builds()
    known = list(ort.get_all_providers())
    unknown = [name for name in (*profile.providers, *profile.options) if name not in known]
    if unknown:
        raise ProviderError(f"device names {unknown[0]}, which is no execution provider; expected {', '.join(known)}")
    available = available_providers()
    missing = [provider for provider in profile.providers if provider not in available]
    if missing and strict:
        build = _BUILD_OF.get(missing[0], "an onnxruntime build with it")
        possible = ", ".join(name for name, other in shipped_profiles().items() if is_installed(other))
        raise ProviderError(
            f"device asks for {missing[0]}, which is not installed (this onnxruntime has {', '.join(available)}); "
            f"replace onnxruntime by {build}, choose a device that runs here ({possible}), or set strict_provider: false"
        )
