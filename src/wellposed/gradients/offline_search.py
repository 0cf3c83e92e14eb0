"""Searching designs on a surrogate, without a query of the true function: gradient ascent and CMA-ES."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..step import mode
from .output_gradient import OutputFunction, mean_output

Bounds = tuple[float | Tensor, float | Tensor]


def best_designs(x: Tensor, y: Tensor, count: int = 128) -> Tensor:
    """The `count` designs with the highest values, best first: where a search starts.

    Args:
        x: (designs, d).
        y: (designs,).
        count: how many, between 1 and the number of designs.

    Raises:
        ValueError: if there are fewer designs than `count`, or x and y differ in length.

    Example:
        >>> best_designs(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([5.0, 9.0, 7.0]), 2).flatten()
        tensor([1., 2.])
    """
    if len(x) != len(y) or not 1 <= count <= len(x):
        raise ValueError(
            f"best_designs: count must lie in [1, {len(x)}] and x and y be equally long, got count={count}, "
            f"{len(x)} designs and {len(y)} values"
        )
    return x[y.reshape(-1).topk(count).indices]


def offline_optimize(
    surrogate: nn.Module,
    x0: Tensor,
    steps: int = 200,
    lr: float | Literal["auto"] = "auto",
    bounds: Bounds | None = None,
    output_fn: OutputFunction | None = None,
) -> Tensor:
    """Gradient ascent on a surrogate: `x <- x + lr * df(x)/dx`, for every design by itself.

    Args:
        surrogate: from (n, d) to (n,) or (n, 1), or what `output_fn` reads; put in evaluation mode meanwhile. Its
            inputs should be standardised, as one lr serves all coordinates.
        x0: (n, d), the designs to start from, e.g. `best_designs`.
        steps: >= 0.
        lr: "auto" is `0.01 * sqrt(d)`, as in the authors' code; d is the number of coordinates of a design.
        bounds: lowest and highest value, numbers or (d,) tensors; designs are projected after every step.
        output_fn: from the surrogate's outputs to (n,).

    Returns:
        (n, d), detached.

    Raises:
        ValueError: for steps < 0, lr <= 0, or designs without a batch dimension.

    Example:
        >>> bowl = torch.nn.Module()
        >>> bowl.forward = lambda x: -(x - 1).square().sum(1)
        >>> offline_optimize(bowl, torch.zeros(1, 2), lr=0.1)
        tensor([[1.0000, 1.0000]])
    """
    if x0.ndim < 2 or steps < 0:
        raise ValueError(
            f"offline_optimize: x0 must be (n, d) and steps >= 0, got shape {tuple(x0.shape)} and steps={steps}"
        )
    step_size = 0.01 * math.sqrt(x0[0].numel()) if lr == "auto" else lr
    if not step_size > 0:
        raise ValueError(f"offline_optimize: lr must be > 0 or 'auto', got {lr!r}")
    x = x0.detach().clone()
    with mode(surrogate, False):
        for _ in range(steps):
            x = (x + step_size * input_gradient(surrogate, x, output_fn)).detach()
            if bounds is not None:
                x = project(x, bounds)
    return x


@torch.enable_grad()  # type: ignore[untyped-decorator]
def input_gradient(
    surrogate: nn.Module, x: Tensor, output_fn: OutputFunction | None = None, create_graph: bool = False
) -> Tensor:
    """`df(x_i)/dx_i` for every design, of the shape of x; differentiable in the weights if `create_graph`.

    Example:
        >>> linear = torch.nn.Linear(2, 1)
        >>> bool((input_gradient(linear, torch.zeros(3, 2)) == linear.weight).all())
        True
    """
    leaf = x.detach().requires_grad_()
    predictions = (output_fn or mean_output)(surrogate(leaf))
    (gradient,) = torch.autograd.grad(predictions.sum(), leaf, create_graph=create_graph)
    return gradient


def project(x: Tensor, bounds: Bounds) -> Tensor:
    """Designs cut off at their bounds.

    Example:
        >>> project(torch.tensor([[-2.0, 0.5]]), (-1.0, 1.0))
        tensor([[-1.0000,  0.5000]])
    """
    low, high = (torch.as_tensor(bound, dtype=x.dtype, device=x.device) for bound in bounds)
    return torch.minimum(torch.maximum(x, low), high)


@torch.no_grad()
def evolution_search(
    surrogate: nn.Module,
    start: Tensor,
    sigma: float = 0.3,
    population: int = 32,
    generations: int = 60,
    keep: int = 128,
    seed: int = 0,
    bounds: tuple[float, float] | None = None,
    output_fn: OutputFunction | None = None,
) -> Tensor:
    """CMA-ES on a surrogate (Hansen's pycma): the designs of the last generations.

    Args:
        surrogate: as in `offline_optimize`.
        start: (d,), mean of the first generation, e.g. `best_designs(x, y, 16).mean(0)`.
        sigma: first step size, in units of the inputs, > 0.
        population, generations: designs a generation, >= 2, and how many generations, >= 1.
        keep: how many of the last designs are returned; at most population * generations.
        seed: of the search, >= 0.
        bounds: lowest and highest value of every coordinate.
        output_fn: from the surrogate's outputs to (n,).

    Returns:
        (keep, d), of start's dtype and device, in the order in which they were drawn.

    Raises:
        ImportError: if pycma is not installed.
        ValueError: for an argument out of its range.

    Example:
        >>> bowl = torch.nn.Module()
        >>> bowl.forward = lambda x: -(x - 1).square().sum(1)
        >>> found = evolution_search(bowl, torch.zeros(2), population=8, generations=40, keep=8)
        >>> bool((found - 1).abs().max() < 0.1)
        True
    """
    if start.ndim != 1 or not sigma > 0 or population < 2 or generations < 1 or seed < 0:
        raise ValueError(
            "evolution_search: start must be (d,), sigma > 0, population >= 2, generations >= 1 and seed >= 0, got "
            f"shape {tuple(start.shape)}, {sigma}, {population}, {generations} and {seed}"
        )
    if not 1 <= keep <= population * generations:
        raise ValueError(
            f"evolution_search: keep must lie in [1, population * generations = {population * generations}], got {keep}"
        )
    random = np.random.default_rng(seed)
    options: dict[str, Any] = {
        "popsize": population,
        "verbose": -9,
        # A source of its own: pycma would seed numpy's global one.
        "seed": math.nan,
        "randn": lambda *shape: random.standard_normal(shape),
    }
    if bounds is not None:
        options["bounds"] = list(bounds)
    search = _pycma().CMAEvolutionStrategy(start.double().cpu().numpy(), sigma, options)
    found: list[np.ndarray[Any, Any]] = []
    with mode(surrogate, False):
        for _ in range(generations):
            designs = search.ask()
            batch = torch.as_tensor(np.array(designs), dtype=start.dtype, device=start.device)
            predictions = (output_fn or mean_output)(surrogate(batch))
            search.tell(designs, (-predictions.double()).tolist())
            found = [*found, *designs][-keep:]
    return torch.as_tensor(np.array(found), dtype=start.dtype, device=start.device)


def percentile_report(scores: Tensor, percentiles: Sequence[float] = (50, 80, 100)) -> dict[float, float]:
    """Percentiles of the scores of one run's designs, interpolated linearly, as the literature reports them.

    Example:
        >>> percentile_report(torch.tensor([0.0, 1.0, 2.0]), (50, 100))
        {50: 1.0, 100: 2.0}
    """
    values = torch.quantile(scores.double().reshape(-1), torch.tensor(percentiles, dtype=torch.float64) / 100)
    return dict(zip(percentiles, values.tolist(), strict=True))


def _pycma() -> Any:
    try:
        return importlib.import_module("cma")
    except ImportError as error:
        raise ImportError("evolution_search needs pycma: pip install cma") from error
