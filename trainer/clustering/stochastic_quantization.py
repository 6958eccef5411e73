"""Stochastic quantization: K atoms that represent a stream of embeddings, moved by one look at each of them, in constant memory.

Source: Kozyriev and Norkin, "Robust clustering on high-dimensional data with stochastic quantization", arXiv 2409.02066. In its letters
(xi a sample, y_k an atom, here a centroid mu_k; n_k the hits of atom k so far):

    F(y) = E min_k |xi - y_k|^r,  r >= 1;    k* = argmin_k |xi - y_k|,    g = r |xi - y_k*|^(r-2) (y_k* - xi)
    y_k* <- Proj_Y(y_k* - rho g),            rho_k = rho0 / (1 + n_k / tau)^a,  a in (1/2, 1]

Only the nearest atom moves. r = 2 is k-means (with rho_k = 1 / (2 n_k): running means), r < 2 resists outliers, r > 2 seeks them.
The theorem (rho > 0, sum rho = inf, sum rho^2 < inf, Y convex and compact, independent draws) promises convergence to a connected set
of stationary points, no more; it speaks of optimizer "sgd". What the paper adds: momentum, NAG, AdaGrad, RMSProp, Adam.

Differs from the paper: state is per atom and changes only when that atom is hit (shared state lets one atom's momentum push another);
Adam corrects its bias by 1 - beta^t; a step is capped, s = min(rho r d^(r-2), 1), so that no atom passes its sample, and no optimizer
moves an atom farther than to its farthest hit; Y is a box around a pilot sample; rho0 and tau come from that sample; a batch counts as
its single samples, all compared with the atoms as they were before it; an atom that is hardly ever nearest restarts, at most
`RESTARTS` times, so that the theorem's conditions hold after the last time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from trainer.clustering.engine import build_assign
from trainer.clustering.kmeans import check_distinct, seeding
from trainer.clustering.reservoir import Reservoir
from trainer.distance import nearest
from trainer.errors import DataError

Optimizer = Literal["sgd", "momentum", "nag", "adagrad", "rmsprop", "adam"]
LINEAR = ("sgd", "momentum", "nag")  # their move is proportional to the gradient, so each sample's part can be capped
VELOCITY = ("momentum", "nag", "adam")
SQUARES = ("adagrad", "rmsprop", "adam")
PILOT_STEP = 0.1  # of the way to the sample: the median first step of the automatic rho0
PILOT_ROWS_PER_ATOM = 10  # the least that k-means++ and tau are taken from, where the stream has them
LONGEST_TAU = 30.0  # hits; best of 3, 10, 30, 100 and N / K in one to three passes on small mixtures, sgd, r = 1 to 3
MARGIN = 0.05  # of the pilot's range, on either side of the box
DEAD_RATE = 0.05  # of 1 / K: an atom hit less often is dead
WINDOW = (
    20  # rows per atom over which the hit rate is averaged: 1 / DEAD_RATE, the time in which a dead one expects one hit
)
RESTARTS = 10  # of one atom
SMALL_BATCH, LARGE_BATCH = (
    32,
    1024,
)  # limits of the automatic batch: faster than single rows; small beside the reservoir
TINY = 1e-8  # d^(r-2) at distance 0 with r < 2


@dataclass(frozen=True)
class QuantizationOptions:
    """Letters as in the paper; the default meets the theorem's conditions on step and box.

    `rho0` auto: the median capped step on the pilot is `PILOT_STEP`. `decay` is a; `tau` None: the pilot's rows per atom, at most `LONGEST_TAU`.
    `running_mean` is rho = 1 / (2 n_k) and needs r = 2, sgd and average none.
    `average` divides an atom's gradient over a batch by 1 (every hit counts as a single sample would), by the atom's hits, or by the
    batch size (the paper's expectation). `gamma` is of momentum and NAG, `beta` of RMSProp, `betas` of Adam.
    `batch_size` None: about one row per atom, nearly as single samples.
    `init`: k-means++ on the pilot or random rows of it. The pilot is what first fills the reservoir of `reservoir_size` rows.
    """

    r: float = 2.0
    optimizer: Optimizer = "sgd"
    schedule: Literal["decay", "running_mean"] = "decay"
    rho0: float | Literal["auto"] = "auto"
    decay: float = 0.75
    tau: float | None = None
    gamma: float = 0.9
    beta: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    average: Literal["none", "atom", "batch"] = "none"
    batch_size: int | None = None
    project: bool = True
    reseed: bool = True
    reservoir_size: int = 10_000
    init: Literal["++", "random"] = "++"

    def __post_init__(self) -> None:
        betas = (self.gamma, self.beta, *self.betas)
        rules = {
            "r": (self.r, self.r >= 1, "at least 1"),
            "rho0": (self.rho0, self.rho0 == "auto" or self.rho0 > 0, "auto or more than 0"),
            "decay": (self.decay, 0.5 < self.decay <= 1, "in (0.5, 1]: sum rho must diverge, sum rho^2 must not"),
            "tau": (self.tau, self.tau is None or self.tau > 0, "more than 0"),
            "betas": (betas, all(0 <= beta < 1 for beta in betas), "gamma, beta and both betas in [0, 1)"),
            "eps": (self.eps, self.eps > 0, "more than 0"),
            "batch_size": (self.batch_size, self.batch_size is None or self.batch_size >= 1, "at least 1"),
            "reservoir_size": (self.reservoir_size, self.reservoir_size >= 1, "at least 1"),
        }
        for name, (value, fits, expected) in rules.items():
            if not fits:
                raise ValueError(f"{name} is {value}, expected {expected}")
        if self.schedule == "running_mean" and (self.r, self.optimizer, self.average) != (2, "sgd", "none"):
            found = f"r {self.r:g}, {self.optimizer} and average {self.average}"
            raise ValueError(f"schedule is running_mean with {found}, expected r 2, sgd and average none; use decay")


@dataclass
class Atoms:
    """State per atom, float64: `mu` (K, D) around the frame's centre; `first`, `second` (K, D) moments, (0, D) where unused.

    All (K,): `hits` are rows, `updates` batches that hit it, both since its last start; `rate` the moving share of rows.
    """

    mu: Tensor
    first: Tensor
    second: Tensor
    hits: Tensor
    updates: Tensor
    rate: Tensor
    restarts: Tensor

    @classmethod
    def at(cls, mu: Tensor, optimizer: Optimizer) -> Atoms:
        """Fresh atoms at mu (K, D)."""
        zeros = mu.new_zeros(len(mu))
        first = torch.zeros_like(mu if optimizer in VELOCITY else mu[:0])
        second = torch.zeros_like(mu if optimizer in SQUARES else mu[:0])
        return cls(mu, first, second, zeros, zeros.clone(), zeros + 1 / len(mu), zeros.clone())

    def restart(self, ids: Tensor, mu: Tensor) -> None:
        """Puts the atoms `ids` (n,) at mu (n, D) with empty state."""
        self.mu[ids] = mu
        for zeroed in (self.first, self.second, self.hits, self.updates):
            if len(zeroed):
                zeroed[ids] = 0.0
        self.rate[ids] = 1 / len(self.mu)
        self.restarts[ids] += 1


@dataclass(frozen=True)
class Frame:
    """What the pilot decides, float64: `centre`, and `low`, `high` of the box around it, all (D,); `rho0` and `tau`, single numbers."""

    centre: Tensor
    low: Tensor
    high: Tensor
    rho0: Tensor
    tau: Tensor


class StochasticQuantizer:
    """Learns `n_clusters` atoms from rows (D,), in one order and one pass or many.

    Rows are gathered until the pilot is whole, then learned from in batches of `batch_size`, however many come at a time: the
    same rows in the same order give the same atoms. `seed` decides initial atoms, reservoir and restarts. `init`: (K, D) atoms to start
    from, whose order is kept. All is held on the device of the first rows, or of a loaded state.
    """

    def __init__(
        self, n_clusters: int, seed: int, options: QuantizationOptions | None = None, init: Tensor | None = None
    ) -> None:
        if init is not None and (init.dim() != 2 or len(init) != n_clusters):
            raise DataError(f"the initial atoms are {tuple(init.shape)}, expected ({n_clusters}, D): method.n_clusters")
        self.n_clusters = n_clusters
        self.options = options or QuantizationOptions()
        self._init = init
        self.batch_size = self.options.batch_size or min(max(n_clusters, SMALL_BATCH), LARGE_BATCH)
        self._generator = torch.Generator().manual_seed(seed)
        self._reservoir = Reservoir(max(self.options.reservoir_size, PILOT_ROWS_PER_ATOM * n_clusters))
        self._waiting: list[Tensor] = []  # rows not learned from: until the pilot is whole, then less than one batch
        self._count = 0  # of these rows
        self._frame: Frame | None = None
        self._atoms: Atoms | None = None
        self._since_check = 0

    def partial_fit(self, batch: Tensor) -> Self:
        """Takes rows (B, D), B of any size; up to one batch of them waits for the next call or `finish`.

        Raises:
            DataError: another shape than before, a value that is not finite, or a pilot with fewer distinct rows than atoms.
        """
        self._waiting.append(self._checked(batch))
        self._count += len(batch)
        if self._atoms is None and self._count >= self._reservoir.size:
            self._start(torch.cat(self._waiting)[: self._reservoir.size])
        if self._atoms is not None and self._count >= self.batch_size:
            rows = torch.cat(self._waiting)
            self._count = len(rows) % self.batch_size
            self._waiting = [rows[len(rows) - self._count :].clone()]  # a view would hold all of `rows`
            for part in rows[: len(rows) - self._count].split(self.batch_size):
                self._learn(part)
        return self

    def finish(self) -> Self:
        """Learns from the rows that wait; the stream may go on. A DataError where it had fewer rows than atoms."""
        if self._atoms is None:
            if self._count < (self.n_clusters if self._init is None else 1):
                raise DataError(
                    f"method.n_clusters is {self.n_clusters}, but the stream ended after {self._count} embeddings; use fewer clusters or more images"
                )
            self._start(torch.cat(self._waiting))
        if self._count:
            for part in torch.cat(self._waiting).split(self.batch_size):
                self._learn(part)
        self._waiting, self._count = [], 0
        return self

    def fit(self, x: Tensor, epochs: int = 1, order: Literal["given", "shuffled", "drawn"] = "shuffled") -> Self:
        """Passes over x (N, D) and finishes; errors are those of `partial_fit` and `finish`.

        Args:
            order: of each epoch; `drawn` takes N rows with replacement, as the theorem has it; `given` is the same as a stream of x.
        """
        for _ in range(epochs):
            index = torch.arange(len(x))
            if order == "shuffled":
                index = torch.randperm(len(x), generator=self._generator)
            elif order == "drawn":
                index = torch.randint(len(x), (len(x),), generator=self._generator)
            for part in index.split(self.batch_size):
                self.partial_fit(x[part.to(x.device)])
        return self.finish()

    @property
    def centroids(self) -> Tensor:
        """The atoms (K, D), float32, without the rows that still wait; a DataError before enough rows came to start."""
        atoms, frame = self._started()
        return (atoms.mu + frame.centre).float()

    @property
    def sample(self) -> Tensor:
        """A uniform sample (n, D) of the rows learned from, n at most the reservoir's size; `objective(sample)` is F's trace."""
        return self._reservoir.rows

    def predict(self, x: Tensor) -> Tensor:
        """Index (N,) of the nearest atom of x (N, D)."""
        return nearest(x, self.centroids)[0]

    def objective(self, x: Tensor) -> float:
        """F on x (N, D): the mean of min_k |x - y_k|^r."""
        return float(nearest(x, self.centroids)[1].double().pow(self.options.r / 2).mean())

    def state(self) -> dict[str, Tensor]:
        """All that `load_state` of a quantizer with the same arguments needs to continue as if there had been no stop."""
        found = {"generator": self._generator.get_state(), "since_check": torch.tensor(self._since_check)}
        found |= {f"reservoir.{name}": value for name, value in self._reservoir.state().items()}
        if self._count:
            found["waiting"] = torch.cat(self._waiting).clone()
        for part, holder in (("frame", self._frame), ("atoms", self._atoms)):
            if holder is not None:
                found |= {f"{part}.{name}": value.clone() for name, value in vars(holder).items()}
        return found

    def load_state(self, state: dict[str, Tensor]) -> Self:
        """Continues from `state`, which stays as it is; a DataError where it is of another K or kind of optimizer."""
        held: dict[str, dict[str, Tensor]] = {"reservoir": {}, "frame": {}, "atoms": {}}
        for name in state:
            part, _, entry = name.partition(".")
            if entry:
                held[part][entry] = state[name].clone()
        frame, atoms = (Frame(**held["frame"]), Atoms(**held["atoms"])) if held["atoms"] else (None, None)
        if atoms is not None:
            fresh = Atoms.at(atoms.mu.new_zeros(self.n_clusters, atoms.mu.shape[1]), self.options.optimizer)
            if wrong := [name for name, value in vars(fresh).items() if held["atoms"][name].shape != value.shape]:
                raise DataError(
                    f"the saved {wrong[0]} is not of method.n_clusters {self.n_clusters} and {self.options.optimizer}; use the settings it was saved with"
                )
        self._generator.set_state(state["generator"].cpu())
        self._since_check = int(state["since_check"])
        self._reservoir.load_state(held["reservoir"])
        self._waiting = [state["waiting"].clone()] if "waiting" in state else []
        self._count = sum(map(len, self._waiting))
        self._frame, self._atoms = frame, atoms
        return self

    def _checked(self, batch: Tensor) -> Tensor:
        known = [*self._waiting[:1], *([] if self._init is None else [self._init])]
        known += [] if self._atoms is None else [self._atoms.mu]
        if batch.dim() != 2 or any(rows.shape[1] != batch.shape[1] for rows in known):
            expected = f"(B, {known[0].shape[1] if known else 'D'})"
            raise DataError(f"a batch of embeddings is {tuple(batch.shape)}, expected {expected}")
        rows = batch.detach().float()
        if len(bad := torch.nonzero(~torch.isfinite(rows).all(1))[:, 0]):
            raise DataError(
                f"{len(bad)} of {len(rows)} embeddings are not finite, row {bad[0]} of the batch is {rows[bad[0], :3].tolist()}...; "
                f"look for a diverged encoder or a damaged image"
            )
        return rows if self._atoms is None else rows.to(self._atoms.mu.device)

    def _start(self, pilot: Tensor) -> None:
        centre = pilot.mean(0)
        centred = pilot - centre
        if self._init is None:
            check_distinct(pilot, self.n_clusters)
            mu = seeding(centred, self.n_clusters, self._generator, self.options.init).double()
        else:
            mu = self._init.detach().to(centre.device).double() - centre
        low, high = torch.cat([centred.double(), mu]).aminmax(dim=0)
        margin = MARGIN * (high - low)
        tau = self.options.tau or min(len(pilot) / self.n_clusters, LONGEST_TAU)
        rho0, tau_0d = centre.new_tensor((self._first_rho(centred, mu.float()), tau), dtype=torch.float64)
        self._frame = Frame(centre.double(), low - margin, high + margin, rho0, tau_0d)
        self._atoms = Atoms.at(mu, self.options.optimizer)

    def _first_rho(self, z: Tensor, mu: Tensor) -> float:
        """The automatic rho0 from the pilot z (N, D) and the initial mu (K, D), both centred."""
        options = self.options
        if options.rho0 != "auto":
            return options.rho0
        distance = nearest(z, mu)[1].double().sqrt()
        apart = distance[distance > TINY]  # the seeds themselves are at 0
        typical = float(apart.median()) if len(apart) else 1.0
        if options.optimizer in SQUARES:  # these divide by the gradient's size: rho is a length per coordinate
            return PILOT_STEP * typical / z.shape[1] ** 0.5
        rho = PILOT_STEP / (options.r * typical ** (options.r - 2))
        if options.optimizer != "sgd":  # velocity sums up to 1 / (1 - gamma) steps
            rho *= 1 - options.gamma
        return rho * self.n_clusters if options.average == "batch" else rho  # an atom gets 1 / K of a batch

    def _learn(self, rows: Tensor) -> None:
        atoms, frame = self._started()
        self._reservoir.offer(rows, self._generator)
        centred = rows.double() - frame.centre
        labels = build_assign(centred.float(), self.n_clusters, "torch")(atoms.mu)[0]
        self._move(centred, labels)
        share = torch.bincount(labels, minlength=self.n_clusters).double() / len(rows)
        atoms.rate.lerp_(share, min(1.0, len(rows) / (WINDOW * self.n_clusters)))
        self._since_check += len(rows)
        if self.options.reseed and self._since_check >= WINDOW * self.n_clusters:
            self._since_check = 0
            self._revive()

    def _move(self, rows: Tensor, labels: Tensor) -> None:
        """Moves the atoms nearest to rows (B, D), float64 and centred; labels (B,). U of K atoms are hit."""
        (atoms, frame), options = self._started(), self.options
        hit, member, counts = torch.unique(labels, return_inverse=True, return_counts=True)
        rho = self._rho(hit, counts)  # (U,)
        offset = rows - atoms.mu[labels]
        reach = rows.new_zeros(len(hit)).scatter_reduce(0, member, offset.norm(dim=1), "amax")
        if options.optimizer == "nag":  # as seen from where the velocity will carry the atom
            offset = offset - options.gamma * atoms.first[labels]
        weight = options.r * offset.norm(dim=1).clamp_min(TINY) ** (options.r - 2)
        weight = weight / {"none": 1, "atom": counts[member], "batch": len(rows)}[options.average]
        if options.optimizer in LINEAR:
            # The cap: the samples' steps together are at most 1, so the atom stays among itself and them.
            weight = torch.minimum(weight * rho[member], 1 / counts[member].double())
        pull = rows.new_zeros(len(hit), rows.shape[1]).index_add_(0, member, weight[:, None] * offset)
        atoms.updates[hit] += 1
        move = self._step(hit, pull, rho)
        move = move * (reach / move.norm(dim=1).clamp_min(TINY)).clamp_max(1.0)[:, None]
        if options.optimizer in ("momentum", "nag"):
            atoms.first[hit] = move
        moved = atoms.mu[hit] + move
        atoms.mu[hit] = moved.clamp(frame.low, frame.high) if options.project else moved
        atoms.hits[hit] += counts

    def _rho(self, hit: Tensor, counts: Tensor) -> Tensor:
        """Step sizes (U,) of the atoms `hit` (U,), which have `counts` (U,) rows in this batch."""
        atoms, frame = self._started()
        if self.options.schedule == "running_mean":
            return 1 / (2 * (atoms.hits[hit] + counts))
        time = atoms.hits[hit] if self.options.average == "none" else atoms.updates[hit]
        # AdaGrad's own sum of squares grows like t and gives the other t^(-1/2).
        decay = self.options.decay - (0.5 if self.options.optimizer == "adagrad" else 0.0)
        return frame.rho0 / (1 + time / frame.tau) ** decay

    def _step(self, hit: Tensor, pull: Tensor, rho: Tensor) -> Tensor:
        """Moves (U, D) of the atoms `hit` and their moments; pull (U, D) is -rho g for the linear optimizers, -g for the others."""
        atoms, options = self._started()[0], self.options
        if options.optimizer == "sgd":
            return pull
        if options.optimizer in LINEAR:
            return options.gamma * atoms.first[hit] + pull
        if options.optimizer in ("adagrad", "rmsprop"):
            past = atoms.second[hit]
            new = past + pull.square() if options.optimizer == "adagrad" else pull.square().lerp(past, options.beta)
            atoms.second[hit] = new
            return rho[:, None] * pull / (new + options.eps).sqrt()
        (first, second), time = options.betas, atoms.updates[hit][:, None]
        atoms.first[hit] = pull.lerp(atoms.first[hit], first)
        atoms.second[hit] = pull.square().lerp(atoms.second[hit], second)
        mean, square = atoms.first[hit] / (1 - first**time), atoms.second[hit] / (1 - second**time)
        return rho[:, None] * mean / (square.sqrt() + options.eps)

    def _revive(self) -> None:
        """Restarts dead atoms at rows of the reservoir, drawn in proportion to distance^r."""
        atoms, frame = self._started()
        dead = torch.nonzero((atoms.rate < DEAD_RATE / self.n_clusters) & (atoms.restarts < RESTARTS))[:, 0]
        if not len(dead):
            return
        rows = self._reservoir.rows.double() - frame.centre
        d2 = build_assign(rows.float(), self.n_clusters, "torch")(atoms.mu)[1].double().cpu()
        odds = (d2 / d2.max().clamp_min(TINY)) ** (self.options.r / 2)  # scaled first: a high power could overflow
        dead = dead[: int(odds.count_nonzero())]
        if len(dead):
            places = rows[torch.multinomial(odds, len(dead), generator=self._generator).to(rows.device)]
            atoms.restart(dead, places.clamp(frame.low, frame.high) if self.options.project else places)

    def _started(self) -> tuple[Atoms, Frame]:
        if self._atoms is None or self._frame is None:
            raise DataError(
                f"method.n_clusters is {self.n_clusters}, but only {self._count} of {self._reservoir.size} first embeddings came; give more or call finish()"
            )
        return self._atoms, self._frame
