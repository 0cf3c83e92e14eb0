"""What a weight compander asks of the optimizer: weight decay of w instead of v, and the step of adaptive methods."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import ASGD, LBFGS, SGD, AdamW, Optimizer

from .compander_decay import decays_twice, require_companded
from .compander_functions import shrunk_
from .compander_module import Companded, check_choice

SATURATED = 1e-12
"""Below this share of a/b the slope counts as 0: dividing by it would give 0/0."""

# Decay that never enters the gradient. Adam and its kin say so in each group.
_DECOUPLED = frozenset({"AdamW", "Adafactor", "Muon", "Lion", "LAMB"})


@dataclass
class _Pending:
    """What one step keeps between `before` and `after`.

    Attributes:
        taken: groups whose weight decay is done here, and its number.
        shrinking: factor of w (or v) by the id of v, where decay is decoupled.
        old: v before the step, where the optimizer's move is not taken as it is.
        divisors: dw/dv, under the modified step.
        changed: tensors whose gradient was rewritten, and that gradient.
    """

    taken: list[tuple[dict[str, Any], Any]] = field(default_factory=list)
    shrinking: dict[int, Any] = field(default_factory=dict)
    old: list[tuple[Companded, Tensor]] = field(default_factory=list)
    divisors: list[Tensor] = field(default_factory=list)
    changed: list[tuple[Companded, Tensor]] = field(default_factory=list)


class CompanderStep:
    """Weight decay and adaptive steps of a companded model, around the optimizer's own step.

    Two things go wrong if v is given to an optimizer as it is (arXiv 2306.16993, section III-A):

    - Its weight decay would shrink v. With fixed scales the paper penalises w: whatever decay a group holds acts on w
      here, in the gradient for SGD and Adam, in w itself for AdamW and other decoupled ones. The group's own number
      is 0 only while the optimizer steps. With learned scales v decays, and the scales never do.
    - Adam and its kin normalise the factor dw/dv away. The modified step hands them dL/dw and multiplies their move
      by dw/dv: `v + (dw/dv) delta`. Where the slope is 0 in floating point nothing moves.

    Args:
        model: companded.
        optimizer: its optimizer.
        modified: the modified step; "auto" for all but SGD, ASGD and L-BFGS.
        penalty: the weights decay by a penalty in the loss, so that decay in the optimizer is refused.

    Raises:
        ValueError: if nothing is companded, or if the modified step is asked for where v is no parameter.
        TypeError: if the optimizer cannot be stepped around (L-BFGS evaluates the gradient inside of its step).

    Example:
        >>> from wellposed.weights import apply_compander, fold_compander
        >>> model = nn.Sequential(nn.Linear(2, 1))
        >>> names = apply_compander(model)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        >>> companding = CompanderStep(model, optimizer).register()     # hooks: the loop stays as it is
        >>> model(torch.ones(4, 2)).square().mean().backward()
        >>> optimizer.step()
        >>> model = fold_compander(model)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        modified: bool | Literal["auto"] = "auto",
        penalty: bool = False,
    ) -> None:
        check_choice("CompanderStep", "modified", modified, (True, False, "auto"))
        found = require_companded(model, "CompanderStep")
        self.optimizer = optimizer
        self.modified = not isinstance(optimizer, (SGD, ASGD, LBFGS)) if modified == "auto" else modified
        if self.modified and isinstance(optimizer, LBFGS):
            raise TypeError("CompanderStep: LBFGS evaluates gradients inside of its step; pass modified=False")
        for one in found:
            if self.modified and not one.direct:
                raise ValueError(
                    f"CompanderStep: {one.name!r} is companded on top of another parametrization, so that no parameter "
                    "is its v; pass modified=False"
                )
        self.penalty = penalty
        self._by_v = {id(one.v): one for one in found if one.direct}
        self._scales = {id(p) for one in found for p in one.compander.parameters()}
        self._handles: list[Any] = []
        self._pending = _Pending()

    def register(self) -> CompanderStep:
        """Run `before` and `after` as hooks of the optimizer.

        Gradients that are clipped before the step are those of v then, and a gradient scaler must unscale them first
        (`scaler.unscale_(optimizer)`). To clip those of w, call `before` and `after` around clipping and step instead.
        """
        self._handles = [
            self.optimizer.register_step_pre_hook(lambda *_: self.before()),
            self.optimizer.register_step_post_hook(lambda *_: self.after()),
        ]
        return self

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def before(self) -> None:
        """After the backward pass: take weight decay over, and turn gradients of v into those of w.

        Raises:
            ValueError: if weights that a penalty decays would decay in the optimizer as well.
        """
        self._give_back()  # of a step that was never finished
        for group in self.optimizer.param_groups:
            self._take_over(group)
        pending = self._pending
        moving = [(one, one.v.grad) for one in self._by_v.values() if one.v.grad is not None]
        pending.old = [
            (one, one.v.detach().clone()) for one, _ in moving if self.modified or id(one.v) in pending.shrinking
        ]
        if self.modified and moving:
            pending.divisors = [_divisor(one) for one, _ in moving]
            torch._foreach_div_([gradient for _, gradient in moving], pending.divisors)
            pending.changed = moving

    @torch.no_grad()
    def after(self) -> None:
        """After the optimizer's step: scale its move, decay w where decay is decoupled, give the groups back.

        Raises:
            RuntimeError: if another method replaced the gradients that `before` had prepared.
        """
        pending = self._pending
        replaced = [one for one, g in pending.changed if one.v.grad is not None and one.v.grad is not g]
        if replaced:
            self._give_back()
            raise RuntimeError(
                f"WeightCompander: the gradient of {replaced[0].name!r} was replaced after the compander had prepared "
                "it; put WeightCompander after methods that evaluate the batch again, e.g. "
                "Compose(SharpnessAwareMinimization(), WeightCompander())"
            )
        if pending.old:
            moves = torch._foreach_sub([one.v for one, _ in pending.old], [old for _, old in pending.old])
            if self.modified:
                # The divisor is infinite at saturation, where nothing may move.
                torch._foreach_mul_(moves, [slope.where(slope.isfinite(), 0.0) for slope in pending.divisors])
            for (one, old), move in zip(pending.old, moves, strict=True):
                if id(one.v) in pending.shrinking:
                    _shrink_(one, old, pending.shrinking[id(one.v)])
                one.v.copy_(old.add_(move))
        self._give_back()

    def _take_over(self, group: dict[str, Any]) -> None:
        decay = group.get("weight_decay")
        if not decay:
            return
        members = {id(p): self._by_v.get(id(p)) for p in group["params"]}
        ours = {
            key: one
            for key, one in members.items()
            if one is not None and (one.compander.decays_weight or self.modified)
        }
        if not ours and not self._scales & members.keys():
            return
        for one in ours.values():
            if self.penalty and one.compander.decays_weight:
                raise ValueError(decays_twice(one.name, decay))
        decoupled = _decoupled(self.optimizer, group)
        factor = 1.0 - group["lr"] * decay
        signed = -decay if group.get("maximize") else decay
        for parameter in group["params"]:
            key = id(parameter)
            if parameter.grad is None or key in self._scales:
                continue
            if key not in ours:
                # As the optimizer would: the rest of the group does not notice.
                parameter.mul_(factor) if decoupled else parameter.grad.add_(parameter, alpha=signed)
            elif decoupled:
                self._pending.shrinking[key] = factor
            else:
                parameter.grad.add_(_decay_gradient(ours[key]), alpha=signed)
                self._pending.changed.append((ours[key], parameter.grad))
        group["weight_decay"] = 0.0
        self._pending.taken.append((group, decay))

    def _give_back(self) -> None:
        for group, decay in self._pending.taken:
            group["weight_decay"] = decay
        self._pending = _Pending()


def _divisor(one: Companded) -> Tensor:
    """dw/dv in the gradient's dtype, infinite where it is 0 in floating point: the quotient is 0 there."""
    a, b = one.compander.scales()
    steepest: Any = abs(a / b)
    slope = one.compander.slope(one.v.detach()).to(one.v.dtype)
    return slope.where(slope.abs() > SATURATED * steepest, torch.inf)


def _decay_gradient(one: Companded) -> Tensor:
    """Gradient in v of `||w||^2 / 2`, or of `||v||^2 / 2` where the scales are learned."""
    v = one.v.detach()
    if not one.compander.decays_weight:
        return v
    return (one.compander(v) * one.compander.slope(v)).to(v.dtype)


def _shrink_(one: Companded, v: Tensor, factor: float | Tensor) -> None:
    if one.compander.decays_weight:
        shrunk_(v, factor, *one.compander.scales(), one.compander.fn)
    else:
        v.mul_(factor)


def _decoupled(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    named = isinstance(optimizer, AdamW) or type(optimizer).__name__ in _DECOUPLED
    return bool(group.get("decoupled_weight_decay", named))
