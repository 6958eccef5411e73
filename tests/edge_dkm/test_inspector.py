from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_dkm import FrameError, Inspector, ModelError, Policy, Runtime
from edge_dkm.errors import ContractError, UsageError
from edge_dkm.inspector import Inspection
from tests.images import draw


def frame(kind: str = "disc", seed: int = 1) -> np.ndarray:
    return draw(kind, np.random.default_rng(seed))


def test_the_three_kinds_fall_into_three_clusters(tiny_model_path: Path) -> None:
    with Inspector(tiny_model_path) as inspector:
        ids = [
            {inspector.inspect(frame(kind, seed)).cluster.id for seed in range(5)}
            for kind in ("disc", "square", "bars")
        ]
    assert [len(s) for s in ids] == [1, 1, 1] and len(set.union(*ids)) == 3


def test_an_inspection_carries_distance_margin_score_and_verdict(tiny_model_path: Path) -> None:
    with Inspector(tiny_model_path) as inspector:
        result = inspector.inspect(frame())
    assert result.distance > 0 and result.margin is not None and result.margin > 0
    assert result.is_novel == (result.novelty_score > result.novelty_threshold == 1.0)
    assert 0 < result.p_value <= 1
    assert (result.verdict, result.reason) == (("review", "novel") if result.is_novel else ("pass", "default"))


def test_a_model_with_a_bank_says_how_strange_the_strangest_place_is(
    bank_model_path: Path, tiny_model_path: Path
) -> None:
    damaged = frame()
    damaged[2:7, 2:7] = (255, 0, 255)
    with Inspector(bank_model_path) as inspector:
        assert inspector.fetched[-1] == "patch_score"
        clean, spotted = inspector.inspect_batch([frame(), damaged])
        maps = inspector.run(np.stack([frame(), damaged]), ("novelty_map", "patch_score"))
    assert clean.patch_score is not None and spotted.patch_score is not None
    assert clean.patch_score > 0 and spotted.patch_score > 1.3 * clean.patch_score
    side = maps["novelty_map"].shape[1]
    assert maps["novelty_map"].shape == (2, side, side) and side > 8
    assert maps["patch_score"].tolist() == pytest.approx([clean.patch_score, spotted.patch_score])
    assert maps["patch_score"].tolist() == pytest.approx(maps["novelty_map"].max((1, 2)).tolist())
    strangest = np.unravel_index(maps["novelty_map"][1].argmax(), (side, side))
    assert max(strangest) * 32 / side <= 9  # pixels: where the spot is
    with Inspector(tiny_model_path) as inspector:
        assert inspector.inspect(frame()).patch_score is None and "patch_score" not in inspector.fetched


