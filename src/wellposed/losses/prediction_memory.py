"""`PredictionMemory`: the last predicted probabilities of every training example (or token), dense or compressed."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..sample_table import SampleTable

_CHUNK = 65_536
_LARGEST_EXACT = {torch.float16: 2**11, torch.float32: 2**24}
"""Up to which number every integer is exact in a dtype."""


def compressed(
    probabilities: Float[Tensor, "batch classes"], top_k: int
) -> tuple[Float[Tensor, "batch top_k"], Int[Tensor, "batch top_k"]]:
    """The `top_k` largest probabilities of each row, and their classes.

    Example:
        >>> values, classes = compressed(torch.tensor([[0.1, 0.6, 0.3]]), top_k=2)
        >>> values, classes
        (tensor([[0.6000, 0.3000]]), tensor([[1, 2]]))
    """
    return tuple(probabilities.topk(top_k, dim=-1))  # type: ignore[return-value]


def expanded(
    values: Float[Tensor, "batch top_k"], classes: Int[Tensor, "batch top_k"], num_classes: int
) -> Float[Tensor, "batch classes"]:
    """Rows that sum to 1: `values` at `classes`, and what is left spread evenly over all other classes.

    Rows of zeros stay zero: they were never written. Rounding in half precision is made up for.

    Example:
        >>> expanded(torch.tensor([[0.6, 0.3]]), torch.tensor([[1, 2]]), num_classes=4)
        tensor([[0.0500, 0.6000, 0.3000, 0.0500]])
    """
    kept = values.sum(-1, keepdim=True)
    others = num_classes - values.shape[-1]
    left = (1.0 - kept).clamp(min=0.0) / max(1, others)
    # Values that were rounded up, or that are all there is, are brought back to a sum of 1.
    scale = torch.where(kept > 0, (1.0 - left * others) / kept.clamp(min=1e-12), 0.0)
    rows = torch.where(kept > 0, left, 0.0).expand(-1, num_classes).contiguous()
    return rows.scatter_(-1, classes, values * scale)


class PredictionMemory(nn.Module):
    """One row of class probabilities for each training example, read back as rows that sum to 1.

    Two `SampleTable`s do the work, with all they guarantee: rows survive a checkpoint, agree on every rank, and rows
    that are not finite are never stored.

    Args:
        num_rows: examples, or tokens, of the whole training set.
        num_classes: C.
        top_k: keep only this many of the largest probabilities; the rest is spread evenly over the other classes.
            None keeps all.
        dtype: storage; float16 errs by at most 2.5e-4 in each probability.
        storage, path, sync: see `SampleTable`.

    Attributes:
        visited: (num_rows,) bool, which rows were ever written.

    Raises:
        ValueError: if `top_k` lies outside of [1, num_classes], or as `SampleTable` does.

    Example:
        >>> memory = PredictionMemory(num_rows=3, num_classes=4, top_k=1, dtype=torch.float16)
        >>> memory.write(torch.tensor([2]), torch.tensor([[0.0, 0.25, 0.625, 0.125]]))
        >>> memory.read(torch.tensor([2, 0]))
        tensor([[0.1250, 0.1250, 0.6250, 0.1250],
                [0.0000, 0.0000, 0.0000, 0.0000]])
        >>> memory.bytes_per_row
        4
    """

    def __init__(
        self,
        num_rows: int,
        num_classes: int,
        *,
        top_k: int | None = None,
        dtype: torch.dtype = torch.float32,
        storage: Literal["device", "cpu", "memmap"] = "device",
        path: str | Path | None = None,
        sync: Literal["auto", "never"] = "auto",
    ) -> None:
        super().__init__()
        if top_k is not None and not 1 <= top_k <= num_classes:
            raise ValueError(f"PredictionMemory: top_k must lie in [1, {num_classes}] or be None, got {top_k}")
        self.num_classes, self.top_k, self.dtype = num_classes, top_k, dtype

        def table(width: int, kind: torch.dtype, where: str | Path | None) -> SampleTable:
            return SampleTable(num_rows, (width,), dtype=kind, storage=storage, path=where, sync=sync)

        self.values = table(top_k or num_classes, dtype, path)
        if top_k is not None:
            # Class numbers are kept as floating numbers, so that one table serves both: the smallest exact ones.
            exact = next((kind for kind, limit in _LARGEST_EXACT.items() if num_classes <= limit), None)
            if exact is None:
                raise ValueError(f"PredictionMemory: num_classes must be at most {2**24} with top_k, got {num_classes}")
            beside = None if path is None else Path(path).with_suffix(".classes.npy")
            self.classes = table(top_k, exact, beside)

    @property
    def visited(self) -> Bool[Tensor, " rows"]:
        """Which rows were ever written."""
        return self.values.visited

    @property
    def bytes_per_row(self) -> int:
        """Bytes that one row takes in the tables."""
        return sum(part.rows[0].numel() * part.rows.element_size() for part in self._tables())

    def read(self, index: Int[Tensor, " batch"], device: torch.device | None = None) -> Float[Tensor, "batch classes"]:
        """Rows of `index` in float32 on `device`; zeros where nothing was ever written."""
        rows = self.values.read(index, device=device)
        if self.top_k is not None:
            return expanded(rows, self.classes.read(index, device=device).long(), self.num_classes)
        if self.dtype == torch.float32:
            return rows
        return rows / rows.sum(-1, keepdim=True).clamp(min=1e-12)

    def seen(self, index: Int[Tensor, " batch"]) -> Bool[Tensor, " batch"]:
        """Whether each row was ever written, on the index's device."""
        return self.values.seen(index)

    @torch.no_grad()
    def write(self, index: Int[Tensor, " batch"], probabilities: Float[Tensor, "batch classes"]) -> None:
        """Store rows; those that are not finite keep their old content."""
        if self.top_k is None:
            self.values.write(index, probabilities)
            return
        values, classes = compressed(probabilities, self.top_k)
        # Both tables must leave out the same rows, and class numbers are always finite.
        finite = values.to(self.dtype).isfinite().all(-1, keepdim=True)
        self.values.write(index, values)
        self.classes.write(index, classes.to(self.classes.rows.dtype).masked_fill(~finite, torch.nan))

    @torch.no_grad()
    def absorb(self, newer: PredictionMemory) -> None:
        """Take over every row that `newer` has, and empty it; in pieces, as tables may be as large as the memory."""
        for mine, theirs in zip(self._tables(), newer._tables(), strict=True):
            for start in range(0, len(mine), _CHUNK):
                part = slice(start, start + _CHUNK)
                fresh = theirs.visited[part]
                mine.rows[part] = torch.where(fresh[:, None], theirs.rows[part], mine.rows[part])
                mine.visited[part] |= fresh
            mine.skipped += theirs.skipped
            theirs.reset()

    def _tables(self) -> list[SampleTable]:
        return [self.values] if self.top_k is None else [self.values, self.classes]
