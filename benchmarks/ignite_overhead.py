"""What surrogate sharpness costs inside a training step of a surrogate, beside SAM: pairs in turn, one process."""

import statistics
import sys
import time

import torch
from torch import nn

from wellposed.gradients import SurrogateSharpness, perturbed, surrogate_sharpness

WIDTHS, BATCH, D, PAIRS = (256, 2048), 128, 24, 41


def network(width):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(D, width), nn.LeakyReLU(0.3), nn.Linear(width, width), nn.LeakyReLU(0.3), nn.Linear(width, 1)
    )


def step(model, x, y, optimizer, extra):
    optimizer.zero_grad()
    nn.functional.mse_loss(model(x)[:, 0], y).backward()
    extra(model, x, y)
    optimizer.step()


def nothing(model, x, y):
    """Plain training."""


def sharpness_aware(model, x, y):
    """The second gradient of SAM."""
    parameters = list(model.parameters())
    with perturbed(parameters, [p.grad.clone() for p in parameters], 0.05):
        model.zero_grad()
        nn.functional.mse_loss(model(x)[:, 0], y).backward()


def constrained(method):
    def extra(model, x, y):
        method.add_grad_(model, x)
        method.dual_step()

    return extra


def summed(method):
    """The same penalty as one loss, differentiated twice."""

    def extra(model, x, y):
        method.penalty_of(model, x).backward()
        method.dual_step()

    return extra


def compare(width, pairs):
    options = {"lam": 0.1, "eps": 0.07, "lam_lr": 1e-9}  # never 0: every step pays for the second derivative
    ways = {
        "plain": nothing,
        "SAM": sharpness_aware,
        "IGNITE, exact": constrained(SurrogateSharpness(**options)),
        "IGNITE, finite difference": constrained(SurrogateSharpness(**options, hvp="finite_difference")),
        "IGNITE, penalty_of": summed(SurrogateSharpness(**options)),
        "IGNITE, inactive": constrained(SurrogateSharpness(lam=0.0, eps=100.0, lam_lr=1.0)),
    }
    models = {name: network(width) for name in ways}
    optimizers = {name: torch.optim.AdamW(model.parameters(), 1e-3, foreach=True) for name, model in models.items()}
    generator = torch.Generator().manual_seed(0)
    times = {name: [] for name in ways}
    for number in range(pairs + 2):
        x = torch.randn(BATCH, D, generator=generator)
        y = x.sin().sum(1)
        for name in list(ways) if number % 2 else list(ways)[::-1]:
            started = time.perf_counter()
            step(models[name], x, y, optimizers[name], ways[name])
            if number > 1:  # the first rounds warm up
                times[name].append(time.perf_counter() - started)
    print(f"\nd-{width}-{width}-1, batch {BATCH}, {pairs} pairs")
    for name, values in times.items():
        ratios = sorted(a / b for a, b in zip(values, times["plain"], strict=True))
        # 95 % for the median: order statistics of the binomial distribution, normal approximation.
        rank = max(0, int((pairs - 1.96 * pairs**0.5) / 2))
        print(
            f"{name:<26} median {1e3 * statistics.median(values):8.2f} ms a step; / plain: "
            f"{statistics.median(ratios):.2f} [{ratios[rank]:.2f}, {ratios[-1 - rank]:.2f}]"
        )
    x = torch.randn(BATCH, D, generator=generator)
    print("norm at the end:", {n: round(float(surrogate_sharpness(m, x, rho=1.0)), 2) for n, m in models.items()})


def main(pairs=PAIRS):
    torch.set_num_threads(1)
    for width in WIDTHS:
        compare(width, pairs if width < 1000 else max(5, pairs // 4))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
