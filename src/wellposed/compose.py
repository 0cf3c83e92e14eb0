"""`Compose`: several methods as one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .regularizer import Regularizer, leaves
from .step import Step


class Compose(Regularizer):
    """Run several methods in the order given; itself a `Regularizer`.

    `finish` runs in the reverse order, so that what was wrapped last is unwrapped first; methods that changed nothing
    at `attach` run before all that did: an average or the best epoch finds the tensors that it saw in training.

    Args:
        regularizers: the methods; a nested `Compose` is taken apart.

    Raises:
        TypeError: for anything that is no `Regularizer`.
        ValueError: if two of them replace the task loss: the second would silently win; or if one rewrites the batch
            after another has given each network of a `Pair` its own.

    Example:
        >>> class Ridge(Regularizer):
        ...     def penalty(self, step):
        ...         return sum(p.square().sum() for p in step.model.parameters())
        >>> both = Compose(Ridge(), Ridge())
        >>> len(both.penalty(Step(nn.Linear(2, 1))))
        2
    """

    def __init__(self, *regularizers: Regularizer) -> None:
        super().__init__()
        for regularizer in regularizers:
            if not isinstance(regularizer, Regularizer):
                raise TypeError(f"Compose: every argument must be a Regularizer, got {type(regularizer).__name__}")
        self.regularizers = nn.ModuleList(leaves(regularizers))
        owners = [type(r).__name__ for r in self if r.replaces_loss]
        if len(owners) > 1:
            raise ValueError(f"Compose: at most one method may replace the task loss, got {' and '.join(owners)}")
        pairing = ""
        for r in self:
            if pairing and type(r).on_batch is not Regularizer.on_batch:
                name = type(r).__name__
                raise ValueError(
                    f"Compose: {pairing} gives each network its own batch, so {name}, which acts on the batch, must come "
                    f"before it: Compose({name}(...), {pairing}(...))"
                )
            pairing = type(r).__name__ if r.pairs_batch else pairing
        self.requires = frozenset().union(*(r.requires for r in self))
        self.coupled = any(r.coupled for r in self)
        self.pairs_batch = bool(pairing)

    def __iter__(self) -> Any:
        return iter(self.regularizers)

    def __len__(self) -> int:
        return len(self.regularizers)

    @property
    def acts_in(self) -> frozenset[str]:
        return frozenset().union(*(r.acts_in for r in self))

    @property
    def replaces_loss(self) -> bool:
        return any(r.replaces_loss for r in self)

    def attach(self, model: nn.Module) -> nn.Module:
        for regularizer in self:
            model = regularizer.attach(model)
        return model

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        return [group for regularizer in self for group in regularizer.parameter_groups(model)]

    def on_batch(self, step: Step) -> None:
        for regularizer in self:
            regularizer.on_batch(step)

    def loss(self, step: Step) -> Tensor | None:
        # Each is asked, so that a method may hand the task loss back by returning None.
        return next((value for r in self if (value := r.loss(step)) is not None), None)

    def penalty(self, step: Step) -> list[Tensor] | None:
        terms: list[Tensor] = []
        for regularizer in self:
            value = regularizer.penalty(step)
            if value is not None:
                terms.extend(value if isinstance(value, list) else [value])
        return terms or None

    def on_backward(self, step: Step) -> None:
        for regularizer in self:
            regularizer.on_backward(step)

    def on_gradients(self, step: Step) -> None:
        for regularizer in self:
            regularizer.on_gradients(step)

    def on_step(self, step: Step) -> None:
        for regularizer in self:
            regularizer.on_step(step)

    def on_epoch(self, step: Step) -> None:
        for regularizer in self:
            regularizer.on_epoch(step)

    def finish(self, model: nn.Module) -> nn.Module:
        for has_attached in (False, True):
            for regularizer in reversed(list(self)):
                if (type(regularizer).attach is not Regularizer.attach) == has_attached:
                    model = regularizer.finish(model)
        return model
