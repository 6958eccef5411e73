"""From camera pixels to the encoder's input: fit, resize, normalise. Trained with and exported as the same module.

`Preprocess` runs in the training data pass, in `predict` and, traced, inside the exported graph. The geometric step stays in
uint8 and equals onnxruntime CPU's Resize bit for bit (tests/trainer/test_preprocess.py), so training sees the device's pixels.

    image uint8 (N,H,W,3) BGR --crop--> Resize (uint8, NHWC) --Pad--> Transpose, Cast -> [grey] -> (x - mean) / std -> (N,C,h,w)

`local_contrast` shows the encoder each pixel relative to what is around it, in grey (trainer/local_contrast.py).
`resize: matmul` is for providers without an antialiased Resize: Cast, then two constant matrix products (fixed H, W only).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from configs import Settings
from trainer.local_contrast import GREY_OF_BGR, local_contrast
from trainer.stored_pixels import Pixels

MAX_ALIAS_STEP = 1.5  # down-scaling beyond this without antialias folds texture into false patterns
MOMENTS_ELEMENTS = 1 << 20  # of a batch whose mean and squares are summed: 4 MB as float32
FIXED_POINT_BITS = 22  # of the antialiased filter's weights, in Pillow and onnxruntime


class PreprocessSettings(Settings):
    """What happens between the ROI's pixels and the encoder."""

    height_px: int | None = Field(None, ge=1, le=4096, description="height of the encoder's input")
    width_px: int | None = Field(None, ge=1, le=4096, description="width of the encoder's input")
    resize: Literal["none", "onnx", "matmul"] = "onnx"
    fit: Literal["stretch", "pad", "crop"] = "stretch"
    antialias: bool = True
    alias: Literal["refuse", "allow"] = "refuse"
    color: Literal["bgr", "gray"] = "bgr"
    normalise: Literal["mean_std", "rms", "unit", "imagenet"] = "mean_std"
    local_contrast: float | None = Field(
        None, ge=0, le=1, description="contrast to the neighbourhood (1), to the whole image (0), or so much of each"
    )


class AliasError(ValueError):
    """Down-scaling without antialias beyond MAX_ALIAS_STEP."""


