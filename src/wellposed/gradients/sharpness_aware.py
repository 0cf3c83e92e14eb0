"""Sharpness-aware minimisation (SAM): take the gradient at the worst nearby point."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..hyperparameter import Hyperparameter, check_strength, value_of
from ..regularizer import Regularizer
from ..step import Step

_TINY = 1e-12


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Euclidean norm over all tensors together, accumulated in at least float32."""
    norms = torch._foreach_norm([g if g.dtype == torch.float64 else g.float() for g in gradients])
    return torch.stack([n.to(norms[0].device) for n in norms]).norm()


@contextmanager
def perturbed(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], rho: float | Tensor, adaptive: bool = False
) -> Iterator[None]:
    """Move `parameters` by `rho * g / ||g||` inside the block, and give their exact old values back.

    Args:
        parameters: tensors to move, in place.
        gradients: g, one for each.
        rho: radius of the ball, >= 0.
        adaptive: scale-invariant form (ASAM, Kwon et al. 2021): `rho * |w|^2 g / || |w| g ||`.

    Example:
        >>> w, g = torch.tensor([3.0, 4.0]), torch.tensor([0.6, 0.8])
        >>> with perturbed([w], [g], rho=5.0):
        ...     print(w)
        tensor([6., 8.])
        >>> w
        tensor([3., 4.])
    """
    with torch.no_grad():
        old = [p.detach().clone() for p in parameters]
        if adaptive:
            sizes = [p.abs() for p in old]
            scaled = torch._foreach_mul(list(gradients), sizes)
            scale = rho / (gradient_norm(scaled) + _TINY)
            moves = list(torch._foreach_mul(scaled, sizes))
        else:
            scale = rho / (gradient_norm(gradients) + _TINY)
            moves = list(gradients)
        for parameter, move in zip(parameters, moves, strict=True):
            # A scalar tensor as factor: no synchronisation with an accelerator.
            parameter.add_(move * scale.to(move))
    try:
        yield
    finally:
        # Copied back and not subtracted, so that the weights return bit for bit, also after an exception.
        with torch.no_grad():
            torch._foreach_copy_(list(parameters), old)


class SharpnessAwareMinimization(Regularizer):
    """Sharpness-aware minimisation, SAM (Foret et al. 2021, arXiv 2010.01412, eq. 2-3).

    After the ordinary gradient g, the same batch is evaluated at `w + rho * g / ||g||`, and the gradient found there
    replaces g. Costs a second forward and backward pass. With rho = 0 it is plain training.

    Args:
        rho: radius, >= 0; a float or a `Hyperparameter`, which `wellposed.tuning.SelfTuner` can learn.
        adaptive: scale-invariant form (ASAM).

    Raises:
        ValueError: if rho is negative.

    Attributes:
        kept: how often g was kept because the second gradient was not finite.

    Example:
        >>> from wellposed import fit
        >>> data = torch.utils.data.TensorDataset(torch.randn(32, 3), torch.arange(32) % 2)
        >>> result = fit(torch.nn.Linear(3, 2), data, epochs=1, regularizer=SharpnessAwareMinimization(rho=0.05))
    """

    requires = frozenset({"closure", "gradients"})
    kept: Tensor

    def __init__(self, rho: float | Hyperparameter = 0.05, adaptive: bool = False) -> None:
        super().__init__()
        check_strength("SharpnessAwareMinimization", "rho", rho)
        self.rho = rho
        self.adaptive = adaptive
        self.register_buffer("kept", torch.zeros((), dtype=torch.int64))

    def on_gradients(self, step: Step) -> None:
        parameters = [p for p in step.model.parameters() if p.grad is not None]
        gradients = [p.grad.clone() for p in parameters if p.grad is not None]
        rho = value_of(self.rho)
        if (not isinstance(self.rho, Hyperparameter) and rho == 0) or not gradients:
            return
        norm = gradient_norm(gradients)
        if not torch.isfinite(norm) or norm == 0:
            return  # nowhere to go, or a bad step, which is the loop's to judge
        with perturbed(parameters, gradients, rho, self.adaptive):
            step.closure()
        found = [p.grad for p in parameters if p.grad is not None]
        if len(found) < len(parameters) or not torch.isfinite(gradient_norm(found)):
            self.kept += 1
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
