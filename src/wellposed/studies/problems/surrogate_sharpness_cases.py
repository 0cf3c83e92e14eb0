"""Cases of the exact claim: the finite difference of IGNITE is the gradient of the norm, or comes to it at first order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp

from ...gradients import MeanPrediction
from ...lab.study import Case

DRAWS = 5
EXACT = 1e-10


class Bilinear(nn.Module):
    """`f(x) = v' W x`.

    Example:
        >>> Bilinear(3, 2, torch.Generator())(torch.zeros(4, 3)).shape
        torch.Size([4])
    """

    def __init__(self, d: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(hidden, d, generator=generator, dtype=torch.float64))
        self.second = nn.Parameter(torch.randn(hidden, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.first.dtype) @ self.first.T @ self.second


def bilinear_norm_gradient(first: Tensor, second: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Closed form: with m the mean input, `||dh||^2 = ||W m||^2 + ||v||^2 ||m||^2`; its root's gradient in W and in v."""
    mean = x.mean(0)
    image = first @ mean
    norm = (image.square().sum() + second.square().sum() * mean.square().sum()).sqrt()
    return torch.outer(image, mean) / norm, second * mean.square().sum() / norm


def smooth_network(generator: torch.Generator) -> nn.Sequential:
    """A small network with tanh, in float64."""
    network = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 1)).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return network


def gradient_cases() -> list[Case]:
    """Bilinear models at three distances, convergence on a tanh network, and the exact rule against autograd."""
    cases = []
    for draw in range(DRAWS):
        generator = torch.Generator().manual_seed(draw)
        x = torch.randn(6, 4, generator=generator, dtype=torch.float64)
        bilinear = Bilinear(4, 3, generator)
        expected = bilinear_norm_gradient(bilinear.first.detach(), bilinear.second.detach(), x)
        for r in (1e-3, 0.2, 5.0):
            error = distance(finite_difference(bilinear, x, r), expected)
            cases.append(Case(f"bilinear, draw {draw}, r = {r:g}: finite difference", error, EXACT))
        cases.append(Case(f"bilinear, draw {draw}: exact", distance(exact(bilinear, x), expected), EXACT))
        network = smooth_network(generator)
        truth = exact(network, x)
        for name, other in (("double backward", twice(network, x)), ("jvp of the gradient", forward(network, x))):
            cases.append(Case(f"tanh network, draw {draw}: exact against {name}", distance(truth, other), EXACT))
        errors = [distance(finite_difference(network, x, r), truth) for r in (4e-3, 2e-3)]
        ratio = errors[0] / errors[1]
        cases.append(Case(f"tanh network, draw {draw}: halving r halves the error", abs(ratio - 2), 0.2))
    return cases


def finite_difference(network: nn.Module, x: Tensor, r: float) -> list[Tensor]:
    """The gradient of the norm by the library's probe."""
    mean = MeanPrediction(network, [(x, 1.0)])
    return mean.norm_gradient(mean.gradient(), "finite_difference", r)


def exact(network: nn.Module, x: Tensor) -> list[Tensor]:
    """The gradient of the norm by the library's double backward."""
    mean = MeanPrediction(network, [(x, 1.0)])
    return mean.norm_gradient(mean.gradient(keep_graph=True), "exact")


def twice(network: nn.Module, x: Tensor) -> list[Tensor]:
    """Autograd on the norm itself."""
    parameters = list(network.parameters())
    first = torch.autograd.grad(network(x).mean(), parameters, create_graph=True)
    norm = torch.cat([g.reshape(-1) for g in first]).norm()
    return list(torch.autograd.grad(norm, parameters, materialize_grads=True))


def forward(network: nn.Module, x: Tensor) -> list[Tensor]:
    """Forward over reverse: the derivative of the gradient along `g / ||g||`."""
    values = {name: p.detach() for name, p in network.named_parameters()}
    slope = grad(lambda v: functional_call(network, v, (x,)).mean())
    first = slope(values)
    norm = torch.cat([g.reshape(-1) for g in first.values()]).norm()
    moved = jvp(slope, (values,), ({name: g / norm for name, g in first.items()},))[1]
    return list(moved.values())


def distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest absolute difference."""
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
