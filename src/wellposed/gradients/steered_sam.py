"""`SteeredSAM`: the rules of `RegularizedGradient` around any optimizer, for a loop without this library's contract."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..batching import unwrap
from ..hyperparameter import refuse_hyperparameter
from ..step import copied_buffers, random_numbers, restore_random_numbers
from .factor_perturbation import low_rank_factors
from .gradient_rules import Rule, Scope
from .sharpness_aware import gradient_norm
from .sharpness_steering import SharpnessSteering, refuse_sparse

_SETTINGS = ("rho", "lam", "sagm_alpha", "every", "rule", "scope")


class SteeredSAM(Optimizer):
    """SAM, GSAM, SAGM and the rules `project`, `mix` and `steer` (see `RegularizedGradient`) around any optimizer.

    `step(closure)` calls the closure twice: at the weights, and at `w + rho g / |g|`, with the same random numbers. The
    closure runs forward and backward over ALL micro-batches of the step and returns the loss; gradients are zeroed here.
    Groups and state are those of the wrapped optimizer, so that learning rate schedules work on this one.

        optimizer = SteeredSAM(torch.optim.AdamW(model.parameters(), 1e-3), rho=0.1, model=model)
        def closure():
            loss = criterion(model(x), y)
            loss.backward()
            return loss
        optimizer.step(closure)

    Args:
        base_optimizer: any optimizer that steps without a closure.
        rho: radius, >= 0. May be changed between steps.
        rule, lam, scope, perturb, every, sagm_alpha, damping, force_second_pass: as for `RegularizedGradient`.
        share_rng: repeat the first pass's random numbers (dropout masks) in the second.
        model: needed for `perturb="weight"`, and where layers keep running statistics (batch norm): the second pass then
            works on copies of them.
        scaler: a gradient scaler, whose `scale(loss).backward()` the closure calls. Both passes are unscaled here, and
            the step goes through `scaler.step`; call `scaler.update()` afterwards, and no `unscale_`.

    Raises:
        TypeError: for a base that is no optimizer, or a `Hyperparameter` (only a tuner could learn it).
        ValueError: for an argument out of its range, a base that needs a closure itself (LBFGS), or sparse gradients.

    Attributes:
        last_stats: `cos`, `conflict`, `g_norm` and `gs_norm` of the last second pass, as tensors; empty before.
        number, skipped: steps in all, and those left out because the gradient was not finite.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> optimizer = SteeredSAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1)
        >>> def closure():
        ...     loss = model(torch.ones(4, 2)).square().mean()
        ...     loss.backward()
        ...     return loss.item()
        >>> optimizer.step(closure) > optimizer.step(closure)
        True
    """

    def __init__(
        self,
        base_optimizer: Optimizer,
        rho: float = 0.05,
        rule: Rule = "mix",
        lam: float = 0.5,
        sagm_alpha: float = 1e-3,
        scope: Scope = "global",
        perturb: Literal["factors", "weight"] = "factors",
        share_rng: bool = True,
        every: int = 1,
        damping: float = 0.01,
        force_second_pass: bool = False,
        model: nn.Module | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        _check_base(base_optimizer)
        for name, value in (("rho", rho), ("lam", lam)):
            refuse_hyperparameter("SteeredSAM", name, value, "no tuner runs it here; use RegularizedGradient")
        if perturb == "weight" and model is None:
            raise ValueError("SteeredSAM: perturb='weight' needs model=, whose low-rank layers it looks for")
        self.steering = SharpnessSteering(
            rho, rule, lam, scope, perturb, every, sagm_alpha, damping, force_second_pass, "SteeredSAM"
        )
        self.base_optimizer, self.share_rng = base_optimizer, share_rng
        self.model, self.scaler = model, scaler if scaler is not None and scaler.is_enabled() else None
        self.number = self.skipped = 0
        self.last_stats: dict[str, Tensor] = {}
        super().__init__(base_optimizer.param_groups, base_optimizer.defaults)
        self.param_groups, self.state = base_optimizer.param_groups, base_optimizer.state

    @property
    def rho(self) -> Any:
        """The radius; may be set, e.g. by a schedule."""
        return self.steering.rho

    @rho.setter
    def rho(self, value: float) -> None:
        if not value >= 0:
            raise ValueError(f"SteeredSAM: rho must be >= 0, got {value}")
        self.steering.rho = value

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of the wrapped optimizer with the corrected gradient.

        Args:
            closure: forward and backward over the whole batch; returns the loss.

        Returns:
            What the closure returned at the weights themselves.

        Raises:
            ValueError: without a closure, or for sparse gradients.
        """
        if closure is None:
            raise ValueError(
                "SteeredSAM.step: closure is missing; it must run forward and backward, and return the loss"
            )
        device = next((p.device for group in self.param_groups for p in group["params"]), torch.device("cpu"))
        with torch.enable_grad():
            self.zero_grad()
            random = random_numbers(device)
            loss = closure()
            number, self.number = self.number, self.number + 1
            finite = not self.steering.due(number) or self._second_pass(closure, random, device)
        if self.scaler is None:
            if finite:
                self.base_optimizer.step()
        else:
            self.scaler.step(self.base_optimizer)
        return loss

    def _second_pass(self, closure: Callable[[], Any], random: dict[str, Tensor], device: torch.device) -> bool:
        """Correct the gradients; False, and nothing done, where they are not finite."""
        named = [(f"parameter {i}", p) for i, p in enumerate(self._trained())]
        refuse_sparse("SteeredSAM", named)
        parameters = [p for _, p in named]
        scale = 1.0 if self.scaler is None else float(self.scaler.get_scale())
        gradients = [p.grad / scale for p in parameters if p.grad is not None]
        norm = float(gradient_norm(gradients)) if gradients else 0.0
        if norm - norm != 0:
            self.skipped += 1  # a scaler sees it too, and skips the step itself
            return False
        if norm == 0:
            return True  # nowhere to go
        factors = low_rank_factors(self.model) if self.model is not None and self.steering.perturb == "weight" else []
        after = random_numbers(device)
        module = None if self.model is None else unwrap(self.model)
        with self.steering.moved(parameters, gradients, factors):
            self.zero_grad()
            if self.share_rng:
                restore_random_numbers(random, device)
            with nullcontext() if module is None else copied_buffers(module):
                closure()
        if self.share_rng:
            restore_random_numbers(after, device)
        sharp = [torch.zeros_like(p) if p.grad is None else p.grad / scale for p in parameters]
        made, found, used = self.steering.combine(gradients, sharp)
        self.zero_grad()
        for parameter, gradient in zip(parameters, made, strict=True):
            # A scaler unscales once more when it steps; its scale is a power of two, so that this loses nothing.
            parameter.grad = gradient * scale
        self.last_stats = {
            "cos": found.cosine,
            "conflict": used & (found.dot < 0),
            "g_norm": found.norm,
            "gs_norm": found.sharp_norm,
        }
        return True

    def _trained(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Let go of all gradients."""
        self.base_optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the wrapped optimizer."""
        if "state" not in self.__dict__ or self.param_groups is not self.base_optimizer.param_groups:
            super().add_param_group(param_group)  # while the base class sets itself up
        else:
            self.base_optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state, with the settings of the rule and the number of steps."""
        settings = {name: getattr(self.steering, name) for name in _SETTINGS}
        return {**self.base_optimizer.state_dict(), "steering": settings, "number": self.number}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        rest = {key: value for key, value in state_dict.items() if key not in ("steering", "number")}
        self.base_optimizer.load_state_dict(rest)
        self.param_groups, self.state = self.base_optimizer.param_groups, self.base_optimizer.state
        for name, value in state_dict["steering"].items():
            setattr(self.steering, name, value)
        self.number = int(state_dict["number"])


def _check_base(base: Any) -> None:
    if not isinstance(base, Optimizer):
        raise TypeError(f"SteeredSAM: base_optimizer must be an optimizer, got {type(base).__name__}")
    closure = inspect.signature(type(base).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"SteeredSAM: base_optimizer {type(base).__name__} needs a closure itself; use one that steps from .grad"
        )
