"""On the real OpenVINO provider, in an environment that has onnxruntime-openvino instead of onnxruntime (docs/devices.md); skipped elsewhere.

That environment needs no torch: EDGE_DKM_MODEL names an exported model with its golden images, for which the other one's tiny model will do.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from edge_dkm import Inspector, ModelError, Runtime
from edge_dkm.codebook import write_codebook
from edge_dkm.errors import UsageError
from edge_dkm.golden import Golden, load_golden, verify_golden
from edge_dkm.model_file import golden_path
from edge_dkm.models import runtime_of
from edge_dkm.runtime import CPU, OPENVINO
from edge_dkm.verification import prove, prove_all, warm

pytestmark = pytest.mark.skipif(OPENVINO not in ort.get_available_providers(), reason="needs onnxruntime-openvino")
ON = Runtime((OPENVINO, CPU), {OPENVINO: {"device_type": "CPU"}})


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the model with its sidecars."""
    given = os.environ.get("EDGE_DKM_MODEL")
    source = Path(given) if given else Path(request.getfixturevalue("tiny_model_path"))
    folder = tmp_path_factory.mktemp("model")
    for path in source.parent.glob(f"{source.name}*"):
        shutil.copy(path, folder / path.name)
    return folder / source.name


def golden_of(inspector: Inspector) -> Golden:
    assert inspector.file.path is not None
    return load_golden(golden_path(inspector.file.path), inspector.metadata.golden_sha256)


def test_it_runs_there_in_fp32_and_gives_the_golden_answers(model: Path) -> None:
    with Inspector(model, runtime=ON) as inspector:
        assert inspector.providers[0] == OPENVINO and inspector.precision == "fp32"
        assert inspector.ran.kernels is not None and inspector.ran.kernels[OPENVINO] >= 1
        assert set(inspector.providers) == set(inspector.ran.kernels)  # the CPU provider only where it runs something
        assert verify_golden(inspector, golden_of(inspector)).max_score_difference < 1e-4


def test_it_ignores_overridden_inputs_which_is_found_out_so_that_a_threshold_and_a_codebook_count(
    model: Path, tmp_path: Path
) -> None:
    with Inspector(model) as on_cpu, Inspector(model, runtime=ON) as inspector:
        golden = golden_of(inspector)
        assert (on_cpu.ran.head, inspector.ran.head) == ("graph", "runtime")
        tensors = {name: tensor * np.float32(1.3) for name, tensor in golden.codebook.items()}
        path = write_codebook(tmp_path, tensors, {"model_sha256": inspector.file.sha256})
        # Control: what the provider itself answers to a replaced scale is its old answer.
        image, names = golden.images[0][None], ("novelty_score",)
        feed = {"novelty_scale": golden.codebook["novelty_scale"] * np.float32(10)}
        raw = [inspector._open().run(list(names), {"image": image, **f})[0] for f in ({}, feed)]
        assert np.array_equal(*raw)
    with Inspector(model, path, novelty_threshold=0.5) as on_cpu, Inspector(model, path, runtime=ON) as inspector:
        inspector.set_novelty_threshold(0.5)
        for n, image in enumerate(golden.images):
            expected, got = on_cpu.inspect(image), inspector.inspect(image)
            assert got.novelty_score == pytest.approx(expected.novelty_score, rel=1e-3, abs=1e-4), n
            if golden.is_decisive(n, 10):
                assert got.cluster.id == expected.cluster.id, n
            if abs(expected.novelty_score - 0.5) > 1e-3:
                assert got.is_novel == expected.is_novel, n


def test_bf16_runs_where_the_golden_images_allow_it_and_else_fp32_with_the_reason(model: Path) -> None:
    with Inspector(model, runtime=replace(ON, precision="bf16")) as inspector:
        assert inspector.ran.asked == "bf16"
        assert (inspector.precision, inspector.ran.why is None) in {("bf16", True), ("fp32", False)}
        assert verify_golden(inspector, golden_of(inspector)).precision == inspector.precision


def test_without_golden_images_a_lowered_precision_falls_back(model: Path, tmp_path: Path) -> None:
    with Inspector(model.read_bytes(), runtime=replace(ON, precision="bf16")) as inspector:
        assert inspector.precision == "fp32" and "given as bytes has no golden images" in str(inspector.ran.why)
    alone = Path(shutil.copy(model, tmp_path / "alone.onnx"))
    with Inspector(alone, runtime=replace(ON, precision="bf16")) as inspector:
        assert inspector.precision == "fp32" and "cannot be read" in str(inspector.ran.why)


def test_fp16_on_a_cpu_is_refused_since_openvino_would_take_bf16_for_it(model: Path) -> None:
    with pytest.raises(UsageError, match="precision is fp16, but OpenVINO on a CPU computes in fp32 or bf16"):
        Inspector(model, runtime=replace(ON, precision="fp16"))


def test_an_option_it_does_not_know_is_an_error_and_no_silent_cpu(model: Path) -> None:
    wrong = replace(ON, options={OPENVINO: {"device_type": "CPU", "devise": "1"}})
    with pytest.raises(ModelError, match="on OpenVINOExecutionProvider: .*Invalid OpenVINO EP option: devise"):
        Inspector(model, runtime=wrong)
    with Inspector(model, runtime=replace(wrong, strict=False)) as inspector:
        assert inspector.providers == [CPU]
    with pytest.raises(
        UsageError, match="options.OpenVINOExecutionProvider.precision is ACCURACY, but precision fp32 sets it to FP32"
    ):
        Inspector(model, runtime=replace(ON, options={OPENVINO: {"precision": "ACCURACY"}}))


def test_the_compiled_model_is_kept_and_a_damaged_one_does_no_harm(model: Path, tmp_path: Path) -> None:
    runtime = replace(runtime_of("openvino", strict=True), cache=tmp_path / "cache")
    (first,) = warm([str(model)], "openvino", runtime)
    assert first.ran is not None and first.ran.cache is not None and not first.ran.from_cache
    (kept,) = (tmp_path / "cache").iterdir()
    assert kept == first.ran.cache and kept.stat().st_mode & 0o077 == 0 and list(kept.iterdir())
    (second,) = warm([str(model)], "openvino", runtime)
    assert second.ran is not None and second.ran.from_cache
    for path in kept.iterdir():
        path.chmod(0o600)
        data = bytearray(path.read_bytes())
        data[len(data) // 2 :] = b"x" * (len(data) - len(data) // 2)
        path.write_bytes(data)
    (third,) = warm([str(model)], "openvino", runtime)
    assert third.report is not None and third.report.max_score_difference < 1e-4


def test_the_profiles_of_this_environment_are_proven(model: Path) -> None:
    rows = {row.device: row for row in prove_all(str(model))}
    assert {"cpu", "openvino", "openvino_bf16"} <= set(rows) and not any(row.disagrees for row in rows.values())
    assert prove(str(model), "openvino").text().startswith("verified  ")
