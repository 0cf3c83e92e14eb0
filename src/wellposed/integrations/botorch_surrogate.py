"""`BotorchSurrogate`: the posterior mean of a BoTorch model, as a surrogate for offline optimization."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

HOW_TO_INSTALL = "BoTorch is not installed: pip install botorch"


class BotorchSurrogate(nn.Module):
    """Posterior mean of a BoTorch model, differentiable in the designs: what a search on logged data ascends.

    `offline_optimize` and `evolution_search` take it in the place of a network. Nothing of it trains any more: it stays
    in evaluation mode, and its parameters need no gradient.

    Args:
        model: a fitted BoTorch model of one outcome, e.g. a `SingleTaskGP`; it is put in evaluation mode. Its
            predictions come in the units of its outcomes, whatever transforms it has.

    Attributes:
        model: as given.

    Raises:
        ImportError: if BoTorch is not installed.
        TypeError: for a model that has no posterior.
        ValueError: for a model of several outcomes.

    Example:
        >>> from wellposed.gradients import best_designs, offline_optimize
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> y = -(x[:, 0] - 0.5).square()
        >>> surrogate = BotorchSurrogate.fitted(x, y)  # doctest: +SKIP
        >>> offline_optimize(surrogate, best_designs(x, y, 1)).round(decimals=1)  # doctest: +SKIP
        tensor([[0.5000]])
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        _botorch()
        if not callable(getattr(model, "posterior", None)):
            raise TypeError(f"BotorchSurrogate: model must be a BoTorch model, got {type(model).__name__}")
        outcomes = getattr(model, "num_outputs", 1)
        if outcomes != 1:
            raise ValueError(f"BotorchSurrogate: model must have one outcome, got {outcomes}")
        self.model = model.requires_grad_(False)
        self.eval()

    @classmethod
    def fitted(
        cls,
        x: Float[Tensor, "designs dimension"],
        y: Float[Tensor, " designs"],
        fitted_on: int | None = None,
        seed: int = 0,
    ) -> BotorchSurrogate:
        """A `SingleTaskGP` with BoTorch's own priors and fitting, in float64, on designs scaled to the unit cube.

        Outcomes are standardised by BoTorch. Kernel and noise are those of the highest posterior on at most `fitted_on`
        designs; the mean rests on all of them.

        Args:
            x, y: designs and their outcomes, to be maximised.
            fitted_on: designs for the marginal likelihood, whose cost is cubic; None takes all.
            seed: which designs these are.

        Raises:
            ImportError: if BoTorch is not installed.
            ValueError: for shapes that do not fit, or fewer than 2 designs to fit on.
        """
        botorch = _botorch()
        count = len(x) if fitted_on is None else min(fitted_on, len(x))
        if x.ndim != 2 or y.shape != x.shape[:1]:
            raise ValueError(
                f"BotorchSurrogate: x must be (n, d) and y (n,), got shapes {tuple(x.shape)} and {tuple(y.shape)}"
            )
        if count < 2:
            raise ValueError(f"BotorchSurrogate: fitted_on must be >= 2, got {fitted_on} with {len(x)} designs")
        x, y = x.detach().double(), y.detach().double()[:, None]
        # One scaling for both models: a length scale must mean the same in both.
        bounds = torch.stack([x.amin(0), x.amax(0)])

        def process(rows: Tensor) -> Any:
            scaled = botorch.models.transforms.Normalize(x.shape[1], bounds=bounds)
            return botorch.models.SingleTaskGP(x[rows], y[rows], input_transform=scaled)

        chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:count].to(x.device)
        model = process(chosen)
        likelihood = import_module("gpytorch.mlls").ExactMarginalLogLikelihood(model.likelihood, model)
        with warnings.catch_warnings(), exact():
            # A retry of the fit from another start is BoTorch's business.
            warnings.simplefilter("ignore", botorch.exceptions.warnings.OptimizationWarning)
            botorch.fit.fit_gpytorch_mll(likelihood)
        if count < len(x):
            whole = process(torch.arange(len(x), device=x.device))
            for part in ("mean_module", "covar_module", "likelihood"):
                getattr(whole, part).load_state_dict(getattr(model, part).state_dict())
            model = whole
        return cls(model)

    def train(self, mode: bool = True) -> BotorchSurrogate:
        """Stays in evaluation mode: in training mode a process forgets its data."""
        return super().train(False)

    def forward(self, inputs: Float[Tensor, "designs dimension"]) -> Float[Tensor, " designs"]:
        """Posterior means in the dtype of the inputs."""
        data = next((t for t in self.model.parameters()), inputs)
        with exact(), import_module("gpytorch.settings").skip_posterior_variances():
            mean = self.model.posterior(inputs.to(data.dtype)).mean  # type: ignore[operator]
        return mean[:, 0].to(inputs.dtype)


def exact() -> Any:
    """Cholesky factors of any size: gpytorch's iterative solvers, its default from 800 designs on, are approximate.

    Raises:
        ImportError: if BoTorch is not installed.
    """
    _botorch()
    settings = import_module("gpytorch.settings")
    return settings.fast_computations(covar_root_decomposition=False, log_prob=False, solves=False)


def _botorch() -> Any:
    """The package; imported when it is needed, so that this module can be read without it."""
    try:
        return import_module("botorch")
    except ImportError as error:
        raise ImportError(HOW_TO_INSTALL) from error
