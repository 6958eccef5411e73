"""Loads the models of a line, one per camera, proves each by its golden images, and checks that cameras show what it was trained on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from devices.profile import DeviceProfile, load_profile
from devices.providers import check_providers
from edge_dkm.batching import Limits
from edge_dkm.compiled import renewed
from edge_dkm.decision import Policy
from edge_dkm.errors import ModelError, ParityError, UsageError
from edge_dkm.framing import roi_problem
from edge_dkm.golden import GoldenReport, load_golden, verify_golden
from edge_dkm.inspector import Inspector, Runtime
from edge_dkm.model_file import golden_path
from edge_dkm.runtime import COMPILING, TENSORRT
from edge_dkm.settings import LineSettings

CACHE = "cache"  # inside the state folder
Tell = Callable[[str, str], None]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """What the loading of a line gives: one inspector per camera, and how many frames of several cameras may go in one run."""

    inspectors: dict[str, Inspector]
    limits: Limits

    def close(self) -> None:
        """Frees the models."""
        for inspector in self.inspectors.values():
            inspector.close()


def runtime_of(device: str, *, strict: bool, cache: Path | None = None) -> Runtime:
    """The device profile as the inspector takes it; `cache` is where compiled models are kept unless the profile says where.

    Raises:
        ConfigError, ProviderError: no such profile, or a provider that is not installed.
    """
    profile = load_profile(device)
    check_providers(profile, strict=strict)
    if not profile.run_here:
        log.warning("device %s: %s; its golden images are the proof", device, profile.named)
    return as_runtime(profile, strict=strict, cache=cache)


def as_runtime(profile: DeviceProfile, *, strict: bool, cache: Path | None = None) -> Runtime:
    """The same of a profile that is read already."""
    return Runtime(
        providers=profile.providers,
        options=profile.options,
        threads=profile.threads,
        spinning=profile.spinning,
        strict=strict,
        precision=profile.precision,
        warm_up=profile.warm_up,
        io_binding=profile.io_binding,
        cache=profile.cache or cache,
        fixed_frame=profile.fixed_frame,
        resize=profile.resize,
        device=profile.title,
        run_here=profile.run_here,
    )


def line_runtime(settings: LineSettings) -> Runtime:
    """Of a line: compiled models lie in its state folder."""
    return runtime_of(settings.device, strict=settings.strict_provider, cache=settings.state / CACHE)


def load_models(settings: LineSettings, tell: Tell | None = None) -> dict[str, Inspector]:
    """One inspector per camera; those of the same model share its session, and each has its own threshold and labels.

    Args:
        tell: is called with (code, detail) when a step begins that may take long.

    Raises:
        ModelError: a model is not usable, or fails its golden images on this device.
        UsageError: verdicts name unknown clusters, or a ROI differs from the training's.
    """
    runtime = line_runtime(settings)
    policy = Policy(settings.verdicts.default, settings.verdicts.novel, settings.verdicts.clusters)
    by_path: dict[str, Inspector] = {}
    inspectors: dict[str, Inspector] = {}
    for name, camera in settings.cameras.items():
        path = camera.model or settings.model or ""
        if path not in by_path:
            if tell is not None:
                tell(*step(runtime, path))

            def open_it(runtime: Runtime, path: str = path) -> Inspector:
                return Inspector(path, runtime=runtime, policy=policy, novelty_threshold=settings.novelty_threshold)

            by_path[path] = open_proven(open_it, runtime)[0]
        problem = roi_problem(name, camera, by_path[path].metadata.input)
        if problem is not None:
            raise UsageError(problem)
        inspectors[name] = by_path[path].twin()
    return inspectors


def step(runtime: Runtime, model: str) -> tuple[str, str]:
    """Code and words for what opening this model means: compiling takes minutes with TensorRT, seconds with OpenVINO."""
    compiler = next((provider for provider in runtime.providers if provider in COMPILING), None)
    if compiler is None:
        return "LOADING", f"loading {Path(model).name}"
    kind = "building the TensorRT engine for" if compiler == TENSORRT else "compiling for OpenVINO:"
    return "COMPILING", f"{kind} {Path(model).name}"


def open_proven(open_it: Callable[[Runtime], Inspector], runtime: Runtime) -> tuple[Inspector, GoldenReport]:
    """A model that gives the golden answers; a compiled one from the cache that does not is replaced by one compiled anew, once.

    Raises:
        ModelError: it is not usable, or not proven.
    """
    inspector = open_it(runtime)
    try:
        return inspector, verify_model(inspector)
    except ModelError as error:
        inspector.close()
        cache = inspector.ran.cache
        if not isinstance(error, ParityError) or cache is None or not inspector.ran.from_cache:
            raise
        log.warning("%s; what was compiled earlier (%s) is not used, it is compiled anew", error, cache)
    with renewed(cache) as fresh:
        inspector = open_it(runtime if fresh is not None else replace(runtime, cache=None))
        try:
            return inspector, verify_model(inspector)
        except ModelError:
            inspector.close()
            raise


def verify_model(inspector: Inspector) -> GoldenReport:
    """Proves a model loaded from a file by the golden images beside it."""
    path: Path | None = inspector.file.path
    if path is None:
        raise ModelError("a model given as bytes has no golden images to verify it with")
    return verify_golden(inspector, load_golden(golden_path(path), inspector.metadata.golden_sha256))
