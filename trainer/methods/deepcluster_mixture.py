"""DeepCluster with a variational mixture of Gaussians in k-means' place; `method.name: deepcluster_mixture`.

Sources: Caron et al. 2018 (arXiv 1807.05520) for the loop; clustering/bayesian_mixture.py and clustering/soft_labels.py for the mixture
and its labels. The combination is ours: no paper, no published figures. Every `relabel_every_epochs`:
1. features of the images as they are, projected (PCA fitted anew, variances divided out);
2. variational Bayes from the last responsibilities (or afresh), which empties components; those too small are dropped;
3. tempered responsibilities become soft labels rt:  L = -mean_i w_i sum_k rt_ik ln softmax(W relu(encoder(aug(x_i))) + b)_k
`n_clusters` is the most components to start from: the method finds how many there are. What is warm is the images' responsibilities, not
the parameters: they are tied to images, while the features' coordinates turn with every fit of the PCA. Components never revive, so
every `fresh_every`-th clustering starts afresh, as does one that a fresh mixture beats on the same rows.
"""

from __future__ import annotations

from dataclasses import replace
from enum import IntEnum
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from trainer.clustering.bayesian_mixture import Mixture, MixtureOptions, Reuse, fit_mixture
from trainer.clustering.boundary import fit_boundary
from trainer.clustering.kmeans import distinct_rows
from trainer.clustering.mixture_state import mixture_from, mixture_state
from trainer.clustering.soft_labels import DRIFTED, Pruned, SoftLabels, balancing_weights, drift, prune, temper
from trainer.distance import nearest
from trainer.errors import CollapseError, DataError
from trainer.learner import Learner
from trainer.methods.head import LinearHead, head_state, load_head, own_draws
from trainer.methods.pseudo_label import PseudoLabelMethod, PseudoLabelSettings
from trainer.samplers import soft_balanced

GROWTH = 4  # times n_clusters: as far as the number of components may double
DRIFT_ROWS = 5000  # a fresh mixture of as many rows is compared with the warm one, on as many others
SAME_COMPONENT = 0.3  # of a new component's mass, that an old one must share to hand its row of the head down
LARGEST_SHARE = 0.9
MAX_ALARMS = 3  # in a row
MIN_AGREEMENT = 0.95
PULL = 0.01  # of the centroids towards the means, where the means alone answer otherwise than the mixture
MANY_DIMENSIONS = 64  # there, responsibilities are one-hot and a component per handful of images pays


class Count(IntEnum):
    """Places in `counters`."""

    SIZE = 0  # components that a fresh mixture starts from
    DONE = 1  # clusterings
    ALARMS = 2  # in a row
    HALVINGS = 3  # of the spread
    GROW = 4  # whether SIZE has been doubled since the last fresh mixture


class DeepClusterMixtureSettings(PseudoLabelSettings):
    """`warm`: what the next clustering starts from. `posterior` keeps the first projection and makes the old posterior the prior.

    `memory`: the share of its counts that the old posterior then has.
    """

    name: Literal["deepcluster_mixture"] = "deepcluster_mixture"
    relabel_every_epochs: int = Field(3, ge=1)
    warm: Literal["responsibilities", "posterior", "fresh"] = "responsibilities"
    memory: float = Field(0.1, ge=0, le=0.3)
    fresh_every: int = Field(5, ge=1, description="clusterings")
    weights: Literal["dirichlet", "sticks"] = "dirichlet"
    covariance: Literal["diag", "full"] = "diag"
    spread: float = Field(
        0.5, gt=0, description="prior variance of a component, as a share of all; smaller: more, tighter ones"
    )
    perplexity: float = Field(2.0, ge=1, description="components per soft label")
    labels_per_image: int = Field(5, ge=1)
    balance: Literal["weights", "sampler", "none"] = "weights"

    @model_validator(mode="after")
    def _labels_hold_that_many(self) -> DeepClusterMixtureSettings:
        most = (1 + self.labels_per_image) / 2
        if self.perplexity > most:
            raise ValueError(
                f"perplexity is {self.perplexity:g} with labels_per_image {self.labels_per_image}, expected at most {most:g} (half-way to "
                f"labels that say nothing)"
            )
        return self


