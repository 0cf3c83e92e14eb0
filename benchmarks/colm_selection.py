"""Mini-batch coresets: the greedy choice beside submodlib's and apricot's, and what a step costs beside random batches.

Greedy: facility location of 29 from 93 candidates of four sources (CoLM's own case), and of half of 128 and of 512 on one
matrix, in turn, in one process, on one thread; the value reached stands beside the time. Peers that are not installed are
left out: `pip install submodlib-py numba`, `pip install apricot-select`.

Step: a causal transformer with an adapter on its last value projection trains on a pool of 128 sequences of ten sources,
on half of it, or on a coreset. `exact features` and `one direction` are the selection's gradients alone.
"""

import statistics
import sys
import time
from functools import partial

import numpy as np
import torch
from torch import nn

from wellposed import Regularizer, Step
from wellposed.accumulation import Accumulation
from wellposed.gradients.coreset_gradients import CoresetGradients
from wellposed.gradients.greedy_medoids import (
    facility_location,
    facility_location_value,
    pairwise_similarity,
)
from wellposed.gradients.mini_batch_coreset import MiniBatchCoreset
from wellposed.objective import cross_entropy

PAIRS, POOL, SMALL = 31, 128, (4, 5, 6, 7, 8, 9)
SHARES = torch.tensor([10.0, 8.0, 6.0, 5.0, 3.4, 2.7, 2.0, 1.4, 0.8, 0.5])
SIZES, BUDGETS = (32, 26, 19, 16), (10, 8, 6, 5)


# ── greedy ──────────────────────────────────────────────────────────────────────────────────────────────────────
def submodlib_picks():
    """A function of a matrix and a budget, or None."""
    try:
        from submodlib import FacilityLocationFunction
    except ImportError:
        return None

    def picks(S, budget, optimizer):
        kernel = S.numpy()
        function = FacilityLocationFunction(n=len(kernel), mode="dense", sijs=kernel, separate_rep=False)
        return torch.tensor(
            [pick for pick, _ in function.maximize(budget=budget, optimizer=optimizer, show_progress=False)]
        )

    return picks


def apricot_picks():
    try:
        from apricot import FacilityLocationSelection
    except ImportError:
        return None

    def picks(S, budget):
        found = FacilityLocationSelection(budget, metric="precomputed", optimizer="lazy").fit(
            S.numpy().astype(np.float64)
        )
        return torch.as_tensor(found.ranking[:budget])

    return picks


