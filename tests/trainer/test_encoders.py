from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trainer.encoders import ENCODERS, Encoder
from trainer.encoders.conv import ConvSettings
from trainer.encoders.feature_mlp import FeatureMLPSettings
from trainer.encoders.mlp import MLPSettings
from trainer.encoders.pretrained import PretrainedSettings
from trainer.encoders.resnet import ResNetSettings
from trainer.encoders.sobel import Sobel
from trainer.errors import DataError

WEIGHTS = Path("../shared/weights/squeezenet1_0-imagenet.safetensors")


def build(name: str, shape: tuple[int, int, int]) -> Encoder:
    settings = {
        "mlp": MLPSettings(hidden=(16,), dim=5),
        "conv": ConvSettings(dim=5),
        "resnet": ResNetSettings(dim=5),
        "pretrained": PretrainedSettings(weights=""),
        "feature_mlp": FeatureMLPSettings(backbone=PretrainedSettings(weights=""), hidden=(16,), dim=5),
    }
    return ENCODERS[name](settings[name], shape)


@pytest.mark.parametrize("name", list(ENCODERS))
@pytest.mark.parametrize("shape", [(3, 40, 56), (1, 33, 35)])
def test_features_have_the_announced_size_and_the_decoder_restores_the_shape(
    name: str, shape: tuple[int, int, int]
) -> None:
    encoder = build(name, shape).eval()
    x = torch.randn(2, *shape)
    features = encoder(x)
    assert features.shape == (2, encoder.out_dim)
    decoder = encoder.build_decoder()
    if decoder is not None:
        assert decoder.eval()(features).shape == encoder.stem(encoder.frozen(x)).shape
    assert (decoder is None) == (name == "pretrained")


def test_glorot_weights_are_uniform_within_their_bound_in_encoder_and_decoder_without_bias() -> None:
    torch.manual_seed(0)
    encoder = ENCODERS["mlp"](MLPSettings(hidden=(60,), dim=5, init="glorot"), (1, 10, 10))
    decoder = encoder.build_decoder()
    assert decoder is not None
    for layer in (*encoder.layers, *decoder.layers):  # type: ignore[misc, union-attr]
        bound = (6 / sum(layer.weight.shape)) ** 0.5
        assert 0.95 * bound < float(layer.weight.detach().abs().max()) <= bound and not layer.bias.any()
    plain = ENCODERS["mlp"](MLPSettings(hidden=(60,), dim=5), (1, 10, 10))
    assert float(plain.layers[0].weight.detach().abs().max()) <= 0.1 and plain.layers[0].bias.any()  # type: ignore[index, union-attr, union-attr]


def test_the_input_of_feature_mlp_is_scaled_to_a_mean_square_of_one_and_frozen() -> None:
    encoder = build("feature_mlp", (3, 48, 48)).eval()
    features = encoder.frozen(torch.randn(90, 3, 48, 48, generator=torch.Generator().manual_seed(0)))
    encoder.fit_stem(features)
    x = encoder.stem(features)
    assert x.shape == (90, 64, 1, 1) and float(x.square().mean()) == pytest.approx(1.0, rel=1e-4)
    assert not x.requires_grad and encoder.head(x).requires_grad


def test_the_backbone_of_feature_mlp_never_goes_into_training_mode() -> None:
    encoder = build("feature_mlp", (3, 48, 48)).train()
    assert encoder.training and encoder.layers.training  # type: ignore[union-attr]
    assert not any(module.training for module in encoder.backbone.modules())  # type: ignore[union-attr]


def test_feature_mlp_says_what_it_cannot_do() -> None:
    backbone = PretrainedSettings(weights="", trainable=True)
    with pytest.raises(DataError, match="expected trainable: false"):
        ENCODERS["feature_mlp"](FeatureMLPSettings(backbone=backbone), (3, 48, 48))
    encoder = build("feature_mlp", (3, 48, 48))
    with pytest.raises(DataError, match=r"encoder\.input\.dim is 64, but there are 5 training images"):
        encoder.fit_stem(encoder.frozen(torch.randn(5, 3, 48, 48)))


def test_the_mlp_is_the_papers_shape() -> None:
    encoder = ENCODERS["mlp"](MLPSettings(), (1, 28, 28))
    assert [tuple(layer.weight.shape) for layer in encoder.layers] == [(500, 784), (500, 500), (2000, 500), (10, 2000)]  # type: ignore[operator, union-attr]
    decoder = encoder.build_decoder()
    assert decoder is not None
    assert [tuple(layer.weight.shape) for layer in decoder.layers] == [(2000, 10), (500, 2000), (500, 500), (784, 500)]  # type: ignore[operator, union-attr]


def test_an_input_too_small_for_the_convolutions_is_an_error_that_says_so() -> None:
    with pytest.raises(DataError, match="input is 40x7, expected at least 8x8"):
        build("conv", (3, 7, 40))


def test_mean_and_std_pooling_doubles_the_features_and_has_finite_gradients_on_a_constant_image() -> None:
    settings = PretrainedSettings(weights="", layers=("fire2",), pool="mean_std", trainable=True)
    encoder = ENCODERS["pretrained"](settings, (3, 32, 32))
    features = encoder(torch.zeros(1, 3, 32, 32))
    features.sum().backward()
    assert features.shape == (1, 256)
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters() if p.grad is not None)


