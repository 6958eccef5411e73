from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import lgamma, log, pi
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import digamma, softmax
from scipy.stats import beta, invwishart, kstest
from sklearn.mixture import BayesianGaussianMixture
from torch import Tensor

from trainer.clustering.bayesian_mixture import Mixture, MixtureOptions, Reuse, Sticks, fit_mixture
from trainer.clustering.matching import label_names
from trainer.errors import DataError

KINDS = (
    {"covariance": "diag", "weights": "dirichlet"},
    {"covariance": "diag", "weights": "sticks"},
    {"covariance": "full", "weights": "dirichlet"},
    {"covariance": "full", "weights": "sticks"},
)
COVARIANCES = ("diag", "full")


def options(n_components: int, **changes: Any) -> MixtureOptions:
    return MixtureOptions(n_components, **changes)


def blobs(k: int = 4, each: int = 100, size: int = 4, apart: float = 6.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(k, size, generator=generator) * apart
    truth = torch.arange(k).repeat_interleave(each)
    return centres[truth] + torch.randn(k * each, size, generator=generator), truth


def overlapping(seed: int = 1) -> Tensor:
    return torch.randn(300, 5, generator=torch.Generator().manual_seed(seed)) * torch.tensor([3.0, 2, 1, 1, 0.5])


def labels(mixture: Mixture, x: Tensor) -> Tensor:
    return mixture.log_rho(x).argmax(1)


def random_responsibilities(n: int, k: int) -> Tensor:
    return (2 * torch.randn(n, k, generator=torch.Generator().manual_seed(5))).softmax(1)


def drops(elbo: tuple[float, ...]) -> list[float]:
    return [after - before for before, after in pairwise(elbo) if after - before < -1e-6 * abs(after)]


# values by hand


def test_one_m_step_by_hand() -> None:
    # Rows 0, 2 | 7 on the first axis, mean 3; the prior has b0 = 0.5 var = 0.5 * 26 / 3, beta0 = a0 = 1, alpha0 = 1/2.
    x = torch.tensor([[0.0], [2.0], [7.0]])
    r = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    found = fit_mixture(x, options(2, max_iterations=1), 0, responsibilities=r).belief.components
    assert found.strength.tolist() == [3, 2]
    assert (found.mean[:, 0] + 3).tolist() == pytest.approx([(3 + 2) / 3, (3 + 7) / 2])
    assert (found.dof / 2).tolist() == [2, 1.5]  # a
    b0 = 0.5 * 26 / 3
    b = found.factor[:, 0, 0, 0].square() / 2
    assert b.tolist() == pytest.approx([b0 + 0.5 * (2 + 2 / 3 * 4), b0 + 0.5 * (0 + 1 / 2 * 16)])


def test_one_e_step_by_hand() -> None:
    x = torch.tensor([[0.0, 1.0], [2.0, -1.0], [7.0, 3.0]])
    r = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.0, 1.0]])
    mixture = fit_mixture(x, options(2, max_iterations=1), 0, responsibilities=r)
    found, alpha = mixture.belief.components, np.array([0.5 + 1.7, 0.5 + 1.3])
    m, a, b = mixture.means.numpy(), (found.dof / 2).numpy(), (found.factor[:, :, 0, 0].square() / 2).numpy()
    slow = np.empty((3, 2))
    for i in range(3):
        for k in range(2):
            terms = [
                digamma(a[k])
                - log(b[k, d])
                - log(2 * pi)
                - a[k] / b[k, d] * (float(x[i, d]) - m[k, d]) ** 2
                - 1 / float(found.strength[k])
                for d in range(2)
            ]
            slow[i, k] = digamma(alpha[k]) - digamma(4) + 0.5 * sum(terms)
    assert mixture.log_rho(x).numpy() == pytest.approx(slow)
    assert mixture.responsibilities(x).numpy() == pytest.approx(softmax(slow, axis=1))
    assert mixture.mean_log_likelihood(x) == pytest.approx(np.logaddexp(slow[:, 0], slow[:, 1]).mean())
    assert mixture.counts.numpy() == pytest.approx(softmax(slow, axis=1).sum(0))