class Preprocess(nn.Module):
    """uint8 (N, H, W, 3) BGR -> float32 (N, C, height_px, width_px).

    `geometry` gives uint8 (float32 for `matmul`) in NHWC and is what the trainer caches; `normalise` turns that into the input.
    `mean`, `std`: (C,) in grey levels 0..255, set by `fit_normalise`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, settings: PreprocessSettings, height_px: int, width_px: int) -> None:
        super().__init__()
        self.settings, self.height_px, self.width_px = settings, height_px, width_px
        channels = 1 if settings.color == "gray" else 3
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.full((channels,), 255.0))

    def forward(self, image: Tensor) -> Tensor:
        return self.normalise(self.geometry(image))

    @property
    def stored_dtype(self) -> torch.dtype:
        """What `geometry` gives."""
        return torch.float32 if self.settings.resize == "matmul" else torch.uint8

    def geometry(self, image: Tensor) -> Tensor:
        """Crop, resize and pad: (N, H, W, 3) uint8 -> (N, height_px, width_px, 3), uint8 unless `resize: matmul`."""
        height, width = image.shape[1], image.shape[2]
        if self.settings.resize == "none":
            return image
        if self.settings.fit == "crop":
            crop_h = torch.sym_min(height, torch.sym_max(1, (width * self.height_px) // self.width_px))
            crop_w = torch.sym_min(width, torch.sym_max(1, (height * self.width_px) // self.height_px))
            image = _slice(image, (height - crop_h) // 2, (width - crop_w) // 2, crop_h, crop_w)
            return self._resize(image, self.height_px, self.width_px)
        if self.settings.fit == "pad":
            new_h = torch.sym_max(1, torch.sym_min(self.height_px, (2 * height * self.width_px + width) // (2 * width)))
            new_w = torch.sym_max(
                1, torch.sym_min(self.width_px, (2 * width * self.height_px + height) // (2 * height))
            )
            return _pad(self._resize(image, new_h, new_w), self.height_px, self.width_px)
        return self._resize(image, self.height_px, self.width_px)

    def normalise(self, pixels: Tensor) -> Tensor:
        """(N, h, w, 3 or 1) in grey levels -> (N, C, h, w) float32."""
        return (self._channels(pixels) - self.mean[:, None, None]) / self.std[:, None, None]

    def _channels(self, pixels: Tensor) -> Tensor:
        """What is normalised: (N, h, w, 3 or 1) -> (N, C, h, w) float32, in grey levels."""
        x = pixels.permute(
            0, 3, 1, 2
        ).float()  # (N, 3, h, w): transposed while still uint8, it is a quarter of the bytes
        if self.settings.color == "gray" and x.shape[1] == 3:
            x = (x * x.new_tensor(GREY_OF_BGR)[:, None, None]).sum(1, keepdim=True)
        elif self.settings.color == "bgr" and x.shape[1] == 1:
            x = x.expand(-1, 3, -1, -1)
        if self.settings.local_contrast is not None:
            x = local_contrast(x, self.settings.local_contrast)
        return x

    def fit_normalise(self, pixels: Pixels) -> None:
        """Sets `mean` and `std` from training pixels (N, h, w, 3 or 1); one constant per channel, never per image."""
        kind = self.settings.normalise
        if kind == "imagenet":
            mean, std = torch.tensor([103.53, 116.28, 123.675]), torch.tensor([57.375, 57.12, 58.395])  # BGR
            if self.settings.color == "gray":
                mean, std = mean.mean(0, keepdim=True), std.mean(0, keepdim=True)
        else:
            mean, std = self._moments(pixels, kind)
        self.mean.copy_(mean)
        self.std.copy_(std)

    def _moments(self, pixels: Pixels, kind: str) -> tuple[Tensor, Tensor]:
        zeros = torch.zeros_like(self.mean)
        if kind == "unit":
            return zeros, torch.full_like(self.std, 255.0)
        total, squares, count = zeros.double(), zeros.double(), 0
        for batch in pixels.split(max(1, min(1024, MOMENTS_ELEMENTS // max(1, pixels[:1].numel())))):
            x = self._channels(batch)
            total += x.sum((0, 2, 3), dtype=torch.float64).cpu()
            squares += x.square().sum((0, 2, 3), dtype=torch.float64).cpu()
            count += x.shape[0] * x.shape[2] * x.shape[3]
        if kind == "rms":  # DEC's rule: the mean of x^2 over all pixels becomes 1, the zero stays where it is
            return zeros, (squares.sum() / (count * len(zeros))).sqrt().float().clamp_min(1.0).expand_as(zeros)
        mean = total / count
        return mean.float(), (squares / count - mean.square()).clamp_min(1.0).sqrt().float()

    def _resize(self, image: Tensor, height: int, width: int) -> Tensor:
        if self.settings.resize == "matmul":
            return _resize_matmul(image, height, width, self.settings.antialias)
        if torch.onnx.is_in_onnx_export():
            return _onnx_resize(image, height, width, self.settings.antialias)
        return resize_uint8(image, height, width, self.settings.antialias)

    def check_step(self, height: int, width: int) -> None:
        """Raises AliasError where frames of this size would be scaled down without antialias by more than MAX_ALIAS_STEP."""
        s = self.settings
        if s.resize == "none" or s.antialias or s.alias == "allow":
            return
        across, down = width / self.width_px, height / self.height_px
        step = {"stretch": max(across, down), "pad": max(across, down), "crop": min(across, down)}[s.fit]
        if step > MAX_ALIAS_STEP:
            raise AliasError(
                f"frames of {width}x{height} are scaled down by {step:.2f} to {self.width_px}x{self.height_px} with "
                f"preprocess.antialias: false, expected at most {MAX_ALIAS_STEP}; set antialias: true, a smaller ROI, or alias: allow"
            )


def _slice(image: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    if not torch.onnx.is_in_onnx_export():
        return image[:, top : top + height, left : left + width]
    operands = [image, _vector(top, left), _vector(top + height, left + width), torch.tensor([1, 2])]
    return torch.onnx.ops.symbolic(
        "Slice", operands, dtype=image.dtype, shape=(image.shape[0], height, width, 3), version=13
    )


def _pad(image: Tensor, height: int, width: int) -> Tensor:
    top, left = (height - image.shape[1]) // 2, (width - image.shape[2]) // 2
    bottom, right = height - image.shape[1] - top, width - image.shape[2] - left
    if not torch.onnx.is_in_onnx_export():
        return nn.functional.pad(image, (0, 0, left, right, top, bottom))
    operands = [image, _vector(0, top, left, 0, 0, bottom, right, 0)]
    return torch.onnx.ops.symbolic(
        "Pad", operands, {"mode": "constant"}, dtype=image.dtype, shape=(image.shape[0], height, width, 3), version=18
    )


def _onnx_resize(image: Tensor, height: int, width: int, antialias: bool) -> Tensor:
    """The traced form. `exclude_outside` with antialias: without it onnxruntime's border is off by up to 9 grey levels."""
    attributes: dict[str, Any] = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
    if antialias:
        attributes |= {"antialias": 1, "exclude_outside": 1}
    sizes = _vector(image.shape[0], height, width, 3)
    return torch.onnx.ops.symbolic(
        "Resize",
        [image, None, None, sizes],
        attributes,
        dtype=torch.uint8,
        shape=(image.shape[0], height, width, 3),
        version=18,
    )


