"""A trainer's optimizer with the wishes of a method carried out, and its own weight-decay exclusions kept."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..batching import unwrap
from ..parameters import parameter_groups

_WISHES = ("weight_decay", "lr_factor")


def regroup(
    optimizer: Optimizer, model: nn.Module, wishes: Iterable[dict[str, Any]], decayed: Collection[str] = ()
) -> None:
    """Split the groups of a fresh optimizer by the wishes of `Regularizer.parameter_groups`, in place.

    Every group remembers the names of its parameters, frozen ones too, so that `Step.replace_parameters` can bring
    them back to where the trainer would have put them.

    Args:
        optimizer: without state yet, so of any class.
        model: whose parameters it holds.
        wishes: see `wellposed.parameters.parameter_groups`.
        decayed: names that the trainer's weight decay applies to; decides the group of frozen parameters.

    Raises:
        ValueError: for wishes that name no parameter, or contradict each other.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
        >>> regroup(optimizer, model, [{"names": ["bias"], "lr_factor": 10.0}])
        >>> [(group["names"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
        [(['weight'], 0.1, 0.5), (['bias'], 1.0, 0.5)]
    """
    named = dict(unwrap(model).named_parameters())
    names = {id(parameter): name for name, parameter in named.items()}
    chosen = {
        name: {key: group[key] for key in _WISHES if key in group}
        for group in parameter_groups(model, wishes)
        for name in group["names"]
    }  # a name that is missing is owned by a method
    old = list(optimizer.param_groups)
    members = [[names.get(id(p), "") for p in group["params"]] for group in old]
    known = {name for group in members for name in group}
    for name, parameter in named.items():
        if name in chosen and name not in known and not parameter.requires_grad:
            home = 1 if len(old) == 2 and decayed and name not in decayed else 0
            members[home].append(name)
    new: list[dict[str, Any]] = []
    for group, own in zip(old, members, strict=True):
        by_id = {names.get(id(p), ""): p for p in group["params"]}
        rest = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        parts: dict[tuple[tuple[str, float], ...], dict[str, Any]] = {}
        if not own:
            parts[()] = {**rest, "params": [], "names": []}
        for name in own:
            if name and name not in chosen:
                continue
            wish = tuple(sorted(chosen.get(name, {}).items()))
            part = parts.setdefault(wish, {**rest, "params": [], "names": [], **dict(wish)})
            part["names"].append(name)
            if name in by_id:
                part["params"].append(by_id[name])
        new.extend(parts.values())
    for group in new:
        group["lr"] = group["lr"] * group.pop("lr_factor", 1.0)
    optimizer.param_groups[:] = new
