"""Several matrices fused into one tensor (query, key and value; gate and up), taken apart into blocks of rows."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from .half_discovery import FUSED_OTHERWISE, FUSED_TWO, Piece, Unit


def split_fused(units: Sequence[Unit], shapes: dict[str, Tensor], transposed: Collection[str]) -> list[Unit]:
    """Every fused unit as one unit a matrix: blocks of its rows (of columns in GPT-2's transposed layers).

    Args:
        units: as `discover` returns them.
        shapes: parameters by name.
        transposed: names of the weights that are stored (inputs, outputs).

    Raises:
        ValueError: for a layout in which the matrices are no blocks of rows, or blocks whose sizes cannot be told.
    """
    made: list[Unit] = []
    for unit in units:
        if unit.fused == 1:
            made.append(unit)
            continue
        sizes = _block_sizes(unit, units, shapes, transposed)
        start = 0
        for number, size in enumerate(sizes):
            pieces = []
            for piece in unit.pieces:
                tensor = shapes[piece.name]
                dim = 1 if piece.name in transposed else 0
                scalars = tensor.numel() // tensor.shape[dim] * size
                pieces.append(Piece(piece.name, scalars, dim, start, start + size))
            start += size
            made.append(Unit(f"{unit.name}[{number}]", tuple(pieces), unit.category, unit.layer))
    return made


def _block_sizes(
    unit: Unit, units: Sequence[Unit], shapes: dict[str, Tensor], transposed: Collection[str]
) -> tuple[int, ...]:
    leaf = unit.name.rpartition(".")[2]
    weight = next((p.name for p in unit.pieces if shapes[p.name].ndim >= 2), "")
    if leaf in FUSED_OTHERWISE or not weight or shapes[weight].ndim != 2:
        raise ValueError(
            f"HalfFineTuning: balance='params' cannot split {unit.name!r}: its matrices are no blocks of rows; use "
            "strategy='layer', 'model' or 'element', or name whole tensors with groups="
        )
    tensor = shapes[weight]
    rows = tensor.shape[1 if weight in transposed else 0]
    if leaf in FUSED_TWO:
        return (rows // 2, rows - rows // 2)
    parent = unit.name.rpartition(".")[0]
    queries = rows // 3
    for other in units:  # the output projection reads as many numbers as the queries have rows
        if other is not unit and other.category == "attention" and other.name.rpartition(".")[0] == parent:
            name = other.pieces[0].name
            queries = shapes[name].shape[0 if name in transposed else -1] if shapes[name].ndim == 2 else queries
    rest = rows - queries
    if rest <= 0 or rest % 2:
        raise ValueError(
            f"HalfFineTuning: balance='params' cannot tell the blocks of {unit.name!r}: {rows} rows, {queries} of them "
            "queries; name whole tensors with groups="
        )
    return (queries, rest // 2, rest // 2)
