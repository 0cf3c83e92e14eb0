"""The multiplier of `rho * ||g|| <= eps`: its ascent step, and limits and rates that fit a run of any length."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..step import DivergenceError

LEAST_RATIO = 1.2
"""Smallest automatic `eps / rho`. An output bias b has dh/db = 1 on every batch, so `||g||` cannot go below 1."""

LARGE = 1e3
"""A multiplier beyond this says that its limit is out of reach."""

_STATE = ("multiplier", "last_norm", "limit", "rate")


def dual_ascent(lam: Tensor, rate: Tensor, sharpness: Tensor, eps: Tensor, clamp: bool = True) -> Tensor:
    """`lam + rate * (sharpness - eps)`, not below 0 if `clamp`: gradient ascent on the Lagrangian.

    Beside descent in the weights it is the basic differential multiplier method (Platt and Barr, 1987).

    Args:
        lam, rate, sharpness, eps: of one shape, one entry a network; sharpness is `rho * ||g||`.
        clamp: without it a multiplier may become negative, and then rewards sharpness.

    Example:
        >>> dual_ascent(torch.tensor(0.1), torch.tensor(1.0), torch.tensor(0.05), torch.tensor(0.2))
        tensor(0.)
    """
    moved = lam + rate * (sharpness - eps)
    return moved.clamp(min=0.0) if clamp else moved


def half_of_the_first(rho: float, norm: Tensor) -> Tensor:
    """The automatic limit, `eps = rho * max(1.2, norm / 2)`, from the first batch's `||g||`.

    A fixed eps does not carry over between networks: at the same recipe `||g||` grows like the root of the width.

    Example:
        >>> half_of_the_first(0.05, torch.tensor(6.0))
        tensor(0.1500)
    """
    return rho * (norm / 2).clamp(min=LEAST_RATIO)


def rate_for(target: float, steps: int, sharpness: Tensor, eps: Tensor) -> Tensor:
    """The rate at which lam would grow by `target` in `steps` steps, were the sharpness to stay what it is.

    The excess `sharpness - eps` counts as at least a quarter of the sharpness: at a limit close to it, or above,
    the rate would else be without bound, or negative.

    Example:
        >>> rate_for(5.0, 100, torch.tensor(0.3), torch.tensor(0.2))
        tensor(0.5000)
    """
    excess = torch.maximum(sharpness - eps, sharpness / 4)
    return target / (steps * excess.clamp(min=torch.finfo(excess.dtype).tiny))


class NormMultiplier(nn.Module):
    """State of the constraint `rho * ||g|| <= eps`, for one or several networks: multipliers, limits, rates, last norms.

    Args:
        rho: factor of the norm.
        lam: first multiplier.
        eps: limit, or None: half of the first sharpness, see `half_of_the_first`.
        rate: of the ascent, or None: see `rate_for`.
        target: growth over the run that `rate_for` aims at.
        clamp: keep multipliers at or above 0.
        owner: named in errors and warnings.

    Attributes:
        multiplier, last_norm, limit, rate: (networks,); nan where not known yet.
        batches: how many were measured.

    Example:
        >>> state = NormMultiplier(rho=0.1, lam=1.0, eps=0.2, rate=0.5)
        >>> state.measured([3.0], steps=None)
        >>> state.ascend()
        >>> state.multiplier
        tensor([1.0500])
    """

    multiplier: Tensor
    last_norm: Tensor
    limit: Tensor
    rate: Tensor
    batches: Tensor
    batches_of_epoch: Tensor
    active_of_epoch: Tensor

    def __init__(
        self,
        rho: float,
        lam: float,
        eps: float | None = None,
        rate: float | None = None,
        target: float = 5.0,
        clamp: bool = True,
        owner: str = "NormMultiplier",
    ) -> None:
        super().__init__()
        self.rho, self.target, self.clamp, self.owner = rho, target, clamp, owner
        unknown = float("nan")
        for name, number in (("multiplier", lam), ("last_norm", None), ("limit", eps), ("rate", rate)):
            self.register_buffer(name, torch.full((1,), unknown if number is None else float(number)))
        for name in ("batches", "batches_of_epoch", "active_of_epoch"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))
        self._warned: set[str] = set()

    def of(self, networks: int) -> Tensor:
        """(networks,): the multipliers. State that was made for one network is copied to each at first use.

        Raises:
            ValueError: if it was used with another number of networks before.
        """
        if len(self.multiplier) != networks:
            if len(self.multiplier) > 1 or self.batches > 0:
                raise ValueError(
                    f"{self.owner}: it has multipliers for {len(self.multiplier)} networks, and the model has "
                    f"{networks}; use one {self.owner} a model"
                )
            for name in _STATE:
                setattr(self, name, getattr(self, name).expand(networks).clone())
        return self.multiplier

    @torch.no_grad()
    def measured(self, norms: Sequence[float], steps: int | None, learn: bool = True) -> None:
        """Take note of a batch's norms; the first one sets limits and rates that are not known yet.

        Args:
            norms: one for each network.
            steps: planned number of optimizer steps, or None where it is not known.
            learn: whether the multiplier is learned at all.

        Raises:
            DivergenceError: if a norm is not finite.
            ValueError: if a rate is needed and `steps` is None.
        """
        if not all(map(math.isfinite, norms)):
            raise DivergenceError(
                f"{self.owner}: ||dh/dw|| is {list(norms)} on batch {int(self.batches)} (from 0); training has left "
                "the finite numbers"
            )
        found = self.last_norm.new_tensor(norms)
        if learn and self.batches == 0:
            self._begin(found, steps)
        self.last_norm.copy_(found)
        self.batches += 1
        if learn:
            self.batches_of_epoch += 1
            self.active_of_epoch += ((self.rho * found >= self.limit) | (self.multiplier != 0)).any()

    def _begin(self, first: Tensor, steps: int | None) -> None:
        self.limit.copy_(torch.where(torch.isnan(self.limit), half_of_the_first(self.rho, first), self.limit))
        if not bool(torch.isnan(self.rate).any()):
            return
        if steps is None:
            raise ValueError(
                f"{self.owner}: lam_lr='auto' needs the planned number of optimizer steps in a loop of your own; give "
                "total_steps=, or lam_lr= as a number"
            )
        self.rate.copy_(rate_for(self.target, steps, self.rho * first, self.limit))

    @torch.no_grad()
    def ascend(self) -> None:
        """One step of the multipliers by the last norms.

        Raises:
            RuntimeError: if no batch was measured yet.
        """
        if torch.isnan(self.last_norm).any():
            raise RuntimeError(f"{self.owner}.dual_step: call add_grad_ (or penalty_of) on a batch first")
        self.multiplier.copy_(
            dual_ascent(self.multiplier, self.rate, self.rho * self.last_norm, self.limit, self.clamp)
        )
        if bool((self.multiplier > LARGE).any()):
            self.warn_once(
                f"the multiplier has grown to {float(self.multiplier.max()):.3g}: the limit eps / rho = "
                f"{float(self.limit.min()) / self.rho:.3g} seems out of reach; raise eps or lower lam_lr",
                key="large",
            )

    def close_epoch(self, epoch: int) -> None:
        """Warn if the constraint never acted in the `epoch` epochs' last one, and begin to count anew."""
        if self.batches_of_epoch > 0 and self.active_of_epoch == 0:
            self.warn_once(
                f"the constraint was inactive in the whole of epoch {epoch}: rho * ||dh/dw|| stayed below eps = "
                f"{float(self.limit.max()):.3g} and the multiplier at 0, so training was plain; lower eps",
                key="inactive",
            )
        self.batches_of_epoch.zero_()
        self.active_of_epoch.zero_()

    def warn_once(self, message: str, key: str) -> None:
        """A warning, the first time that it is due."""
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(f"{self.owner}: {message}", stacklevel=2)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in _STATE:  # a state of several networks may be loaded before the first batch
            saved = state_dict.get(prefix + name)
            if saved is not None:
                setattr(self, name, getattr(self, name).new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *rest)
