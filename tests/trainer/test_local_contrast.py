from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.local_contrast import GREY_OF_BGR, MIDDLE, local_contrast
from trainer.preprocess import Preprocess, PreprocessSettings


def texture(height: int = 96, width: int = 80, channels: int = 1, seed: int = 0) -> Tensor:
    """Noise with some structure, between 60 and 190 and so clear of both ends."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 1, height // 8, width // 8, generator=generator)
    field = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    return (60 + 60 * field + 70 * torch.rand(1, 1, height, width, generator=generator)).expand(-1, channels, -1, -1)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_gain_and_offset_of_the_picture_say_nothing(share: float) -> None:
    x = texture()
    wanted = local_contrast(x, share)
    for gain, offset in ((1.3, 0.0), (1.0, 40.0), (0.8, -20.0)):
        moved = (local_contrast(gain * x + offset, share) - wanted).abs()
        # Not exactly: a floor of grey levels stands beside the deviation, of about 20 here.
        assert float(moved.mean()) < 4 and float(moved.max()) < 16
        # Control: without it every pixel moves by more.
        assert float((gain * x + offset - x).abs().mean()) > 4 * float(moved.mean())


def test_an_offset_alone_says_nothing_at_all() -> None:
    x = texture()
    assert torch.allclose(local_contrast(x + 50), local_contrast(x), atol=0.02)


def test_shading_goes_with_the_neighbourhood_and_stays_with_the_whole_image() -> None:
    x = texture(160, 160)
    shaded = x + torch.linspace(-55, 60, 160)
    moved = {
        share: float((local_contrast(shaded, share) - local_contrast(x, share)).abs().mean()) for share in (0.0, 1.0)
    }
    assert 3 * moved[1.0] < moved[0.0]


def test_what_is_larger_than_the_window_is_kept_by_the_whole_images_part() -> None:
    x = 100 + 4 * torch.rand(1, 1, 160, 160, generator=torch.Generator().manual_seed(0))
    x[..., 40:, 40:] += 60
    inside, outside = (slice(90, 130), slice(90, 130)), (slice(0, 20), slice(0, 20))

    def step(share: float) -> float:
        found = local_contrast(x, share)[0, 0]
        return float(found[inside].mean() - found[outside].mean())

    assert abs(step(1.0)) < 3 and step(0.0) > 40
    assert step(0.5) == pytest.approx((step(0.0) + step(1.0)) / 2, abs=0.5)


def test_a_small_spot_stands_out_where_it_is() -> None:
    x = texture(96, 96)
    spot = x.clone()
    spot[..., 48:54, 48:54] += 60
    apart = (local_contrast(spot) - local_contrast(x))[0, 0]
    assert float(apart[48:54, 48:54].mean()) > 15 and float(apart[:12, :12].abs().max()) < 0.01


@pytest.mark.parametrize("value", [0.0, 128.0, 255.0])
@pytest.mark.parametrize("size", [(96, 80), (20, 28), (7, 90), (1, 1)])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_an_even_picture_is_even_and_finite(value: float, size: tuple[int, int], share: float) -> None:
    found = local_contrast(torch.full((2, 3, *size), value), share)
    assert found.shape == (2, 3, *size)
    assert torch.allclose(found, torch.full_like(found, MIDDLE), atol=0.05)


def test_half_black_and_half_white_stays_in_the_range_of_a_picture() -> None:
    x = torch.zeros(1, 3, 64, 64)
    x[..., 32:] = 255
    for share in (0.0, 0.5, 1.0):
        found = local_contrast(x, share)
        assert torch.isfinite(found).all() and 0 <= float(found.min()) < float(found.max()) <= 255


def test_noise_of_an_even_surface_is_not_blown_up() -> None:
    x = 100 + torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))  # a deviation of .3 grey levels
    assert float(local_contrast(x).std()) < 3
    assert float(local_contrast(texture()).std()) > 20  # control


def test_colour_becomes_grey_in_all_channels() -> None:
    x = 255 * torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    found = local_contrast(x)
    assert torch.equal(found[:, 0], found[:, 1]) and torch.equal(found[:, 0], found[:, 2])
    grey = (x * torch.tensor(GREY_OF_BGR)[:, None, None]).sum(1, keepdim=True)
    assert torch.allclose(found[:, :1], local_contrast(grey), atol=1e-3)


def preprocess(**changes: Any) -> Preprocess:
    made = Preprocess(PreprocessSettings(normalise="unit", **changes), 48, 48)
    made.fit_normalise(texture(48, 48, 3).permute(0, 2, 3, 1).byte())
    return made


@pytest.mark.parametrize("color", ["bgr", "gray"])
def test_the_encoder_sees_the_same_part_under_another_light_only_with_it(color: str) -> None:
    pixels = texture(48, 48, 3).permute(0, 2, 3, 1)
    brighter = (1.2 * pixels + 15).byte()
    moved = {}
    for share in (None, 1.0):
        made = preprocess(color=color, local_contrast=share)
        moved[share] = float((made.normalise(brighter) - made.normalise(pixels.byte())).abs().mean())
        assert made.normalise(brighter).shape == (1, 1 if color == "gray" else 3, 48, 48)
    assert moved[1.0] < 0.02 < 0.1 < moved[None]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("share", [None, 0.0, 0.5])
@pytest.mark.parametrize("color", ["bgr", "gray"])
def test_what_the_encoder_takes_has_mean_0_and_deviation_1(color: str, share: float | None, channels: int) -> None:
    dark = (torch.cat([texture(seed=n) for n in range(6)]) / 4).round().to(torch.uint8)
    pixels = dark.expand(-1, channels, -1, -1).permute(0, 2, 3, 1).contiguous()
    settings: Any = {"color": color, "local_contrast": share}
    for kind in ("mean_std", "rms"):
        preprocess = Preprocess(PreprocessSettings(normalise=kind, **settings), 96, 80)
        preprocess.fit_normalise(pixels)
        x = preprocess.normalise(pixels)
        assert float(x.square().mean().sqrt()) == pytest.approx(1.0, rel=1e-3)
        assert kind == "rms" or float(x.mean()) == pytest.approx(0.0, abs=1e-3)


def test_none_is_off_and_0_is_the_whole_images_contrast() -> None:
    pixels = texture(48, 48, 3).permute(0, 2, 3, 1).byte()
    x = pixels.permute(0, 3, 1, 2).float()
    assert torch.equal(preprocess().normalise(pixels), x / 255)
    assert torch.allclose(preprocess(local_contrast=0.0).normalise(pixels), local_contrast(x, 0.0) / 255)


@pytest.mark.parametrize("share", [-0.1, 1.1, "some"])
def test_a_share_beyond_none_and_all_is_refused(share: object) -> None:
    with pytest.raises(ValueError, match="local_contrast"):
        PreprocessSettings.model_validate({"local_contrast": share})
