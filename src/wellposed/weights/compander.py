"""Weight compander (WC): a bounded, S-shaped reparameterisation of every weight, as a method of a training loop."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from ..batching import unwrap
from ..hyperparameter import Hyperparameter, check_strength, value_of
from ..pair import Pair
from ..regularizer import Regularizer
from ..step import Step
from .compander_attach import WEIGHTED_LAYERS, Learnable, Units, apply_compander, check_options
from .compander_decay import compander_penalty
from .compander_folding import fold_compander
from .compander_functions import CompanderFunction
from .compander_module import check_choice, check_scales, companded
from .compander_step import CompanderStep


class WeightCompander(Regularizer):
    """Weight compander, WC (Cakaj, Mehnert and Yang 2023, arXiv 2306.16993): train v, where `w = a arctan(v / b)`.

    It bounds every weight by `a pi / 2` and moves weights near zero most. `attach` compands the convolutional and
    linear layers without changing the network, `finish` stores plain weights again. With a >= 0.5 it is close to a
    learning rate larger by `(a / b)^2`; the bound is felt where a is 2 to 4 standard deviations of the weights
    (`units="deviation"`).

    Weight decay: whatever decay a companded tensor has (`WeightDecay`, the optimizer's own)
    acts on w while the scales are fixed, and on v while they are learned, as in the paper; see `CompanderStep`. A
    decay that a tuner learns goes to `weight_decay` here. Weight averages (EMA) are averages of v, sharpness-aware
    steps move v. In a `Compose` this method stands after those that evaluate the batch again (SAM), and before those
    that copy the networks when they attach (ELR+).

    Args:
        a, b: height and width, > 0; a number, or a `Hyperparameter` that a tuner learns.
        fn: "arctan", "arsinh", "erf", "tanh", or the control "linear"; see `compand`.
        learnable: "no", "layer" (the paper's fine version: start from a = 0.5, b = 1.0) or "global" (coarse).
        log_space: learn the logarithms of a and b, which keeps them positive.
        units: "absolute", or "deviation" for multiples of each layer's standard deviation.
        weight_decay: of the companded weights: a number for the optimizer, a `Hyperparameter` as the penalty
            `weight_decay / 2 * ||w||^2`, None for whatever the optimizer holds.
        modified_step: the paper's step for adaptive optimizers; "auto" for all but SGD, ASGD and L-BFGS.
        out_of_range, types, skip, stack: see `apply_compander`.

    Raises:
        ValueError: for an argument out of range; from `attach`, for weights out of range, naming the layer; in
            training, if weights decay twice.

    Example:
        >>> import torch
        >>> from wellposed import fit
        >>> data = torch.utils.data.TensorDataset(torch.randn(32, 3), torch.arange(32) % 2)
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> model = fit(model, data, epochs=1, regularizer=WeightCompander(a=0.7, b=0.7)).model
        >>> list(model.state_dict())
        ['0.weight', '0.bias', '2.weight', '2.bias']
    """

    requires = frozenset({"gradients", "optimizer"})

    def __init__(
        self,
        a: float | Hyperparameter = 0.7,
        b: float | Hyperparameter = 0.7,
        *,
        fn: CompanderFunction = "arctan",
        learnable: Learnable = "no",
        log_space: bool = False,
        units: Units = "absolute",
        weight_decay: float | Hyperparameter | None = None,
        modified_step: bool | Literal["auto"] = "auto",
        out_of_range: Literal["raise", "clip"] = "raise",
        types: tuple[type[nn.Module], ...] = WEIGHTED_LAYERS,
        skip: Collection[str] = (),
        stack: bool = False,
    ) -> None:
        super().__init__()
        check_scales("WeightCompander", a, b, fn, learnable != "no")
        check_options("WeightCompander", learnable, units, out_of_range)
        check_choice("WeightCompander", "modified_step", modified_step, (True, False, "auto"))
        if weight_decay is not None:
            check_strength("WeightCompander", "weight_decay", weight_decay)
        self.a, self.b, self.weight_decay = a, b, weight_decay
        self.modified_step: bool | Literal["auto"] = modified_step
        self._options: dict[str, Any] = {
            "fn": fn, "learnable": learnable, "log_space": log_space, "units": units,
            "out_of_range": out_of_range, "types": types, "skip": skip, "stack": stack,
        }  # fmt: skip
        self._stepper: tuple[nn.Module, Optimizer, CompanderStep] | None = None

    def attach(self, model: nn.Module) -> nn.Module:
        # One pair (a, b) "for the network" means each network of a Pair.
        for network in [model.a, model.b] if isinstance(model, Pair) else [model]:
            apply_compander(network, self.a, self.b, **self._options)
        return model

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        found = companded(model)
        scales = {id(p) for one in found for p in one.compander.parameters()}
        wishes: list[dict[str, Any]] = []
        if names := [n for n, p in unwrap(model).named_parameters() if id(p) in scales]:
            wishes.append({"names": names, "weight_decay": 0.0})
        if self.weight_decay is not None:
            in_optimizer = 0.0 if isinstance(self.weight_decay, Hyperparameter) else self.weight_decay
            wishes.append({"names": [one.v_name for one in found], "weight_decay": in_optimizer})
        return wishes

    def penalty(self, step: Step) -> Tensor | None:
        if not isinstance(self.weight_decay, Hyperparameter):
            return None
        return compander_penalty(step.model, value_of(self.weight_decay))

    def on_gradients(self, step: Step) -> None:
        self._around(step).before()

    def on_step(self, step: Step) -> None:
        self._around(step).after()

    def finish(self, model: nn.Module) -> nn.Module:
        self._stepper = None
        return fold_compander(model)

    def _around(self, step: Step) -> CompanderStep:
        if step.optimizer is None:
            raise ValueError("WeightCompander: step.optimizer is missing; its weight decay must act on w")
        if self._stepper is None or self._stepper[0] is not step.model or self._stepper[1] is not step.optimizer:
            penalty = isinstance(self.weight_decay, Hyperparameter)
            made = CompanderStep(step.model, step.optimizer, self.modified_step, penalty)
            self._stepper = (step.model, step.optimizer, made)
        return self._stepper[2]

    def __getstate__(self) -> dict[str, Any]:
        # A copy belongs to another loop: it must not carry model and optimizer along.
        return {**self.__dict__, "_stepper": None}
