"""One pool on several ranks: whose examples it holds, sums over the ranks, and dealing what was chosen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from ..batching import IGNORE_INDEX, map_tensors
from ..loading import distributed
from ..step import Step


class PoolExchange:
    """The pool of one optimizer step, over all ranks: rank 0's examples first.

    With one process nothing is exchanged.

    Args:
        size: examples of this rank.
        device: on which tensors are exchanged.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.device = size, device
        self.world = dist.get_world_size() if distributed() else 1
        self.rank = dist.get_rank() if self.world > 1 else 0
        self.sizes = [int(t) for t in self._gathered(torch.tensor([size], device=device))]
        self.start = sum(self.sizes[: self.rank])

    @property
    def total(self) -> int:
        """Examples of all ranks."""
        return sum(self.sizes)

    def own(self, positions: Int[Tensor, " n"]) -> Int[Tensor, " m"]:
        """Those of ascending positions in the pool that are this rank's, counted from its first example."""
        here = positions[(positions >= self.start) & (positions < self.start + self.size)]
        return here - self.start

    def sum(self, values: Tensor) -> Tensor:
        """Over the ranks."""
        if self.world > 1:
            values = values.contiguous()
            dist.all_reduce(values)
        return values

    def rows(self, values: Tensor) -> Tensor:
        """Rows of all ranks one after the other; ranks may hold different numbers of them."""
        return torch.cat(self._gathered(values)) if self.world > 1 else values

    def agreed(self, values: Tensor) -> Tensor:
        """Rank 0's tensor on every rank: rounding must not let two ranks choose differently."""
        if self.world > 1:
            values = values.to(self.device).contiguous()
            dist.broadcast(values, 0)
        return values

    def _gathered(self, values: Tensor) -> list[Tensor]:
        if self.world == 1:
            return [values]
        counts = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world)]
        dist.all_gather(counts, torch.tensor([len(values)], device=self.device))
        longest = max(int(c) for c in counts)
        values = values.to(self.device)
        padded = values.new_zeros(
            (longest, *values.shape[1:]), dtype=torch.uint8 if values.dtype == torch.bool else None
        )
        padded[: len(values)] = values
        found = [torch.zeros_like(padded) for _ in range(self.world)]
        dist.all_gather(found, padded)
        return [part[: int(count)].to(values.dtype) for part, count in zip(found, counts, strict=True)]

    # ── dealing ───────────────────────────────────────────────────────────────────────────────────────────────────
    def deal(
        self,
        step: Step,
        chosen: Int[Tensor, " batch"],
        weights: Float[Tensor, " batch"] | None,
        source: Int[Tensor, " pool"],
    ) -> None:
        """Rewrite a step's batch to this rank's share of the chosen examples.

        They are dealt out source by source, so that the numbers of a source differ by at most one between ranks; a
        block each would give the first rank nearly all of the small sources. Within a rank the pool's order is kept.

        Args:
            step: with this rank's part of the pool.
            chosen: positions in the pool.
            weights: of the chosen examples, multiplied into the step's; None for 1.
            source: of every example of the pool.

        Raises:
            ValueError: if fewer examples are chosen than there are ranks, or tensors of the ranks do not fit together.
        """
        if len(chosen) < self.world:
            raise ValueError(
                f"MiniBatchCoreset: {len(chosen)} examples were chosen for {self.world} ranks; raise ratio or the pool"
            )
        by_source = torch.sort(chosen).values
        by_source = by_source[torch.argsort(source[by_source], stable=True)]
        mine = torch.sort(by_source[self.rank :: self.world]).values
        names = ("inputs", "targets", "index", "weights", "extra")
        values = {name: getattr(step, name) for name in names}
        for name, value in zip(names, self._taken(values, mine).values(), strict=True):
            setattr(step, name, value)
        if weights is not None:
            place = torch.zeros(self.total, dtype=weights.dtype, device=weights.device)
            place[chosen.to(weights.device)] = weights
            own = place[mine.to(weights.device)]
            before = step.weights
            step.weights = own if before is None else before * own.reshape(own.shape + (1,) * (before.ndim - 1))

    def _taken(self, values: dict[str, Any], rows: Tensor) -> dict[str, Any]:
        parts = self._everywhere(values)

        def take(tensor: Tensor) -> Tensor:
            if not (tensor.ndim and len(tensor) == self.size):
                return tensor
            whole = tensor if parts is None else next(parts).to(tensor.device)
            return whole[rows.to(whole.device)]

        found: dict[str, Any] = map_tensors(take, values)
        return found

    def _everywhere(self, values: dict[str, Any]) -> Iterator[Tensor] | None:
        """Every tensor of the batch, of all ranks together, in the order in which `map_tensors` meets them."""
        if self.world == 1:
            return None
        own: list[tuple[Tensor, int]] = []
        for name, value in values.items():
            fill = IGNORE_INDEX if name == "targets" else 0

            def keep(tensor: Tensor, fill: int = fill) -> Tensor:
                if tensor.ndim and len(tensor) == self.size:
                    own.append((tensor.cpu(), 0 if tensor.is_floating_point() else fill))
                return tensor

            map_tensors(keep, value)
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, own)
        if any(len(part) != len(own) for part in gathered):
            raise ValueError("MiniBatchCoreset: the batches of the ranks must hold the same tensors")
        return iter([_joined(list(parts)) for parts in zip(*gathered, strict=True)])


def _joined(parts: list[tuple[Tensor, int]]) -> Tensor:
    """Rows of all ranks; sequences are padded on the right to the longest (targets by -100, all else by 0)."""
    tensors, fill = [part[0] for part in parts], parts[0][1]
    if len({t.shape[2:] for t in tensors}) > 1 or len({t.ndim for t in tensors}) > 1:
        raise ValueError(
            "MiniBatchCoreset: tensors of the ranks may differ only in examples and length, got "
            f"{[tuple(t.shape) for t in tensors]}"
        )
    if tensors[0].ndim > 1:
        longest = max(t.shape[1] for t in tensors)
        tensors = [
            t if t.shape[1] == longest
            else torch.cat([t, t.new_full((len(t), longest - t.shape[1], *t.shape[2:]), fill)], 1)
            for t in tensors
        ]  # fmt: skip
    return torch.cat(tensors)
