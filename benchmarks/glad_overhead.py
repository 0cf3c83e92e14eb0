"""What the rules of GLAD's family cost inside a step of LoRA tuning: pairs in turn, one process. Target: 2.0x, and 3 %."""

import copy
import itertools
import statistics
import sys
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

from wellposed import Step
from wellposed.accumulation import Accumulation
from wellposed.gradients import SharpnessAwareMinimization
from wellposed.gradients.sharpness_steering import RegularizedGradient
from wellposed.objective import cross_entropy
from wellposed.regularizer import Regularizer
from wellposed.weights.attention_projections import split_attention
from wellposed.weights.low_rank import add_low_rank

WIDTH, LAYERS, LENGTH, BATCH, CLASSES, PAIRS = 256, 4, 32, 16, 20, 25


class Encoder(nn.Module):
    """A transformer over vectors, averaged and classified; LoRA of rank 2 on q, k and v, as CLIP-LoRA has it."""

    def __init__(self, width, layers):
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        return self.head(self.body(x).mean(1))


def adapted(width, layers, rank=2):
    torch.manual_seed(0)
    model = Encoder(width, layers)
    split_attention(model)
    add_low_rank(model, rank, alpha=1, targets=["q_proj", "k_proj", "v_proj"])
    return model


def step(model, x, y, optimizer, method, number=0):
    """One step as `fit` makes it."""
    optimizer.zero_grad()
    batch = Accumulation(Step(model, optimizer, inputs=x, targets=y, number=number), method, cross_entropy)
    batch.run()
    batch.on_gradients()
    optimizer.step()


def bare_sam(model, x, y, optimizer, rho=0.05, number=0):
    """Two passes in a loop of one's own, without anything of this library: the least that a second pass costs."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    with torch.no_grad():
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        old = [p.detach().clone() for p in parameters]
        torch._foreach_add_(parameters, [p.grad * (rho / norm) for p in parameters])
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    with torch.no_grad():
        torch._foreach_copy_(parameters, old)
    optimizer.step()


def compare(width, layers, length, pairs):
    methods = {
        "plain LoRA": Regularizer(),
        "SAM (wellposed)": SharpnessAwareMinimization(0.05),
        **{
            f"rule {rule}": RegularizedGradient(0.05, rule)
            for rule in ("project", "mix", "steer", "gsam", "sagm", "sam")
        },
        "steer, a tensor each": RegularizedGradient(0.05, "steer", scope="tensor"),
        "mix, weight space": RegularizedGradient(0.05, "mix", perturb="weight"),
        "mix, every 4th step": RegularizedGradient(0.05, "mix", every=4),
    }
    ways = {name: partial(step, method=method) for name, method in methods.items()}
    ways["SAM (bare loop)"] = bare_sam
    start = adapted(width, layers)
    models = {name: copy.deepcopy(start) for name in ways}
    optimizers = {
        name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3, foreach=True)
        for name, model in models.items()
    }
    generator = torch.Generator().manual_seed(0)
    times = {name: [] for name in ways}
    for number in range(pairs + 2):
        x = torch.randn(BATCH, length, width, generator=generator)
        y = torch.randint(CLASSES, (BATCH,), generator=generator)
        for name in list(ways) if number % 2 else list(ways)[::-1]:
            started = time.perf_counter()
            ways[name](models[name], x, y, optimizers[name], number=number)
            if number > 1:  # the first rounds warm up
                times[name].append(time.perf_counter() - started)
    trained = sum(p.numel() for p in start.parameters() if p.requires_grad)
    print(f"\n{layers} layers of width {width}, batch {BATCH} x {length}, {trained:,} trained numbers, {pairs} pairs")
    for name, values in times.items():
        ratios = sorted(a / b for a, b in zip(values, times["plain LoRA"], strict=True))
        # 95 % for the median: order statistics of the binomial distribution, normal approximation.
        rank = max(0, int((pairs - 1.96 * pairs**0.5) / 2))
        print(
            f"{name:<22} median {1e3 * statistics.median(values):8.2f} ms a step; / plain: "
            f"{statistics.median(ratios):.2f} [{ratios[rank]:.2f}, {ratios[-1 - rank]:.2f}]"
        )


def memory(width, layers):
    """What a step allocates at its peak, in units of the trained parameters: activations are made to weigh nothing."""
    print("\npeak of gradients and copies within a step, in units of the trained parameters")
    for name, method in {
        "plain LoRA": Regularizer(),
        "mix": RegularizedGradient(0.05),
        "steer": RegularizedGradient(0.05, "steer"),
    }.items():
        model = adapted(width, layers, rank=width)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, 1e-3, foreach=True)
        x, y = torch.randn(1, 1, width), torch.zeros(1, dtype=torch.int64)
        step(model, x, y, optimizer, method)
        optimizer.zero_grad()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            step(model, x, y, optimizer, method)
        events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
        sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
        print(f"{name:<22} {max(itertools.accumulate(sizes)) / sum(p.nbytes for p in parameters):.2f}")


def main(pairs=PAIRS, width=WIDTH, layers=LAYERS, length=LENGTH):
    torch.set_num_threads(1)
    compare(width, layers, length, pairs)
    memory(width, layers)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
