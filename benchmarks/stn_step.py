"""A self-tuning step against a plain one: the same network, methods and batch, in turn, one process.

Plain is a step of `fit`'s own loop with the strengths fixed. A peer that learns dropout rates does not exist; betty-ml,
higher and TorchOpt need the training loss's derivative in the hyperparameter.
"""

import copy
import statistics
import sys
import time
from functools import partial

import torch
from torch import nn

from wellposed import Compose, Hyperparameter, Step
from wellposed.accumulation import Accumulation
from wellposed.bilevel import BilevelProblem
from wellposed.features import Dropout, InputNoise
from wellposed.losses import LabelSmoothing
from wellposed.objective import cross_entropy
from wellposed.tuning import SelfTuner
from wellposed.weights import WeightDecay

PAIRS = 31
SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9, foreach=True)


def perceptron(*widths):
    layers = []
    for before, after in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convolutional():
    layers = []
    for before, after in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, 128), nn.ReLU(), nn.Linear(128, 10))


NETWORKS = {
    "perceptron 64-256-256-10, batch 100": (lambda: perceptron(64, 256, 256, 10), (100, 64)),
    "perceptron 784-1200-1200-1200-10, batch 128": (lambda: perceptron(784, 1200, 1200, 1200, 10), (128, 784)),
    "convolutions 32-64-128 with batch norm, batch 64": (convolutional, (64, 3, 32, 32)),
}


def methods(tuned):
    def strength(value, **options):
        return Hyperparameter(value, per_example=True, **options) if tuned else value

    return Compose(
        Dropout(strength(0.2, low=0.0, high=0.9)),
        InputNoise(strength(0.1, high=0.6)),
        LabelSmoothing(strength(0.05, high=0.3)),
        WeightDecay(strength(1e-4, chart="exp")),
    )


def plain_step(model, batch):
    method = methods(tuned=False)
    model = method.attach(copy.deepcopy(model))
    optimizer = SGD(model.parameters(), weight_decay=1e-4)
    generator = torch.Generator().manual_seed(0)

    def step():
        optimizer.zero_grad(set_to_none=True)
        pool = Step(model, optimizer, *batch, generator=generator)
        method.on_batch(pool)
        Accumulation(pool, method, cross_entropy).run()
        optimizer.step()

    return step


def tuner(model, **options):
    method = methods(tuned=True)
    model = method.attach(copy.deepcopy(model))
    problem = BilevelProblem.from_regularizer(model, method, cross_entropy)
    return SelfTuner(problem, SGD, **options)


def seconds(step):
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def measure(name, build, shape, pairs):
    torch.manual_seed(0)
    model = build()
    batch = torch.randn(shape), torch.randint(0, 10, (shape[0],))
    stn, delta = tuner(model, delta=False), tuner(model)
    steps = {
        "plain": plain_step(model, batch),
        "STN, training": lambda: stn.training_step(batch),
        "STN, validation": lambda: stn.validation_step(batch),
        "Delta-STN, training": lambda: delta.training_step(batch),
        "Delta-STN, validation": lambda: delta.validation_step(batch),
        "Delta-STN, not linearised": lambda: unlinearised.training_step(batch),
    }
    unlinearised = tuner(model, linearize=False)
    plain_numbers = sum(p.numel() for p in model.parameters())
    responding = sum(p.numel() for p in stn.problem.params.values())
    print(f"{name}: {plain_numbers:,} parameters, {responding / plain_numbers:.2f} times as many with the response")
    times = {label: [] for label in steps}
    for number in range(pairs + 2):
        for label in list(steps) if number % 2 else list(steps)[::-1]:
            taken = seconds(steps[label])
            if number > 1:  # the first two rounds warm up
                times[label].append(taken)
    for label, values in times.items():
        ratios = sorted(a / b for a, b in zip(values, times["plain"], strict=True))
        # 95 % for the median: order statistics of the binomial distribution, normal approximation.
        rank = max(0, int((pairs - 1.96 * pairs**0.5) / 2))
        print(
            f"  {label:<26} median {1e3 * statistics.median(values):7.2f} ms; / plain: "
            f"{statistics.median(ratios):.2f} [{ratios[rank]:.2f}, {ratios[-1 - rank]:.2f}], {pairs} pairs"
        )


def main(pairs=PAIRS):
    torch.set_num_threads(1)
    for name, (build, shape) in NETWORKS.items():
        measure(name, build, shape, pairs)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
