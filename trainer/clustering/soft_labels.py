"""From a fitted mixture to labels to train on: prunes its components, tempers its responsibilities, balances the rows.

In many dimensions responsibilities are one-hot; dividing ln rho by a temperature gives back what the mixture knows of the others:

    rt_ik = softmax of ln rho_ik / tau over the `top` largest k,  tau such that mean_i exp(H(rt_i)) = target_perplexity
    w_i = clip(N sum_k rt_ik / (K_live Nt_k), 0.1, 10),   Nt_k = sum_i rt_ik,  K_live: components with Nt_k > 0

Source: our own. The perplexity is that of the labels as they are stored, after the cut to `top`, not before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from trainer.clustering.bayesian_mixture import Mixture

DRIFTED = 0.5  # nats per row by which a fresh mixture has to beat a warm one
FEWEST_MEMBERS, LEAST_SHARE = 5.0, 0.1  # a component with less than either, the share being of N / K, is pruned
ROUNDS = 2  # of M- and E-step after pruning
LEAST_WEIGHT, MOST_WEIGHT = 0.1, 10.0
COLDEST, HOTTEST = 1e-9, 1e9  # temperatures; beyond, labels are one-hot or uniform for any ln rho that occurs
CLOSE = 1e-3  # relative error of the perplexity at which the search ends


@dataclass(frozen=True)
class Pruned:
    """`mixture` of the components `kept` (K_eff,), ids of the old one; `residual` (M,): rows that were most likely in one of `dropped`.

    The `elbo` of a mixture that lost components starts anew.
    """

    mixture: Mixture
    kept: Tensor
    dropped: Tensor
    residual: Tensor


@dataclass(frozen=True)
class SoftLabels:
    """`ids` (N, m) int32, most likely first; `weights` (N, m) float32, rows sum to 1; `tau`; the mean `perplexity` it gives."""

    ids: Tensor
    weights: Tensor
    tau: float
    perplexity: float

    def dense(self, n_components: int) -> Tensor:
        """Weights (N, K), 0 where nothing is stored."""
        wide = self.weights.new_zeros(len(self.ids), n_components)
        return wide.scatter_(1, self.ids.long(), self.weights)


def prune(mixture: Mixture, x: Tensor, fewest: float = FEWEST_MEMBERS, share: float = LEAST_SHARE) -> Pruned:
    """Drops components with N_k < max(fewest, share N / K) and refits the others to x (N, D), the rows that `mixture` was fitted to.

    K is the number that the mixture might have had: with that of the survivors the limit would rise whenever one dies, and take a rare
    kind with it in the end. The largest component always stays. Survivors keep their order.
    """
    limit = max(fewest, share * len(x) / mixture.options.n_components)
    alive = mixture.counts >= limit
    alive[mixture.counts.argmax()] = True
    kept, dropped = torch.nonzero(alive)[:, 0], torch.nonzero(~alive)[:, 0]
    if not len(dropped):
        return Pruned(mixture, kept, dropped, dropped)
    residual = torch.nonzero(~alive[mixture.log_rho(x).argmax(1)])[:, 0]
    return Pruned(mixture.restricted(kept, x, ROUNDS), kept, dropped, residual)


def drift(warm: Mixture, fresh: Mixture, held_out: Tensor) -> float:
    """Nats per row by which `fresh` explains the rows `held_out` (N, D) better; above DRIFTED, fit afresh to all rows."""
    return fresh.mean_log_likelihood(held_out) - warm.mean_log_likelihood(held_out)


def temper(log_rho: Tensor, target_perplexity: float = 2.0, top: int = 5) -> SoftLabels:
    """Soft labels of log-responsibilities (N, K), as flat on average as the target asks.

    tau falls below 1 where they are too flat already. With m = min(top, K) components to a row no more than m can be reached, and that
    only by uniform labels, which teach nothing: the target is at most (1 + m) / 2. Rows whose largest are equal cannot be sharpened.

    Raises:
        ValueError: a target below 1, no component to keep, or log-responsibilities that are not finite.
    """
    if not target_perplexity >= 1 or top < 1:
        raise ValueError(f"target_perplexity is {target_perplexity} and top {top}, expected 1 or more of both")
    if not log_rho.isfinite().all():
        raise ValueError(
            f"log_rho {tuple(log_rho.shape)} has values that are not finite, expected those of a fitted mixture"
        )
    values, ids = log_rho.detach().double().topk(min(top, log_rho.shape[1]), dim=1)
    target = min(target_perplexity, (1 + values.shape[1]) / 2)
    tau = _bisect(lambda at: _mean_perplexity(values, at), target)
    return SoftLabels(ids.int(), (values / tau).softmax(1).float(), tau, _mean_perplexity(values, tau))


def balancing_weights(labels: SoftLabels, n_components: int) -> Tensor:
    """Weights (N,) of the rows in a loss, such that every live component counts alike; their mean is 1 before they are clipped."""
    flat, weights = labels.ids.long().flatten(), labels.weights.double()
    mass = weights.new_zeros(n_components).index_add_(0, flat, weights.flatten())
    share = torch.where(mass > 0, 1 / mass, 0)[labels.ids.long()]
    balanced = (weights * share).sum(1) * len(weights) / (mass > 0).sum()
    return balanced.clamp(LEAST_WEIGHT, MOST_WEIGHT).float()


def perplexity(r: Tensor) -> Tensor:
    """Exponential of the entropy (N,) of each row of r (N, K)."""
    return torch.special.entr(r).sum(1).exp()


def _mean_perplexity(values: Tensor, tau: float) -> float:
    return float(perplexity((values / tau).softmax(1)).mean())


def _bisect(rising: Callable[[float], float], target: float) -> float:
    """The temperature at which `rising` meets the target; COLDEST or HOTTEST where it does not."""
    low = high = 1.0
    while rising(low) > target and low > COLDEST:
        low /= 4
    while rising(high) < target and high < HOTTEST:
        high *= 4
    while high / low > 1 + CLOSE**2:
        middle = sqrt(low * high)
        found = rising(middle)
        if abs(found / target - 1) < CLOSE:
            return middle
        low, high = (middle, high) if found < target else (low, middle)
    return sqrt(low * high)