def test_noise_is_novel_and_its_verdict_is_the_policys(tiny_model_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    with Inspector(tiny_model_path, policy=Policy(novel="reject")) as inspector:
        result = inspector.inspect(noise)
    assert (result.is_novel, result.verdict, result.reason) == (True, "reject", "novel")


def test_one_by_one_and_in_a_batch_give_the_same_answers(tiny_model_path: Path) -> None:
    frames = [frame(kind, seed) for seed in range(3) for kind in ("disc", "square", "bars")]
    with Inspector(tiny_model_path) as inspector:
        single, batch = [inspector.inspect(f) for f in frames], inspector.inspect_batch(frames)
        assert inspector.inspect_batch([]) == []
        with pytest.raises(FrameError, match="one batch holds frames of"):
            inspector.inspect_batch([frames[0], frames[0][:10]])
    assert [s.cluster.id for s in single] == [b.cluster.id for b in batch]
    assert np.allclose([s.novelty_score for s in single], [b.novelty_score for b in batch], rtol=1e-5)


@pytest.mark.parametrize(
    ("bad", "code", "text"),
    [
        (None, "F-TYPE", "NoneType, expected a numpy array .*return None"),
        (np.zeros((32, 32, 3), np.float32), "F-DTYPE", "float32, expected uint8"),
        (np.zeros((32, 32, 3), np.uint16), "F-DTYPE", "uint16"),
        (np.zeros((32, 32), np.uint8), "F-SHAPE", "COLOR_GRAY2BGR"),
        (np.zeros((32, 32, 4), np.uint8), "F-SHAPE", r"\(32, 32, 4\), expected \(H, W, 3\)"),
        (np.zeros((0, 32, 3), np.uint8), "F-SHAPE", "32x0"),
    ],
)
def test_a_frame_the_graph_cannot_take_says_what_it_is_and_what_was_expected(
    tiny_model_path: Path, bad: np.ndarray, code: str, text: str
) -> None:
    with Inspector(tiny_model_path) as inspector, pytest.raises(FrameError, match=text) as caught:
        inspector.inspect(bad)
    assert caught.value.code == code


def layouts(original: np.ndarray) -> dict[str, np.ndarray]:
    """The same pixels, laid out in memory in every way that numpy has."""
    height, width, _ = original.shape
    wide = np.zeros((2 * height + 1, 3 * width + 2, 5), np.uint8)
    wide[1::2, 2::3, 1:4] = original
    read_only = original.copy()
    read_only.setflags(write=False)
    backwards = np.ascontiguousarray(original[::-1, ::-1, ::-1])
    planes = np.ascontiguousarray(original.transpose(2, 0, 1))
    odd = np.zeros(original.size + 1, np.uint8)[1:].reshape(original.shape)
    odd[...] = original
    return {
        "sliced out of a larger one": wide[1::2, 2::3, 1:4],
        "Fortran order": np.asfortranarray(original),
        "read-only": read_only,
        "negative strides": backwards[::-1, ::-1, ::-1],
        "planes": planes.transpose(1, 2, 0),
        "transposed twice": np.ascontiguousarray(original.transpose(1, 0, 2)).transpose(1, 0, 2),
        "at an odd address": odd,
        "from bytes": np.frombuffer(original.tobytes(), np.uint8).reshape(original.shape),
        "masked": np.ma.masked_array(original),
        "of another byte order": original.astype(">u1"),
    }


def test_layout_and_write_protection_change_neither_the_answer_nor_the_frame(tiny_model_path: Path) -> None:
    original = frame()
    with Inspector(tiny_model_path) as inspector:
        expected = inspector.inspect(original)
        variants = layouts(original)
        for name, variant in variants.items():
            assert inspector.inspect(variant) == expected, name
            assert np.array_equal(variant, original), name
        assert inspector.inspect_batch(list(variants.values())) == inspector.inspect_batch([original] * len(variants))
    assert np.array_equal(original, frame())


def test_a_row_that_is_repeated_by_a_stride_of_zero_is_as_good_as_its_copy(tiny_model_path: Path) -> None:
    repeated = np.broadcast_to(frame()[5], (32, 32, 3))
    with Inspector(tiny_model_path) as inspector:
        assert inspector.inspect(repeated) == inspector.inspect(repeated.copy())


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 3), (33, 31), (480, 640), (1000, 7)])
def test_a_graph_for_any_size_answers_at_every_size(tiny_model_path: Path, size: tuple[int, int]) -> None:
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    before = image.copy()
    with Inspector(tiny_model_path) as inspector:
        result = inspector.inspect(image)
        assert result == inspector.inspect(np.asfortranarray(image)) and np.isfinite(result.novelty_score)
    assert np.array_equal(image, before)


@pytest.mark.parametrize(
    "dtype", ["int8", "bool", "uint16", "float16", "float64", "complex64", "object", "S1", "datetime64[s]"]
)
def test_every_other_type_of_pixel_is_named(tiny_model_path: Path, dtype: str) -> None:
    with Inspector(tiny_model_path) as inspector, pytest.raises(FrameError, match="expected uint8") as caught:
        inspector.inspect(np.zeros((32, 32, 3), dtype))
    assert caught.value.code == "F-DTYPE" and f"the frame is {np.dtype(dtype)}" in caught.value.detail


