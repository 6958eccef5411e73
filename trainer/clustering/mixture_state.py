"""A fitted mixture as tensors, and back: what a checkpoint keeps of it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from trainer.clustering.bayesian_mixture import Belief, Mixture, MixtureOptions, NormalWishart, Sticks


def mixture_state(mixture: Mixture) -> dict[str, Tensor]:
    """Everything but the options, of which only what a run changes by itself: the number of components and the spread."""
    state = {
        "origin": mixture.origin,
        "counts": mixture.counts,
        "elbo": torch.tensor(mixture.elbo, dtype=torch.float64),
    }
    state["n_components"] = torch.tensor(mixture.options.n_components)
    state["spread"] = torch.tensor(mixture.options.spread, dtype=torch.float64)
    for name in ("belief", "prior"):
        belief: Belief = getattr(mixture, name)
        state |= {f"{name}.weights.{key}": value for key, value in vars(belief.weights).items()}
        state |= {f"{name}.components.{key}": value for key, value in vars(belief.components).items()}
    # A copy of its own: a checkpoint's format has no room for tensors that share memory.
    return {key: value.clone().contiguous() for key, value in state.items()}


def mixture_from(state: dict[str, Tensor], options: MixtureOptions, device: torch.device) -> Mixture:
    """What `mixture_state` gave."""
    state = {key: value.to(device) for key, value in state.items()}

    def belief(name: str) -> Belief:
        def part(kind: str) -> dict[str, Tensor]:
            prefix = f"{name}.{kind}."
            return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}

        return Belief(Sticks(**part("weights")), NormalWishart(**part("components")))

    options = replace(options, n_components=int(state["n_components"]), spread=float(state["spread"]))
    elbo = tuple(state["elbo"].tolist())
    return Mixture(belief("belief"), belief("prior"), state["origin"], state["counts"], elbo, options)
