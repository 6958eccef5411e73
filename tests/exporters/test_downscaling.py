from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

from edge_dkm.contract import PIXELS
from exporters.downscaling import speed_up_downscaling
from tests.exporters.graphs import model_of, operators, output_of, resized
from trainer.preprocess import resize_uint8

RNG = np.random.default_rng(0)


def both(frame: tuple[int, int], size: tuple[int, int]) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """The Resize, and what it is replaced by."""
    slow, fast = resized(size), resized(size)
    assert speed_up_downscaling(fast.graph, frame, size)
    onnx.checker.check_model(fast, full_check=True)
    return slow, fast


@pytest.mark.parametrize(
    ("frame", "size"),
    [
        ((24, 24), (12, 12)),
        ((30, 42), (10, 14)),
        ((24, 36), (12, 12)),
        ((21, 35), (3, 5)),
        ((36, 24), (12, 12)),
        ((24, 9), (12, 9)),
        ((9, 24), (9, 12)),
    ],
)
def test_a_whole_step_gives_the_bytes_of_resize_and_of_the_trainer(
    frame: tuple[int, int], size: tuple[int, int]
) -> None:
    slow, fast = both(frame, size)
    assert "Resize" not in operators(fast) and "QLinearConv" in operators(fast)
    for image in (
        RNG.integers(0, 256, (1, *frame, 3), dtype=np.uint8),
        RNG.integers(0, 2, (1, *frame, 3), dtype=np.uint8) * 255,
        RNG.integers(0, 4, (1, *frame, 3), dtype=np.uint8),  # sums that fall on halves
        np.full((1, *frame, 3), 255, np.uint8),
    ):
        found = output_of(fast, image, PIXELS)
        assert np.array_equal(found, output_of(slow, image, PIXELS))
        assert np.array_equal(found, resize_uint8(torch.from_numpy(image), *size, antialias=True).numpy())


def test_halves_are_rounded_upwards() -> None:
    """1 3 3 1 over bytes 0 0 1 1 is 4 / 8: a half, which Resize makes 1 and rounding to even would make 0."""
    _, fast = both((8, 8), (8, 4))
    row = np.array([9, 0, 0, 1, 1, 9, 9, 9], np.uint8)
    image = np.repeat(np.repeat(row[None, None, :, None], 3, 3), 8, 1)
    assert output_of(fast, image, PIXELS)[0, 0, 1].tolist() == [1, 1, 1]


def test_several_frames_in_one_run_do_not_mix() -> None:
    _, fast = both((16, 24), (8, 12))
    images = RNG.integers(0, 256, (3, 16, 24, 3), dtype=np.uint8)
    together = output_of(fast, images, PIXELS)
    assert all(np.array_equal(together[n], output_of(fast, images[n : n + 1], PIXELS)[0]) for n in range(3))


def test_a_frame_of_the_right_size_is_passed_through() -> None:
    _, fast = both((6, 8), (6, 8))
    image = RNG.integers(0, 256, (1, 6, 8, 3), dtype=np.uint8)
    assert operators(fast) == ["Reshape"] and np.array_equal(output_of(fast, image, PIXELS), image)


@pytest.mark.parametrize(
    ("frame", "size"),
    [((25, 24), (12, 12)), ((12, 12), (24, 24)), ((4, 4), (2, 2)), ((48, 48), (12, 12))],
    ids=["no whole step", "up", "only ends", "halves decided by rounding"],
)
def test_other_steps_keep_their_resize(frame: tuple[int, int], size: tuple[int, int]) -> None:
    model = resized(size)
    assert not speed_up_downscaling(model.graph, frame, size) and operators(model) == ["Resize"]


def test_a_resize_without_antialias_or_behind_another_step_is_left_alone() -> None:
    plain = resized((12, 12), antialias=0)
    assert not speed_up_downscaling(plain.graph, (24, 24), (12, 12))
    later = resized((12, 12))
    later.graph.node[0].input[0] = "cropped"
    crop = onnx.helper.make_node("Identity", ["image"], ["cropped"])
    behind = model_of([crop, *later.graph.node], PIXELS, {"sizes": np.array([1, 12, 12, 3])})
    assert not speed_up_downscaling(behind.graph, (24, 24), (12, 12))
