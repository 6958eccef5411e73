"""The fully connected layer: nn.Linear's answers and gradients by oneDNN, plain operators where a graph is traced."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trainer.encoders import dense
from trainer.encoders.dense import Dense, _is_fast
from trainer.encoders.mlp import MLPEncoder, MLPSettings

HAS_ONE_DNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@pytest.fixture(autouse=True)
def other_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that is not Intel's, wherever the tests run."""
    monkeypatch.setattr(dense, "_is_intel", lambda: False)


def pair(width_in: int = 300, width: int = 70) -> tuple[Dense, nn.Linear]:
    """A layer and PyTorch's own of the same weights."""
    torch.manual_seed(0)
    layer, plain = Dense(width_in, width), nn.Linear(width_in, width)
    plain.load_state_dict(layer.state_dict())
    return layer, plain


def gradients(y: Tensor, x: Tensor, layer: nn.Linear) -> list[Tensor]:
    """Of a weighted sum of y, by input, weight and bias."""
    torch.manual_seed(1)
    return list(torch.autograd.grad(y, [x, layer.weight, layer.bias], torch.randn_like(y)))


@pytest.mark.parametrize("slope", [1.0, 0.2, 0.0])
@pytest.mark.parametrize("is_intel", [False, True])
def test_answers_and_gradients_are_those_of_a_linear_layer_and_its_unit_up_to_rounding(
    slope: float, is_intel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "_is_intel", lambda: is_intel)
    layer, plain = pair()
    x = torch.randn(33, 300, requires_grad=True)
    sums = plain(x)
    y, expected = layer(x, slope), sums.clamp_min(0) + slope * sums.clamp_max(0)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for found, right in zip(gradients(y, x, layer), gradients(expected, x, plain), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-4)


def test_a_relu_that_is_left_out_of_the_way_back_would_be_seen() -> None:
    layer, plain = pair()
    x = torch.randn(33, 300, requires_grad=True)
    of_relu, without = gradients(layer(x, 0.0), x, layer), gradients(plain(x), x, plain)
    assert all((a - b).abs().max() > 0.1 for a, b in zip(of_relu, without, strict=True))


def test_a_unit_at_exactly_zero_passes_no_gradient() -> None:
    layer = Dense(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -1.0]]))
        layer.bias.zero_()
    y = layer(torch.tensor([[3.0, 3.0], [3.0, 1.0]]), 0.0)
    y.sum().backward()
    assert y.flatten().tolist() == [0.0, 2.0]
    assert layer.weight.grad is not None and layer.weight.grad.tolist() == [[3.0, 1.0]]  # of the second row alone


def test_the_first_layer_computes_no_gradient_of_the_pixels() -> None:
    layer, _ = pair()
    x = torch.randn(8, 300)
    layer(x).sum().backward()
    assert x.grad is None and layer.weight.grad is not None


def test_the_same_batch_gives_the_same_bits() -> None:
    layer, _ = pair()
    x = torch.randn(256, 300, requires_grad=True)
    once, again = gradients(layer(x, 0.0), x, layer), gradients(layer(x, 0.0), x, layer)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_an_empty_batch_has_no_features() -> None:
    assert pair()[0](torch.zeros(0, 300), 0.0).shape == (0, 70)


def test_autocast_still_decides_on_the_precision() -> None:
    layer, plain = pair()
    x = torch.randn(33, 300)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
        assert torch.equal(layer(x, 0.0), torch.relu(plain(x)))


def test_a_double_is_no_float() -> None:
    layer, plain = pair()
    x = torch.randn(5, 300, dtype=torch.float64)
    assert torch.equal(layer.double()(x), plain.double()(x))


@pytest.mark.skipif(not HAS_ONE_DNN, reason="this PyTorch has no oneDNN")
def test_eager_float32_on_a_cpu_takes_the_fast_way_and_nothing_else_does() -> None:
    layer, _ = pair()
    x = torch.randn(4, 300)
    assert _is_fast(x, layer.weight)
    assert not _is_fast(x.double(), layer.weight)
    assert not _is_fast(x.to("meta"), layer.weight)
    assert not _is_fast(x[0], layer.weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert not _is_fast(x, layer.weight)


@pytest.mark.skipif(not HAS_ONE_DNN, reason="this PyTorch has no oneDNN")
def test_on_an_intel_processor_the_products_stay_pytorchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, plain = pair()
    x = torch.randn(4, 300)
    monkeypatch.setattr(dense, "_is_intel", lambda: True)
    assert not _is_fast(x, layer.weight) and torch.equal(layer(x, 0.0), torch.relu(plain(x)))


def test_a_traced_encoder_shows_plain_operators_only() -> None:
    encoder = MLPEncoder(MLPSettings(hidden=(6, 5), dim=2), (1, 4, 4)).eval()
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    graph = torch.export.export(encoder, (torch.rand(3, 1, 4, 4),), dynamic_shapes=(batch,)).graph
    called = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert called == {"aten.flatten.using_ints", "aten.linear.default", "aten.relu.default"}


def test_leaky_units_are_behind_every_layer_but_the_last_of_encoder_and_decoder() -> None:
    encoder = MLPEncoder(MLPSettings(hidden=(6, 5), dim=2, negative_slope=0.1), (1, 4, 4)).eval()
    decoder, x = encoder.build_decoder(), torch.randn(3, 1, 4, 4)

    def by_hand(layers: nn.Module, h: Tensor) -> Tensor:
        *hidden, last = layers.children()
        for layer in hidden:
            h = layer(h)
            h = torch.where(h > 0, h, 0.1 * h)
        return Tensor(last(h))

    z = encoder(x)
    torch.testing.assert_close(z, by_hand(encoder.layers, x.flatten(1)))
    assert isinstance(decoder.layers, nn.Module)
    torch.testing.assert_close(decoder(z).flatten(1), by_hand(decoder.layers, z))
