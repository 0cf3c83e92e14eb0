"""Conservative objective models (COMs): a surrogate that is trained not to promise much where a search would go."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..batching import unwrap
from ..hyperparameter import refuse_hyperparameter
from ..regularizer import Regularizer
from ..step import Step, copied_buffers, forked_rng
from .offline_search import offline_optimize
from .output_gradient import OutputFunction, mean_output

_BETA1, _BETA2, _TINY = 0.9, 0.999, 1e-8


class ConservativeObjective(Regularizer):
    """Conservative objective models, COMs (Trabucco et al. 2021, arXiv 2107.06882).

    Adds `alpha * mean_j (f(x_j') - f(x_j))`, where x_j' is reached from the training input x_j by gradient ascent on f.
    Gradients flow into both predictions, and not through the ascent. alpha is learned: Adam on log alpha, so that the
    mean difference stays below `limit`.

    Args:
        limit: largest mean overestimation, in units of the (standardised) target.
        alpha: its first value, > 0.
        alpha_lr: step size of Adam on log alpha, >= 0; 0 keeps alpha as it is.
        steps: of the ascent, >= 1.
        lr: of the ascent, times `sqrt(d)`, > 0.
        output_fn: from the model's outputs to (batch,).

    Raises:
        ValueError: for an argument out of its range.
        TypeError: for a `Hyperparameter`, as alpha is learned here already.

    Attributes:
        gap: mean of `f(x') - f(x)` on the last batch.

    Example:
        >>> from wellposed import fit, squared_error
        >>> data = torch.utils.data.TensorDataset(torch.randn(32, 3), torch.randn(32))
        >>> method = ConservativeObjective(steps=2)
        >>> result = fit(torch.nn.Linear(3, 1), data, epochs=1, criterion=squared_error, regularizer=method)
        >>> bool(method.gap > 0)
        True
    """

    log_alpha: Tensor
    moments: Tensor
    updates: Tensor
    gap: Tensor

    def __init__(
        self,
        limit: float = 0.5,
        alpha: float = 0.1,
        alpha_lr: float = 0.01,
        steps: int = 50,
        lr: float = 0.05,
        output_fn: OutputFunction | None = None,
    ) -> None:
        super().__init__()
        reason = "it is learned here already, so that the overestimation stays below limit"
        refuse_hyperparameter("ConservativeObjective", "alpha", alpha, reason)
        for name, value, holds in (
            ("alpha must be > 0", alpha, alpha > 0),
            ("alpha_lr must be >= 0", alpha_lr, alpha_lr >= 0),
            ("steps must be >= 1", steps, steps >= 1),
            ("lr must be > 0", lr, lr > 0),
        ):
            if not holds:
                raise ValueError(f"ConservativeObjective: {name}, got {value!r}")
        self.limit, self.alpha_lr, self.steps, self.lr = limit, alpha_lr, steps, lr
        self.output_fn = mean_output if output_fn is None else output_fn
        self.register_buffer("log_alpha", torch.tensor(math.log(alpha)))
        self.register_buffer("moments", torch.zeros(2))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("gap", torch.zeros(()))

    def on_batch(self, step: Step) -> None:
        # Once a step and not in `penalty`, which may be evaluated any number of times; cut with the batch.
        model = unwrap(step.model)
        lr = self.lr * math.sqrt(step.inputs[0].numel())
        with copied_buffers(model), forked_rng(model):
            step.extra["conservative_inputs"] = offline_optimize(
                model, step.inputs, self.steps, lr, output_fn=self.output_fn
            )
        self.gap.zero_()

    def penalty(self, step: Step) -> Tensor:
        return self.log_alpha.exp() * self._difference(step)

    def on_backward(self, step: Step) -> None:
        self.gap += self._difference(step).sum() * (step.replicas / step.num_examples)

    def on_step(self, step: Step) -> None:
        """Adam on `alpha * (limit - gap)` in log alpha."""
        gradient = self.log_alpha.exp() * (self.limit - self.gap)
        self.updates += 1
        count = int(self.updates)
        new = torch.stack([gradient, gradient.square()])
        decay = new.new_tensor([_BETA1, _BETA2])
        self.moments.copy_(decay * self.moments + (1 - decay) * new)
        first, second = (self.moments / (1 - decay**count)).unbind()
        self.log_alpha -= self.alpha_lr * first / (second.sqrt() + _TINY)

    def _difference(self, step: Step) -> Tensor:
        """(batch,): `f(x') - f(x)`."""
        found = self.output_fn(step.forward(step.extra["conservative_inputs"]))
        return found - self.output_fn(step.outputs)
