"""What a stage of half fine-tuning froze, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .half_discovery import Unit
from .half_selection import Mask


@dataclass(frozen=True)
class CategoryShare:
    """One row: a category's units and scalars, and how many of them are frozen."""

    category: str
    units: int
    frozen_units: int
    parameters: int
    frozen_parameters: int


@dataclass(frozen=True)
class MaskReport:
    """What is frozen in a stage.

    Attributes:
        stage: number of the draw, from 0.
        rows: one a category.
        frozen: names of the tensors that are frozen whole.
        trainable: number of scalars that train, in the whole model.
        unmatched: units inside the layers that belong to no category, and train.

    Example:
        >>> print(MaskReport(0, (CategoryShare("attention", 4, 2, 64, 32),), ("h.0.q.weight",), 90, ()))
        stage 0                units frozen     parameters   frozen
        attention                  4      2             64   50.0 %
        trainable scalars in all: 90
    """

    stage: int
    rows: tuple[CategoryShare, ...]
    frozen: tuple[str, ...]
    trainable: int
    unmatched: tuple[str, ...]

    @property
    def frozen_share(self) -> float:
        """Frozen share of the scalars that could be frozen; 0 where there are none."""
        total = sum(row.parameters for row in self.rows)
        return sum(row.frozen_parameters for row in self.rows) / total if total else 0.0

    def __str__(self) -> str:
        lines = [f"{f'stage {self.stage}':<22} units frozen     parameters   frozen"]
        for row in self.rows:
            share = row.frozen_parameters / max(1, row.parameters)
            lines.append(
                f"{row.category:<22} {row.units:>5} {row.frozen_units:>6} {row.parameters:>14,} {100 * share:>6.1f} %"
            )
        lines.append(f"trainable scalars in all: {self.trainable:,}")
        if self.unmatched:
            lines.append(f"of no category, trained: {', '.join(self.unmatched)}")
        return "\n".join(lines)


def report(stage: int, units: Sequence[Unit], masks: Mask, trainable: int, skip_other: bool) -> MaskReport:
    """Count what the masks freeze, category by category.

    Args:
        stage: number of the draw.
        units: all that could be frozen.
        masks: of the frozen tensors.
        trainable: number of scalars that train.
        skip_other: whether units of no category were left out of the draw.
    """
    rows: dict[str, list[int]] = {}
    unmatched = tuple(u.name for u in units if u.category == "other") if skip_other else ()
    for unit in units:
        if unit.name in unmatched:
            continue
        frozen = sum(_frozen(masks, unit))
        row = rows.setdefault(unit.category, [0, 0, 0, 0])
        for i, value in enumerate((1, int(frozen == unit.size), unit.size, frozen)):
            row[i] += value
    whole = tuple(name for name, mask in masks.items() if mask is False)
    return MaskReport(stage, tuple(CategoryShare(c, *r) for c, r in rows.items()), whole, trainable, unmatched)


def _frozen(masks: Mask, unit: Unit) -> list[int]:
    found = []
    for piece in unit.pieces:
        mask = masks.get(piece.name, True)
        if isinstance(mask, Tensor):
            part = mask if piece.stop is None else mask.narrow(piece.dim, piece.start, piece.stop - piece.start)
            found.append(int((~part).sum()))
        else:
            found.append(0 if mask else piece.size)
    return found
