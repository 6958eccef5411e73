"""`edge-dkm verify` and `warmup`: proves a model on one device profile or on all that this machine has, and fills the cache of compiled models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from devices.errors import DeviceError
from devices.profile import shipped_profiles
from devices.providers import is_installed
from edge_dkm.compiled import is_filled
from edge_dkm.errors import EdgeError, ModelError, ParityError
from edge_dkm.golden import GoldenReport
from edge_dkm.inspector import Inspector, Runtime
from edge_dkm.models import line_runtime, open_proven, runtime_of
from edge_dkm.session import Ran, cache_folder, runs_on_cpu_alone
from edge_dkm.settings import LineSettings


@dataclass(frozen=True)
class Proof:
    """What came of one profile. `report` is None where it failed, with `problem`; `disagrees`: it ran, and a golden answer differs."""

    device: str
    title: str
    run_here: bool
    report: GoldenReport | None = None
    ran: Ran | None = None
    problem: str | None = None
    disagrees: bool = False

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        report = asdict(self.report) if self.report else {}
        facts = {"device": self.device, "title": self.title, "run_here": self.run_here, "ok": self.problem is None}
        if self.ran is not None:
            ran = self.ran
            facts |= {"asked": ran.asked, "why": ran.why, "head": ran.head, "kernels": ran.kernels}
            facts |= {"compile_s": round(ran.compile_s, 3), "cache": str(ran.cache) if ran.cache else None}
        return {**report, **facts, "problem": self.problem}

    def text(self) -> str:
        """For people: one line, a second one for what they should know."""
        mark = "" if self.run_here else ", a profile never run by this project"
        if self.report is None or self.ran is None:
            return f"{'FAIL' if self.disagrees else 'cannot':<10}{self.device}{mark}: {self.problem}"
        report = self.report
        line = (
            f"verified  {report.images} golden images on {report.providers[0]} ({self.device}, {report.precision}{mark}): "
            f"{report.ids_compared} ids equal, scores within {report.max_score_difference:.1e}, "
            f"distances within {report.max_distance_difference:.1e}, allowed {report.tolerance:.0e}"
        )
        return line + (f"\n          {self.ran.asked} was asked for: {self.ran.why}" if self.ran.why else "")


def prove(model: str, device: str, cache: Path | None = None) -> Proof:
    """Opens `model` on one profile and compares its golden images.

    Raises:
        EdgeError, ConfigError, DeviceError: the profile or the model cannot be used at all, or an answer differs.
    """
    return _proven(model, device, runtime_of(device, strict=True, cache=cache))[0]


def prove_all(model: str, cache: Path | None = None) -> Iterator[Proof]:
    """The same for each shipped profile whose providers are installed here; what fails is a row, not an exception.

    Raises:
        ModelError: no usable model, on whatever device.
    """
    Inspector(model).close()
    for name, profile in shipped_profiles().items():
        if not is_installed(profile):
            continue
        try:
            yield prove(model, name, cache)
        except (EdgeError, DeviceError) as error:
            disagrees = isinstance(error, ParityError)
            yield Proof(name, profile.title, profile.run_here, problem=str(error), disagrees=disagrees)


def not_installed() -> list[str]:
    """The shipped profiles that this machine's onnxruntime cannot run."""
    return [name for name, profile in shipped_profiles().items() if not is_installed(profile)]


def warm(models: Sequence[str], device: str, runtime: Runtime) -> Iterator[Proof]:
    """Compiles each model into `runtime.cache`, and proves it: what lies in a cache unproven would only be found at the start.

    Raises:
        EdgeError: as `prove`.
    """
    for model in models:
        proof, inspector = _proven(model, device, runtime)
        wanted = None if runs_on_cpu_alone(runtime) else cache_folder(inspector.file, runtime)
        if wanted is not None and not is_filled(inspector.ran.cache):
            raise ModelError(f"{device} has left nothing in its cache {wanted}; is there room and permission?")
        yield proof


def line_models(settings: LineSettings) -> tuple[list[str], Runtime]:
    """Every model of a line, once, and how the line runs them."""
    models = [camera.model or settings.model or "" for camera in settings.cameras.values()]
    return list(dict.fromkeys(models)), line_runtime(settings)


def _proven(model: str, device: str, runtime: Runtime) -> tuple[Proof, Inspector]:
    inspector, report = open_proven(lambda runtime: Inspector(model, runtime=runtime), runtime)
    inspector.close()
    return Proof(device, runtime.device or device, bool(runtime.run_here), report, inspector.ran), inspector