def _vector(*values: int) -> Tensor:
    """An int64 vector of sizes that may be symbolic while tracing."""
    parts = [
        torch.tensor([v]) if isinstance(v, int) else torch.scalar_tensor(v, dtype=torch.int64).reshape(1)
        for v in values
    ]
    return torch.cat(parts)


def resize_uint8(image: Tensor, height: int, width: int, antialias: bool) -> Tensor:
    """Linear resize of (N, H, W, C) uint8 as onnxruntime's CPU provider computes it, to the last bit."""
    if (image.shape[1], image.shape[2]) == (height, width):
        return image
    if antialias:
        return _resize_antialiased(image, height, width)
    return _resize_linear(image, height, width)


def _resize_antialiased(image: Tensor, height: int, width: int) -> Tensor:
    """Pillow's two-pass scheme: weights in 22-bit fixed point, width first, rounded to uint8 after each pass.

    Tap by tap: a matrix product has a hundred zeros for every weight. Weights are not negative and sum to 2^22: all stays below 2^31.
    """
    for axis, size in ((2, width), (1, height)):
        if image.shape[axis] == size:
            continue
        x, shape = image.int(), [size if n == axis else 1 for n in range(4)]
        total = torch.full((), 1 << (FIXED_POINT_BITS - 1), dtype=torch.int32, device=image.device)
        for index, weights in zip(*_fixed_taps(image.shape[axis], size), strict=True):
            part = x.index_select(axis, index.to(x.device)).mul_(weights.to(x.device).view(shape))
            total = part.add_(total)
        image = total.bitwise_right_shift_(FIXED_POINT_BITS).clamp_(0, 255).to(torch.uint8)
    return image


@lru_cache(maxsize=64)
def _fixed_taps(n_in: int, n_out: int) -> tuple[Tensor, Tensor]:
    """Which input each tap of an output takes, and its weight times 2^22, rounded half away from zero: (taps, n_out) int64 and int32."""
    weights = torch.floor(triangle_weights(n_in, n_out, antialias=True).double() * 2.0**FIXED_POINT_BITS + 0.5).int()
    used = weights > 0
    first, count = used.int().argmax(1), int(used.sum(1).max())
    index = first[:, None] + torch.arange(count)
    inside = index < n_in
    index = index.clamp(max=n_in - 1)
    return index.T.contiguous(), torch.where(inside, weights.gather(1, index), 0).T.contiguous()


def triangle_weights(n_in: int, n_out: int, antialias: bool) -> Tensor:
    """(n_out, n_in) float32 rows that sum to 1: linear interpolation, widened by the down-scaling step where antialiased.

    Computed in float32 in onnxruntime's order of operations, since its rounding is part of the answer.
    """
    position = torch.arange(n_out, dtype=torch.float32)
    ratio = torch.tensor(float(n_out)) / torch.tensor(float(n_in))
    support = (1.0 / ratio).clamp_min(1.0) if antialias else torch.tensor(1.0)
    window = math.ceil(float(support)) * 2 + 1
    centre = 0.5 + (position if n_in == n_out else (position + 0.5) / ratio - 0.5)
    low = torch.floor(centre - support + 0.5).long()
    high = (low + (torch.floor(centre + support + 0.5).long() - low).clamp(0, window)).clamp(0, n_in)
    low = low.clamp(0, n_in)
    columns = low[:, None] + torch.arange(window)  # (n_out, window)
    offsets = (columns.float() - centre[:, None] + 0.5) * (1.0 / support)
    taps = torch.where(columns < high[:, None], (1.0 - offsets.abs()).clamp_min(0.0), 0.0)
    total = torch.zeros(n_out)
    for tap in range(window):  # one after the other: a float32 sum in another order is another sum
        total = total + taps[:, tap]
    taps = taps * torch.where(total == 0, torch.ones(()), 1.0 / total)[:, None]
    return torch.zeros(n_out, n_in + window).scatter_add_(1, columns, taps)[:, :n_in]