@pytest.mark.parametrize(
    "shape", [(), (3,), (32, 3), (32, 32, 1), (32, 32, 2), (1, 32, 32, 3), (32, 0, 3), (3, 32, 32)]
)
def test_every_other_shape_is_named(tiny_model_path: Path, shape: tuple[int, ...]) -> None:
    with Inspector(tiny_model_path) as inspector, pytest.raises(FrameError) as caught:
        inspector.inspect(np.zeros(shape, np.uint8))
    assert caught.value.code == "F-SHAPE" and "expect" in caught.value.detail


@pytest.mark.parametrize("value", ["part.png", b"\x00", 7, [[[0, 0, 0]]], {"image": 1}])
def test_what_is_no_array_is_named(tiny_model_path: Path, value: object) -> None:
    with (
        Inspector(tiny_model_path) as inspector,
        pytest.raises(FrameError, match=f"the frame is {type(value).__name__}, "),
    ):
        inspector.inspect(value)  # type: ignore[arg-type]


def test_a_fixed_size_graph_names_the_size_it_expects(tiny_run_folder: Path, tmp_path: Path) -> None:
    from exporters.export import ExportOptions, export_run
    from trainer import load_run

    export_run(load_run(tiny_run_folder), tmp_path / "part.onnx", ExportOptions(frame=(32, 32)))
    with (
        Inspector(tmp_path / "part.onnx") as inspector,
        pytest.raises(FrameError, match=r"the frame is 40x30, part\.onnx expects 32x32"),
    ):
        inspector.inspect(np.zeros((30, 40, 3), np.uint8))


