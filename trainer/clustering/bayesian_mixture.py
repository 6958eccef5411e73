"""A mixture of Gaussians fitted by variational Bayes, which empties the components it does not need.

Sources: Attias, "A variational Bayesian framework for graphical models", 2000; Bishop, "Pattern recognition and machine learning", 2006,
ch. 10.2 (10.51 to 10.71); Blei and Jordan, "Variational inference for Dirichlet process mixtures", 2006 (sticks).

    pi ~ Dir(alpha0, ..)   or   pi_k = v_k prod_{j<k} (1 - v_j),  v_k ~ Beta(1, g0),  v_K = 1
    diag: lambda_kd ~ Gamma(a0, rate b0_d),  mu_kd ~ N(m0_d, 1 / (beta0 lambda_kd))
    full: Lambda_k ~ Wishart(W0, nu0),       mu_k ~ N(m0, (beta0 Lambda_k)^-1)
    E-step: ln rho_ik = E ln pi_k + E ln N(x_i | mu_k, Lambda_k),   r_ik = softmax_k ln rho_ik
    M-step: N_k = sum_i r_ik and the weighted sums of x and x x^T turn each prior into a posterior of its own family
    ELBO right after an E-step = sum_i logsumexp_k ln rho_ik - KL(weights) - sum_k KL(component k)

m0 is the mean of the rows, b0_d = spread x their variance; full: nu0 = D - 1 + 2 a0, W0^-1 = 2 spread x their covariance, so that each
variance has the same prior as in diag. Two identities save half of the code: Dir(alpha0, ..) is sticks v_j ~ Beta(alpha0, (K - j) alpha0),
and Gamma(a, b) is a Wishart of one axis with nu = 2 a, W^-1 = 2 b. Differs from the sources: b0 and W0^-1 have a floor, so duplicates do
not end in a variance of 0; sticks are ordered by N_k at every M-step, largest first, but components keep their ids. That is the best
order; for g0 > 1 alone the last two can be better swapped, and the ELBO may lose that little.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import log, pi
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torch.special import digamma, gammaln, multigammaln

from trainer.clustering.kmeans import KMeansOptions, kmeans
from trainer.errors import DataError

MAX_KAPPA, MAX_MEMORY = 0.3, 0.3  # of the old counts; of the new rows. With more, it cannot follow features that move
FLOOR, ABSOLUTE_FLOOR = 1e-6, 1e-12  # least prior variance: share of the mean one; where all rows are equal
FEWEST = 1e-10  # rows; keeps the mean of an empty component finite


@dataclass(frozen=True)
class MixtureOptions:
    """What a mixture starts from; symbols of the equations in brackets.

    `concentration` (alpha0 or g0) None: 1 / n_components for "dirichlet", 1 for "sticks". `mean_precision` (beta0), `dof` (a0).
    `spread`: prior variance as a share of the rows' own; smaller gives more and tighter clusters. `tol`: relative rise of the ELBO that
    ends the iterations. `restarts`: k-means starts of a fresh fit; the best ELBO is kept. `chunk`: rows of ln rho in memory at a time.
    """

    n_components: int
    weights: Literal["dirichlet", "sticks"] = "dirichlet"
    covariance: Literal["diag", "full"] = "diag"
    concentration: float | None = None
    mean_precision: float = 1.0
    dof: float = 1.0
    spread: float = 0.5
    max_iterations: int = 100
    tol: float = 1e-5
    restarts: int = 3
    chunk: int = 65536

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int | float) and name != "tol" and not value > 0:
                raise ValueError(f"{name} is {value}, expected more than 0")


class Moments(NamedTuple):
    """Weighted sums over rows: `counts` N_k (K,), `sums` of x (K, D), `squares` of x x^T (K, blocks, axes, axes)."""

    counts: Tensor
    sums: Tensor
    squares: Tensor


@dataclass(frozen=True)
class Sticks:
    """Distribution over the weights: v ~ Beta(`first`, `second`) (K - 1,) each; stick j belongs to component `order[j]`."""

    first: Tensor
    second: Tensor
    order: Tensor

    def updated(self, counts: Tensor) -> Sticks:
        """The posterior after `counts` (K,), self being the prior."""
        order = counts.argsort(descending=True, stable=True)
        ranked = counts[order]
        after = ranked.flip(0).cumsum(0).flip(0)[1:]
        return Sticks(self.first + ranked[:-1], self.second + after, order)

    def expected_log(self) -> Tensor:
        """E ln pi_k in the order of the components: (K,)."""
        total = digamma(self.first + self.second)
        nothing = total.new_zeros(1)
        taken = torch.cat([digamma(self.first) - total, nothing])
        left = torch.cat([nothing, (digamma(self.second) - total).cumsum(0)])
        return torch.empty_like(taken).index_copy_(0, self.order, taken + left)

    def divergence(self, prior: Sticks) -> Tensor:
        """KL from `prior`: a scalar."""
        a, b, a0, b0 = self.first, self.second, prior.first, prior.second
        slope = (a - a0) * digamma(a) + (b - b0) * digamma(b) + (a0 + b0 - a - b) * digamma(a + b)
        return (_log_beta(a0, b0) - _log_beta(a, b) + slope).sum()


@dataclass(frozen=True)
class NormalWishart:
    """Distribution over means and precisions: `mean` (K, D), `strength` beta (K,), `dof` nu (K,), `factor` (K, blocks, axes, axes).

    full is one block of D axes, diag D blocks of one. `factor` is the lower Cholesky factor of W_k^-1; W_k is never formed.
    """

    mean: Tensor
    strength: Tensor
    dof: Tensor
    factor: Tensor

    def weigh(self, x: Tensor, r: Tensor) -> Moments:
        """Moments of x (B, D) under responsibilities (B, K)."""
        r = r.to(x)
        if self.factor.shape[-1] == 1:
            return Moments(r.sum(0), r.T @ x, (r.T @ x.square())[:, :, None, None])
        squares = torch.stack([(x * weight[:, None]).T @ x for weight in r.T])  # one by one: (B, K, D) may not fit
        return Moments(r.sum(0), r.T @ x, squares[:, None])

    def updated(self, moments: Moments) -> NormalWishart:
        """The posterior after `moments`, self being the prior."""
        counts, strength = moments.counts, self.strength + moments.counts
        average = moments.sums / counts[:, None].clamp_min(FEWEST)
        middle, shift = self._columns(average), self._columns(average - self.mean)
        scatter = moments.squares - _wide(counts) * (middle @ middle.mT)
        pull = _wide(self.strength * counts / strength) * (shift @ shift.mT)
        mean = (self.strength[:, None] * self.mean + moments.sums) / strength[:, None]
        factor = torch.linalg.cholesky(self.factor @ self.factor.mT + scatter + pull)
        return NormalWishart(mean, strength, self.dof + counts, factor)

    def select(self, kept: Tensor) -> NormalWishart:
        """The components `kept`."""
        return NormalWishart(self.mean[kept], self.strength[kept], self.dof[kept], self.factor[kept])

    def as_prior(self, memory: Tensor, options: MixtureOptions, floor: float) -> NormalWishart:
        """A prior with these means and expected precisions that counts for `memory` (K,) rows more than the original one."""
        dof = self.factor.shape[-1] - 1 + 2 * options.dof + memory
        inverse_scale = _wide(dof / self.dof) * (self.factor @ self.factor.mT)
        return NormalWishart(self.mean, options.mean_precision + memory, dof, _cholesky(inverse_scale, 2 * floor))

    def expected_log_det(self) -> Tensor:
        """E ln |Lambda_k|: (K,)."""
        blocks, axes = self.factor.shape[1:3]
        halves = (self.dof[:, None] - torch.arange(axes).to(self.dof)) / 2
        return blocks * (digamma(halves).sum(1) + axes * log(2)) - _log_det(self.factor)

    def expected_log_density(self, x: Tensor) -> Tensor:
        """E ln N(x | mu_k, Lambda_k) of x (B, D): (B, K)."""
        constant = self.expected_log_det() - x.shape[1] * (log(2 * pi) + 1 / self.strength)
        if self.factor.shape[-1] == 1:
            w = 1 / self.factor[:, :, 0, 0].square()
            d2 = x.square() @ w.T - 2 * x @ (w * self.mean).T + (w * self.mean.square()).sum(1)
            d2 = d2.clamp_min(0)  # the expanded form can fall below on a mean
        else:
            pairs = zip(self.mean, self.factor[:, 0], strict=True)
            solved = [torch.linalg.solve_triangular(lower, (x - mean).T, upper=False) for mean, lower in pairs]
            d2 = torch.stack([column.square().sum(0) for column in solved], 1)
        return 0.5 * (constant - self.dof * d2)

    def divergence(self, prior: NormalWishart) -> Tensor:
        """KL from `prior`: a scalar."""
        size, ratio = self.mean.shape[1], prior.strength / self.strength
        shift = self._columns(self.mean - prior.mean)
        moved = torch.linalg.solve_triangular(self.factor, shift, upper=False).square().sum((1, 2, 3))
        trace = torch.linalg.solve_triangular(self.factor, prior.factor, upper=False).square().sum((1, 2, 3))
        means = size * (ratio - 1 - ratio.log()) + prior.strength * self.dof * moved
        spreads = (self.dof - prior.dof) * self.expected_log_det() - self.dof * (size - trace)
        return (0.5 * (means + spreads) + self._log_normaliser() - prior._log_normaliser()).sum()

    def _log_normaliser(self) -> Tensor:
        (blocks, axes), half = self.factor.shape[1:3], self.dof / 2
        return half * (_log_det(self.factor) - blocks * axes * log(2)) - blocks * multigammaln(half, axes)

    def _columns(self, values: Tensor) -> Tensor:
        return values.reshape(len(values), *self.factor.shape[1:3], 1)


@dataclass(frozen=True)
class Belief:
    """Distribution over weights and components; the prior and the posterior both are one."""

    weights: Sticks
    components: NormalWishart

    def updated(self, moments: Moments) -> Belief:
        """The M-step: the posterior, self being the prior."""
        return Belief(self.weights.updated(moments.counts), self.components.updated(moments))

    def log_rho(self, x: Tensor) -> Tensor:
        """Unnormalised log-responsibilities (B, K) of x (B, D)."""
        return self.weights.expected_log() + self.components.expected_log_density(x)

    def divergence(self, prior: Belief) -> float:
        """KL from `prior`."""
        return float(self.weights.divergence(prior.weights) + self.components.divergence(prior.components))


@dataclass(frozen=True)
class Mixture:
    """A fitted mixture; its log-responsibilities and responsibilities are float64.

    `counts` N_k (K,) of the last E-step; `elbo` after each E-step; `belief` and `prior` lie around `origin` (D,), the mean of the rows.
    """

    belief: Belief
    prior: Belief
    origin: Tensor
    counts: Tensor
    elbo: tuple[float, ...]
    options: MixtureOptions

    @property
    def n_components(self) -> int:
        return len(self.counts)

    @property
    def means(self) -> Tensor:
        """Expected means (K, D)."""
        return self.belief.components.mean + self.origin

    def log_rho(self, x: Tensor) -> Tensor:
        """Unnormalised log-responsibilities (N, K) of x (N, D)."""
        parts = x.detach().split(self.options.chunk)
        return torch.cat([self.belief.log_rho(part.double() - self.origin) for part in parts])

    def responsibilities(self, x: Tensor) -> Tensor:
        """Responsibilities (N, K) of x (N, D); rows sum to 1."""
        return self.log_rho(x).softmax(1)

    def mean_log_likelihood(self, x: Tensor) -> float:
        """Mean of logsumexp_k ln rho_ik over x (N, D), nats per row."""
        return float(self.log_rho(x).logsumexp(1).mean())

    def restricted(self, kept: Tensor, x: Tensor, rounds: int) -> Mixture:
        """The components `kept` (K_eff,) alone: an E-step on x (N, D), then `rounds` of M- and E-step."""
        rows = x.detach().double() - self.origin
        prior = Belief(_sticks(len(kept), self.options, rows), self.prior.components.select(kept))
        survivors = Belief(prior.weights.updated(self.counts[kept]), self.belief.components.select(kept))
        start = _e_step(rows, survivors, self.options.chunk)[0]
        found = _iterate(rows, start, prior, replace(self.options, max_iterations=rounds, tol=0.0))
        return replace(found, origin=self.origin, options=self.options)


@dataclass(frozen=True)
class Reuse:
    """The posterior of `mixture` as the next prior, with `kappa` of its counts; only for features that hardly moved.

    m0_k <- m_k, beta0_k <- beta0 + kappa N_k, a0_k <- a0 + kappa N_k / 2, b0_k <- a0_k b_k / a_k
    """

    mixture: Mixture
    kappa: float

    def __post_init__(self) -> None:
        if not 0 <= self.kappa <= MAX_KAPPA:
            raise ValueError(f"kappa is {self.kappa}, expected 0 to {MAX_KAPPA}")


def fit_mixture(
    x: Tensor, options: MixtureOptions, seed: int, *, responsibilities: Tensor | None = None, reuse: Reuse | None = None
) -> Mixture:
    """Fits x (N, D), on its device; the same seed gives the same mixture on a CPU.

    Args:
        seed: of the k-means starts; a warm fit draws nothing.
        responsibilities: (N, K) to start from instead, K <= n_components; a row of zeros takes no part in the first M-step.
        reuse: an old mixture as the prior, and, without `responsibilities`, as the start.

    Raises:
        DataError: fewer rows, or at a fresh start fewer distinct rows, than components; or values that are not finite.
        ValueError: a start that does not fit the rows or the options.
    """
    size = _checked_size(x, options, responsibilities, reuse)
    _check_rows(x, size)
    origin = x.detach().double().mean(0)
    rows = x.detach().double() - origin
    prior, last = (_build_prior(rows, size, options), None) if reuse is None else _recall(reuse, rows, origin, options)
    starts: Iterable[Moments]
    if responsibilities is not None:
        starts = [_weigh(rows, responsibilities, prior, options.chunk)]
    elif last is not None:
        starts = [_e_step(rows, last, options.chunk)[0]]
    else:
        seeds = range(seed * options.restarts, (seed + 1) * options.restarts)
        labels = (kmeans(x, size, each, KMeansOptions(n_init=1)).labels for each in seeds)
        starts = (_weigh(rows, one_hot(found, size), prior, options.chunk) for found in labels)
    best = max((_iterate(rows, start, prior, options) for start in starts), key=lambda fit: fit.elbo[-1])
    return replace(best, origin=origin)


def _iterate(rows: Tensor, moments: Moments, prior: Belief, options: MixtureOptions) -> Mixture:
    """M- and E-steps until the ELBO stands still; `rows` lie around their origin."""
    elbo: list[float] = []
    for _ in range(options.max_iterations):
        belief = prior.updated(moments)
        moments, log_likelihood = _e_step(rows, belief, options.chunk)
        elbo.append(log_likelihood - belief.divergence(prior))
        if len(elbo) > 1 and elbo[-1] - elbo[-2] <= options.tol * abs(elbo[-1]):
            break
    return Mixture(belief, prior, torch.zeros_like(rows[0]), moments.counts, tuple(elbo), options)


def _e_step(rows: Tensor, belief: Belief, chunk: int) -> tuple[Moments, float]:
    """The moments under the responsibilities of `belief`, and the sum of logsumexp_k ln rho_ik."""
    parts, log_likelihood = [], rows.new_zeros(())
    for part in rows.split(chunk):
        log_rho = belief.log_rho(part)
        parts.append(belief.components.weigh(part, log_rho.softmax(1)))
        log_likelihood += log_rho.logsumexp(1).sum()
    return _total(parts), float(log_likelihood)


def _weigh(rows: Tensor, r: Tensor, prior: Belief, chunk: int) -> Moments:
    return _total([prior.components.weigh(*pair) for pair in zip(rows.split(chunk), r.split(chunk), strict=True)])


def _total(parts: list[Moments]) -> Moments:
    return Moments(*(torch.stack(each).sum(0) for each in zip(*parts, strict=True)))


def _sticks(size: int, options: MixtureOptions, like: Tensor) -> Sticks:
    """The prior of `size` weights."""
    places = torch.arange(size, device=like.device)
    ones = torch.ones(size - 1).to(like)
    if options.weights == "sticks":
        return Sticks(ones, ones * (options.concentration or 1.0), places)
    alpha = options.concentration or 1 / options.n_components
    return Sticks(ones * alpha, places[1:].flip(0) * ones * alpha, places)


def _build_prior(rows: Tensor, size: int, options: MixtureOptions) -> Belief:
    covariance = rows.T @ rows / len(rows)
    blocks = covariance[None] if options.covariance == "full" else covariance.diagonal()[:, None, None]
    factor = _cholesky(2 * options.spread * blocks, 2 * _floor(rows)).expand(size, -1, -1, -1)
    strength = rows.new_full((size,), options.mean_precision)
    dof = rows.new_full((size,), factor.shape[-1] - 1 + 2 * options.dof)
    return Belief(_sticks(size, options, rows), NormalWishart(torch.zeros_like(rows[:size]), strength, dof, factor))


def _recall(reuse: Reuse, rows: Tensor, origin: Tensor, options: MixtureOptions) -> tuple[Belief, Belief]:
    """The prior that an old mixture makes for `rows`, and its posterior; both around the new `origin`."""
    old = reuse.mixture
    last = replace(old.belief, components=replace(old.belief.components, mean=old.means - origin))
    memory = old.counts * min(reuse.kappa, MAX_MEMORY * len(rows) / float(old.counts.sum()))
    components = last.components.as_prior(memory, options, _floor(rows))
    return Belief(_sticks(old.n_components, options, rows), components), last


def _checked_size(x: Tensor, options: MixtureOptions, responsibilities: Tensor | None, reuse: Reuse | None) -> int:
    size, fewest = options.n_components, 1
    if reuse is not None:
        size = fewest = reuse.mixture.n_components
        kind, features = reuse.mixture.options.covariance, reuse.mixture.means.shape[1:]
        if kind != options.covariance or features != x.shape[1:]:
            raise ValueError(f"the old mixture is {kind} {features}, expected {options.covariance} {x.shape[1:]}")
    if (r := responsibilities) is None:
        return size
    if r.ndim != 2 or len(r) != len(x) or not fewest <= r.shape[1] <= size:
        raise ValueError(f"responsibilities are {tuple(r.shape)}, expected ({len(x)}, {fewest} to {size})")
    if not (r.isfinite().all() and (r >= 0).all() and r.sum() > 0):
        raise ValueError(f"responsibilities sum to {float(r.sum()):g}, expected finite values >= 0, not all of them 0")
    return r.shape[1]


def _check_rows(x: Tensor, size: int) -> None:
    if len(x) < size:
        raise DataError(f"method.n_clusters is {size}, with {len(x)} images; use fewer clusters or more images")
    if wrong := int((~x.isfinite()).any(1).sum()):
        raise DataError(
            f"{wrong} of the {len(x)} embeddings are not finite, so that no method.n_clusters ({size}) can be fitted; "
            f"the encoder has diverged: lower its learning rate, or start again from an earlier checkpoint"
        )


def _floor(rows: Tensor) -> float:
    return max(FLOOR * float(rows.square().mean()), ABSOLUTE_FLOOR)


def _cholesky(blocks: Tensor, floor: float) -> Tensor:
    """Factors of `blocks` (.., axes, axes), which are lifted by as much as their smallest eigenvalue is below `floor`."""
    lift = (floor - torch.linalg.eigvalsh(blocks)[..., 0]).clamp_min(0)
    return torch.linalg.cholesky(blocks + lift[..., None, None] * torch.eye(blocks.shape[-1]).to(blocks))


def _log_det(factor: Tensor) -> Tensor:
    return 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum((1, 2))


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return gammaln(a) + gammaln(b) - gammaln(a + b)


def _wide(values: Tensor) -> Tensor:
    return values[:, None, None, None]