def _resize_linear(image: Tensor, height: int, width: int) -> Tensor:
    """Two-tap linear, truncated: 10-bit fixed point, except that a pure change of width goes through onnxruntime's float path."""
    if image.shape[1] == height:
        left, right, near, far = _taps(image.shape[2], width)
        # Its float path interpolates over (W, C); the channel axis meets itself with weight 1, or .5 + .5 on the last one.
        split = torch.ones(image.shape[3])
        split[-1] = 0.5
        a, b = image[:, :, left].float(), image[:, :, right].float()
        far_a, near_b = far[:, None] * split * a, near[:, None] * split * b
        last = torch.zeros(image.shape[3])
        last[-1] = 0.5
        total = ((far_a + far[:, None] * last * a) + near_b) + near[:, None] * last * b
        return total.to(torch.uint8)
    top, bottom, near_y, _ = _taps(image.shape[1], height)
    left, right, near_x, _ = _taps(image.shape[2], width)
    y1, x1 = (near_y * 1024).long(), (near_x * 1024).long()
    y0, x0 = 1024 - y1, 1024 - x1
    pixels = image.long()
    total = torch.zeros(image.shape[0], height, width, image.shape[3], dtype=torch.int64)
    for rows, weight_y in ((top, y0), (bottom, y1)):
        for columns, weight_x in ((left, x0), (right, x1)):
            total += weight_y[:, None, None] * weight_x[None, :, None] * pixels[:, rows][:, :, columns]
    return (total >> 20).to(torch.uint8)


def _taps(n_in: int, n_out: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Indices of the two neighbours, and the distance to each (= the weight of the other); .5 and .5 where they coincide."""
    position = torch.arange(n_out, dtype=torch.float32)
    if n_in != n_out:
        ratio = torch.tensor(float(n_out)) / torch.tensor(float(n_in))
        position = (position + 0.5) / ratio - 0.5
    position = position.clamp(0.0, float(n_in - 1))
    low = position.long().clamp(max=n_in - 1)
    high = (low + 1).clamp(max=n_in - 1)
    near, far = (position - low).abs(), (position - high).abs()
    same = low == high
    return low, high, torch.where(same, 0.5, near), torch.where(same, 0.5, far)


def _resize_matmul(image: Tensor, height: int, width: int, antialias: bool) -> Tensor:
    """float32 (N, height, width, 3) by two constant matrix products; works on every provider, needs fixed sizes when traced."""
    rows = triangle_weights(int(image.shape[1]), int(height), antialias).to(image.device)
    columns = triangle_weights(int(image.shape[2]), int(width), antialias).to(image.device)
    x = image.permute(0, 3, 1, 2).float()
    return torch.matmul(torch.matmul(rows, x), columns.T).permute(0, 2, 3, 1)


def target_size(settings: PreprocessSettings, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The encoder's input (height, width): as set, or with `resize: none` the one size that all frames share.

    Raises:
        ValueError: the sizes do not fit the settings.
    """
    if settings.resize == "none":
        if len(set(sizes)) != 1:
            shown = ", ".join(f"{w}x{h}" for h, w in sorted(set(sizes))[:4])
            raise ValueError(
                f"preprocess.resize is none, but the images have {len(set(sizes))} sizes ({shown}, ...); crop them alike, or set resize: onnx"
            )
        height, width = sizes[0]
        if (settings.height_px or height, settings.width_px or width) != (height, width):
            raise ValueError(
                f"preprocess.resize is none and the images are {width}x{height}, but width_px, height_px say "
                f"{settings.width_px}x{settings.height_px}"
            )
        return height, width
    if settings.height_px is None or settings.width_px is None:
        raise ValueError(
            "preprocess.height_px and width_px are missing, expected the size of the encoder's input (or resize: none)"
        )
    return settings.height_px, settings.width_px
