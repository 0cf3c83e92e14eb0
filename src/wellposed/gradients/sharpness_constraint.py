"""`SurrogateSharpness` (IGNITE and IGNITE-2): constrain how much a surrogate's mean prediction depends on its weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..hyperparameter import Hyperparameter, check_strength
from ..numerics.tree import global_norm
from ..regularizer import Regularizer
from ..step import Step
from .multiplier import NormMultiplier
from .output_gradient import Curvature, MeanPrediction, OutputFunction, cut_inputs
from .surrogate_ensemble import networks_of


class SurrogateSharpness(Regularizer):
    r"""Surrogate sharpness, IGNITE and IGNITE-2 (Dao et al., NeurIPS 2024, arXiv 2503.04242).

    With `h(w) = mean_j f_w(x_j)`, the mean prediction on a batch, training minimises

        loss(w)   subject to   rho ||dh/dw|| <= eps           (mode "constraint": IGNITE)
        loss(w) + lam rho ||dh/dw||                           (mode "penalty": IGNITE-2)

    The constraint's multiplier is learned: `lam <- max(0, lam + lam_lr (rho ||dh/dw|| - eps))` after every step. The
    gradient of the norm, `H g / ||g||`, is added to the loss's gradient between backward and step, for ALL
    micro-batches of the step together. In a loop of your own:

        loss.backward()
        sharpness.add_grad_(model, x)        # after unscaling, before clipping
        optimizer.step(); sharpness.dual_step()

    or `(loss + sharpness.penalty_of(model, x)).backward()` in the place of `add_grad_`, at the price of one more graph.
    A `SurrogateEnsemble` or a `Pair` has one multiplier a network. Under data parallelism the gradients are averaged
    over the ranks first, so that all agree; sharded parameters (FSDP) are not supported. In a `Compose`, methods that
    evaluate the batch again and replace the gradient (SAM) come before it.

    Args:
        rho: radius of the ball of weights, > 0.
        eps: limit of the sharpness, > 0; "half" is `rho * max(1.2, half of the first ||dh/dw||)`.
        lam: first (constraint) or only (penalty) multiplier, >= 0. In mode "penalty" also a `Hyperparameter`: the term
            then enters the loss, differentiated twice, so that a tuner can learn lam.
        lam_lr: rate of the multiplier, > 0; "auto" lets lam grow by `lam_target` over the run, were the sharpness to
            stay what it is on the first batch.
        mode: "constraint" or "penalty".
        hvp: "exact" (double backward), or "finite_difference", for networks that cannot be differentiated twice.
        r: distance of the finite difference's probe, > 0.
        clamp: keep the multiplier at or above 0. The authors' code does not.
        params: which parameters count: names, or a function of the name; all that require a gradient by default.
        output_fn: from a network's outputs to (batch,); by default the only output, or the first of a tuple.
        lam_target: see `lam_lr`, > 0.
        total_steps: planned optimizer steps, for "auto" in a loop of your own; `fit` knows them.

    Attributes:
        state: multipliers, limits (eps), rates (lam_lr) and last norms as buffers, one entry a network.

    Raises:
        ValueError: for an argument out of its range, an empty batch, nothing to train, or a network whose output is
            not one value an example.
        DivergenceError: if the norm is not finite, naming the step.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))
        >>> sharpness = SurrogateSharpness(lam=1.0, mode="penalty")
        >>> model(torch.ones(4, 3)).square().mean().backward()
        >>> before = model[0].weight.grad.clone()
        >>> sharpness.add_grad_(model, torch.ones(4, 3))
        >>> bool((model[0].weight.grad != before).any())
        True
    """

    def __init__(
        self,
        rho: float = 0.05,
        eps: float | Literal["half"] = "half",
        lam: float | Hyperparameter = 1e-3,
        lam_lr: float | Literal["auto"] = "auto",
        mode: Literal["constraint", "penalty"] = "constraint",
        hvp: Curvature = "exact",
        r: float = 0.05,
        clamp: bool = True,
        params: Collection[str] | Callable[[str], bool] | None = None,
        output_fn: OutputFunction | None = None,
        lam_target: float = 5.0,
        total_steps: int | None = None,
    ) -> None:
        super().__init__()
        _check(rho=rho, eps=eps, lam_lr=lam_lr, r=r, lam_target=lam_target, total_steps=total_steps)
        for name, value, allowed in (
            ("mode", mode, ("constraint", "penalty")),
            ("hvp", hvp, ("exact", "finite_difference")),
        ):
            if value not in allowed:
                raise ValueError(f"SurrogateSharpness: {name} must be one of {list(allowed)}, got {value!r}")
        check_strength("SurrogateSharpness", "lam", lam)
        if isinstance(lam, Hyperparameter) and mode == "constraint":
            raise ValueError(
                "SurrogateSharpness: lam is a Hyperparameter, but mode 'constraint' learns the multiplier itself; "
                "use mode='penalty', or a number"
            )
        if params is not None and not callable(params) and not len(params):
            raise ValueError("SurrogateSharpness: params is empty; name at least one parameter")
        self.rho, self.eps, self.lam, self.mode, self.hvp, self.r = rho, eps, lam, mode, hvp, r
        self.params = params if params is None or callable(params) else frozenset(params)
        self.output_fn, self.total_steps = output_fn, total_steps
        # Learned from outside, the term is part of the loss; then micro-batches are measured one by one.
        self.coupled = isinstance(lam, Hyperparameter)
        double = {"double_backward"} if hvp == "exact" or self.coupled else set()
        self.requires = frozenset(double if self.coupled else {"gradients"} | double)
        self.state = NormMultiplier(
            rho,
            float("nan") if isinstance(lam, Hyperparameter) else lam,
            None if isinstance(eps, str) else eps,
            None if isinstance(lam_lr, str) else lam_lr,
            lam_target,
            clamp,
            "SurrogateSharpness",
        )

    @property
    def multiplier(self) -> Tensor:
        """The current lam, (networks,)."""
        return self.lam.value.reshape(-1) if isinstance(self.lam, Hyperparameter) else self.state.multiplier

    @property
    def last_norm(self) -> Tensor:
        """`||dh/dw||` on the last batch, (networks,); nan before the first."""
        return self.state.last_norm

    # ── in a loop of your own ─────────────────────────────────────────────────────────────────────────────────────
    def add_grad_(self, model: nn.Module, x: Any, micro_batches: int = 1) -> None:
        """Add `lam * rho * (gradient of ||dh/dw||)` to `.grad`, and measure the norm for `dual_step`.

        Args:
            model: after `backward`; under mixed precision after unscaling.
            x: inputs of the whole optimizer step, (batch, ...).
            micro_batches: parts into which they are cut, to bound memory; the result does not depend on it.
        """
        replicas = dist.get_world_size() if isinstance(model, nn.parallel.DistributedDataParallel) else 1
        self._act(model, x, micro_batches, replicas, self.total_steps)

    def penalty_of(self, model: nn.Module, x: Any) -> Tensor:
        """`lam * rho * ||dh/dw||`, summed over networks: a scalar to add to a loss, differentiable in w and in lam.

        In mode "constraint" it also measures the norm for `dual_step`.
        """
        means = self._means(model, x)
        lam = self._lam(len(means))
        fixed = self.mode == "penalty" and not isinstance(self.lam, Hyperparameter)
        if fixed and not bool(lam.any()):
            return lam.new_zeros(())
        norms = [mean.norm() for mean in means]
        if self.mode == "constraint":
            self.state.measured([float(norm.detach()) for norm in norms], self.total_steps)
        # A copy: `dual_step` may write the multiplier before the caller's backward pass reads it.
        return torch.stack([one * self.rho * norm for one, norm in zip(lam.clone(), norms, strict=True)]).sum()

    def dual_step(self) -> None:
        """Move the multiplier by what the last batch showed; call it after the optimizer's step.

        Raises:
            RuntimeError: if no batch was measured yet.
        """
        if self.mode == "constraint":
            self.state.ascend()

    # ── in the contract ───────────────────────────────────────────────────────────────────────────────────────────
    @property
    def acts_in(self) -> frozenset[str]:
        learned = isinstance(self.lam, Hyperparameter)
        off = {"on_gradients"} if learned else {"penalty"}
        return super().acts_in - off - ({"on_step", "on_epoch"} if self.mode == "penalty" else set())

    def attach(self, model: nn.Module) -> nn.Module:
        for network, _ in networks_of(model, None):
            MeanPrediction(network, [], select=self._select(network))
        return model

    def penalty(self, step: Step) -> Tensor | None:
        return self.penalty_of(step.model, step.inputs) if isinstance(self.lam, Hyperparameter) else None

    def on_gradients(self, step: Step) -> None:
        if isinstance(self.lam, Hyperparameter):
            return
        self._act(step.model, step.inputs, step.micro_batches, step.replicas, self.total_steps or step.total)
        step.log("surrogate_sharpness", self.rho * self.last_norm.mean())
        step.log("sharpness_multiplier", self.multiplier.mean())

    def on_step(self, step: Step) -> None:
        self.dual_step()

    def on_epoch(self, step: Step) -> None:
        if self.mode == "constraint":
            self.state.close_epoch(step.epoch)

    # ── inside ────────────────────────────────────────────────────────────────────────────────────────────────────
    def _act(self, model: nn.Module, x: Any, micro_batches: int, replicas: int, total_steps: int | None) -> None:
        if isinstance(self.lam, Hyperparameter):
            raise RuntimeError("SurrogateSharpness.add_grad_: lam is a Hyperparameter; add penalty_of to the loss")
        means = self._means(model, x, micro_batches, replicas)
        lam = self._lam(len(means)).tolist()
        if self.mode == "penalty" and not any(lam):
            return
        found = [m.gradient(self.hvp == "exact" and one != 0) for m, one in zip(means, lam, strict=True)]
        norms = [global_norm(gradient) for gradient in found]
        self._check_limit(found, means)
        self.state.measured([float(norm) for norm in norms], total_steps, learn=self.mode == "constraint")
        for mean, gradient, norm, one in zip(means, found, norms, lam, strict=True):
            if one == 0 or norm == 0:
                continue  # skipped, and not multiplied by zero: training stays bit for bit what it is without
            _add_grad(mean.parameters, mean.norm_gradient(gradient, self.hvp, self.r), one * self.rho)

    def _means(self, model: nn.Module, x: Any, micro_batches: int = 1, replicas: int = 1) -> list[MeanPrediction]:
        means = []
        for network, inputs in networks_of(model, x):
            cuts, sizes = cut_inputs(inputs, micro_batches)
            size: float = sum(sizes)
            if replicas > 1:
                total = torch.tensor(size, dtype=torch.float32, device=next(network.parameters()).device)
                dist.all_reduce(total)
                size = float(total)
            parts = [(part, one / size) for part, one in zip(cuts, sizes, strict=True)]
            combine = _sum_over_ranks if replicas > 1 else None
            first = bool(self.state.batches == 0)
            means.append(MeanPrediction(network, parts, self.output_fn, self._select(network), combine, first))
        return means

    def _lam(self, networks: int) -> Tensor:
        if not isinstance(self.lam, Hyperparameter):
            return self.state.of(networks)
        value: Tensor = self.lam.value.reshape(-1)
        if len(value) not in (1, networks):
            raise ValueError(
                f"SurrogateSharpness: lam must hold one value, or {networks}, one a network; it holds {len(value)}"
            )
        return value.expand(networks)

    def _check_limit(self, found: Sequence[Sequence[Tensor]], means: Sequence[MeanPrediction]) -> None:
        """Warn of a limit below the floor that an output bias sets, which no training can reach."""
        if self.mode == "penalty" or isinstance(self.eps, str) or self.eps / self.rho >= 1.1 or self.state.batches > 0:
            return
        for gradients, mean in zip(found, means, strict=True):
            for name, gradient in zip(mean.names, gradients, strict=True):
                single = gradient.ndim <= 1 and int((gradient != 0).sum()) == 1
                if single and abs(float(gradient.sum()) - 1) < 1e-4:
                    self.state.warn_once(
                        f"eps / rho = {self.eps / self.rho:.3g} cannot be reached: the output bias {name!r} has the "
                        "derivative 1 on every batch, so ||dh/dw|| >= 1; raise eps, or leave it out by params=",
                        key="floor",
                    )

    def _select(self, network: nn.Module) -> Callable[[str], bool] | None:
        if self.params is None or callable(self.params):
            return self.params
        known = {name for name, _ in network.named_parameters()}
        if unknown := sorted(self.params - known):
            raise ValueError(f"SurrogateSharpness: params: the network has no parameter {unknown[0]!r}")
        return self.params.__contains__


def _check(**numbers: Any) -> None:
    words = {"eps": "half", "lam_lr": "auto"}
    for name, value in numbers.items():
        if value == words.get(name, ...) or (name == "total_steps" and value is None):
            continue
        if isinstance(value, (str, bool)) or not value > 0:
            also = f" or {words[name]!r}" if name in words else ""
            raise ValueError(f"SurrogateSharpness: {name} must be > 0{also}, got {value!r}")


@torch.no_grad()
def _add_grad(parameters: Sequence[Tensor], gradients: Sequence[Tensor], factor: float) -> None:
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    held = [p.grad for p in parameters if p.grad is not None]
    torch._foreach_add_(held, [g.to(p.dtype) for g, p in zip(gradients, parameters, strict=True)], alpha=factor)


def _sum_over_ranks(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        dist.all_reduce(tensor)
