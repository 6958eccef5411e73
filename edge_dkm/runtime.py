"""How a model is to be run, and what that means in each provider's own options: precision, threads, the folder of compiled models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from edge_dkm.errors import UsageError

Lowering = Literal[
    "fp32", "fp16", "bf16"
]  # what a provider computes in; fp32: as the file says (its own is contract.Precision)
Options = Mapping[str, Mapping[str, str]]
CPU = "CPUExecutionProvider"
OPENVINO, TENSORRT, CUDA = "OpenVINOExecutionProvider", "TensorrtExecutionProvider", "CUDAExecutionProvider"
# Those that can compute a whole float32 graph in a lower precision.
LOWERING: Mapping[str, tuple[Lowering, ...]] = {OPENVINO: ("fp16", "bf16"), TENSORRT: ("fp16", "bf16")}
COMPILING = (OPENVINO, TENSORRT)


@dataclass(frozen=True)
class Runtime:
    """How onnxruntime runs the graph. `threads` 0: one per core. `spinning` burns a core to shave microseconds off a busy line.

    `precision` other than fp32 lets the provider lower the whole graph, if the golden images allow it (edge_dkm/lowered.py).
    `warm_up`: runs before the first frame. `cache`: a folder for compiled models. `fixed_frame`: only for graphs of one frame size;
    `resize`: only for graphs with one of these pre-processing modes (empty: any). `device` and `run_here`: title of the device
    profile, and whether the project has ever run it, for what a line says about itself.
    """

    providers: Sequence[str] = (CPU,)
    options: Options = field(default_factory=dict)
    threads: int = 0
    spinning: bool = False
    strict: bool = True
    precision: Lowering = "fp32"
    warm_up: int = 0
    io_binding: bool = False
    cache: Path | None = None
    fixed_frame: bool = False
    resize: Sequence[str] = ()
    device: str | None = None
    run_here: bool | None = None


def check_precision(runtime: Runtime) -> None:
    """Raises UsageError where the first provider does not have the precision."""
    first = runtime.providers[0]
    # Asked for fp16, OpenVINO on a processor that lacks it takes bf16 without a word (measured: the same answers).
    is_cpu = first == OPENVINO and _device_type(runtime.options.get(first, {})) == "CPU"
    is_real = not (is_cpu and runtime.precision == "fp16")
    if runtime.precision == "fp32" or (runtime.precision in LOWERING.get(first, ()) and is_real):
        return
    if is_cpu:
        raise UsageError(f"precision is {runtime.precision}, but OpenVINO on a CPU computes in fp32 or bf16")
    able = " and ".join(f"{name} ({', '.join(kinds)})" for name, kinds in LOWERING.items())
    raise UsageError(
        f"precision is {runtime.precision}, but {first} computes a float32 graph in float32; expected fp32, or {able}"
    )


def check_runtime(runtime: Runtime) -> None:
    """Raises UsageError for what no provider needs to be opened to know: a precision it does not have, options that say otherwise."""
    check_precision(runtime)
    for provider in runtime.providers:
        provider_options(provider, runtime, None)


def provider_options(provider: str, runtime: Runtime, cache: Path | None) -> dict[str, str]:
    """The profile's own options win over what follows from its other keys; not over its precision, which `info` names.

    Raises:
        UsageError: an option that says otherwise than the precision.
    """
    own = dict(runtime.options.get(provider, {}))
    kept = _cache_options(cache).get(provider, {}) if cache is not None else {}
    threads = {"num_of_threads": str(runtime.threads)} if provider == OPENVINO and runtime.threads else {}
    precision = runtime.precision if provider == runtime.providers[0] else "fp32"
    lowered = _precision_options(provider, precision, _device_type(own))
    clash = sorted(key for key in lowered if key in own and own[key] != lowered[key])
    if clash:
        raise UsageError(
            f"options.{provider}.{clash[0]} is {own[clash[0]]}, but precision {precision} sets it to {lowered[clash[0]]}; leave one out"
        )
    return {**kept, **threads, **own, **lowered}


def _device_type(own: Mapping[str, str]) -> str:
    """OpenVINO's CPU, GPU, NPU, AUTO..., without the number of the device."""
    return own.get("device_type", "CPU").partition(".")[0].partition(":")[0]


def _precision_options(provider: str, precision: Lowering, device_type: str) -> dict[str, str]:
    if provider == TENSORRT and precision != "fp32":
        return {f"trt_{precision}_enable": "True"}
    if provider == OPENVINO and precision == "bf16":  # `precision` knows only FP32, FP16 and ACCURACY
        return {"load_config": json.dumps({device_type: {"INFERENCE_PRECISION_HINT": "bf16"}})}
    if provider == OPENVINO:
        return {"precision": precision.upper()}  # a GPU would take FP16 unasked
    return {}


def _cache_options(folder: Path) -> dict[str, dict[str, str]]:
    where = str(folder)
    engine = {"trt_engine_cache_enable": "True", "trt_engine_cache_path": where}
    timing = {"trt_timing_cache_enable": "True", "trt_timing_cache_path": where}
    return {OPENVINO: {"cache_dir": where}, TENSORRT: engine | timing}
