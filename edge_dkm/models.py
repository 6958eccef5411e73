"""Loads the models of a line, one per camera, proves each by its golden images, and checks that cameras show what it was trained on."""

from __future__ import annotations

from pathlib import Path

from devices.profile import load_profile
from devices.providers import check_providers
from edge_dkm.decision import Policy
from edge_dkm.errors import ModelError, UsageError
from edge_dkm.framing import roi_problem
from edge_dkm.golden import GoldenReport, load_golden, verify_golden
from edge_dkm.inspector import Inspector, Runtime
from edge_dkm.model_file import golden_path
from edge_dkm.settings import LineSettings


def runtime_of(device: str, *, strict: bool) -> Runtime:
    """The device profile as the inspector takes it.

    Raises:
        ConfigError, ProviderError: no such profile, or a provider that is not installed.
    """
    profile = load_profile(device)
    check_providers(profile, strict=strict)
    return Runtime(profile.providers, profile.options, profile.threads, profile.spinning, strict)


def load_models(settings: LineSettings) -> dict[str, Inspector]:
    """One inspector per camera; those of the same model share its session, and each has its own threshold and labels.

    Raises:
        ModelError: a model is not usable, or fails its golden images on this device.
        UsageError: verdicts name unknown clusters, or a ROI differs from the training's.
    """
    runtime = runtime_of(settings.device, strict=settings.strict_provider)
    policy = Policy(settings.verdicts.default, settings.verdicts.novel, settings.verdicts.clusters)
    by_path: dict[str, Inspector] = {}
    inspectors: dict[str, Inspector] = {}
    for name, camera in settings.cameras.items():
        path = camera.model or settings.model or ""
        if path not in by_path:
            inspector = Inspector(path, runtime=runtime, policy=policy, novelty_threshold=settings.novelty_threshold)
            verify_model(inspector)
            by_path[path] = inspector
        problem = roi_problem(name, camera, by_path[path].metadata.input)
        if problem is not None:
            raise UsageError(problem)
        inspectors[name] = by_path[path].twin()
    return inspectors


def verify_model(inspector: Inspector) -> GoldenReport:
    """Proves a model loaded from a file by the golden images beside it."""
    path: Path | None = inspector.file.path
    if path is None:
        raise ModelError("a model given as bytes has no golden images to verify it with")
    return verify_golden(inspector, load_golden(golden_path(path), inspector.metadata.golden_sha256))
