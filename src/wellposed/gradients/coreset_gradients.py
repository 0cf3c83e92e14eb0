"""What a coreset compares: gradients of the pool's examples in one tensor, and the Adam history that scales them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ..indexed_dataset import epoch_seed
from ..objective import Criterion
from ..step import Step
from .adam_features import AdamMoments, GradientRows
from .last_layer_gradient import ExampleLosses, last_layer_gradients, last_linear_weight, named_tensor
from .zeroth_order import ZerothOrderGradients, random_directions

Feature = Literal["last_layer_grad", "zo"] | Callable[[Step], Tensor]


@dataclasses.dataclass
class CoresetGradients:
    """Gradients of the candidates, by the way that `feature` names.

    Attributes:
        feature: "last_layer_grad", "zo", or a function of a step with the candidates that returns (candidates, d).
        parameter: name of the tensor; None is the last linear weight that trains.
        criterion: unreduced task loss.
        n_directions, fixed_z, zo_eps: of "zo".
        chunk_size: examples in one forward pass.
        seed: of the directions.
    """

    feature: Feature
    parameter: str | None
    criterion: Criterion
    n_directions: int
    fixed_z: bool
    zo_eps: float
    chunk_size: int | None
    seed: int
    _zeroth: ZerothOrderGradients | None = None

    def rows(self, step: Step, which: Tensor, updates: int) -> GradientRows:
        """Gradients of some examples of a step's batch.

        Args:
            step: with the pool.
            which: positions.
            updates: optimizer steps so far, which choose the directions if they are not fixed.
        """
        if callable(self.feature):
            return self._by_function(self.feature, step, which)
        name = self.name(step)
        tensor = named_tensor(step.model, name)[2]
        losses = ExampleLosses(step, self.criterion, which, self.chunk_size)
        if self.feature == "last_layer_grad":
            if not len(which):  # a rank without candidates
                return GradientRows(tensor.new_zeros((0, tensor.numel()), dtype=torch.float32))
            return GradientRows(last_layer_gradients(losses, name))
        if self._zeroth is None or self._zeroth.parameter != name:
            self._zeroth = ZerothOrderGradients(name, self.zo_eps)
        drawn = torch.Generator().manual_seed(epoch_seed(self.seed, 0 if self.fixed_z else updates))
        directions = random_directions(self.n_directions, tensor, drawn)
        if not len(which):
            return GradientRows(directions.new_zeros((0, len(directions))), directions)
        return self._zeroth(losses, directions)

    def name(self, step: Step) -> str:
        """Of the tensor."""
        return last_linear_weight(step.model) if self.parameter is None else self.parameter

    def optimizer_moments(self, step: Step, like: Tensor, betas: tuple[float, float], eps: float) -> AdamMoments:
        """Adam's own state of the tensor, zeros before its first step.

        Raises:
            ValueError: if the optimizer has no moments.
        """
        optimizer = step.optimizer
        if optimizer is None or not all("betas" in group for group in optimizer.param_groups):
            kind = "None" if optimizer is None else type(optimizer).__name__
            raise ValueError(
                f"MiniBatchCoreset: history='optimizer' reads the moments of Adam or AdamW, and the optimizer is {kind}; "
                "use history='selected', or adam=False"
            )
        state = optimizer.state.get(named_tensor(step.model, self.name(step))[2], {})
        if "exp_avg" not in state:
            return AdamMoments.start(like, betas, eps)
        first, second = (state[name].detach().reshape(-1).to(like) for name in ("exp_avg", "exp_avg_sq"))
        return AdamMoments(first, second, int(state["step"]), betas, eps)

    def _by_function(self, feature: Callable[[Step], Tensor], step: Step, which: Tensor) -> GradientRows:
        inputs, targets, extra = ExampleLosses(step, self.criterion, which, None).chunks[0]
        found = feature(dataclasses.replace(step, inputs=inputs, targets=targets, extra=extra))
        if found.ndim != 2 or len(found) != len(which):
            raise ValueError(
                f"MiniBatchCoreset: feature must return ({len(which)}, d) for {len(which)} candidates, got "
                f"{tuple(found.shape)}"
            )
        return GradientRows(found.detach().to(torch.promote_types(found.dtype, torch.float32)))
