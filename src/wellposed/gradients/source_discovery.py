"""Sources where no labels exist: clusters of hidden states, drawn anew a few times in training."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn

from ..batching import unwrap, valid_positions
from ..indexed_dataset import epoch_seed
from ..step import Step
from .last_layer_gradient import take


def spread_seeds(points: Float[Tensor, "n d"], k: int, generator: torch.Generator) -> Float[Tensor, "k d"]:
    """First centres by k-means++ (Arthur and Vassilvitskii 2007): each next point with probability ~ squared distance.

    Example:
        >>> seeds = spread_seeds(torch.tensor([[0.0], [0.0], [9.0]]), 2, torch.Generator().manual_seed(0))
        >>> sorted(seeds.flatten().tolist())
        [0.0, 9.0]
    """
    chosen = [int(torch.randint(len(points), (), generator=generator))]
    nearest = (points - points[chosen[0]]).square().sum(1)
    for _ in range(k - 1):
        # All remaining distances are 0 where points coincide: any point will do.
        odds = nearest if bool(nearest.sum() > 0) else torch.ones_like(nearest)
        chosen.append(int(torch.multinomial(odds, 1, generator=generator)))
        nearest = torch.minimum(nearest, (points - points[chosen[-1]]).square().sum(1))
    return points[chosen]


def cluster(
    points: Float[Tensor, "n d"], k: int, generator: torch.Generator, iterations: int = 25
) -> Float[Tensor, "k d"]:
    """Centres of k clusters: k-means (SciPy's) from k-means++ seeds.

    Raises:
        ValueError: if there are fewer points than clusters.

    Example:
        >>> points = torch.tensor([[0.0], [0.2], [9.0], [9.2]])
        >>> cluster(points, 2, torch.Generator().manual_seed(0)).sort(0).values.flatten()
        tensor([0.1000, 9.1000])
    """
    if len(points) < k:
        raise ValueError(f"cluster: k must be at most the number of points, {len(points)}, got {k}")
    start = spread_seeds(points.double().cpu(), k, generator)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "One of the clusters is empty")  # it keeps its centre
        centres, _ = kmeans2(points.double().cpu().numpy(), start.numpy(), iter=iterations, minit="matrix")
    return torch.from_numpy(np.ascontiguousarray(centres)).to(points)


def nearest_centre(points: Float[Tensor, "n d"], centres: Float[Tensor, "k d"]) -> Int[Tensor, " n"]:
    """Number of the nearest centre, the first of several.

    Example:
        >>> nearest_centre(torch.tensor([[0.0], [8.0]]), torch.tensor([[9.0], [1.0]]))
        tensor([1, 0])
    """
    return torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)


class SourceDiscovery(nn.Module):
    """Treats clusters of hidden states as sources: after a warm-up, and again a few times later.

    The hidden state of an example is what goes into `module`, averaged over its own tokens. States of recent pools are
    kept in a bank; clusters are those of the bank, and their sizes there say which are small.

    Args:
        num_sources: clusters, >= 2.
        warmup: optimizer steps before the first clustering, >= 1; pools are cut at random meanwhile.
        reclusters: how often clusters are drawn anew, at equal distances in the rest of training.
        bank: hidden states kept.
        module: name of the module whose input is taken; the last linear layer by default.
        seed: of the first centres.

    Raises:
        ValueError: for an argument out of range.

    Example:
        >>> discovery = SourceDiscovery(num_sources=2, warmup=1)
        >>> discovery.observe(torch.tensor([[0.0], [0.1], [9.0]]), total=10)
        >>> ids = discovery.assign(torch.tensor([[0.2], [8.0]]))
        >>> len(set(ids.tolist())), sorted(discovery.sizes.values())
        (2, [1, 2])
    """

    def __init__(
        self,
        num_sources: int = 16,
        warmup: int = 20,
        reclusters: int = 4,
        bank: int = 4096,
        module: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("num_sources", num_sources, 2), ("warmup", warmup, 1), ("reclusters", reclusters, 0),
            ("bank", bank, num_sources),
        ):  # fmt: skip
            if not isinstance(value, int) or value < least:
                raise ValueError(f"SourceDiscovery: {name} must be an integer >= {least}, got {value!r}")
        self.num_sources, self.warmup, self.reclusters = num_sources, warmup, reclusters
        self.bank_size, self.module, self.seed = bank, module, seed
        self.updates = self.clustered = 0
        self.bank: Tensor | None = None
        self.centres: Tensor | None = None
        self.sizes: dict[int, int] = {}

    @torch.no_grad()
    def hidden_states(self, step: Step, chunk_size: int | None = None) -> Float[Tensor, "n d"]:
        """States of the whole pool by one forward pass, in evaluation mode.

        Raises:
            ValueError: if the module is not found, or its input does not have one row an example.
        """
        model = unwrap(step.model)
        layer = self._layer(model)
        size = len(step.targets)
        found = []
        for rows in torch.arange(size).split(chunk_size or size):
            inputs, targets, extra = (take(v, size, rows) for v in (step.inputs, step.targets, step.extra))
            seen: list[Tensor] = []
            handle = layer.register_forward_pre_hook(lambda module, arguments, seen=seen: seen.append(arguments[0]))
            try:
                step.forward(inputs, grad=False, training=False)
            finally:
                handle.remove()
            if not seen or len(seen[0]) != len(rows):
                raise ValueError(
                    f"SourceDiscovery: module {self.module!r} must see one row an example in the forward pass; name "
                    "another one"
                )
            found.append(_mean_over_tokens(seen[0].float(), valid_positions(targets, extra)))
        return torch.cat(found)

    def assign(self, hidden: Float[Tensor, "n d"]) -> Int[Tensor, " n"] | None:
        """The cluster of each example; None while warming up."""
        return None if self.centres is None else nearest_centre(hidden, self.centres.to(hidden))

    def observe(self, hidden: Float[Tensor, "n d"], total: int) -> None:
        """Keep a pool's states, and cluster the bank where it is time to.

        Args:
            hidden: of the pool.
            total: planned optimizer steps.
        """
        hidden = hidden.detach().cpu()
        self.bank = hidden if self.bank is None else torch.cat([self.bank, hidden])
        self.bank = self.bank[-self.bank_size :]
        self.updates += 1
        if self._due(total) and len(self.bank) >= self.num_sources:
            generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.clustered))
            self.centres = cluster(self.bank, self.num_sources, generator)
            self.clustered += 1
            names, counts = nearest_centre(self.bank, self.centres).unique(return_counts=True)
            self.sizes = dict(zip(names.tolist(), counts.tolist(), strict=True))

    def _due(self, total: int) -> bool:
        if self.clustered > self.reclusters:
            return False
        rest = max(0, total - self.warmup)
        return self.updates >= self.warmup + rest * self.clustered / (self.reclusters + 1)

    def _layer(self, model: nn.Module) -> nn.Module:
        if self.module is not None:
            found = dict(model.named_modules()).get(self.module)
            if found is None:
                raise ValueError(f"SourceDiscovery: the model has no module {self.module!r}")
            return found
        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise ValueError("SourceDiscovery: the model has no linear layer; name the module whose input to cluster")
        return linear[-1]

    def get_extra_state(self) -> dict[str, Any]:
        """What an exact resume needs."""
        return {
            "updates": self.updates, "clustered": self.clustered, "bank": self.bank, "centres": self.centres,
            "sizes": dict(self.sizes),
        }  # fmt: skip

    def set_extra_state(self, state: Any) -> None:
        """Continue from `get_extra_state`."""
        self.updates, self.clustered = state["updates"], state["clustered"]
        self.bank, self.centres, self.sizes = state["bank"], state["centres"], dict(state["sizes"])


def _mean_over_tokens(states: Tensor, valid: Tensor | None) -> Tensor:
    if states.ndim == 2:
        return states
    states = states.flatten(1, -2)
    if valid is None or valid.shape != states.shape[:2]:
        return states.mean(1)
    weights = valid.to(states)[:, :, None]
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)
