"""Surrogates for offline optimization: standardised data, the network, its training, and a Gaussian process."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ...compose import Compose
from ...fit import FitResult, fit
from ...gradients import SurrogateEnsemble, ensemble_squared_error, input_gradient
from ...indexed_dataset import TensorLoader
from ...lab.trial import Setting
from ...objective import squared_error
from ...regularizer import Regularizer
from ...step import Step
from .offline_tasks import OfflineTask

WIDTH, SLOPE, BATCH = 256, 0.3, 128


@dataclass(frozen=True)
class StandardizedTask:
    """A task whose offline designs and values have mean 0 and standard deviation 1 in every coordinate.

    Attributes:
        task: in its own units.
        x, y: (n, d) and (n,), standardised.
        mean, scale: (d,), of the designs.
        centre, spread: mean and standard deviation of the values.
    """

    task: OfflineTask
    x: Tensor
    y: Tensor
    mean: Tensor
    scale: Tensor
    centre: Tensor
    spread: Tensor

    @classmethod
    def of(cls, task: OfflineTask, points: int | None = None) -> StandardizedTask:
        """Standardise a task's data, or the first `points` of them.

        Example:
            >>> from wellposed.studies.problems.offline_tasks import offline_task
            >>> view = StandardizedTask.of(offline_task("ackley", 0))
            >>> bool(view.x.mean(0).abs().max() < 1e-5), bool((view.y.std() - 1).abs() < 1e-4)
            (True, True)
        """
        x, y = (part[:points] for part in task.dataset())
        mean, scale = x.mean(0), x.std(0)
        return cls(task, (x - mean) / scale, (y - y.mean()) / y.std(), mean, scale, y.mean(), y.std())

    def designs(self, x: Tensor) -> Tensor:
        """Valid designs in the task's units, from standardised coordinates."""
        return self.task.repair(x * self.scale + self.mean)

    def values(self, predicted: Tensor) -> Tensor:
        """Predictions in the task's units."""
        return predicted * self.spread + self.centre

    def coordinates(self, designs: Tensor) -> Tensor:
        """Standardised coordinates of designs."""
        return (designs - self.mean) / self.scale


def leaky_network(d: int, seed: int, width: int = WIDTH) -> nn.Sequential:
    """Two hidden layers with LeakyReLU of slope 0.3, one output, initialised as torch does, from `seed`.

    Example:
        >>> [m.out_features for m in leaky_network(10, 0) if isinstance(m, nn.Linear)]
        [256, 256, 1]
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(d, width), nn.LeakyReLU(SLOPE), nn.Linear(width, width), nn.LeakyReLU(SLOPE), nn.Linear(width, 1)
        )


def train_surrogate(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    settings: Mapping[str, Setting],
    seed: int,
    regularizer: Regularizer | None = None,
) -> FitResult:
    """`fit` on squared error with AdamW: `learning_rate`, `weight_decay` and `epochs` come from the settings.

    Raises:
        DivergenceError: if the training loss leaves the finite numbers.
    """
    return fit(
        network,
        TensorLoader(x, y, batch_size=BATCH, shuffle=True, seed=seed),
        epochs=int(settings["epochs"]),
        criterion=ensemble_squared_error if isinstance(network, SurrogateEnsemble) else squared_error,
        regularizer=regularizer or Compose(),
        optimizer=partial(
            torch.optim.AdamW,
            lr=float(settings["learning_rate"]),
            weight_decay=float(settings["weight_decay"]),
            fused=True,
        ),
        seed=seed,
    )


class InputGradientPenalty(Regularizer):
    """`strength * ||df(x)/dx||^2` for every example: gradients in the inputs, where IGNITE has those in the weights."""

    requires = frozenset({"double_backward"})

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.strength = strength

    def penalty(self, step: Step) -> Tensor:
        return self.strength * input_gradient(step.model, step.inputs, create_graph=True).square().sum(1)


class GaussianProcess(nn.Module):
    """Posterior mean of a Gaussian process with one length scale a coordinate, differentiable in its inputs.

    Kernel and noise are fitted by scikit-learn on at most `fitted_on` of the points, the mean rests on all of them.

    Args:
        x, y: (n, d) and (n,), standardised.
        fitted_on: points for the marginal likelihood, whose cost is cubic.
        seed: which points, and the optimiser's start.

    Example:
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> process = GaussianProcess(x, x[:, 0])
        >>> bool((process(x) - x[:, 0]).abs().max() < 0.05)
        True
    """

    x: Tensor
    length: Tensor
    weights: Tensor

    def __init__(self, x: Tensor, y: Tensor, fitted_on: int = 300, seed: int = 0) -> None:
        super().__init__()
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

        chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:fitted_on]
        kernel = ConstantKernel(1.0, (1e-3, 1e4)) * RBF([3.0] * x.shape[1], (0.05, 1e3)) + WhiteKernel(
            0.01, (1e-8, 1.0)
        )
        with warnings.catch_warnings():
            # An optimum at the edge of these wide ranges is as good a fit as any.
            warnings.simplefilter("ignore", ConvergenceWarning)
            process = GaussianProcessRegressor(kernel, random_state=seed).fit(x[chosen].numpy(), y[chosen].numpy())
        signal = process.kernel_.k1
        gram = torch.from_numpy(process.kernel_(x.double().numpy()))
        gram += 1e-6 * float(signal.k1.constant_value) * torch.eye(len(x), dtype=gram.dtype)
        weights = torch.cholesky_solve(y.double()[:, None], torch.linalg.cholesky(gram))[:, 0]
        self.register_buffer("x", x.double())
        self.register_buffer("length", torch.as_tensor(signal.k2.length_scale, dtype=torch.float64))
        self.register_buffer("weights", float(signal.k1.constant_value) * weights)

    def forward(self, inputs: Tensor) -> Tensor:
        # In float64: the weights of neighbouring points nearly cancel.
        a, b = inputs.double() / self.length, self.x / self.length
        squares = a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * a @ b.T
        return ((-0.5 * squares.clamp(min=0)).exp() @ self.weights).to(inputs.dtype)
