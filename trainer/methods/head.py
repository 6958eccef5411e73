"""Classification heads of the methods that learn labels: first weights of their own draws, a fresh start with new labels, their state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

HEAD_STD = 0.01


class LinearHead(nn.Module):
    """features (B, F) -> logits (B, K) of their positive part: in the paper the features are taken before the last ReLU, the head after it."""

    def __init__(self, in_dim: int, n_clusters: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, n_clusters)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(torch.relu(features))

    @torch.no_grad()
    def renew(self, optimizer: torch.optim.Optimizer, rows: Tensor | None = None) -> None:
        """N(0, 0.01^2) and no memory of the last labels, in the `rows` marked (K,), or in all of them."""
        chosen = torch.ones(len(self.linear.bias), dtype=torch.bool) if rows is None else rows
        chosen = chosen.to(self.linear.bias.device)
        fresh = torch.randn_like(self.linear.weight) * HEAD_STD
        self.linear.weight.copy_(torch.where(chosen[:, None], fresh, self.linear.weight))
        self.linear.bias.masked_fill_(chosen, 0.0)
        for parameter in self.parameters():
            if bool(chosen.all()):
                optimizer.state.pop(parameter, None)  # with the count of steps, which scales Adam's first ones
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value[chosen] = 0.0


@contextlib.contextmanager
def own_draws(seed: int) -> Iterator[None]:
    """Random numbers of one's own for a head's first weights: with the common ones, a head more or less would change the decoder's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def head_state(head: nn.Module) -> dict[str, Tensor]:
    """For a checkpoint."""
    return {f"head.{key}": value for key, value in head.state_dict().items()}


def load_head(head: nn.Module, state: dict[str, Tensor]) -> None:
    """What `head_state` gave."""
    head.load_state_dict({k.removeprefix("head."): v for k, v in state.items() if k.startswith("head.")})