def weights_after(counts: list[float], **changes: Any) -> tuple[Sticks, Sticks]:
    x = torch.randn(len(counts), 1, generator=torch.Generator().manual_seed(0))
    mixture = fit_mixture(
        x, options(len(counts), max_iterations=1, **changes), 0, responsibilities=torch.eye(len(counts))
    )
    prior = mixture.prior.weights
    return prior, prior.updated(torch.tensor(counts, dtype=torch.float64))


def test_sticks_follow_the_formula_of_blei_and_jordan_in_descending_order() -> None:
    _, posterior = weights_after([2.0, 9.0, 4.0], weights="sticks", concentration=0.7)
    first, second = np.array([1 + 9, 1 + 4.0]), np.array([0.7 + 6, 0.7 + 2])
    taken, left = digamma(first) - digamma(first + second), digamma(second) - digamma(first + second)
    by_size = [taken[0], taken[1] + left[0], left[0] + left[1]]
    assert posterior.expected_log().tolist() == pytest.approx([by_size[2], by_size[0], by_size[1]])
    assert posterior.order.tolist() == [1, 2, 0]


def test_a_dirichlet_is_told_by_its_sticks() -> None:
    prior, posterior = weights_after([2.0, 9.0, 4.0, 0.0], concentration=0.3)
    alpha = np.array([2.3, 9.3, 4.3, 0.3])
    assert posterior.expected_log().tolist() == pytest.approx(digamma(alpha) - digamma(alpha.sum()))
    kl = lgamma(alpha.sum()) - lgamma(1.2) - sum(lgamma(a) - lgamma(0.3) for a in alpha)
    kl += float(((alpha - 0.3) * (digamma(alpha) - digamma(alpha.sum()))).sum())
    assert float(posterior.divergence(prior)) == pytest.approx(kl)


def test_the_divergence_of_sticks_is_that_of_their_beta_distributions() -> None:
    prior, posterior = weights_after([5.0, 2.0], weights="sticks", concentration=2.0)
    v = (np.arange(200000) + 0.5) / 200000
    density, before = beta(1 + 5, 2 + 2), beta(1, 2)
    slow = np.mean(density.pdf(v) * (density.logpdf(v) - before.logpdf(v)))
    assert float(posterior.divergence(prior)) == pytest.approx(slow, rel=1e-6)


def test_the_elbo_of_one_diagonal_component_is_the_evidence() -> None:
    x = overlapping()
    mixture = fit_mixture(x, options(1), 0)
    prior, found = mixture.prior.components, mixture.belief.components
    a0, a, beta0, beta_n = 1.0, 1.0 + 150, 1.0, 301.0
    b0, b = prior.factor[0, :, 0, 0].square() / 2, found.factor[0, :, 0, 0].square() / 2
    evidence = (a0 * b0.log() - a * b.log()).sum() + 5 * (
        lgamma(a) - lgamma(a0) + 0.5 * log(beta0 / beta_n) - 150 * log(2 * pi)
    )
    assert mixture.elbo[-1] == pytest.approx(float(evidence))


def test_the_elbo_of_one_full_component_is_the_evidence() -> None:
    x = overlapping()
    mixture = fit_mixture(x, options(1, covariance="full"), 0)
    prior, found = mixture.prior.components, mixture.belief.components
    nu0, nu = torch.tensor(6.0).double(), torch.tensor(306.0).double()
    old, new = (2 * each.factor[0, 0].diagonal().log().sum() for each in (prior, found))
    evidence = 0.5 * (nu0 * old - nu * new) - 300 * 5 / 2 * log(pi) + 5 / 2 * log(1 / 301)
    evidence += torch.special.multigammaln(nu / 2, 5) - torch.special.multigammaln(nu0 / 2, 5)
    assert mixture.elbo[-1] == pytest.approx(float(evidence))


