"""Device profiles and what is asked of the machine for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs import ConfigError
from devices import providers
from devices.errors import ProviderError
from devices.profile import DeviceProfile, load_profile, shipped_profiles
from devices.providers import check_providers, installed_builds, is_installed

CPU, OPENVINO = "CPUExecutionProvider", "OpenVINOExecutionProvider"


def test_what_was_never_run_here_is_marked() -> None:
    profiles = shipped_profiles()
    assert {name for name, profile in profiles.items() if profile.run_here} == {"cpu", "openvino", "openvino_bf16"}
    assert profiles["cuda"].named == "NVIDIA GPU through CUDA (never run by this project)"
    assert profiles["cpu"].named == profiles["cpu"].title


def test_every_shipped_profile_warms_up_and_can_end_on_the_cpu() -> None:
    for name, profile in shipped_profiles().items():
        assert profile.warm_up >= 1 and profile.providers[-1] == CPU, name
        assert set(profile.options) <= set(profile.providers), name


def test_gpu_profiles_compute_in_float32_unless_they_say_otherwise() -> None:
    for name in ("cuda", "tensorrt"):
        profile = load_profile(name)
        assert profile.precision == "fp32" and profile.options["CUDAExecutionProvider"]["use_tf32"] == "0"
        assert profile.io_binding


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("title: x\nprecision: int4", "precision is int4, expected 'fp32', 'fp16' or 'bf16'"),
        ("title: x\nwarmup: 3", "warmup.*did you mean 'warm_up'"),
        ("title: x\nproviders: []", "providers"),
        ("title: x\nthreads: -1", "threads is -1"),
        ("threads: 2", "title"),
    ],
)
def test_a_profile_that_is_wrong_says_where(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_profile(tmp_path / "mine.yaml")


def test_a_profile_that_asks_for_what_is_not_installed_says_what_is_possible() -> None:
    if is_installed(load_profile("tensorrt")):
        pytest.skip("TensorRT is installed")
    with pytest.raises(
        ProviderError,
        match=r"TensorrtExecutionProvider, which is not installed \(this onnxruntime has .*CPUExecutionProvider\); "
        r"replace onnxruntime by onnxruntime-gpu, choose a device that runs here \(cpu, .*\), or set strict_provider: false",
    ):
        check_providers(load_profile("tensorrt"), strict=True)
    check_providers(load_profile("tensorrt"), strict=False)


def test_a_provider_that_does_not_exist_is_an_error_in_any_case() -> None:
    for profile in (
        DeviceProfile(title="typing error", providers=("CudaExecutionProvider", CPU)),
        DeviceProfile(title="typing error", options={"CudaExecutionProvider": {}}),
    ):
        with pytest.raises(
            ProviderError, match="names CudaExecutionProvider, which is no execution provider; expected .*CUDAExec"
        ):
            check_providers(profile, strict=False)


def install(folder: Path, name: str, version: str) -> None:
    """What pip leaves of a distribution."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_two_builds_of_onnxruntime_in_one_environment_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = installed_builds()
    assert len(before) == 1
    check_providers(load_profile("cpu"), strict=True)
    second = next(name for name in ("onnxruntime-gpu", "onnxruntime-qnn") if name not in before[0])
    install(tmp_path, second, "1.31.1")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert f"{second} 1.31.1" in installed_builds()
    with pytest.raises(
        ProviderError, match="which overwrite each other's files; uninstall all, then install the one you need"
    ):
        check_providers(load_profile("cpu"), strict=False)


def test_control_a_package_that_goes_with_a_build_is_no_second_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "onnxruntime-extensions", "0.15.2")
    monkeypatch.syspath_prepend(str(tmp_path))
    check_providers(load_profile("cpu"), strict=True)
    assert "onnxruntime-extensions" not in providers.BUILDS
