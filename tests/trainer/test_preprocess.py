from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

from trainer.preprocess import AliasError, Preprocess, PreprocessSettings, resize_uint8, target_size, triangle_weights


def onnxruntime_resize(image: NDArray[np.uint8], height: int, width: int, antialias: bool) -> NDArray[np.uint8]:
    attributes: dict[str, Any] = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
    if antialias:
        attributes |= {"antialias": 1, "exclude_outside": 1}
    node = helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, list(image.shape))],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, None)],
        [helper.make_tensor("sizes", TensorProto.INT64, [4], [image.shape[0], height, width, 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 8
    result: NDArray[np.uint8] = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(
        None, {"x": image}
    )[0]
    return result


@pytest.mark.parametrize("antialias", [True, False])
def test_resize_equals_onnxruntime_to_the_last_bit_on_random_sizes(antialias: bool) -> None:
    rng = np.random.default_rng(0)
    for trial in range(40):
        height, width, new_height, new_width = (int(v) for v in rng.integers(1, 160, 4))
        if trial % 5 == 0:
            new_height = height
        if trial % 7 == 0:
            new_width = width
        image = rng.integers(0, 256, (2, height, width, 3), dtype=np.uint8)
        ours = resize_uint8(torch.from_numpy(image), new_height, new_width, antialias).numpy()
        theirs = onnxruntime_resize(image, new_height, new_width, antialias)
        assert np.array_equal(ours, theirs), f"{width}x{height} -> {new_width}x{new_height}"


def test_halving_with_antialias_weighs_1_3_3_1() -> None:
    # Output 1 sits between inputs 2 and 3; the triangle of half-width 2 gives them .75, their neighbours .25, over a sum of 2.
    weights = triangle_weights(8, 4, antialias=True)
    assert weights[1].tolist() == pytest.approx([0, 0.125, 0.375, 0.375, 0.125, 0, 0, 0])


def test_weights_of_every_output_pixel_sum_to_one() -> None:
    for n_in, n_out in ((100, 7), (7, 100), (33, 33), (5, 1)):
        assert triangle_weights(n_in, n_out, antialias=True).sum(1).tolist() == pytest.approx([1.0] * n_out, abs=1e-6)


def build(**settings: Any) -> Preprocess:
    return Preprocess(PreprocessSettings(height_px=8, width_px=12, **settings), 8, 12)


def test_pad_keeps_the_aspect_and_fills_with_black() -> None:
    out = build(fit="pad").geometry(torch.full((1, 16, 8, 3), 200, dtype=torch.uint8))
    assert out.shape == (1, 8, 12, 3)
    assert out[0, 4, :, 0].tolist() == [0] * 4 + [200] * 4 + [0] * 4


def test_crop_takes_the_middle() -> None:
    image = torch.zeros(1, 8, 36, 3, dtype=torch.uint8)
    image[:, :, 12:24] = 150
    assert (build(fit="crop").geometry(image) == 150).all()


def test_matmul_mode_agrees_with_the_exact_one_within_rounding() -> None:
    image = torch.randint(0, 256, (1, 40, 31, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    exact, matmul = build().geometry(image).float(), build(resize="matmul").geometry(image)
    assert matmul.dtype == torch.float32
    assert float((exact - matmul).abs().max()) <= 1.01


def test_normalised_training_pixels_have_mean_0_and_standard_deviation_1() -> None:
    module = build()
    pixels = torch.randint(0, 256, (50, 8, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    module.fit_normalise(pixels)
    x = module.normalise(pixels)
    assert x.mean((0, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=1e-4)
    assert x.std((0, 2, 3)).tolist() == pytest.approx([1, 1, 1], abs=1e-3)


def test_rms_makes_the_mean_square_1_and_leaves_zero_at_zero() -> None:
    module = build(normalise="rms", color="gray")
    pixels = torch.randint(0, 256, (50, 8, 12, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    module.fit_normalise(pixels)
    assert float(module.normalise(pixels).square().mean()) == pytest.approx(1.0, abs=1e-4)
    assert float(module.normalise(torch.zeros(1, 8, 12, 1, dtype=torch.uint8)).abs().max()) == 0.0


@pytest.mark.parametrize("color", ["gray", "bgr"])
def test_a_grey_image_stored_with_one_channel_or_three_gives_the_same_input(color: str) -> None:
    module = build(color=color)
    grey = torch.randint(0, 256, (3, 8, 12, 1), dtype=torch.uint8)
    assert torch.allclose(module.normalise(grey), module.normalise(grey.expand(-1, -1, -1, 3)), atol=1e-5)


def test_down_scaling_without_antialias_is_refused_beyond_one_and_a_half() -> None:
    module = build(antialias=False)
    module.check_step(12, 18)
    with pytest.raises(AliasError, match=r"scaled down by 2\.00 .* alias: allow"):
        module.check_step(16, 18)
    build(antialias=False, alias="allow").check_step(800, 1200)
    build().check_step(800, 1200)


def test_resize_none_takes_the_size_of_the_images_and_refuses_a_mixture() -> None:
    settings = PreprocessSettings(resize="none")
    assert target_size(settings, [(30, 40), (30, 40)]) == (30, 40)
    with pytest.raises(ValueError, match="2 sizes"):
        target_size(settings, [(30, 40), (31, 40)])
    with pytest.raises(ValueError, match="height_px"):
        target_size(PreprocessSettings(resize="none", height_px=5, width_px=5), [(30, 40)])
    with pytest.raises(ValueError, match="missing"):
        target_size(PreprocessSettings(), [(30, 40)])
