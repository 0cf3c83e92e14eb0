"""How evenly a network uses its weights ("weight democracy"), and what it loses with some of them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..batching import unwrap
from ..evaluation import Metric, predict
from .compander_attach import WEIGHTED_LAYERS
from .compander_folding import fold_compander, remove_parametrization


def weight_tensors(model: nn.Module, types: tuple[type[nn.Module], ...] = WEIGHTED_LAYERS) -> dict[str, Tensor]:
    """The weights of convolutional and linear layers as the layers use them (companded or not), detached, by name.

    A tensor that layers share is listed once.

    Example:
        >>> list(weight_tensors(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))))
        ['0.weight']
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, module in unwrap(model).named_modules():
        if not isinstance(module, types):
            continue
        layer: Any = module
        # A shared tensor is known by the parameter behind it: a reparametrised weight is a new tensor at each access.
        parts = layer.parametrizations.weight if parametrize.is_parametrized(module, "weight") else None
        source = layer.weight if parts is None else next(parts.parameters(), None)
        if id(source) not in seen:
            seen.add(id(source))
            found[f"{path}.weight" if path else "weight"] = layer.weight.detach()
    return found


@torch.no_grad()
def effective_number_of_weights(weights: Iterable[Tensor], relative: bool = True) -> float:
    """`(sum |w|)^2 / sum w^2`: how many weights take part; as a share of their number unless told otherwise.

    1 if all have the same magnitude, 1/n if one alone is not zero, 2/pi for normal and 3/4 for uniform ones.

    Args:
        weights: tensors, taken together.
        relative: divide by the number of weights.

    Raises:
        ValueError: without weights. All-zero ones count as one.

    Example:
        >>> effective_number_of_weights([torch.tensor([1.0, -1.0]), torch.tensor([0.0, 0.0])])
        0.5
    """
    count, absolute, square = 0, 0.0, 0.0
    for tensor in weights:
        values = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
        count += values.numel()
        absolute += float(values.abs().sum())
        square += float(values.square().sum())
    if count == 0:
        raise ValueError("effective_number_of_weights: weights holds no number")
    effective = absolute**2 / square if square > 0 else 1.0
    return effective / count if relative else effective


@torch.no_grad()
def weight_statistics(
    model: nn.Module | Mapping[str, Tensor] | Iterable[Tensor], small: float = 0.01
) -> dict[str, float]:
    """What the paper looks at in a distribution of weights (arXiv 2306.16993, section IV-B).

    Args:
        model: a network, whose convolutional and linear weights are taken together, or tensors.
        small: a weight below this magnitude counts as near zero.

    Returns:
        `max` of |w|, `deviation` (standard), `kurtosis` (3 for normal weights), `near_zero` (share with |w| < small),
        `effective` (see `effective_number_of_weights`), `count`.

    Example:
        >>> found = weight_statistics([torch.tensor([-1.0, 1.0, 1.0, -1.0])])
        >>> found["max"], found["deviation"], found["kurtosis"], found["effective"]
        (1.0, 1.0, 1.0, 1.0)
    """
    if isinstance(model, nn.Module):
        model = weight_tensors(model)
    tensors = list(model.values() if isinstance(model, Mapping) else model)
    if sum(t.numel() for t in tensors) == 0:
        raise ValueError("weight_statistics: model holds no convolutional or linear weight")
    w = torch.cat(
        [t.detach().reshape(-1).to(tensors[0].device, torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    )
    centred = w - w.mean()
    variance = centred.square().mean()
    # Standardised first: the fourth power of small weights would leave float32's range.
    kurtosis = (centred / variance.sqrt()).pow(4).mean() if variance > 0 else torch.tensor(float("nan"))
    return {
        "max": float(w.abs().max()),
        "deviation": float(variance.sqrt()),
        "kurtosis": float(kurtosis),
        "near_zero": float((w.abs() < small).float().mean()),
        "effective": effective_number_of_weights([w]),
        "count": float(w.numel()),
    }


def randomly_pruned(
    model: nn.Module,
    share: float,
    generator: torch.Generator | None = None,
    types: tuple[type[nn.Module], ...] = WEIGHTED_LAYERS,
) -> nn.Module:
    """A plain copy of a network in which each weight is zero with probability `share`, drawn independently.

    Args:
        model: companded or not; left as it is.
        share: in [0, 1].
        generator: of the mask, on the CPU; None draws from torch's global random state.
        types: layers whose weights are pruned.

    Raises:
        ValueError: if share lies outside of [0, 1].

    Example:
        >>> pruned = randomly_pruned(nn.Linear(100, 100), 0.3, torch.Generator().manual_seed(0))
        >>> round(float((pruned.weight == 0).float().mean()), 1)
        0.3
    """
    if not 0 <= share <= 1:
        raise ValueError(f"randomly_pruned: share must lie in [0, 1], got {share!r}")
    pruned = fold_compander(copy.deepcopy(unwrap(model)))
    for module in pruned.modules():
        if isinstance(module, types) and parametrize.is_parametrized(module, "weight"):
            remove_parametrization(module, "weight")
    with torch.no_grad():
        for weight in weight_tensors(pruned, types).values():
            keep = torch.rand(weight.shape, generator=generator) >= share
            weight.mul_(keep.to(weight))
    return pruned


def pruned_accuracy(
    model: nn.Module,
    loader: Iterable[Any],
    share: float = 0.3,
    masks: int = 10,
    generator: torch.Generator | None = None,
    metric: Metric | None = None,
) -> float:
    """Mean accuracy over random masks that zero a share of the convolutional and linear weights: redundancy.

    Args:
        model: companded or not; left as it is.
        loader: what `fit` takes as validation data; passed over once for each mask.
        share: of the weights, in [0, 1].
        masks: how many, >= 1.
        generator: of the masks, on the CPU.
        metric: another `metric(outputs, targets)` than the share of correct classes.

    Raises:
        ValueError: for share or masks out of range.

    Example:
        >>> model = nn.Linear(3, 3, bias=False)
        >>> _ = nn.init.eye_(model.weight)
        >>> data = [(torch.eye(3), torch.arange(3))]
        >>> [round(pruned_accuracy(model, data, share), 2) for share in (0.0, 1.0)]
        [1.0, 0.33]
    """
    if masks < 1:
        raise ValueError(f"pruned_accuracy: masks must be >= 1, got {masks!r}")
    judge = metric or (lambda outputs, targets: (outputs.argmax(-1) == targets).float().mean())
    found = [float(judge(*predict(randomly_pruned(model, share, generator), loader))) for _ in range(masks)]
    return sum(found) / masks
