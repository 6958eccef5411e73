"""What a session says about itself, on the providers that are here; OpenVINO's own are in test_openvino.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from edge_dkm import Inspector, ModelError, Runtime
from edge_dkm.errors import UsageError
from edge_dkm.model_file import read_model
from edge_dkm.runtime import CPU, OPENVINO, TENSORRT
from edge_dkm.session import (
    cache_folder,
    can_override,
    noise,
    open_first,
    open_session,
    open_tried,
    runs_on_cpu_alone,
)
from tests.images import draw

AZURE = "AzureExecutionProvider"  # of the plain wheel: takes any model and runs nothing of it
needs_azure = pytest.mark.skipif(AZURE not in ort.get_available_providers(), reason="not in this build")


def test_on_the_cpu_everything_asked_for_is_what_runs(tiny_model_path: Path) -> None:
    with Inspector(tiny_model_path, runtime=Runtime(warm_up=2, device="mine")) as inspector:
        ran = inspector.ran
        assert (ran.actual, ran.precision, ran.asked, ran.head, ran.why) == ((CPU,), "fp32", "fp32", "graph", None)
        assert ran.compile_s > 0 and ran.cache is None and inspector.precision == "fp32"


@needs_azure
def test_a_provider_that_takes_the_model_and_runs_nothing_of_it_is_found_out(tiny_model_path: Path) -> None:
    wanted = (AZURE, CPU)
    with pytest.raises(ModelError, match=rf"{AZURE} takes part.onnx but runs nothing of it: all of it ran on {CPU}"):
        Inspector(tiny_model_path, runtime=Runtime(wanted))
    with Inspector(tiny_model_path, runtime=Runtime(wanted, strict=False)) as inspector:
        assert inspector.providers == [CPU]
        assert inspector.ran.kernels is not None and set(inspector.ran.kernels) == {CPU}
        assert inspector.ran.head == "graph" and inspector.ran.kernels[CPU] > 5


def frozen(path: Path) -> bytes:
    """The model as OpenVINO takes it: it accepts values for the overridable inputs, and goes on with constants."""
    model = onnx.load(path)
    overridable = {tensor.name for tensor in model.graph.initializer} & {i.name for i in model.graph.input}
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name in overridable]:
        copy = onnx.TensorProto()
        copy.CopyFrom(tensor)
        copy.name = f"{tensor.name}_constant"
        model.graph.initializer.append(copy)
        for node in model.graph.node:
            node.input[:] = [copy.name if name == tensor.name else name for name in node.input]
    return model.SerializeToString()


def test_whether_inputs_can_be_overridden_is_found_out_by_trying(tiny_model_path: Path) -> None:
    plain, deaf = read_model(tiny_model_path), read_model(frozen(tiny_model_path))
    with Inspector(tiny_model_path) as inspector:
        metadata = inspector.metadata
    image = noise(metadata.input)
    assert can_override(open_session(plain, Runtime()), metadata, image)
    assert not can_override(open_session(deaf, Runtime()), metadata, image)
    # It is one that takes the values without an error: nothing but the answers tells.
    session = open_session(deaf, Runtime())
    scale = np.array([100], np.float32)
    answers = [session.run(["novelty_score"], {"image": image, **feed})[0] for feed in ({}, {"novelty_scale": scale})]
    assert np.array_equal(*answers)


def test_with_a_bank_that_is_found_out_too(bank_model_path: Path) -> None:
    """A graph that heeds the codebook answers with its patches, which a head without them would take for deafness."""
    with Inspector(bank_model_path) as inspector:
        metadata = inspector.metadata
        assert inspector.ran.head == "graph" and metadata.head_inputs == ("embedding", "patch_score")
    image = np.zeros_like(noise(metadata.input))  # stranger to the bank than the probe's codebook makes it to the head
    heeding, deaf = (open_session(read_model(m), Runtime()) for m in (bank_model_path, frozen(bank_model_path)))
    assert can_override(heeding, metadata, image) and not can_override(deaf, metadata, image)
    blind = replace(metadata, novelty={})  # control: as if the file did not say that it has a bank
    assert not can_override(heeding, blind, image)


def test_a_session_that_fails_on_other_values_cannot_override(tiny_model_path: Path) -> None:
    model = onnx.load(tiny_model_path)
    kept = [value for value in model.graph.input if value.name != "calibration"]  # now a constant, and no input
    del model.graph.input[:]
    model.graph.input.extend(kept)
    with Inspector(tiny_model_path) as inspector:
        session = open_session(read_model(model.SerializeToString()), Runtime())
        assert not can_override(session, inspector.metadata, noise(inspector.metadata.input))


def test_a_precision_that_the_provider_does_not_have_is_refused(tiny_model_path: Path) -> None:
    for runtime in (Runtime(precision="bf16"), Runtime(("CPUExecutionProvider",), precision="fp16")):
        with pytest.raises(
            UsageError, match=rf"precision is {runtime.precision}, but {CPU} computes a float32 graph in float32"
        ):
            Inspector(tiny_model_path, runtime=runtime)


def test_without_the_provider_and_not_strict_a_lowered_precision_is_fp32_and_says_why(tiny_model_path: Path) -> None:
    if OPENVINO in ort.get_available_providers():
        pytest.skip("OpenVINO is here")
    runtime = Runtime((OPENVINO, CPU), strict=False, precision="bf16")
    with Inspector(tiny_model_path, runtime=runtime) as inspector:
        assert (inspector.precision, inspector.ran.asked) == ("fp32", "bf16")
        assert inspector.ran.why == f"{OPENVINO} is not here"


def test_a_compiled_model_is_kept_by_model_provider_version_and_precision(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    file = read_model(tiny_model_path)
    runtime = Runtime((OPENVINO, CPU), cache=tmp_path)
    folder = cache_folder(file, runtime)
    assert folder == tmp_path / f"{file.sha256[:12]}-openvino-{ort.__version__}-fp32"
    others = [
        cache_folder(replace(file, sha256="0" * 64), runtime),
        cache_folder(file, replace(runtime, providers=(TENSORRT, CPU))),
        cache_folder(file, replace(runtime, precision="bf16")),
    ]
    assert len({folder, *others}) == 4 and None not in others
    assert (
        cache_folder(file, Runtime(cache=tmp_path)) is None and cache_folder(file, replace(runtime, cache=None)) is None
    )


def test_what_does_not_suit_the_profile_is_refused_before_anything_is_compiled(tiny_model_path: Path) -> None:
    def opened(runtime: Runtime) -> None:
        Inspector(tiny_model_path, runtime=runtime)

    with pytest.raises(
        ModelError, match="part.onnx takes frames of any size, but engine compiles for one; export it with --frame"
    ):
        opened(Runtime(fixed_frame=True, device="engine"))
    with pytest.raises(ModelError, match="part.onnx has preprocess.resize onnx, engine runs none, matmul"):
        opened(Runtime(resize=("none", "matmul"), device="engine"))
    opened(Runtime(resize=("onnx",)))


def test_bound_inputs_and_outputs_give_the_same_answers(tiny_model_path: Path) -> None:
    """The code path of GPU profiles, on the CPU provider: on a GPU it was never run."""
    frames = [draw(kind, np.random.default_rng(4)) for kind in ("disc", "square", "bars")]
    with Inspector(tiny_model_path) as plain, Inspector(tiny_model_path, runtime=Runtime(io_binding=True)) as bound:
        for threshold in (None, 0.3):
            if threshold is not None:
                plain.set_novelty_threshold(threshold)
                bound.set_novelty_threshold(threshold)
            assert [bound.inspect(frame) for frame in frames] == [plain.inspect(frame) for frame in frames]
            assert bound.inspect_batch(frames) == plain.inspect_batch(frames)
        assert (plain.ran.head, bound.ran.head) == ("graph", "runtime")  # an overridable input cannot be bound


def test_warming_up_uses_the_size_of_the_training(tiny_model_path: Path) -> None:
    with Inspector(tiny_model_path) as inspector:
        spec = inspector.metadata.input
    assert noise(spec).shape == (1, 32, 32, 3)
    assert noise(replace(spec, roi=(5, 6, 48, 24))).shape == (1, 24, 48, 3)
    assert noise(replace(spec, h=10, w=20)).shape == (1, 10, 20, 3)
    assert noise(replace(spec, frame=None)).shape == (1, 224, 224, 3)


def test_the_session_to_look_at_is_the_one_that_runs_on_the_cpu(tiny_model_path: Path) -> None:
    file, runtime = read_model(tiny_model_path), Runtime()
    assert runs_on_cpu_alone(runtime)
    first = open_first(file, runtime)
    with Inspector(tiny_model_path) as inspector:
        assert open_tried(file, inspector.metadata, runtime, first).session is first.session


def test_a_graph_with_no_kernel_for_an_operator_names_the_reason_and_not_the_source_line(tmp_path: Path) -> None:
    node = helper.make_node("NoSuchOperator", ["image"], ["y"])
    image = helper.make_tensor_value_info("image", onnx.TensorProto.UINT8, [1])
    output = helper.make_tensor_value_info("y", onnx.TensorProto.UINT8, [1])
    model = helper.make_model(
        helper.make_graph([node], "g", [image], [output]), opset_imports=[helper.make_opsetid("", 18)]
    )
    model.ir_version = 8
    (tmp_path / "odd.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="cannot be loaded as an ONNX model: .*NoSuchOperator") as caught:
        Inspector(tmp_path / "odd.onnx")
    assert "onnxruntime_src" not in str(caught.value)
