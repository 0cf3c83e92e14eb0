"""Small bilevel problems for the tests of this room."""

import math

import torch
from torch import nn

from wellposed import BilevelProblem, Hyperparameter


class Recorder:
    """An endless iterator that records what was taken."""

    def __init__(self, batches):
        self.batches, self.taken = list(batches), []

    def __iter__(self):
        return self

    def __next__(self):
        batch = self.batches[len(self.taken) % len(self.batches)]
        self.taken.append(batch)
        return batch


def quadratic(dimension=4, upper=3, seed=0):
    """g = y'Ay/2 - (Bx)'y + noise'y, f = |y - c|^2 / 2 + d'x; a batch is the noise. float64, all in closed form."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    root = draw(dimension, dimension)
    a = root @ root.T / dimension + torch.eye(dimension, dtype=torch.float64)
    b, c, d = draw(dimension, upper), draw(dimension), draw(upper)
    y = {"y": draw(dimension).requires_grad_()}
    x = Hyperparameter(draw(upper).float(), -math.inf, math.inf, "identity", name="x").double()

    def inner(params, hypers, noise):
        w = params["y"]
        return 0.5 * w @ a @ w - (b @ hypers["x"]) @ w + (noise * w).sum()

    def outer(params, hypers, noise):
        return 0.5 * (params["y"] - c).square().sum() + d @ hypers["x"] + (noise * params["y"]).sum()

    problem = BilevelProblem(None, inner, outer, y, {"x": x}, strong_convexity=1.0)
    problem.parts = (a, b, c, d)
    return problem


def noises(count, dimension=4, seed=7, scale=0.1):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(dimension, generator=generator, dtype=torch.float64) for _ in range(count)]


class WeightedRegression(nn.Module):
    """Softmax regression, 20 parameters."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, inputs):
        return self.layer(inputs)