def test_the_full_prior_gives_each_variance_the_prior_of_the_diagonal_one() -> None:
    x = overlapping()
    full, diag = (fit_mixture(x, options(1, covariance=kind), 0).prior.components for kind in COVARIANCES[::-1])
    inverse_scale = (full.factor[0, 0] @ full.factor[0, 0].T).numpy()
    drawn = np.asarray(invwishart(float(full.dof[0]), inverse_scale).rvs(4000, random_state=0))[:, 2, 2]
    a0, b0 = float(diag.dof[0]) / 2, float(diag.factor[0, 2, 0, 0].square() / 2)
    assert kstest(drawn, "invgamma", args=(a0, 0, b0)).pvalue > 0.01
    assert kstest(drawn, "invgamma", args=(a0 + 0.5, 0, b0)).pvalue < 0.01  # the test can tell


def test_in_one_dimension_full_and_diagonal_are_the_same_model() -> None:
    x = overlapping()[:, :1]
    r = random_responsibilities(300, 3)
    diag, full = (fit_mixture(x, options(3, covariance=kind), 0, responsibilities=r) for kind in COVARIANCES)
    assert diag.elbo == pytest.approx(full.elbo)
    assert torch.allclose(diag.log_rho(x), full.log_rho(x))


def test_full_dirichlet_agrees_with_scikit_learn() -> None:
    x, _ = blobs(3, each=60, size=3, apart=2.0)
    ours = fit_mixture(x, options(3, covariance="full", concentration=0.4, tol=1e-12, max_iterations=500), 0)
    theirs = BayesianGaussianMixture(
        n_components=3,
        tol=1e-10,
        max_iter=500,
        reg_covar=0,
        weight_concentration_prior_type="dirichlet_distribution",
        weight_concentration_prior=0.4,
        mean_precision_prior=1,
        degrees_of_freedom_prior=3 - 1 + 2,
        covariance_prior=np.cov(x.numpy().T, bias=True),
        n_init=5,
        random_state=0,
    ).fit(x.double().numpy())
    same = [int(((ours.means - torch.from_numpy(mean)) ** 2).sum(1).argmin()) for mean in theirs.means_]
    assert sorted(same) == [0, 1, 2]
    assert ours.means[same].numpy() == pytest.approx(theirs.means_, abs=1e-3)
    assert ours.counts[same].numpy() + 0.4 == pytest.approx(theirs.weight_concentration_, abs=1e-2)
    assert ours.responsibilities(x)[:, same].numpy() == pytest.approx(
        theirs.predict_proba(x.double().numpy()), abs=1e-3
    )


# what must hold for any rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("concentration", [None, 0.01, 1.0])
def test_the_elbo_never_falls(kind: dict[str, str], concentration: float | None) -> None:
    for x in (blobs(each=40)[0], overlapping()[:150]):
        start = random_responsibilities(len(x), 8)
        chosen = options(8, tol=1e-9, max_iterations=40, restarts=1, concentration=concentration, **kind)
        for mixture in (fit_mixture(x, chosen, 0), fit_mixture(x, chosen, 0, responsibilities=start)):
            assert len(mixture.elbo) > 3 and drops(mixture.elbo) == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_elbo_of_spoiled_responsibilities_is_seen_to_fall(kind: dict[str, str]) -> None:
    x = overlapping()
    fitted = fit_mixture(x, options(4, **kind), 0)
    r, one = fitted.responsibilities(x), options(4, max_iterations=1, **kind)
    again, spoiled = (fit_mixture(x, one, 0, responsibilities=each) for each in (r, r.roll(150, 0)))
    assert drops(fitted.elbo + again.elbo) == []  # one step more, from where it stopped
    assert drops(fitted.elbo + spoiled.elbo) != []


def test_more_restarts_never_end_worse() -> None:
    x = overlapping()
    one, many = (fit_mixture(x, options(6, restarts=n), 0).elbo[-1] for n in (1, 5))
    assert many >= one