def test_the_threshold_can_be_moved_and_must_make_sense(tiny_model_path: Path) -> None:
    with Inspector(tiny_model_path) as inspector:
        score = inspector.inspect(frame()).novelty_score
        inspector.set_novelty_threshold(score * 0.9)
        assert inspector.inspect(frame()).is_novel
        for bad in (0.0, -1.0, float("nan"), float("inf")):
            with pytest.raises(UsageError, match="expected a finite number greater than 0"):
                inspector.set_novelty_threshold(bad)
    with Inspector(tiny_model_path, novelty_threshold=score * 1.1) as inspector:
        assert not inspector.inspect(frame()).is_novel


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:x", "Git-LFS pointer of .*git lfs pull"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"PK\x03\x04 a zip", "zip or pickle"),
        (b"not a model at all", "cannot be loaded as an ONNX model"),
    ],
)
def test_a_file_that_is_no_model_is_called_what_it_is(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "part.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=text):
        Inspector(path)


def test_a_missing_model_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model; `dkm-export"):
        Inspector(tmp_path / "nope.onnx")
    with pytest.raises(ModelError, match="cannot be read"):
        Inspector(tmp_path)


def test_a_truncated_or_edited_model_does_not_load(copied_model: Path) -> None:
    data = copied_model.read_bytes()
    for changed in (data[: len(data) // 2], data[:-1], data[:5000] + bytes([data[5000] ^ 1]) + data[5001:]):
        copied_model.write_bytes(changed)
        with pytest.raises(ModelError, match=r"sha256 .* but part\.onnx\.sha256 names"):
            Inspector(copied_model)


def test_control_without_its_digest_a_flipped_bit_may_load(copied_model: Path) -> None:
    copied_model.with_name("part.onnx.sha256").unlink()
    with Inspector(copied_model) as inspector:
        assert not inspector.file.checked


def test_another_contract_and_a_foreign_model_are_refused(copied_model: Path) -> None:
    import onnx

    model = onnx.load(copied_model)
    copied_model.with_name("part.onnx.sha256").unlink()
    for prop in model.metadata_props:
        if prop.key == "dkm.contract":
            prop.value = "2"
    onnx.save(model, copied_model)
    with pytest.raises(ContractError, match="has contract 2, this runtime speaks contract 1"):
        Inspector(copied_model)
    del model.metadata_props[:]
    onnx.save(model, copied_model)
    with pytest.raises(ContractError, match="without dkm.contract"):
        Inspector(copied_model)


def test_a_model_whose_outputs_were_changed_is_refused(copied_model: Path) -> None:
    import onnx

    model = onnx.load(copied_model)
    copied_model.with_name("part.onnx.sha256").unlink()
    del model.graph.output[3]
    onnx.save(model, copied_model)
    with pytest.raises(ContractError, match="has no output 'p_value'"):
        Inspector(copied_model)


def test_a_missing_provider_is_an_error_unless_fallback_is_accepted(tiny_model_path: Path) -> None:
    wanted = ("TensorrtExecutionProvider", "CPUExecutionProvider")
    with pytest.raises(ModelError, match="has no TensorrtExecutionProvider, it has"):
        Inspector(tiny_model_path, runtime=Runtime(providers=wanted))
    with Inspector(tiny_model_path, runtime=Runtime(providers=wanted, strict=False)) as inspector:
        assert inspector.providers == ["CPUExecutionProvider"]


def test_a_policy_that_names_an_unknown_cluster_lists_the_known_ones(tiny_model_path: Path) -> None:
    with pytest.raises(
        UsageError, match="names 'scratch', which part.onnx does not have; its clusters are 0 cluster-0"
    ):
        Inspector(tiny_model_path, policy=Policy(clusters={"scratch": "reject"}))


def test_many_threads_share_one_inspector(tiny_model_path: Path) -> None:
    frames = [frame(kind, seed) for seed in range(8) for kind in ("disc", "square", "bars")]
    with Inspector(tiny_model_path, runtime=Runtime(threads=1)) as inspector:
        expected = [inspector.inspect(f).cluster.id for f in frames]
        results: list[list[int]] = []
        threads = [
            threading.Thread(target=lambda: results.append([inspector.inspect(f).cluster.id for f in frames]))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == [expected] * 4


def test_a_closed_inspector_says_so(tiny_model_path: Path) -> None:
    inspector = Inspector(tiny_model_path)
    inspector.close()
    inspector.close()
    with pytest.raises(UsageError, match="is closed"):
        inspector.inspect(frame())


def test_it_loads_from_bytes(tiny_model_path: Path) -> None:
    with Inspector(tiny_model_path.read_bytes()) as inspector:
        assert inspector.inspect(frame()).cluster.name.startswith("cluster-")


def test_it_works_in_a_host_program_with_folders_of_our_names_and_without_torch(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    for name in ("configs", "devices", "trainer"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the host program has its own')")
    shutil.copy(tiny_model_path, tmp_path / "part.onnx")
    program = """
import sys
for name in ("torch", "onnx", "scipy", "sklearn", "pydantic", "yaml", "cv2", "paho"):
    sys.modules[name] = None
sys.path.insert(0, "")
import numpy as np
from edge_dkm import Inspector
with Inspector("part.onnx") as inspector:
    result = inspector.inspect(np.zeros((32, 32, 3), np.uint8))
    print(result.cluster.name, result.verdict, result.novelty_score > 0, result.is_novel)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("cluster-")


def test_a_threshold_that_is_moved_during_a_run_is_not_that_of_the_runs_answer(tiny_model_path: Path) -> None:
    with Inspector(tiny_model_path) as inspector:
        inspector.set_novelty_threshold(1e-6)
        run, frame = inspector._run, draw("disc", np.random.default_rng(1))

        def meanwhile(*arguments: Any) -> Any:
            outputs = run(*arguments)
            inspector.set_novelty_threshold(1e6)
            return outputs

        inspector._run = meanwhile  # type: ignore[method-assign]
        for judged in (lambda: inspector.inspect(frame), lambda: inspector.inspect_for([inspector], [frame])[0]):
            inspector.set_novelty_threshold(1e-6)
            answer = judged()
            assert isinstance(answer, Inspection)
            assert answer.is_novel == (answer.novelty_score > answer.novelty_threshold)
