"""From cluster and novelty to a verdict. One order for everybody: failed, bad frame, cluster verdict reject, novel, cluster verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from edge_dkm.contract import Cluster, Verdict
from edge_dkm.errors import UsageError

Reason = Literal["cluster_verdict", "novel", "default"]


@dataclass(frozen=True)
class Policy:
    """What a line makes of a cluster. `clusters` maps a cluster's name or id to a verdict and wins over the graph's."""

    default: Verdict = "pass"
    novel: Verdict = "review"
    clusters: Mapping[str, Verdict] = field(default_factory=dict)


class Decision:
    """The verdict of each cluster of one model under one policy, worked out once."""

    def __init__(self, clusters: tuple[Cluster, ...], policy: Policy, model: str) -> None:
        known = {key for cluster in clusters for key in (cluster.name, str(cluster.id))}
        unknown = sorted(set(policy.clusters) - known)
        if unknown:
            raise UsageError(
                f"verdicts.clusters names '{unknown[0]}', which {model} does not have; its clusters are "
                f"{', '.join(f'{c.id} {c.name}' for c in clusters)}"
            )
        self._policy = policy
        self._verdicts = [policy.clusters.get(c.name, policy.clusters.get(str(c.id), c.verdict)) for c in clusters]

    def __call__(self, cluster_id: int, is_novel: bool) -> tuple[Verdict, Reason]:
        """The verdict of a completed inspection and what it rests on."""
        verdict = self._verdicts[cluster_id]
        if verdict == "reject":
            return "reject", "cluster_verdict"
        if is_novel:
            return self._policy.novel, "novel"
        if verdict is not None:
            return verdict, "cluster_verdict"
        return self._policy.default, "default"
