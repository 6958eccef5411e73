"""Batches of a learner: which images they hold, what their reconstruction costs; deterministic runs do not fill memory with NaN."""

from __future__ import annotations

import torch

from tests.trainer.learning import blob_learner
from trainer.fitting import _determinism


def test_a_batch_holds_the_asked_images_in_the_asked_order() -> None:
    learner = blob_learner()
    index = torch.tensor([7, 0, 99, 7])
    x = learner.batch(learner.share(index))
    pixels = learner.pixels[index]  # type: ignore[index]
    assert torch.equal(x, learner.model.preprocess.normalise(pixels))
    assert torch.equal(x[0], x[3])
    assert not torch.equal(x[0], x[1])


def test_the_error_of_a_reconstruction_is_the_sum_of_squares_over_an_image() -> None:
    learner = blob_learner()
    decoder = learner.need_decoder("this test")
    index = torch.tensor([3, 41])
    _, error = learner.reconstruct(index)
    x = learner.batch(learner.share(index))
    output = decoder(learner.features(index))
    expected = torch.stack([((output[n] - x[n]) ** 2).sum() for n in range(2)])
    torch.testing.assert_close(error, expected)
    gradient = torch.autograd.grad(error.sum(), decoder.layers[-1].bias)[0]  # type: ignore[union-attr,index]
    torch.testing.assert_close(gradient, 2 * (output - x).flatten(1).sum(0))


def test_a_deterministic_run_leaves_new_memory_as_it_is_and_restores_the_choice_of_its_host() -> None:
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with _determinism(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