def greedy(pairs):
    generator = torch.Generator().manual_seed(0)
    four = [pairwise_similarity(torch.randn(n, 120, generator=generator)) for n in SIZES]
    longest, valid = max(SIZES), torch.arange(max(SIZES)) < torch.tensor(SIZES)[:, None]
    padded = torch.stack([nn.functional.pad(S, (0, longest - len(S), 0, longest - len(S))) for S in four])
    budgets = torch.tensor(BUDGETS)
    cases = {"four sources": (four, BUDGETS, lambda: list(facility_location(padded, budgets, valid)[0]))}
    for n in (POOL, 4 * POOL):
        one = pairwise_similarity(torch.randn(n, 120, generator=generator))
        cases[f"one source of {n}"] = ([one], [n // 2], lambda one=one, n=n: [facility_location(one, n // 2)[0]])
    peers = {"apricot": apricot_picks()}
    if (lazy := submodlib_picks()) is not None:
        for optimizer in ("LazyGreedy", "NaiveGreedy"):
            peers[f"submodlib, {optimizer}"] = partial(lazy, optimizer=optimizer)
    for title, (matrices, picked, ours) in cases.items():
        ways = {"wellposed": ours}
        for name, peer in peers.items():
            if peer is not None:
                ways[name] = lambda peer=peer, m=matrices, b=picked: [peer(S, k) for S, k in zip(m, b, strict=True)]
        for name, way in ways.items():
            value = sum(float(facility_location_value(S, p[p >= 0])) for S, p in zip(matrices, way(), strict=True))
            print(f"{title}: {name} reaches {value:.4f}")
        report(title, ways, pairs)


# ── steps ───────────────────────────────────────────────────────────────────────────────────────────────────────
class Block(nn.Module):
    """Attention and a perceptron, with an adapter on the values or not."""

    def __init__(self, width, adapted):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        if adapted:
            self.lora_a, self.lora_b = nn.Linear(width, 16, bias=False), nn.Linear(16, width, bias=False)
        self.adapted = adapted

    def forward(self, x):
        n, length, width = x.shape
        h = self.norm1(x)
        q, k, v = self.qkv(h).chunk(3, -1)
        if self.adapted:
            v = v + self.lora_b(self.lora_a(h))
        q, k, v = (t.reshape(n, length, 4, width // 4).transpose(1, 2) for t in (q, k, v))
        h = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(h.transpose(1, 2).reshape(n, length, width))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """Six blocks; the last one has an adapter on its values."""

    def __init__(self, width, vocabulary, blocks=6):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, number == blocks - 1) for number in range(blocks))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


ADAPTER = "blocks.5.lora_b.weight"


def pool_of(model, optimizer, size, length, vocabulary, number):
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, vocabulary, (size, length + 1), generator=generator)
    source = torch.multinomial(SHARES, size, replacement=True, generator=generator)
    extra = {"source": source}
    return Step(model, optimizer, tokens[:, :-1], tokens[:, 1:], torch.arange(size), extra=extra, generator=generator)


def steps(pairs, width, length, vocabulary=1000):
    torch.manual_seed(0)
    model = Decoder(width, vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    shared = {"small_sources": SMALL, "parameter": ADAPTER}
    methods = {
        "random, 64": (POOL // 2, Regularizer()),
        "random, 128": (POOL, Regularizer()),
        "64 of 128, at random": (POOL, MiniBatchCoreset(ranking="random", **shared)),
        "64 of 128, exact": (POOL, MiniBatchCoreset(**shared)),
        "64 of 128, one direction": (POOL, MiniBatchCoreset(feature="zo", fixed_z=True, **shared)),
        "64 of 128, 16 directions": (POOL, MiniBatchCoreset(feature="zo", n_directions=16, **shared)),
    }
    count = {"step": 0}

    def step(size, method):
        count["step"] += 1
        pool = pool_of(model, optimizer, size, length, vocabulary, count["step"])
        optimizer.zero_grad()
        method.on_batch(pool)
        Accumulation(pool, method, cross_entropy).run()
        optimizer.step()
        method.on_step(pool)

    ways = {name: (lambda size=size, method=method: step(size, method)) for name, (size, method) in methods.items()}
    report("a training step", ways, pairs, reference="random, 128")
    pool, every = pool_of(model, optimizer, POOL, length, vocabulary, 0), torch.arange(POOL)
    exact = CoresetGradients("last_layer_grad", ADAPTER, cross_entropy, 1, True, 1e-3, None, 0)
    zeroth = CoresetGradients("zo", ADAPTER, cross_entropy, 1, True, 1e-3, None, 0)
    features = {
        "one direction": lambda: zeroth.rows(pool, every, 0),
        "exact features": lambda: exact.rows(pool, every, 0),
    }
    report("features of 128", features, pairs)


def report(title, ways, pairs, reference=None):
    """Medians, and the median ratio to the reference (the first way by default) over alternating rounds."""
    reference = reference or next(iter(ways))
    times = {name: [] for name in ways}
    for number in range(pairs + 1):
        for name in list(ways) if number % 2 else list(ways)[::-1]:
            started = time.perf_counter()
            ways[name]()
            if number:  # the first round warms up
                times[name].append(time.perf_counter() - started)
    for name, values in times.items():
        ratios = sorted(a / b for a, b in zip(values, times[reference], strict=True))
        # 95 % for the median: order statistics of the binomial distribution, normal approximation.
        rank = max(0, int((pairs - 1.96 * pairs**0.5) / 2))
        print(
            f"{title}: {name:<26} median {1e3 * statistics.median(values):9.3f} ms; / {reference}: "
            f"{statistics.median(ratios):.3f} [{ratios[rank]:.3f}, {ratios[-1 - rank]:.3f}], {pairs} pairs"
        )


def main(pairs=PAIRS, width=256, length=64):
    torch.set_num_threads(1)
    greedy(pairs)
    steps(pairs, width, length)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
