"""Which half is frozen: draws by category, by layer, among all matrices, or scalar by scalar."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from ..indexed_dataset import epoch_seed
from .half_discovery import Unit

Strategy = Literal["category", "layer", "model", "element"]
Balance = Literal["modules", "params"]
Mask = dict[str, bool | Tensor]

SHARE_TOLERANCE = 0.02
"""Subsets whose share of the parameters is this close to the closest attainable one count as equally good."""
_ENUMERATED = 12
_EPSILON = 1e-9


def draw_generator(seed: int, stage: int) -> torch.Generator:
    """The random numbers of one stage's draw: a function of (seed, stage) alone, the same on every rank and device.

    Example:
        >>> a, b = draw_generator(0, 3), draw_generator(0, 3)
        >>> bool(torch.rand(1, generator=a) == torch.rand(1, generator=b))
        True
    """
    return torch.Generator().manual_seed(epoch_seed(seed, stage))


def frozen_counts(ratio: float, members: int, layers: int, generator: torch.Generator) -> list[int]:
    """How many of `members` are frozen in each of `layers` layers: `floor(ratio * members)`, and one more in random ones.

    In all they are `floor(ratio * members * layers)`. With 3 members, ratio 0.5 and an even number of layers one half of
    the layers freezes 1 and the other 2, as the paper has it for feed-forward layers.

    Example:
        >>> sorted(frozen_counts(0.5, 3, 4, draw_generator(0, 0)))
        [1, 1, 2, 2]
        >>> frozen_counts(0.5, 4, 2, draw_generator(0, 0))
        [2, 2]
    """
    least = math.floor(ratio * members + _EPSILON)
    more = math.floor(ratio * members * layers + _EPSILON) - least * layers
    chosen = set(torch.randperm(layers, generator=generator)[:more].tolist())
    return [least + (layer in chosen) for layer in range(layers)]


def draw_frozen(
    units: Sequence[Unit], ratio: float, strategy: Strategy, balance: Balance, generator: torch.Generator
) -> list[Unit]:
    """The units to freeze in one stage, for the strategies that freeze whole units.

    Args:
        units: what may be frozen, as `half_discovery.discover` returns it; with "params" fused ones already split.
        ratio: share to freeze, in [0, 1].
        strategy: "category": in every layer a share of each category (the paper's proposal); "layer": everything in a
            share of the layers; "model": a share of all units, wherever they are.
        balance: of strategy "category": "modules" counts matrices, "params" their scalars.
        generator: of the draw.

    Returns:
        The frozen units, in the order of `units`.
    """
    outside = [u for u in units if u.category == "outside"]
    inside = [u for u in units if u.category != "outside"]
    if strategy == "category":
        chosen = _by_category([u for u in inside if u.category != "other"], ratio, balance, generator)
    elif strategy == "layer":
        layers = sorted({u.layer for u in inside})
        order = torch.randperm(len(layers), generator=generator).tolist()
        frozen = {layers[i] for i in order[: math.floor(ratio * len(layers) + _EPSILON)]}
        chosen = {u.name for u in inside if u.layer in frozen}
    else:
        pool = [u for u in inside if u.category != "other"]
        chosen = _sample(pool, math.floor(ratio * len(pool) + _EPSILON), generator)
    # Outside of the layers there is one pool: what the user took from the list of tensors that always train.
    chosen |= _sample(outside, math.floor(ratio * len(outside) + _EPSILON), generator)
    return [u for u in units if u.name in chosen]


def _sample(pool: Sequence[Unit], count: int, generator: torch.Generator) -> set[str]:
    order = torch.randperm(len(pool), generator=generator).tolist()
    return {pool[i].name for i in order[:count]}


def _by_category(units: Sequence[Unit], ratio: float, balance: Balance, generator: torch.Generator) -> set[str]:
    layers: dict[tuple[str, int], list[Unit]] = {}
    for unit in units:
        layers.setdefault((unit.category, unit.layer), []).append(unit)
    # Layers of one category with equally many members share one count (encoder and decoder layers may differ).
    alike: dict[tuple[str, int], list[list[Unit]]] = {}
    for (category, _), members in layers.items():
        alike.setdefault((category, len(members)), []).append(members)
    chosen: set[str] = set()
    for (_, size), found in alike.items():
        if balance == "params":
            chosen |= _balanced(found, ratio, generator)
            continue
        for members, count in zip(found, frozen_counts(ratio, size, len(found), generator), strict=True):
            chosen |= _sample(members, count, generator)
    return chosen


def _balanced(layers: Sequence[Sequence[Unit]], ratio: float, generator: torch.Generator) -> set[str]:
    """In every layer a subset whose share of the scalars is as close to `ratio` as subsets can be.

    Where the closest subsets lie on both sides (1 or 2 of 3 equal matrices), as many layers take the larger side as keep
    the mean share at `ratio`; so equal matrices give the rule that counts matrices.
    """
    sides = [_closest_subsets(members, ratio) for members in layers]
    two = [i for i, (below, above) in enumerate(sides) if below and above]
    upper: set[int] = set()
    if two:
        low, high = (sum(_share(layers[i], sides[i][s][0]) for i in two) / len(two) for s in (0, 1))
        count = math.floor(len(two) * (ratio - low) / (high - low) + _EPSILON)
        upper = {two[j] for j in torch.randperm(len(two), generator=generator)[:count].tolist()}
    chosen: set[str] = set()
    for i, (members, (below, above)) in enumerate(zip(layers, sides, strict=True)):
        candidates = above if (i in upper or not below) else below
        if len(members) > _ENUMERATED:
            chosen |= _greedy(members, ratio, generator)
            continue
        picked = candidates[int(torch.randint(len(candidates), (), generator=generator))]
        chosen |= {members[j].name for j in picked}
    return chosen


def _share(members: Sequence[Unit], subset: Sequence[int]) -> float:
    return sum(members[j].size for j in subset) / sum(u.size for u in members)


def _closest_subsets(members: Sequence[Unit], ratio: float) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Subsets within the tolerance of the closest share: those below the ratio (or at it), and those above.

    Where some hit the ratio within the tolerance there are no sides: all of them are in the first list.
    """
    if len(members) > _ENUMERATED:
        return [()], []
    indices = range(len(members))
    subsets = [c for size in range(len(members) + 1) for c in itertools.combinations(indices, size)]
    gaps = {subset: _share(members, subset) - ratio for subset in subsets}
    best = min(abs(gap) for gap in gaps.values())
    close = [subset for subset in subsets if abs(gaps[subset]) <= best + SHARE_TOLERANCE + _EPSILON]
    if best <= SHARE_TOLERANCE:
        return close, []
    return [s for s in close if gaps[s] <= 0], [s for s in close if gaps[s] > 0]


def _greedy(members: Sequence[Unit], ratio: float, generator: torch.Generator) -> set[str]:
    """Members in random order as long as each brings the share closer to the ratio: many experts, too many subsets."""
    target, total, taken = ratio * sum(u.size for u in members), 0, set()
    for j in torch.randperm(len(members), generator=generator).tolist():
        if abs(total + members[j].size - target) < abs(total - target):
            total += members[j].size
            taken.add(members[j].name)
    return taken


def element_mask(shape: Sequence[int], ratio: float, generator: torch.Generator) -> Bool[Tensor, ...]:
    """True where a scalar trains: all but `floor(ratio * n)` of the n scalars, drawn without replacement.

    Example:
        >>> int(element_mask((3, 4), 0.5, draw_generator(0, 0)).sum())
        6
    """
    count = math.prod(shape)
    mask = torch.ones(count, dtype=torch.bool)
    mask[torch.randperm(count, generator=generator)[: math.floor(ratio * count + _EPSILON)]] = False
    return mask.reshape(tuple(shape))


def masks_of(frozen: Sequence[Unit], shapes: Mapping[str, Tensor]) -> Mask:
    """The frozen units as masks by parameter: False for a tensor frozen whole, a bool tensor where only blocks of it are.

    Returns:
        Masks of the frozen tensors alone; True in them means that a scalar trains.
    """
    masks: Mask = {}
    for unit in frozen:
        for piece in unit.pieces:
            if piece.stop is None:
                masks[piece.name] = False
                continue
            part = masks.setdefault(piece.name, torch.ones(shapes[piece.name].shape, dtype=torch.bool))
            assert isinstance(part, Tensor)
            part.narrow(piece.dim, piece.start, piece.stop - piece.start).fill_(False)
    return {name: False if isinstance(m, Tensor) and not m.any() else m for name, m in masks.items()}
