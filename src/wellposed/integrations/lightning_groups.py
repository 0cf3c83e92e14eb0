"""A method's wishes about optimizer groups, carried out while a LightningModule builds its optimizer by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..parameters import parameter_groups

Settings = tuple[tuple[str, Any], ...]


class WishedGroups:
    """Which settings each parameter of a network is to have, and the cutting of a user's groups by them.

    Args:
        network: as the method's `attach` returned it.
        wishes: what `Regularizer.parameter_groups` returned.

    Raises:
        ValueError: for wishes that contradict each other or name no parameter; see `parameter_groups`.

    Example:
        >>> network = nn.Linear(2, 1)
        >>> groups = WishedGroups(network, [{"names": ["bias"], "weight_decay": 0.0}])
        >>> parts = groups.cut({"params": list(network.parameters()), "weight_decay": 0.1})
        >>> [(part["names"], part["weight_decay"]) for part in parts]
        [(['weight'], 0.1), (['bias'], 0.0)]
    """

    def __init__(self, network: nn.Module, wishes: Iterable[dict[str, Any]]) -> None:
        self.named = dict(network.named_parameters())
        self.wishes = list(wishes)
        self._settings: dict[str, Settings] = {}
        for group in parameter_groups(network, self.wishes):
            settings = tuple(sorted((k, v) for k, v in group.items() if k not in ("params", "names")))
            self._settings.update(dict.fromkeys(group["names"], settings))
        self.owned = set(self.named) - set(self._settings)
        self._names = {id(parameter): name for name, parameter in self.named.items()}

    def name_of(self, parameter: Tensor) -> str | None:
        """The name of a parameter in the network, or None for a stranger."""
        return self._names.get(id(parameter))

    def cut(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        """One group of a user's as one for each different wish, in the order of its parameters."""
        given = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        parts: dict[Settings, dict[str, Any]] = {}
        for entry in given:  # a tensor, or a pair of name and tensor
            name = self.name_of(entry[1] if isinstance(entry, tuple) else entry)
            if name in self.owned:
                continue
            settings = () if name is None else self._settings[name]
            part = parts.setdefault(settings, {**group, "params": [], "names": [], **dict(settings)})
            part["params"].append(entry)
            part["names"] += [] if name is None else [name]
        return list(parts.values())

    def adopt(self, optimizer: Optimizer) -> None:
        """Give parameters that are in no group (frozen ones) a home, in case they train later."""
        groups: list[dict[str, Any]] = optimizer.param_groups
        for group in groups:
            group.setdefault("names", [n for p in group["params"] if (n := self.name_of(p)) is not None])
        known = {name for group in groups for name in group["names"]}
        for name, settings in self._settings.items():
            if name not in known:
                fits = (g for g in groups if g["names"] and self._settings[g["names"][0]] == settings)
                next(fits, groups[0])["names"].append(name)

    @contextmanager
    def applied(self) -> Iterator[list[Optimizer]]:
        """Cut the groups of every optimizer that is built inside the block; yields these optimizers.

        Inside, and not afterwards: learning-rate schedulers that a module builds right after its optimizer keep one
        number for each group.
        """
        built: list[Optimizer] = []
        every: Any = Optimizer
        original: Callable[[Optimizer, dict[str, Any]], None] = every.add_param_group

        def add_param_group(optimizer: Optimizer, param_group: dict[str, Any]) -> None:
            if not any(optimizer is one for one in built):
                built.append(optimizer)
            for part in self.cut(param_group):
                factor = part.pop("lr_factor", 1.0)
                original(optimizer, part)
                if factor != 1.0:
                    optimizer.param_groups[-1]["lr"] *= factor

        every.add_param_group = add_param_group
        try:
            yield built
        finally:
            every.add_param_group = original
