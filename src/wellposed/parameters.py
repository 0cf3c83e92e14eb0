"""Which parameters train, in which optimizer group, and how their gradients are clipped."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .batching import unwrap
from .pair import Pair

_NAMES = "names"
_KEYS = frozenset({"names", "weight_decay", "lr_factor", "owned"})


def parameter_groups(model: nn.Module, wishes: Iterable[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """Optimizer groups of all trainable parameters, with the wishes of the methods carried out.

    A wish is what `Regularizer.parameter_groups` returns: `{"names": [...], "weight_decay": ..., "lr_factor": ...}`
    sets these for the parameters named; `{"names": [...], "owned": True}` keeps them out of the optimizer, because
    the method trains them itself. Every group remembers its names, frozen ones too, under `"names"`, so that
    `select_parameters` can bring them back.

    Raises:
        ValueError: for a wish with an unknown key or parameter, or if two wishes disagree about a parameter.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> groups = parameter_groups(model, [{"names": ["bias"], "weight_decay": 0.0}])
        >>> [(group["names"], group.get("weight_decay")) for group in groups]
        [(['weight'], None), (['bias'], 0.0)]
    """
    named = dict(unwrap(model).named_parameters())
    options: dict[str, dict[str, Any]] = {name: {} for name in named}
    for wish in wishes:
        if unknown := set(wish) - _KEYS:
            raise ValueError(f"parameter_groups: unknown key {sorted(unknown)[0]!r}; allowed: {sorted(_KEYS)}")
        chosen = {key: value for key, value in wish.items() if key != "names"}
        for name in wish["names"]:
            _require_name(name, named, "parameter_groups")
            for key, value in chosen.items():
                if options[name].get(key, value) != value:
                    raise ValueError(
                        f"parameter_groups: two methods disagree about {key} of {name!r}: "
                        f"{options[name][key]} and {value}"
                    )
            options[name].update(chosen)
    groups: dict[tuple[tuple[str, Any], ...], dict[str, Any]] = {}
    for name, parameter in named.items():
        own = options[name]
        if own.get("owned"):
            continue
        settings = tuple(sorted((k, v) for k, v in own.items() if k != "owned"))
        group = groups.setdefault(settings, {"params": [], _NAMES: [], **dict(settings)})
        group[_NAMES].append(name)
        if parameter.requires_grad:
            group["params"].append(parameter)
    return list(groups.values())


def apply_lr_factors(optimizer: Optimizer) -> None:
    """Multiply each group's learning rate by its `lr_factor` (once, before a scheduler is built)."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * group.pop("lr_factor", 1.0)


def select_parameters(model: nn.Module, optimizer: Optimizer, names: Collection[str]) -> None:
    """Train exactly the parameters called `names`: set `requires_grad`, prune and extend the optimizer.

    A newly frozen tensor leaves its group, its gradient and its optimizer state: a gradient of zero would not
    freeze it, because decoupled weight decay and old momentum still move it. A tensor that comes back starts with
    fresh state.

    Raises:
        RuntimeError: under DistributedDataParallel or FSDP, which fix the trainable set when they wrap the model.
        ValueError: for an unknown name, or if nothing would be left to train.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel) or type(model).__name__.startswith("FSDP"):
        raise RuntimeError(
            "replace_parameters: cannot change which parameters train under "
            f"{type(model).__name__}: it reduces only the tensors that were trainable when it wrapped the model; "
            "choose them in attach, before wrapping"
        )
    named = dict(unwrap(model).named_parameters())
    wanted = set(names)
    for name in wanted:
        _require_name(name, named, "replace_parameters")
    if not wanted:
        raise ValueError("replace_parameters: names is empty; at least one parameter must train")
    home = {name: group for group in optimizer.param_groups for name in group.get(_NAMES, ())}
    position = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in named.items():
        home.setdefault(name, position.get(id(parameter), optimizer.param_groups[0]))
    for group in optimizer.param_groups:
        group["params"] = []
    for name, parameter in named.items():
        parameter.requires_grad_(name in wanted)
        if name in wanted:
            home[name]["params"].append(parameter)
        else:
            parameter.grad = None
            optimizer.state.pop(parameter, None)


def trainable_names(model: nn.Module) -> list[str]:
    """Names of the parameters that require a gradient."""
    return [name for name, p in unwrap(model).named_parameters() if p.requires_grad]


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Clip the global gradient norm, of each network of a `Pair` by itself; returns the largest norm before."""
    module = unwrap(model)
    networks = [module.a, module.b] if isinstance(module, Pair) else [module]
    norms = [torch.nn.utils.clip_grad_norm_(network.parameters(), max_norm) for network in networks]
    return torch.stack(norms).max()


def _require_name(name: str, named: dict[str, nn.Parameter], where: str) -> None:
    if name not in named:
        near = difflib.get_close_matches(name, named, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{where}: the model has no parameter {name!r}{hint}")
