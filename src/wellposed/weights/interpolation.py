"""Between old and new weights: WiSE-FT's interpolation, and the half-reset from which half fine-tuning came."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..hyperparameter import refuse_hyperparameter
from ..regularizer import Regularizer

State = Mapping[str, Tensor]


def interpolate_weights(base: State, tuned: State, alpha: float) -> dict[str, Tensor]:
    """`base + alpha (tuned - base)`, tensor by tensor: WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903).

    The rival that everyone should try before anything else against forgetting: it needs no other training, and one run
    gives the whole front from alpha = 0 (old) to 1 (new).

    Args:
        base: state dict before fine-tuning.
        tuned: state dict after it, with the same names and shapes.
        alpha: in [0, 1].

    Returns:
        A state dict. Tensors that are no floating point numbers (counters) are those of `tuned`.

    Raises:
        ValueError: for alpha out of range, or states that differ in a name or shape.

    Example:
        >>> interpolate_weights({"w": torch.tensor([0.0])}, {"w": torch.tensor([4.0])}, 0.25)
        {'w': tensor([1.])}
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"interpolate_weights: alpha must lie in [0, 1], got {alpha!r}")
    _check_alike("interpolate_weights", base, tuned)
    with torch.no_grad():
        # lerp gives both ends exactly.
        return {
            name: torch.lerp(base[name].to(new), new, alpha) if new.is_floating_point() else new.clone()
            for name, new in tuned.items()
        }


def half_reset(tuned: State, base: State, mask: Mapping[str, bool | Tensor]) -> dict[str, Tensor]:
    """The tuned weights with the masked half set back to the base: the pilot study of HFT (arXiv 2404.18466, section 2).

    Args:
        tuned: state dict after fine-tuning.
        base: state dict before it, with the same names and shapes.
        mask: by name, True where the tuned value stays; False or a bool tensor elsewhere, as `HalfFineTuning.mask` gives it.
            What it does not name stays tuned.

    Returns:
        A state dict.

    Raises:
        ValueError: for states that differ in a name or shape, or a mask with an unknown name or another shape.

    Example:
        >>> half_reset({"a": torch.ones(1), "b": torch.ones(1)}, {"a": torch.zeros(1), "b": torch.zeros(1)}, {"a": False})
        {'a': tensor([0.]), 'b': tensor([1.])}
    """
    _check_alike("half_reset", base, tuned)
    for name, kept in mask.items():
        if name not in tuned:
            raise ValueError(f"half_reset: mask names {name!r}, which the state dicts do not hold")
        if isinstance(kept, Tensor) and kept.shape != tuned[name].shape:
            raise ValueError(
                f"half_reset: mask of {name!r} has shape {tuple(kept.shape)}, not {tuple(tuned[name].shape)}"
            )
    found = {}
    for name, new in tuned.items():
        kept = mask.get(name, True)
        old = base[name].to(new)
        if isinstance(kept, Tensor):
            found[name] = torch.where(kept.to(new.device), new, old).detach()
        else:
            found[name] = (new if kept else old).detach().clone()
    return found


class WeightInterpolation(Regularizer):
    """WiSE-FT as a method: trains as usual, and `finish` returns `start + alpha (trained - start)`.

    Over several stages (several `fit` calls) each interpolates between its own start and end.

    Args:
        alpha: share of the way from the start to the trained weights, in [0, 1]; 1 is plain training.

    Raises:
        ValueError: for alpha out of range.
        TypeError: for a `Hyperparameter`: no loss in training depends on alpha. One run gives the models of all alphas:
            keep both state dicts, and choose with `interpolate_weights` on validation data.

    Example:
        >>> from wellposed import fit
        >>> data = torch.utils.data.TensorDataset(torch.randn(32, 3), torch.arange(32) % 2)
        >>> model = fit(nn.Linear(3, 2), data, epochs=1, regularizer=WeightInterpolation(0.7)).model
    """

    def __init__(self, alpha: float = 0.5) -> None:
        super().__init__()
        reason = "no loss in training depends on it; choose it afterwards, with interpolate_weights"
        refuse_hyperparameter("WeightInterpolation", "alpha", alpha, reason)
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"WeightInterpolation: alpha must lie in [0, 1], got {alpha!r}")
        self.alpha = float(alpha)
        self._start: dict[str, Tensor] = {}

    def attach(self, model: nn.Module) -> nn.Module:
        self._start = {name: value.detach().clone() for name, value in model.state_dict().items()}
        return model

    def finish(self, model: nn.Module) -> nn.Module:
        model.load_state_dict(interpolate_weights(self._start, model.state_dict(), self.alpha))
        self._start = {}
        return model

    def get_extra_state(self) -> dict[str, Any]:
        """What an exact resume needs: the weights at the start."""
        return {"start": self._start}

    def set_extra_state(self, state: Any) -> None:
        """Continue from `get_extra_state`."""
        self._start = state["start"]


def _check_alike(owner: str, base: State, tuned: State) -> None:
    if unknown := sorted(set(base) ^ set(tuned)):
        where = "base" if unknown[0] in base else "tuned"
        raise ValueError(f"{owner}: base and tuned must hold the same names; {unknown[0]!r} is in {where} alone")
    for name, value in base.items():
        if value.shape != tuned[name].shape:
            raise ValueError(
                f"{owner}: {name!r} has shape {tuple(value.shape)} in base and {tuple(tuned[name].shape)} in tuned"
            )
