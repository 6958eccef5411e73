from __future__ import annotations

import pytest
import torch

from tests.trainer.learning import blob_learner
from trainer.augment import AugmentSettings, augment


def dot(height: int = 21, width: int = 41, row: int = 10, column: int = 30) -> torch.Tensor:
    x = torch.zeros(1, 1, height, width)
    x[0, 0, row, column] = 1.0
    return x


def test_nothing_set_changes_nothing() -> None:
    x = torch.randn(4, 3, 9, 9)
    assert AugmentSettings().is_identity and torch.equal(augment(x, AugmentSettings()), x)


def test_a_shift_stays_within_its_share_of_the_side_and_keeps_the_mass() -> None:
    torch.manual_seed(0)
    x = dot().expand(64, -1, -1, -1)
    moved = augment(x, AugmentSettings(shift=0.1))
    columns = (moved[:, 0].sum(1) * torch.arange(41.0)).sum(1) / moved[:, 0].sum((1, 2))
    rows = (moved[:, 0].sum(2) * torch.arange(21.0)).sum(1) / moved[:, 0].sum((1, 2))
    assert float((columns - 30).abs().max()) <= 4.1 + 0.5 and float((rows - 10).abs().max()) <= 2.1 + 0.5
    assert float((columns - 30).abs().max()) > 2 and float(columns.std()) > 1  # negative control: it does move


def test_a_turn_keeps_lengths_on_an_image_that_is_not_square() -> None:
    torch.manual_seed(1)
    turned = augment(dot().expand(64, -1, -1, -1), AugmentSettings(rotate_deg=25))
    rows, columns = torch.meshgrid(torch.arange(21.0) - 10, torch.arange(41.0) - 20, indexing="ij")
    mass = turned[:, 0].sum((1, 2))
    y, x = ((turned[:, 0] * axis).sum((1, 2)) / mass for axis in (rows, columns))
    radius = (x.square() + y.square()).sqrt()
    assert torch.allclose(radius, torch.full_like(radius, 10.0), atol=0.6)
    assert float(torch.atan2(y, x).abs().max()) > 0.2  # negative control: it does turn


def test_a_flip_mirrors_about_half_of_the_images() -> None:
    torch.manual_seed(0)
    x = dot().expand(200, -1, -1, -1)
    flipped = augment(x, AugmentSettings(flip="horizontal"))
    mirrored = (flipped[:, 0, 10, 10] > 0.99).sum()
    assert 60 < int(mirrored) < 140 and int((flipped[:, 0, 10, 30] > 0.99).sum()) == 200 - int(mirrored)


@pytest.mark.parametrize("kind", ["brightness", "contrast", "noise"])
def test_grey_values_change_where_asked_and_places_do_not(kind: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 1, 6, 6)
    changed = augment(x, AugmentSettings.model_validate({kind: 0.5}))
    assert changed.shape == x.shape and not torch.allclose(changed, x)
    if kind != "noise":
        assert torch.equal(changed.flatten(1).argsort(1), x.flatten(1).argsort(1))


def test_training_batches_are_changed_and_full_passes_are_not() -> None:
    learner = blob_learner(augment=AugmentSettings(shift=0.2))
    index = torch.arange(10)
    plain = blob_learner()
    assert not torch.allclose(learner.batch(learner.share(index)), plain.batch(plain.share(index)))
    assert torch.equal(learner.all_latents(), plain.all_latents())


@pytest.mark.parametrize("settings", [AugmentSettings(shift=0.1), AugmentSettings(contrast=0.1, noise=0.1)])
def test_a_share_of_a_batch_may_hold_no_image(settings: AugmentSettings) -> None:
    nobody = torch.zeros(0, dtype=torch.int64)
    assert augment(torch.zeros(0, 1, 9, 9), settings, nobody, 4).shape == (0, 1, 9, 9)


def test_noise_does_not_depend_on_how_the_images_lie_in_memory() -> None:
    x = torch.rand(6, 3, 5, 5)
    found = []
    for laid in (x, x.contiguous(memory_format=torch.channels_last)):
        torch.manual_seed(0)
        found.append(augment(laid, AugmentSettings(noise=0.1)))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], x)
