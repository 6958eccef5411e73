from __future__ import annotations

import pytest
import torch

from trainer.encoders.conv import ConvEncoder, ConvSettings
from trainer.errors import DataError
from trainer.layer_tap import LayerTap


def tapped(net: ConvEncoder, *layers: str) -> LayerTap:
    return LayerTap(net, layers, "method.layers", lambda: net.head(torch.zeros(1, 1, 16, 16)))


def encoder() -> ConvEncoder:
    torch.manual_seed(0)
    return ConvEncoder(ConvSettings(channels=(4, 6, 8), dim=5), (1, 16, 16))


def test_maps_are_pooled_and_all_layers_have_one_scale() -> None:
    net = encoder()
    tap = tapped(net, "conv2", "features")
    x = 100 * torch.randn(7, 1, 16, 16)
    with tap.listening():
        rows = tap.rows(net.head(x))
    assert [tuple(row.shape) for row in rows] == [(7, 6), (7, 5)]
    for row in rows:
        assert torch.allclose(row.mean(1), torch.zeros(7), atol=1e-4) and torch.allclose(
            row.var(1, unbiased=False), torch.ones(7), atol=1e-2
        )


def test_gradients_go_through_a_hooked_layer_to_what_is_before_it_only() -> None:
    net = encoder()
    tap = tapped(net, "conv2")
    with tap.listening():
        tap.rows(net.head(torch.randn(3, 1, 16, 16)))[0].square().sum().backward()
    assert net.conv1.weight.grad is not None and net.conv3.weight.grad is None


def test_outside_of_listening_nothing_is_kept() -> None:
    net = encoder()
    tap = tapped(net, "conv2")
    with tap.listening():
        net.head(torch.randn(3, 1, 16, 16))
    assert not net.conv2._forward_hooks and not tap._caught


@pytest.mark.parametrize("layer", ["layer3", "norms", ""])
def test_a_layer_that_gives_nothing_is_refused_with_those_that_do(layer: str) -> None:
    with pytest.raises(
        DataError, match=rf"method.layers names '{layer}', which gives nothing.*expected one of features, .*conv2"
    ):
        tapped(encoder(), layer)
