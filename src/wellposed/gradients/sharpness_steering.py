"""`RegularizedGradient`: the ordinary gradient corrected by the sharpness-aware one, by a rule of one's choice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..hyperparameter import Hyperparameter, check_strength, value_of
from ..regularizer import Regularizer
from ..step import Step
from .factor_perturbation import LowRankFactors, low_rank_factors, weight_space_moves
from .gradient_rules import PLAIN_AT_ZERO, RULES, Agreement, Rule, Scope, agreement, regularized_gradient
from .sharpness_aware import gradient_norm, perturbed


@dataclass
class SharpnessSteering:
    """The settings of a rule, and the second pass that it needs; what the regularizer and the optimizer share.

    Attributes:
        rho, rule, lam, scope, perturb, every, sagm_alpha, damping, force_second_pass: see `RegularizedGradient`.
        owner: named in errors.
    """

    rho: float | Hyperparameter
    rule: Rule
    lam: float | Hyperparameter
    scope: Scope
    perturb: Literal["factors", "weight"]
    every: int
    sagm_alpha: float
    damping: float
    force_second_pass: bool
    owner: str

    def __post_init__(self) -> None:
        check_strength(self.owner, "rho", self.rho)
        check_strength(self.owner, "lam", self.lam, 0.0, 1.0)
        for name, value, allowed in (
            ("rule", self.rule, RULES),
            ("scope", self.scope, ("global", "tensor")),
            ("perturb", self.perturb, ("factors", "weight")),
        ):
            if value not in allowed:
                raise ValueError(f"{self.owner}: {name} must be one of {list(allowed)}, got {value!r}")
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"{self.owner}: every must be an integer >= 1, got {self.every!r}")
        for name in ("sagm_alpha", "damping"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{self.owner}: {name} must be >= 0, got {getattr(self, name)!r}")

    def due(self, number: int) -> bool:
        """Whether step `number` (from 0) needs a second pass."""
        if number % self.every:
            return False
        nothing = _is_zero(self.rho) or (self.rule in PLAIN_AT_ZERO and _is_zero(self.lam))
        return self.force_second_pass or not nothing

    @contextmanager
    def moved(
        self, parameters: Sequence[Tensor], direction: Sequence[Tensor], factors: Sequence[LowRankFactors]
    ) -> Iterator[None]:
        """Parameters at the sharpness-aware point inside the block; afterwards their own values, bit for bit."""
        radius = value_of(self.rho)
        moves = list(direction)
        if self.perturb == "weight":
            moves, size = weight_space_moves(parameters, direction, factors, self.damping)
            # `perturbed` measures moves in the parameters' own coordinates; the radius is meant for the weights.
            radius = radius * gradient_norm(moves) / size.clamp(min=1e-30)
        if self.rule == "sagm":
            radius = radius - self.sagm_alpha * gradient_norm(direction)
        with perturbed(parameters, moves, radius):
            yield

    def combine(self, gradients: Sequence[Tensor], sharp: Sequence[Tensor]) -> tuple[list[Tensor], Agreement, Tensor]:
        """The corrected gradient (g itself, where s is zero or not finite), the global agreement, and whether s was used."""
        found = agreement(gradients, sharp)
        inside = found if self.scope == "global" else None
        made = regularized_gradient(gradients, sharp, self.rule, value_of(self.lam), self.scope, inside)
        used = found.usable
        for m, g in zip(made, gradients, strict=True):
            torch.where(used, m, g, out=m)  # on the device: no second synchronisation a step
        return made, found, used


def _is_zero(strength: float | Hyperparameter) -> bool:
    return not isinstance(strength, Hyperparameter) and strength == 0


def refuse_sparse(owner: str, named: Sequence[tuple[str, Tensor]]) -> None:
    """Raise for gradients that are no plain dense tensors.

    Raises:
        ValueError: naming the parameter.
    """
    for name, parameter in named:
        gradient = parameter.grad
        if gradient is None:
            continue
        if gradient.layout != torch.strided:
            raise ValueError(
                f"{owner}: the gradient of {name!r} is sparse; use dense gradients (nn.Embedding(sparse=False))"
            )
        if hasattr(gradient, "full_tensor"):
            raise ValueError(f"{owner}: the gradient of {name!r} is sharded (FSDP), which is not supported; use DDP")


class RegularizedGradient(Regularizer):
    """Gradients steered by sharpness, in the manner of GLAD (Peng et al. 2025, arXiv 2507.13089).

    After the ordinary gradient g, the same batch (same dropout masks, running statistics left alone) is evaluated at
    `w + rho g / |g|`; the gradient s found there corrects g by a rule. THE AUTHORS' RULE IS NOT PUBLIC: their text says
    that the SAM gradient is a reference which turns g. The family here fits that, and includes SAM, GSAM and SAGM; see
    `wellposed.gradients.regularized_gradient`. Costs a second forward and backward pass.

    `project` changes nothing unless g and s conflict, which needs a loss that curves down along g: watch
    `gradient_conflict` in the history. In the coordinates of LoRA's factors rho has no fixed meaning, and the usual 0.05
    is weak: try 0.02 to 1, or `perturb="weight"`, where it is a radius in the weights.

    Args:
        rho: radius, >= 0; a float or a `Hyperparameter`. With 0 it is plain training, bit for bit.
        rule: "project", "mix", "steer", "gsam", "sagm" or "sam".
        lam: strength of the rule, in [0, 1]; a float or a `Hyperparameter`.
        scope: "global", or "tensor": inner products of each parameter tensor by itself. The perturbation stays global.
        perturb: "factors": along the gradient of what trains; "weight": for low-rank adapters, the steepest direction of
            the adapted weights, with rho their distance. Other parameters move along their gradient in both.
        every: a second pass only in each k-th step; plain gradients between.
        force_second_pass: make it even where it cannot change anything (rho = 0, lam = 0), for tests.
        sagm_alpha: SAGM's point lies at the radius `rho - sagm_alpha |g|`.
        damping: see `wellposed.gradients.factor_perturbation.weight_space_direction`.
        sync_perturbation: under data parallelism: True, all ranks move along the common gradient; False, each along that
            of its own share (m-sharpness), at the price of a third pass.

    Raises:
        ValueError, TypeError: for an argument out of its range; in training, for sparse or sharded gradients.

    Attributes:
        passes: how many second passes were made.
        skipped: how often none was made, because of `every`, a zero gradient, or nothing to do.
        kept: how often g was kept because s was zero or not finite.

    Example:
        >>> from wellposed import fit
        >>> data = torch.utils.data.TensorDataset(torch.randn(32, 3), torch.arange(32) % 2)
        >>> result = fit(nn.Linear(3, 2), data, epochs=1, regularizer=RegularizedGradient(rho=0.1, rule="mix"))
        >>> result.history[0]["gradient_conflict"], result.history[0]["gradient_cosine"] > 0.9
        (0.0, True)
    """

    requires = frozenset({"closure", "gradients"})
    passes: Tensor
    skipped: Tensor
    kept: Tensor

    def __init__(
        self,
        rho: float | Hyperparameter = 0.05,
        rule: Rule = "mix",
        lam: float | Hyperparameter = 0.5,
        scope: Scope = "global",
        perturb: Literal["factors", "weight"] = "factors",
        every: int = 1,
        force_second_pass: bool = False,
        sagm_alpha: float = 1e-3,
        damping: float = 0.01,
        sync_perturbation: bool = True,
    ) -> None:
        super().__init__()
        self.steering = SharpnessSteering(
            rho, rule, lam, scope, perturb, every, sagm_alpha, damping, force_second_pass, "RegularizedGradient"
        )
        # Modules as attributes, so that a tuner finds them.
        self.rho, self.lam = rho, lam
        self.sync_perturbation = sync_perturbation
        for name in ("passes", "skipped", "kept"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))

    def on_gradients(self, step: Step) -> None:
        named = [(name, p) for name, p in step.model.named_parameters() if p.grad is not None]
        refuse_sparse("RegularizedGradient", named)
        if not named or not self.steering.due(step.number):
            self.skipped += 1
            return
        parameters = [p for _, p in named]
        gradients = [p.grad.clone() for p in parameters if p.grad is not None]
        norm = float(gradient_norm(gradients))
        if norm == 0 or norm - norm != 0:
            self.skipped += 1  # nowhere to go, or a bad step, which is the loop's to judge
            return
        direction = gradients if self.sync_perturbation else _local_gradients(step, parameters)
        factors = low_rank_factors(step.model) if self.steering.perturb == "weight" else []
        with self.steering.moved(parameters, direction, factors):
            step.closure()
        # A parameter that the second pass did not reach has the gradient zero there.
        sharp = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        made, found, used = self.steering.combine(gradients, sharp)
        for parameter in step.model.parameters():
            parameter.grad = None
        for parameter, gradient in zip(parameters, made, strict=True):
            parameter.grad = gradient
        self._count(step, found, used)

    def _count(self, step: Step, found: Agreement, used: Tensor) -> None:
        if self.kept.device != used.device:
            self.to(used.device)  # counters wait where the gradients are, so that counting does not synchronise
        self.passes += 1
        self.kept += used.logical_not()
        step.log("gradient_cosine", torch.where(used, found.cosine, torch.zeros_like(found.cosine)))
        step.log("gradient_conflict", (used & (found.dot < 0)).float())


def _local_gradients(step: Step, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Gradients of this rank's share alone; in one process, those of the batch."""
    unsynchronised: Callable[[], AbstractContextManager[Any]] = getattr(step.model, "no_sync", nullcontext)
    with unsynchronised():
        step.closure()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