def test_weights_for_rgb_are_turned_for_bgr_frames(tmp_path: Path) -> None:
    encoder = build("resnet", (3, 32, 32))
    tensors = {k: v.clone() for k, v in encoder.state_dict().items() if not k.startswith("embed")}
    tensors["fc.weight"] = torch.zeros(1000, 512)
    save_file(tensors, tmp_path / "w.safetensors")
    loaded = ENCODERS["resnet"](ResNetSettings(weights=str(tmp_path / "w.safetensors")), (3, 32, 32)).eval()
    loaded.load_pretrained()
    assert torch.equal(loaded.conv1.weight, tensors["conv1.weight"].flip(1))  # type: ignore[union-attr]
    # RGB weights on RGB pixels = turned weights on BGR pixels.
    reference = ENCODERS["resnet"](ResNetSettings(), (3, 32, 32)).eval()
    reference.load_state_dict({k: v for k, v in tensors.items() if k != "fc.weight"})
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(loaded(x.flip(1)), reference(x), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [("drop", "key 'bn1.bias' is missing for"), ("add", "key 'extra' is not one of"), ("shape", "has the shape")],
)
def test_weights_of_another_network_are_refused_with_the_first_differing_key(
    tmp_path: Path, change: str, message: str
) -> None:
    tensors = {k: v.clone() for k, v in build("resnet", (3, 32, 32)).state_dict().items() if not k.startswith("embed")}
    if change == "drop":
        del tensors["bn1.bias"]
    elif change == "add":
        tensors["extra"] = torch.zeros(1)
    else:
        tensors["bn1.bias"] = torch.zeros(3)
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(DataError, match=message):
        ENCODERS["resnet"](ResNetSettings(weights=str(tmp_path / "w.safetensors")), (3, 32, 32)).load_pretrained()


def test_a_missing_weights_file_is_never_downloaded_but_named(tmp_path: Path) -> None:
    encoder = ENCODERS["pretrained"](PretrainedSettings(weights=str(tmp_path / "none.safetensors")), (3, 32, 32))
    with pytest.raises(DataError, match=r"does not exist; .*never downloaded"):
        encoder.load_pretrained()
    (tmp_path / "page.safetensors").write_text("<html>")
    with pytest.raises(DataError, match="no safetensors file"):
        ENCODERS["pretrained"](
            PretrainedSettings(weights=str(tmp_path / "page.safetensors")), (3, 32, 32)
        ).load_pretrained()


def test_an_unknown_layer_lists_the_known_ones() -> None:
    with pytest.raises(DataError, match="fire99.*expected one or more of fire2"):
        ENCODERS["pretrained"](PretrainedSettings(weights="", layers=("fire99",)), (3, 32, 32))


@pytest.mark.skipif(not WEIGHTS.is_file(), reason="needs ../shared/weights")
def test_real_squeezenet_weights_load_and_stay_frozen() -> None:
    encoder = ENCODERS["pretrained"](PretrainedSettings(weights=str(WEIGHTS)), (3, 64, 64)).eval()
    encoder.load_pretrained()
    assert encoder.out_dim == 256 + 512 + 512
    assert not any(p.requires_grad for p in encoder.parameters()) and not encoder.is_trainable
    assert float(encoder(torch.randn(2, 3, 64, 64)).std()) > 0.01


@pytest.mark.parametrize("settings", [ConvSettings(dim=5, sobel=True), ResNetSettings(dim=5, sobel=True)])
def test_edges_in_place_of_colours_make_brightness_and_hue_invisible(settings: ConvSettings | ResNetSettings) -> None:
    encoder = ENCODERS[settings.name](settings, (3, 32, 32)).eval()
    x = torch.randn(2, 3, 32, 32)
    brighter = x + torch.tensor([3.0, -1.0, 0.5])[:, None, None]
    assert torch.allclose(encoder(x), encoder(brighter), atol=1e-4)
    plain = ENCODERS[settings.name](settings.model_copy(update={"sobel": False}), (3, 32, 32)).eval()
    assert not torch.allclose(plain(x), plain(brighter), atol=1e-4)


def test_the_edge_filters_are_sobels_and_see_no_edge_at_the_border() -> None:
    ramp = torch.arange(5.0).expand(1, 1, 5, 5)
    horizontal, vertical = Sobel()(ramp)[0]
    assert horizontal[:, 1:-1].flatten().tolist() == [-8.0] * 15 and not vertical.any()
    assert not Sobel()(torch.ones(1, 3, 4, 4)).any()


def test_weights_that_expect_colours_refuse_edges() -> None:
    with pytest.raises(ValueError, match="sobel is true, but weights w.safetensors expect colours"):
        ResNetSettings(weights="w.safetensors", sobel=True)


def test_batch_norm_of_the_convolutions_is_off_unless_asked_for() -> None:
    plain, normed = (ENCODERS["conv"](ConvSettings(dim=5, batch_norm=on), (1, 16, 16)) for on in (False, True))
    count = [sum(isinstance(m, torch.nn.BatchNorm2d) for m in encoder.modules()) for encoder in (plain, normed)]
    assert count == [0, 3]
