"""Latent Cluster Correction: supervised fine-tuning that also pulls samples out of communities which another class owns; `method.name: lcc`.

Source: Ho Thanh, "Latent Cluster Correction", 2025, arXiv 2501.11919, and the author's code; clustering/{communities, ownership,
representatives}.py hold the pieces. Before every epoch from `warmup_epochs` on, for each layer:
    kNN graph of the features -> Leiden or Louvain communities -> owner class of each -> bank of well placed samples
    L = CE + weight mean over layers and misclustered u of min_b |u - t_b(u)| / sqrt(D)
`arm` holds what it has to beat: `cross_entropy` alone, or `same_class`, the same pull without communities (the author's published code
mixes up sample ids, and then amounts to that). Differs from it: one order of samples everywhere; layers pooled and normalised; the
resolution is tuned until classes own communities; the pull is held below `max_pull` of the cross-entropy's gradient; samples that look
mislabelled are not pulled.
What ships: the mean of the well placed samples of each community of the last features, named by its owner.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from trainer import ranks
from trainer.cluster_names import class_names
from trainer.clustering.communities import CommunityOptions, Tuned, find_communities, neighbour_edges, tune_resolution
from trainer.clustering.kmeans import cluster_means
from trainer.clustering.neighbours import neighbours_within
from trainer.clustering.ownership import Ownership, OwnershipOptions, decide_owners
from trainer.clustering.representatives import (
    Bank,
    MisclusteredRounds,
    RepresentativeOptions,
    build_bank,
    build_same_class_bank,
    suspected_mislabels,
)
from trainer.errors import DataError
from trainer.feature_store import FeatureStore
from trainer.layer_tap import FEATURES, LayerTap, row_of
from trainer.learner import SCRATCH, Learner
from trainer.methods.base import MethodSettings
from trainer.methods.head import head_state, load_head, own_draws
from trainer.methods.staged import StagedMethod, StagedSettings
from trainer.stage import EpochReport, OptimizerSettings, figures_of, figures_state
from trainer.whole_file import save_tensors, write_whole

LOG = "communities.jsonl"
CLASSIFIER = "classifier.safetensors"
MAX_REVIEW = 1000  # rows of review.csv


class LCCSettings(StagedSettings):
    """`n_clusters`: at most so many ship; every class's largest community first. `neighbours` of the graph, and of a target with `target: nearest`.

    `representatives` per community with `target: random`. `vote: normalised` lets rare classes own communities. `layers`: `features`, or
    names of the encoder's submodules.
    """

    name: Literal["lcc"] = "lcc"
    n_clusters: int = Field(100, ge=1, description="the most clusters that may ship, an integer >= 1")
    epochs: int = Field(50, ge=1)
    arm: Literal["lcc", "cross_entropy", "same_class"] = "lcc"
    weight: float = Field(0.01, ge=0)
    layers: tuple[str, ...] = Field((FEATURES,), min_length=1)
    neighbours: int = Field(5, ge=1)
    target: Literal["random", "nearest"] = "random"
    representatives: int = Field(100, ge=1)
    warmup_epochs: int = Field(1, ge=0)
    every_epochs: int = Field(1, ge=1)
    communities: Literal["leiden", "louvain"] = "leiden"
    resolution: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    vote: Literal["majority", "normalised"] = "majority"
    min_correct: int = Field(5, ge=1)
    max_pull: float = Field(0.5, gt=0)
    optimizer: OptimizerSettings = OptimizerSettings(kind="sgd", lr=0.01)


class LCC(StagedMethod):
    """`banks`: one per layer, of the last clustering; empty before it. `rounds` (N,): how often in a row each sample was misclustered."""

    Settings: ClassVar[type[MethodSettings]] = LCCSettings
    title = "Latent Cluster Correction: supervised, communities of the features (Ho Thanh 2025)"
    settings: LCCSettings
    is_supervised = True
    finds_clusters = True

    def __init__(self, settings: LCCSettings, learner: Learner, batch_size: int) -> None:
        super().__init__(settings, learner, batch_size)
        self.need_trainable()
        self.epochs = settings.epochs
        given = learner.need_classes(
            "method.name is lcc", "sort the images into one folder per class, or use an unsupervised method"
        )
        self.y, self.classes = given.labels.to(learner.device), given.classes
        self.refuse_learned_projection()
        if ranks.current().are_many and settings.layers != (FEATURES,):
            raise DataError(
                f"method.layers is {', '.join(settings.layers)}, but of several processes each sees those layers of its own samples alone; "
                f"expected {FEATURES}, or one process"
            )
        self.tap = LayerTap(
            learner.model.encoder, settings.layers, "method.layers", lambda: next(learner.feature_batches())
        )
        with own_draws(learner.seed):
            self.head = nn.Linear(learner.model.encoder.out_dim, len(self.classes)).to(learner.device)
        self.rounds = [MisclusteredRounds(len(learner)) for _ in settings.layers]
        self.banks: list[Bank] = []
        self._sources: list[dict[str, Tensor]] = []  # what the banks were built from, for a checkpoint
        self._figures: dict[str, float] = {}
        self._pulls: list[float] = []
        self.owners: list[int] = []
        self._unshipped: list[int] = []
        self._fits = True
        self._review: list[tuple[int, str]] = []

    def init_centroids(self) -> None:
        """None before the end: they come from communities of the learned features."""

    def parameters(self) -> list[nn.Parameter]:
        return [*super().parameters(), *self.head.parameters()]

    def loss(self, index: Tensor) -> Tensor:
        """Cross-entropy of the labelled samples, and the pull of the misclustered ones."""
        y = self.y[index]
        if not self.banks:
            return _cross_entropy(self.head(self.learner.features(index)), y)
        with self.tap.listening():
            features = self.learner.features(index)
            outputs = self.tap.outputs(features)
        ce = _cross_entropy(self.head(features), y)
        pulls = [bank.loss(row_of(output), index) for bank, output in zip(self.banks, outputs, strict=True)]
        self._pulls.append(sum(float(pull.detach()) for pull in pulls))
        parts = [self._held(pull, ce, output) for pull, output in zip(pulls, outputs, strict=True)]
        return ce + self.settings.weight * torch.stack(parts).mean()

    def _held(self, pull: Tensor, ce: Tensor, output: Tensor) -> Tensor:
        """`pull`, scaled down where its gradient at the layer's `output` is more than `max_pull` of the cross-entropy's."""
        if float(pull.detach()) == 0.0:
            return pull
        of_ce, of_pull = (
            torch.autograd.grad(cost, output, retain_graph=True, allow_unused=True)[0] for cost in (ce, pull)
        )
        if of_ce is None or of_pull is None:
            return pull
        limit = self.settings.max_pull * float(of_ce.norm())
        size = self.settings.weight * float(of_pull.norm()) / len(self.banks)
        return pull * (limit / size) if size > limit else pull

    @torch.no_grad()
    def before_epoch(self, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        options = self.settings
        if options.arm == "cross_entropy" or epoch < options.warmup_epochs or epoch % options.every_epochs:
            return
        layers, features = self._layer_rows()
        predicted = self.head(features).softmax(1).max(1)
        self.banks, self._sources, logged = [], [], []
        for number, rows in enumerate(layers):
            layer = options.layers[number]
            if options.arm == "same_class":
                source = {
                    "features": rows,
                    "communities": self.y,
                    "skipped": torch.zeros_like(self.y, dtype=torch.bool),
                }
            else:
                tuned = self._communities(rows, epoch)
                ownership = self._owners(tuned.communities)
                skipped = self.rounds[number].advance(ownership, predicted.indices, predicted.values)
                source = {"features": rows, "communities": tuned.communities, "skipped": skipped}
            self._sources.append(source | {"seed": torch.tensor(self.learner.seed + epoch)})
            self.banks.append(self._bank(self._sources[-1]))
            if options.arm == "lcc":
                logged.append(self._account(tuned, ownership, self.banks[-1], layer))
        self._log(epoch, logged)

    def _layer_rows(self) -> tuple[list[Tensor], Tensor]:
        """Rows (N, D) of each layer for the images as they are, and the encoder's features (N, F)."""
        folder, n = self.learner.options.folder, len(self.learner)
        stores: list[FeatureStore] = []
        features = []
        with self.tap.listening():
            for index, batch in self.learner.feature_batches():
                found = self.tap.rows(batch)
                for number, rows in enumerate(found[len(stores) :], len(stores)):
                    path = None if folder is None else folder / SCRATCH / f"layer{number}.f32"
                    stores.append(FeatureStore(n, rows.shape[1], path))
                for store, rows in zip(stores, found, strict=True):
                    store.write(index, rows)
                features.append(batch)
        # Off the file: the next pass would write into what the banks hold.
        return [store.whole().clone().to(self.learner.device) for store in stores], torch.cat(features)

    def _communities(self, rows: Tensor, epoch: int) -> Tuned:
        options = self.settings
        edges = neighbour_edges(neighbours_within(rows, options.neighbours).ids).cpu()  # where they are looked for
        resolution = 1.0 if options.resolution == "auto" else options.resolution
        how = CommunityOptions(options.communities, resolution, self.learner.seed + epoch)

        def found() -> Tuned:
            if options.resolution == "auto":
                return tune_resolution(edges, self.y.cpu(), how, vote=self._vote())
            return Tuned(find_communities(edges, len(self.y), how), how.resolution, True, ())

        tuned = ranks.current().same(found)  # of several processes, the first one looks for them
        return replace(tuned, communities=tuned.communities.to(self.learner.device))

    def _vote(self) -> OwnershipOptions:
        return OwnershipOptions(self.settings.vote, self.settings.min_correct)

    def _owners(self, communities: Tensor) -> Ownership:
        return decide_owners(self.y, communities, self._vote())

    def _bank(self, source: dict[str, Tensor]) -> Bank:
        options = self.settings
        how = RepresentativeOptions(options.target, options.neighbours, options.representatives, int(source["seed"]))
        if options.arm == "same_class":
            return build_same_class_bank(source["features"], self.y, how)
        return build_bank(source["features"], self._owners(source["communities"]), how, skipped=source["skipped"])

    def _account(self, tuned: Tuned, ownership: Ownership, bank: Bank, layer: str) -> dict[str, object]:
        """What communities.jsonl says of one layer."""
        count = len(self.classes)
        sizes, owned, correct = (
            torch.bincount(classes[classes >= 0], minlength=count)
            for classes in (self.y, ownership.owners, self.y[ownership.correct])
        )
        representatives = nn.functional.pad(bank.share(), (0, count - len(bank.share())))
        prefix = "" if len(self.settings.layers) == 1 else f"{layer}."
        self._figures |= {f"{prefix}{key}": value for key, value in ownership.figures().items()}
        per_class = {
            name: {
                "n": int(sizes[a]),
                "well_placed": round(float(correct[a] / sizes[a].clamp_min(1)), 4),
                "representatives": round(float(representatives[a]), 4),
                "communities": int(owned[a]),
            }
            for a, name in enumerate(self.classes)
        }
        return {"layer": layer, "resolution": tuned.resolution, "fits": tuned.fit, "classes": per_class}

    def _log(self, epoch: int, layers: list[dict[str, object]]) -> None:
        folder = self.learner.options.folder
        if folder is None or not layers:
            return
        path = folder / LOG
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
        # A run that was killed and resumed has been further, as has one that was here before.
        rows = [row for row in rows if row["epoch"] < epoch]
        write_whole(path, "".join(json.dumps(row) + "\n" for row in [*rows, {"epoch": epoch, "layers": layers}]))

    def after_epoch(self, epoch: int) -> EpochReport:
        pull = {"pull": sum(self._pulls) / len(self._pulls)} if self._pulls else {}
        self._pulls.clear()
        return EpochReport({**self._figures, **pull})

    @torch.no_grad()
    def end(self) -> None:
        """Communities of the learned features, whose well placed members' means are the centroids."""
        learner, model = self.learner, self.learner.model
        features = learner.all_features()
        model.projection.fit(features, min(self.settings.n_clusters, len(features)), learner.seed)
        last = row_of(features)
        tuned = self._communities(last, self.epochs)
        self._fits = tuned.fit
        ownership = self._owners(tuned.communities)
        self._suspect(ownership, last)
        counts = torch.bincount(ownership.communities[ownership.correct], minlength=len(ownership.owners))
        shipped = shipped_communities(counts, ownership.owners, self.settings.n_clusters, self.settings.min_correct)
        z = learner.all_latents()
        means = cluster_means(z[ownership.correct], ownership.communities[ownership.correct], len(counts))
        model.set_centroids(means[shipped])
        self.owners = ownership.owners[shipped].tolist()
        self._unshipped = sorted(set(ownership.owners[ownership.owners >= 0].tolist()) - set(self.owners))
        if learner.options.folder is not None:
            tensors = {"weight": self.head.weight.detach(), "bias": self.head.bias.detach()}
            save_tensors(learner.options.folder / CLASSIFIER, tensors, {"classes": json.dumps(self.classes)})

    def _suspect(self, ownership: Ownership, rows: Tensor) -> None:
        found = suspected_mislabels(build_bank(rows, ownership), ownership, rows)
        columns = zip(found.ids.tolist(), found.classes.tolist(), found.owner_classes.tolist(), strict=True)
        self._review = [
            (n, f"labelled {self.classes[a]}, lies among {self.classes[owner]}")
            for n, a, owner in columns
            if owner >= 0
        ][:MAX_REVIEW]

    def review(self) -> list[tuple[int, str]]:
        return self._review

    def cluster_names(self) -> list[str]:
        return class_names(self.owners, self.classes)

    def warnings(self) -> list[str]:
        present = torch.unique(self.y[self.y >= 0]).tolist()
        nothing = [self.classes[a] for a in present if a not in self.owners and a not in self._unshipped]
        found = []
        if not self._fits:
            found.append(
                f"no method.resolution gave communities that fit the {len(present)} classes (as many as classes, at most ten times as many, "
                f"nearly every class owning one): what they say of misclustered images is worth little; try more method.neighbours"
            )
        if nothing:
            found.append(
                f"{len(nothing)} of {len(present)} classes own no community and have no cluster: {', '.join(nothing[:10])}; their parts will "
                f"be given to others: use method.vote: normalised, or more images of them"
            )
        if self._unshipped:
            found.append(
                f"method.n_clusters is {self.settings.n_clusters}, fewer than there are classes: no cluster is left for "
                f"{', '.join(self.classes[a] for a in self._unshipped[:10])}; use more"
            )
        return found

    def state(self) -> dict[str, Tensor]:
        state = head_state(self.head)
        state |= {f"rounds.{n}": rounds.rounds for n, rounds in enumerate(self.rounds)}
        for n, source in enumerate(self._sources):
            state |= {f"source.{n}.{key}": value.clone() for key, value in source.items()}
        return state | figures_state(self._figures)

    def load_state(self, state: dict[str, Tensor]) -> None:
        load_head(self.head, state)
        self._figures = figures_of(state)
        for n, rounds in enumerate(self.rounds):
            rounds.rounds = state[f"rounds.{n}"]
        sources: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            if key.startswith("source."):
                _, number, name = key.split(".")
                sources.setdefault(int(number), {})[name] = value.to(self.learner.device)
        self._sources = [sources[n] for n in sorted(sources)]
        self.banks = [self._bank(source) for source in self._sources]


def shipped_communities(counts: Tensor, owners: Tensor, most: int, min_correct: int) -> Tensor:
    """The communities (K,) whose means ship: the largest of every class first, then others with enough well placed samples, by size.

    Args:
        counts: (communities,) well placed samples of each; `owners`: the class of each, -1: none.
    """
    by_size = [
        b for b in torch.argsort(counts, descending=True, stable=True).tolist() if counts[b] > 0 and owners[b] >= 0
    ]
    largest = [b for n, b in enumerate(by_size) if owners[b] not in owners[by_size[:n]]]
    others = [b for b in by_size if b not in largest and counts[b] >= min_correct]
    return torch.tensor((largest + others)[:most], device=counts.device)


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Mean over the labelled samples of logits (B, C); 0, still in the graph, where there are none."""
    known = y >= 0
    return nn.functional.cross_entropy(logits, y, ignore_index=-1, reduction="sum") / known.sum().clamp_min(1)