def test_the_same_seed_gives_equal_arrays() -> None:
    x = overlapping()
    first, second = (fit_mixture(x, options(6), 3) for _ in range(2))
    assert torch.equal(first.log_rho(x), second.log_rho(x)) and first.elbo == second.elbo


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_change_nothing(kind: dict[str, str]) -> None:
    x = overlapping()
    start = random_responsibilities(300, 5)
    whole, parts = (
        fit_mixture(x, options(5, chunk=n, max_iterations=5, **kind), 0, responsibilities=start) for n in (65536, 37)
    )
    assert whole.elbo == pytest.approx(parts.elbo)
    assert torch.allclose(whole.log_rho(x), parts.log_rho(x))


@pytest.mark.parametrize("kind", KINDS)
def test_permuted_components_stay_in_the_order_of_the_start(kind: dict[str, str]) -> None:
    x = overlapping()
    start, order = random_responsibilities(300, 5), torch.tensor([3, 0, 4, 1, 2])
    plain, turned = (fit_mixture(x, options(5, **kind), 0, responsibilities=r) for r in (start, start[:, order]))
    assert torch.allclose(plain.log_rho(x)[:, order], turned.log_rho(x), atol=1e-6)
    assert torch.allclose(plain.counts[order], turned.counts)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_the_place_of_the_origin_does_not_matter(covariance: str) -> None:
    x = overlapping().double()
    start = random_responsibilities(300, 5)
    near, far = (fit_mixture(x + by, options(5, covariance=covariance), 0, responsibilities=start) for by in (0, 1e4))
    assert torch.allclose(near.log_rho(x), far.log_rho(x + 1e4), atol=1e-5)


def test_the_input_is_left_as_it_was() -> None:
    x, start = overlapping(), random_responsibilities(300, 5)
    before, start_before = x.clone(), start.clone()
    fit_mixture(x, options(5), 0, responsibilities=start)
    assert torch.equal(x, before) and torch.equal(start, start_before)


# warm starts


def warm_start() -> tuple[Tensor, Tensor, Mixture]:
    """Rows, the responsibilities they had in other features, and the mixture that starts from these."""
    x = overlapping()
    return x, (old := random_responsibilities(300, 5)), fit_mixture(x, options(5), 0, responsibilities=old)


@pytest.mark.parametrize("weights", ["dirichlet", "sticks"])
def test_rotated_features_give_the_same_labels_after_a_warm_start(weights: Any) -> None:
    x, old, _ = warm_start()
    q = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)).Q
    chosen = options(5, covariance="full", weights=weights)
    plain = fit_mixture(x, chosen, 0, responsibilities=old)
    turned = fit_mixture(x.double() @ q, chosen, 0, responsibilities=old)
    assert len(set(labels(plain, x).tolist())) > 1
    assert torch.equal(labels(plain, x), labels(turned, x.double() @ q))
    assert plain.elbo == pytest.approx(turned.elbo)


def test_permuted_axes_give_the_same_labels_after_a_warm_start() -> None:
    x, old, plain = warm_start()
    axes = torch.tensor([4, 2, 0, 1, 3])
    assert torch.equal(
        labels(plain, x), labels(fit_mixture(x[:, axes], options(5), 0, responsibilities=old), x[:, axes])
    )


def test_rotation_does_matter_to_parameters_carried_over() -> None:
    # The reason why responsibilities are carried: the old parameters mean nothing in turned features.
    x, truth = blobs()
    q = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(3))).Q
    old = fit_mixture(x, options(4), 0)
    carried = fit_mixture(x @ q, options(4), 0, responsibilities=old.responsibilities(x))
    assert torch.equal(labels(carried, x @ q), labels(old, x))
    assert not torch.equal(labels(old, x @ q), labels(old, x))
    assert len(set(zip(labels(old, x).tolist(), truth.tolist(), strict=True))) == 4


