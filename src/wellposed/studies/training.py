"""The recipe that the small studies share: SGD with momentum, the learning rate cut to a tenth at 1/2 and 3/4."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import MultiStepLR

from ..batching import unwrap
from ..fit import FitResult, fit
from ..indexed_dataset import TensorLoader
from ..lab.trial import Setting
from ..regularizer import Regularizer
from ..step import Step, mode


def multilayer_perceptron(widths: Sequence[int], seed: int, *, bias_of_head: bool = True) -> nn.Sequential:
    """Linear layers with ReLU between them, initialised as torch does, from `seed`.

    Example:
        >>> len(multilayer_perceptron([64, 32, 10], seed=0))
        3
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for i, (fan_in, fan_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            last = i == len(widths) - 2
            layers += [nn.Linear(fan_in, fan_out, bias=bias_of_head or not last), *([] if last else [nn.ReLU()])]
    return nn.Sequential(*layers)


def step_decay(optimizer: Optimizer, total: int) -> MultiStepLR:
    """A tenth of the learning rate from half of the steps on, and a hundredth from three quarters."""
    return MultiStepLR(optimizer, [total // 2, total * 3 // 4], gamma=0.1)


def train(
    model: nn.Module,
    loader: TensorLoader,
    settings: Mapping[str, Setting],
    seed: int,
    regularizer: Regularizer | None = None,
    *,
    nesterov: bool = False,
    validation: TensorLoader | None = None,
    on_epoch_end: Callable[[Step, dict[str, float]], None] | None = None,
) -> FitResult:
    """`fit` under the shared recipe: `learning_rate`, `weight_decay` and `epochs` come from the settings."""
    return fit(
        model,
        loader,
        epochs=int(settings["epochs"]),
        regularizer=regularizer,
        optimizer=partial(
            torch.optim.SGD,
            lr=float(settings["learning_rate"]),
            momentum=0.9,
            nesterov=nesterov,
            weight_decay=float(settings["weight_decay"]),
        ),
        scheduler=step_decay,
        validation=validation,
        seed=seed,
        on_epoch_end=on_epoch_end,
    )


@torch.no_grad()
def logits_of(model: nn.Module, inputs: Tensor, batch: int = 2048) -> Tensor:
    """Outputs in evaluation mode, as one tensor."""
    module = unwrap(model)
    with mode(module, False):
        return torch.cat([module(part) for part in inputs.split(batch)])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of right predictions, in points."""
    return 100.0 * float((logits.argmax(1) == labels).double().mean())
