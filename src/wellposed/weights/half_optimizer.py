"""An optimizer that goes on while the set of trained tensors changes: what is frozen leaves it, what trains again returns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..parameters import select_parameters


def hand_over(
    model: nn.Module,
    optimizer: Optimizer,
    trained: Sequence[str],
    frozen: Sequence[str],
    shelf: dict[str, Any] | None,
) -> None:
    """Let an optimizer go on with another set of tensors.

    Args:
        model: the bare model.
        optimizer: of its tensors.
        trained, frozen: names of what trains from now on, and of what is frozen.
        shelf: where the state of frozen tensors waits for their return; None drops it, and they start anew.

    Raises:
        TypeError: for an optimizer that cannot let tensors go.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> hand_over(model, optimizer, ["weight"], ["bias"], None)
        >>> [len(group["params"]) for group in optimizer.param_groups]
        [1]
    """
    groups = getattr(optimizer, "param_groups", None)
    # These copy their tensors when they are built: taking some out of the groups would change nothing.
    fixed = {"ZeroRedundancyOptimizer", "ZeROOptimizer", "LBFGS"} & {k.__name__ for k in type(optimizer).__mro__}
    if not isinstance(groups, list) or not isinstance(getattr(optimizer, "state", None), dict) or fixed:
        raise TypeError(
            f"HalfFineTuning.new_stage: {type(optimizer).__name__} cannot let go of tensors that are to be frozen; weight "
            "decay would still move them. Build a new optimizer after new_stage"
        )
    named = dict(model.named_parameters())
    _remember_homes(named, groups)
    if shelf is not None:
        shelf.update({name: optimizer.state[named[name]] for name in frozen if named[name] in optimizer.state})
    select_parameters(model, optimizer, trained)
    if shelf is not None:
        optimizer.state.update({named[name]: shelf.pop(name) for name in trained if name in shelf})


def _remember_homes(named: dict[str, nn.Parameter], groups: list[dict[str, Any]]) -> None:
    """Give every parameter a group to come back to: its own, else that of its namesakes in other layers."""
    if any("names" in group for group in groups):
        return
    places = {id(p): number for number, group in enumerate(groups) for p in group["params"]}
    alike = {name: re.sub(r"\d+", "#", name) for name in named}
    homes: dict[str, int] = {}
    for name, p in named.items():
        if id(p) in places:
            homes.setdefault(alike[name], places[id(p)])
    for number, group in enumerate(groups):
        group["names"] = [n for n, p in named.items() if places.get(id(p), homes.get(alike[n], 0)) == number]