def test_a_warm_start_keeps_the_ids() -> None:
    x, truth = blobs()
    old = torch.nn.functional.one_hot((truth + 2) % 4).float()
    assert torch.equal(labels(fit_mixture(x, options(4), 0, responsibilities=old), x), (truth + 2) % 4)


def test_new_images_may_start_without_responsibilities() -> None:
    x, truth = blobs()
    old = torch.nn.functional.one_hot(truth).float()
    old[::3] = 0
    assert torch.equal(labels(fit_mixture(x, options(4), 0, responsibilities=old), x), truth)


def test_fewer_components_than_asked_for_may_be_left_of_the_last_round() -> None:
    x, truth = blobs()
    mixture = fit_mixture(x, options(20), 0, responsibilities=torch.nn.functional.one_hot(truth).float())
    assert mixture.n_components == 4
    assert float(mixture.prior.weights.first[0]) == pytest.approx(1 / 20)  # the original prior


def test_a_reused_posterior_is_the_prior_by_hand() -> None:
    x = overlapping()
    old = fit_mixture(x, options(3), 0)
    prior = fit_mixture(x, options(3), 0, reuse=Reuse(old, 0.1)).prior.components
    last, memory = old.belief.components, 0.1 * old.counts
    assert torch.allclose(prior.mean + x.double().mean(0), old.means)
    assert torch.allclose(prior.strength, 1 + memory) and torch.allclose(prior.dof / 2, 1 + memory / 2)
    a, b = last.dof / 2, last.factor[:, :, 0, 0].square() / 2
    expected = (1 + memory / 2)[:, None] * b / a[:, None]
    assert torch.allclose(prior.factor[:, :, 0, 0].square() / 2, expected)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_a_reused_posterior_expects_the_old_precisions(covariance: str) -> None:
    x = overlapping()
    old = fit_mixture(x, options(3, covariance=covariance), 0)
    prior = fit_mixture(x, options(3, covariance=covariance), 0, reuse=Reuse(old, 0.3)).prior.components
    last = old.belief.components
    wide, narrow = prior.factor @ prior.factor.mT, last.factor @ last.factor.mT
    assert torch.allclose(wide / prior.dof[:, None, None, None], narrow / last.dof[:, None, None, None])


@pytest.mark.parametrize(("new_rows", "memory"), [(300, 90.0), (100, 30.0)])
def test_the_memory_is_capped_at_a_share_of_the_new_rows(new_rows: int, memory: float) -> None:
    x = overlapping()
    old = fit_mixture(x, options(3), 0)
    prior = fit_mixture(x[:new_rows], options(3), 0, reuse=Reuse(old, 0.3)).prior.components
    assert float((prior.strength - 1).sum()) == pytest.approx(memory)


def test_memory_does_not_pile_up_from_round_to_round() -> None:
    x = overlapping()
    mixture = fit_mixture(x, options(3), 0)
    for _ in range(3):
        mixture = fit_mixture(x, options(3), 0, reuse=Reuse(mixture, 0.2))
    assert float((mixture.prior.components.strength - 1).sum()) == pytest.approx(60.0)


@pytest.mark.parametrize("kind", KINDS)
def test_reuse_keeps_ids_and_the_elbo_never_falls(kind: dict[str, str]) -> None:
    x, truth = blobs()
    old = fit_mixture(x, options(8, **kind), 0)
    new = fit_mixture(x + 0.2, options(8, tol=1e-9, **kind), 0, reuse=Reuse(old, 0.3))
    assert drops(new.elbo) == []
    assert torch.equal(labels(new, x + 0.2), labels(old, x))
    assert len(set(zip(labels(new, x + 0.2).tolist(), truth.tolist(), strict=True))) == 4