class DeepClusterMixture(PseudoLabelMethod):
    """State per image: components `label_ids` (N, m), their tempered weights `label_weights` and `responsibilities` as fitted; `balance_weights` (N,).

    `head_rows` (K,): the head's row of each component. The head has room for `capacity` of them; the others are masked.
    """

    Settings = DeepClusterMixtureSettings
    title = "DeepCluster with a variational Gaussian mixture that finds how many clusters there are"
    settings: DeepClusterMixtureSettings
    needs_filled = False  # most parts are good: one component may hold nearly all, and has a limit of its own
    kept: ClassVar[tuple[str, ...]] = (
        "ids",
        "spread",
        "label_ids",
        "label_weights",
        "responsibilities",
        "balance_weights",
        "head_rows",
        "counters",
    )

    def __init__(self, settings: DeepClusterMixtureSettings, learner: Learner, batch_size: int) -> None:
        super().__init__(settings, learner, batch_size)
        if learner.model.projection.settings.l2:
            raise DataError(
                "projection.l2 is true, but method deepcluster_mixture fits Gaussians, which a sphere is not; expected l2: false, "
                "best with projection: {kind: pca, dim: 24, whiten: 0.5}"
            )
        self.capacity = max(settings.n_clusters, min(GROWTH * settings.n_clusters, len(learner) // 5))
        with own_draws(learner.seed):
            self.head = LinearHead(learner.model.encoder.out_dim, self.capacity).to(learner.device)
        n, device = len(learner), learner.device
        self.label_ids = torch.zeros(n, 0, dtype=torch.int64, device=device)
        self.label_weights = torch.zeros(n, 0, device=device)
        self.responsibilities = torch.zeros(n, 0, device=device)
        self.balance_weights = torch.ones(n, device=device)
        self.head_rows = torch.arange(settings.n_clusters, device=device)
        self.counters = torch.zeros(len(Count), dtype=torch.int64)
        self.counters[Count.SIZE] = settings.n_clusters
        self._posterior: Mixture | None = None
        self._residual: list[int] = []
        self._result: dict[str, float] = {}

    def renewed(self) -> list[nn.Parameter]:
        return list(self.head.parameters())

    @torch.no_grad()
    def relabel(self, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        z = self._project(epoch)
        pruned, kept_rows, is_fresh = self._mixture(z, epoch)
        mixture = pruned.mixture
        if _says_nothing(mixture):
            self._alarm(mixture)
            return
        log_rho = mixture.log_rho(z)
        if is_fresh:
            kept_rows, new = self._rows_of(log_rho.softmax(1))
            self.head.renew(optimizer, new)
            self._grow(mixture.n_components)
        self.counters[Count.ALARMS] = 0
        self.counters[Count.DONE] += 1
        soft = temper(log_rho, self.settings.perplexity, self.settings.labels_per_image)
        self._take(soft, log_rho, kept_rows)
        self._posterior, self._residual = mixture, pruned.residual.tolist()
        figures = {"components": float(mixture.n_components), "perplexity": soft.perplexity, "elbo": mixture.elbo[-1]}
        self.note(log_rho.argmax(1), mixture.n_components, epoch, {**figures, "fresh": float(is_fresh)})

    def _project(self, epoch: int) -> Tensor:
        """Embeddings (N, D) of the features as they are now; posterior needs the first projection, the others fit their own."""
        model, device = self.learner.model, self.learner.device
        features = self.learner.stored_features("features").whole().to(device)
        self.watch(features, epoch)
        if self.settings.warm != "posterior" or int(self.counters[Count.DONE]) == 0:
            model.projection.fit(features, self.settings.n_clusters, self.learner.seed)
        return torch.cat([model.projection(part) for part in features.split(8192)])

    def _options(self, size: int) -> MixtureOptions:
        spread = self.settings.spread / 2 ** int(self.counters[Count.HALVINGS])
        return MixtureOptions(size, self.settings.weights, self.settings.covariance, spread=spread)

    def _mixture(self, z: Tensor, epoch: int) -> tuple[Pruned, Tensor, bool]:
        """The pruned mixture of z (N, D), the head's rows of its components if it is warm, and whether it started afresh."""
        size, done, grows = (int(self.counters[n]) for n in (Count.SIZE, Count.DONE, Count.GROW))
        if self.settings.warm == "fresh" or done % self.settings.fresh_every == 0 or grows:
            return self._fresh(z, size, epoch), self.head_rows, True
        held = SoftLabels(self.label_ids, self.responsibilities, 1.0, 1.0).dense(len(self.head_rows)).double()
        reuse = None
        if self.settings.warm == "posterior" and self._posterior is not None:
            reuse = Reuse(self._posterior, self.settings.memory)
        warm = fit_mixture(z, self._options(size), self.learner.seed, responsibilities=held, reuse=reuse)
        if self._has_drifted(warm, z, size, epoch):
            return self._fresh(z, size, epoch), self.head_rows, True
        pruned = prune(warm, z)
        return pruned, self.head_rows[pruned.kept], False

    def _fresh(self, z: Tensor, size: int, epoch: int) -> Pruned:
        size = min(size, distinct_rows(z, size))  # pictures that repeat cannot be told apart
        return prune(fit_mixture(z, self._options(size), self.learner.seed + epoch), z)

    def _grow(self, found: int) -> None:
        """Twice as many components next time, and afresh, where none of them died."""
        hit = found == int(self.counters[Count.SIZE]) < self.capacity
        self.counters[Count.GROW] = int(hit)
        if hit:
            self.counters[Count.SIZE] = min(2 * found, self.capacity)

    def _has_drifted(self, warm: Mixture, z: Tensor, size: int, epoch: int) -> bool:
        """Whether a fresh mixture of some rows explains others better than the warm one, by half a nat."""
        order = torch.randperm(len(z), generator=torch.Generator().manual_seed(self.learner.seed + epoch)).to(z.device)
        half = min(DRIFT_ROWS, len(z) // 2)
        if half < 2 * size:
            return False  # too few rows to say
        once = replace(self._options(size), restarts=1)
        fresh = fit_mixture(z[order[:half]], once, self.learner.seed + epoch)
        return drift(warm, fresh, z[order[half : 2 * half]]) > DRIFTED

    def _rows_of(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """The head's row (K,) of each component of a fresh mixture with responsibilities r (N, K), and the mask (capacity,) of rows that start anew.

        A component takes the row of the old one that shares enough of its images, else a free one.
        """
        k = r.shape[1]
        fresh = torch.ones(self.capacity, dtype=torch.bool)
        rows = torch.full((k,), -1)
        if int(self.counters[Count.DONE]):
            old = SoftLabels(self.label_ids, self.responsibilities, 1.0, 1.0).dense(len(self.head_rows)).double()
            shared = (old.T @ r).cpu().numpy()
            for before, now in zip(*linear_sum_assignment(-shared), strict=True):
                if shared[before, now] >= SAME_COMPONENT * float(r[:, now].sum()):
                    rows[now] = int(self.head_rows[before])
                    fresh[rows[now]] = False
        free = torch.nonzero(fresh)[:, 0]
        rows[rows < 0] = free[: int((rows < 0).sum())]
        return rows.to(r.device), fresh

    def _take(self, soft: SoftLabels, log_rho: Tensor, rows: Tensor) -> None:
        """Keeps the labels, tempered and as fitted, and which rows of the head they speak of."""
        self.label_ids, self.label_weights = soft.ids.long(), soft.weights
        self.responsibilities = log_rho.gather(1, self.label_ids).softmax(1).float()
        self.head_rows = rows
        balanced = self.settings.balance == "weights"
        self.balance_weights = (
            balancing_weights(soft, len(rows)) if balanced else torch.ones(len(self.learner), device=log_rho.device)
        )

    def _alarm(self, mixture: Mixture) -> None:
        """A mixture that says nothing: the labels stay, the next one is tighter.

        Raises:
            CollapseError: there are no labels yet, or it says nothing for the third time.
        """
        self.counters[Count.ALARMS] += 1
        self.counters[Count.HALVINGS] += 1
        alarms = int(self.counters[Count.ALARMS])
        self._figures = {**self._figures, "components": float(mixture.n_components), "alarm": float(alarms)}
        if int(self.counters[Count.DONE]) == 0 or alarms >= MAX_ALARMS:
            raise self._collapse(mixture)

    def _collapse(self, mixture: Mixture) -> CollapseError:
        share = float(mixture.counts.max() / mixture.counts.sum())
        return CollapseError(
            "guard components",
            f"the mixture kept {mixture.n_components} component(s), the largest with {share:.0%} of the images; lower method.spread (now "
            f"{self.settings.spread:g}), start from a better encoder (pretrain), or project to fewer dimensions",
        )

    def order(self, generator: torch.Generator) -> Tensor:
        if self.settings.balance != "sampler":
            return super().order(generator)
        return soft_balanced(self.label_ids, self.label_weights, len(self.head_rows), generator)

    def loss(self, index: Tensor) -> Tensor:
        """Cross-entropy with the soft labels, over the components that live."""
        logits = self.head(self.learner.features(index))[:, self.head_rows]
        log_share = torch.log_softmax(logits, 1).gather(1, self.label_ids[index])
        cost = -(self.label_weights[index] * log_share).sum(1)
        return (self.balance_weights[index] * cost).mean()

    @torch.no_grad()
    def end(self) -> None:
        """A last mixture on the learned features; its means, or centroids that answer more like it, are what ships.

        Raises:
            CollapseError: it keeps one component; the checkpoint is of before.
        """
        z = self._project(self.epochs)
        pruned, _, _ = self._mixture(z, self.epochs)
        if _says_nothing(pruned.mixture):
            raise self._collapse(pruned.mixture)
        self._residual = pruned.residual.tolist()
        said = pruned.mixture.log_rho(z).argmax(1)
        means = pruned.mixture.means.to(z.dtype)
        has_members = torch.bincount(said, minlength=len(means)) > 0
        learned = torch.where(has_members[:, None], fit_boundary(z, said, len(means), PULL), means)
        by_means, by_learned = (float((nearest(z, mu)[0] == said).double().mean()) for mu in (means, learned))
        self.learner.model.set_centroids(means if by_means >= MIN_AGREEMENT or by_means >= by_learned else learned)
        self._result = {
            "components": float(len(means)),
            "agreement": by_means if by_means >= MIN_AGREEMENT else max(by_means, by_learned),
            "agreement_means": by_means,
        }

    def figures(self) -> dict[str, float]:
        """`agreement` of the nearest centroid with the most responsible component; `agreement_means` with component means as centroids."""
        return dict(self._result)

    def review(self) -> list[tuple[int, str]]:
        return [(n, "in a component of too few images to be a cluster") for n in self._residual]

    def refusal(self) -> str | None:
        agreement = self._result.get("agreement", 1.0)
        if agreement >= MIN_AGREEMENT:
            return None
        return (
            f"the nearest centroid is that of the most responsible component for only {agreement:.1%} of the images, expected at least "
            f"{MIN_AGREEMENT:.0%}; the model on the line would answer otherwise than the mixture: use covariance diag, fewer dimensions "
            f"(projection.dim) or a smaller method.spread"
        )

    def warnings(self) -> list[str]:
        dim = self.learner.model.projection.out_dim
        refusal = [self.refusal() or ""]
        if dim > MANY_DIMENSIONS:
            refusal.append(
                f"method deepcluster_mixture fits Gaussians in {dim} dimensions, where every image belongs to one component alone; "
                f"projection: {{kind: pca, dim: 24, whiten: 0.5}} is a good start"
            )
        return [text for text in refusal if text]

    def state(self) -> dict[str, Tensor]:
        kept = super().state() | head_state(self.head)
        if self.settings.warm == "posterior" and self._posterior is not None:
            kept |= {f"posterior.{key}": value for key, value in mixture_state(self._posterior).items()}
        return kept

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        self.counters = self.counters.cpu()
        load_head(self.head, state)
        posterior = {k.removeprefix("posterior."): v for k, v in state.items() if k.startswith("posterior.")}
        if posterior:
            self._posterior = mixture_from(posterior, self._options(1), self.learner.device)


def _says_nothing(mixture: Mixture) -> bool:
    """Whether one component is left, or one holds nearly all."""
    return mixture.n_components < 2 or float(mixture.counts.max() / mixture.counts.sum()) > LARGEST_SHARE
