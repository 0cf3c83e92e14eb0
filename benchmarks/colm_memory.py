"""Mini-batch coresets: peak memory of a training step beside large batches and gradient accumulation.

A causal transformer of six blocks; sequences of ten sources, each a random bigram language of its own, in CoLM's shares. Each
way runs in a process of its own; printed is the largest resident memory in training steps above that before the first one
(weights and data in place; gradients and Adam's state are in it), and, as the quality of what the memory buys, how far the
batch's gradient lies from that of 2,048 examples, relative to its length, over 20 batches, at the weights after the steps.
Of a coreset's gradient two numbers: with uniform weights (CoLM), which aims at another mixture, and with unbiased ones.

With accumulation memory depends on the micro-batch and not on the batch: what a coreset saves against it is time.
"""

import subprocess
import sys

import torch
from colm_selection import ADAPTER, SHARES, SMALL, Decoder

from wellposed import Regularizer, Step
from wellposed.accumulation import Accumulation
from wellposed.gradients.mini_batch_coreset import MiniBatchCoreset
from wellposed.lab.memory import PeakMemory
from wellposed.objective import cross_entropy

POPULATION, BATCHES = 2048, 20


def coreset(**options):
    return MiniBatchCoreset(small_sources=SMALL, parameter=ADAPTER, **options)


WAYS = {  # pool, micro-batches, the selection with uniform and with unbiased weights
    "random 64": (64, 1, None),
    "random 64, 4 micro-batches": (64, 4, None),
    "random 128": (128, 1, None),
    "random 128, 8 micro-batches": (128, 8, None),
    "kept + random, 64 of 128": (128, 1, lambda w: coreset(ranking="random", weights=w)),
    "CoLM exact, 64 of 128": (128, 1, lambda w: coreset(weights=w, chunk_size=64)),
    "CoLM exact, 64 of 128, 4 micro-batches": (128, 4, lambda w: coreset(weights=w, chunk_size=16)),
    "CoLM one direction, 64 of 128": (128, 1, lambda w: coreset(feature="zo", fixed_z=True, weights=w, chunk_size=64)),
}


def sequences(count, length, vocabulary, seed):
    """Tokens (count, length + 1) and sources: each source follows a bigram table of its own."""
    tables = torch.rand(len(SHARES), vocabulary, vocabulary, generator=torch.Generator().manual_seed(0)).pow(8)
    generator = torch.Generator().manual_seed(seed)
    source = torch.multinomial(SHARES, count, replacement=True, generator=generator)
    tokens = [torch.randint(0, vocabulary, (count,), generator=generator)]
    for _ in range(length):
        tokens.append(torch.multinomial(tables[source, tokens[-1]], 1, generator=generator)[:, 0])
    return torch.stack(tokens, 1), source


def gradient(model, step, parts):
    """Of the whole batch, as one vector."""
    model.zero_grad(set_to_none=True)
    Accumulation(step, Regularizer(), cross_entropy, parts).run()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def measure(name, steps, width, length, population, batches, vocabulary=200):
    torch.set_num_threads(1)
    size, parts, make = WAYS[name]
    torch.manual_seed(0)
    model = Decoder(width, vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens, source = sequences(population, length, vocabulary, 1)
    generator = torch.Generator().manual_seed(2)

    def pool(rows):
        return Step(model, optimizer, tokens[rows, :-1], tokens[rows, 1:], rows, extra={"source": source[rows]})

    def draw():
        return pool(torch.randperm(population, generator=generator)[:size])

    method = Regularizer() if make is None else make("uniform")
    peak = PeakMemory()
    peak.start()
    before = peak.read()
    for _ in range(steps):
        step = draw()
        optimizer.zero_grad()
        method.on_batch(step)
        Accumulation(step, method, cross_entropy, parts).run()
        optimizer.step()
        method.on_step(step)
        del step
    used = None if before is None else peak.read() - before
    model.eval()
    whole = gradient(model, pool(torch.arange(population)), population // 64)
    errors = {}
    for weights in ("uniform", "unbiased") if make is not None else ("uniform",):
        choose = Regularizer() if make is None else make(weights)
        found = []
        generator.manual_seed(3)  # the same batches with both kinds of weights
        for _ in range(batches):
            step = draw()
            choose.on_batch(step)
            found.append(float((gradient(model, step, max(4, parts)) - whole).norm() / whole.norm()))
        errors[weights] = sum(found) / len(found)
    shown = "unknown here" if used is None else f"{used / 2**20:8.1f} MB"
    print(f"{name:<40} {shown}  gradient error " + ", ".join(f"{k} {v:.3f}" for k, v in errors.items()), flush=True)


def main(steps=10, width=256, length=64, population=POPULATION, batches=BATCHES):
    for name in WAYS:
        options = map(str, (steps, width, length, population, batches))
        subprocess.run([sys.executable, __file__, name, *options], check=True)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments and arguments[0] in WAYS:
        measure(arguments[0], *map(int, arguments[1:]))
    else:
        main(*map(int, arguments))