# hard cases


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_duplicates_do_not_end_in_nan(covariance: str) -> None:
    x = torch.tensor([[0.0, 0, 1], [0, 3, 1], [9, 3, 1]]).repeat(50, 1)  # and one axis is constant
    mixture = fit_mixture(x, options(3, covariance=covariance), 0)
    assert mixture.log_rho(x).isfinite().all() and np.isfinite(mixture.elbo).all()
    assert len(set(labels(mixture, x[:3]).tolist())) == 3


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_duplicates_survive_many_rounds_of_reuse(covariance: str) -> None:
    x = torch.tensor([[0.0, 0, 1], [0, 3, 1], [9, 3, 1]]).repeat(50, 1)
    mixture = fit_mixture(x, options(3, covariance=covariance), 0)
    for _ in range(30):
        mixture = fit_mixture(x, options(3, covariance=covariance), 0, reuse=Reuse(mixture, 0.1))
    assert mixture.log_rho(x).isfinite().all() and len(set(labels(mixture, x[:3]).tolist())) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_row_is_a_mixture_of_one(kind: dict[str, str]) -> None:
    x = torch.tensor([[3.0, -1.0]])
    mixture = fit_mixture(x, options(1, **kind), 0)
    assert mixture.responsibilities(x).tolist() == [[1.0]] and mixture.counts.tolist() == [1.0]
    assert torch.allclose(mixture.means, x.double())


@pytest.mark.parametrize("kind", KINDS)
def test_two_clusters_in_one_dimension(kind: dict[str, str]) -> None:
    x, truth = blobs(2, size=1, apart=20.0)
    found = labels(fit_mixture(x, options(2, **kind), 0), x)
    assert torch.equal(label_names(truth, found, 2)[found], truth)


def test_equal_rows_are_one_component() -> None:
    x = torch.ones(7, 2)
    assert fit_mixture(x, options(1), 0).log_rho(x).isfinite().all()


def test_more_components_than_rows_is_an_error_that_names_the_setting() -> None:
    with pytest.raises(DataError, match=r"method\.n_clusters is 4, with 3 images; use fewer clusters or more images"):
        fit_mixture(torch.randn(3, 2), options(4), 0)


def test_fewer_distinct_rows_than_components_is_an_error_that_names_the_setting() -> None:
    with pytest.raises(DataError, match=r"method\.n_clusters is 3, but the 10 images have only 2"):
        fit_mixture(torch.tensor([[0.0], [1.0]]).repeat(5, 1), options(3), 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_an_error_that_says_what_to_do(value: float) -> None:
    x = torch.randn(10, 2)
    x[4, 1] = value
    with pytest.raises(DataError, match=r"1 of the 10 embeddings are not finite.*method\.n_clusters \(3\).*lower"):
        fit_mixture(x, options(3), 0)


@pytest.mark.parametrize(
    ("r", "message"),
    [
        (torch.ones(9, 2), r"are \(9, 2\), expected \(10, 1 to 2\)"),
        (torch.ones(10, 3), r"are \(10, 3\), expected"),
        (torch.zeros(10, 2), "sum to 0"),
        (torch.full((10, 2), float("nan")), "sum to nan"),
        (torch.tensor([[2.0, -1.0]]).repeat(10, 1), "expected finite values >= 0"),
    ],
)
def test_responsibilities_that_do_not_fit_are_refused(r: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_mixture(torch.randn(10, 2), options(2), 0, responsibilities=r)


def test_a_mixture_of_other_features_is_no_prior() -> None:
    old = fit_mixture(overlapping(), options(2), 0)
    with pytest.raises(ValueError, match="the old mixture is diag"):
        fit_mixture(overlapping()[:, :3], options(2), 0, reuse=Reuse(old, 0.1))
    with pytest.raises(ValueError, match="the old mixture is diag"):
        fit_mixture(overlapping(), replace(old.options, covariance="full"), 0, reuse=Reuse(old, 0.1))


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="spread is 0, expected more than 0"):
        options(3, spread=0)
    with pytest.raises(ValueError, match="concentration is -1"):
        options(3, concentration=-1)
    with pytest.raises(ValueError, match=r"kappa is 0\.5, expected 0 to 0\.3"):
        Reuse(fit_mixture(overlapping(), options(2), 0), 0.5)
