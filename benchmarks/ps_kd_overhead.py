"""PS-KD inside a real training step with 1,000 classes, against plain cross-entropy: pairs in turn, one process."""

import functools
import statistics
import sys
import time

import torch
from torch import nn

from wellposed.losses import PastModelTeacher, ProgressiveSelfDistillation

CLASSES, BATCH, EXAMPLES, PAIRS, EPOCHS = 1000, 64, 50_000, 81, 10


def network():
    """A small convolutional network with a wide head: about 2 million parameters."""
    torch.manual_seed(0)
    widths = [3, 64, 128, 256]
    layers = []
    for before, after in zip(widths, widths[1:], strict=False):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256 * 16, 256), nn.ReLU(), nn.Linear(256, CLASSES))


def batches(count):
    """Other examples in every step: rows that a step has just read would still lie in the cache."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        inputs = torch.randn(BATCH, 3, 32, 32, generator=generator)
        targets = torch.randint(0, CLASSES, (BATCH,), generator=generator)
        yield inputs, targets, torch.randperm(EXAMPLES, generator=generator)[:BATCH]


def stored(model, batch, criterion):
    inputs, targets, index = batch
    return criterion(model(inputs), targets, index)


def taught(model, batch, teacher):
    inputs, targets, _ = batch
    return nn.functional.cross_entropy(model(inputs), teacher.soften(model, inputs, targets))


def plain(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def main(pairs=PAIRS):
    torch.set_num_threads(1)
    options = {
        "PS-KD": {},
        "PS-KD, float16": {"dtype": torch.float16},
        "PS-KD, top 32": {"top_k": 32, "dtype": torch.float16},
    }
    losses = {"cross-entropy": plain}
    for name, chosen in options.items():
        criterion = ProgressiveSelfDistillation(EXAMPLES, CLASSES, epochs=EPOCHS, **chosen)
        # A full memory in the middle of training: every row is read, mixed and written.
        for start in range(0, EXAMPLES, 1000):
            rows = torch.arange(start, start + 1000)
            criterion.memory.write(rows, torch.rand(1000, CLASSES).softmax(1))
        criterion.set_epoch(EPOCHS // 2)
        losses[name] = functools.partial(stored, criterion=criterion)
        print(f"{name:<22} {criterion.memory.bytes_per_row:6d} bytes an example")
    models = {name: network() for name in [*losses, "past model"]}
    teacher = PastModelTeacher(CLASSES, epochs=EPOCHS)
    teacher.set_epoch(EPOCHS // 2, models["past model"])
    losses["past model"] = functools.partial(taught, teacher=teacher)
    optimizers = {name: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9) for name, model in models.items()}

    def seconds(name, batch):
        started = time.perf_counter()
        optimizers[name].zero_grad()
        losses[name](models[name], batch).backward()
        optimizers[name].step()
        return time.perf_counter() - started

    times = {name: [] for name in losses}
    for number, batch in enumerate(batches(pairs + 1)):
        for name in list(losses) if number % 2 else list(losses)[::-1]:
            taken = seconds(name, batch)
            if number > 0:  # the first round warms up
                times[name].append(taken)
    for name, values in times.items():
        ratios = sorted(a / b for a, b in zip(values, times["cross-entropy"], strict=True))
        # 95 % for the median: order statistics of the binomial distribution, normal approximation.
        rank = max(0, int((pairs - 1.96 * pairs**0.5) / 2))
        print(
            f"{name:<22} median {1e3 * statistics.median(values):7.2f} ms a step of {BATCH}, {CLASSES} classes; "
            f"/ cross-entropy: {statistics.median(ratios):.4f} [{ratios[rank]:.4f}, {ratios[-1 - rank]:.4f}], {pairs} pairs"
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
