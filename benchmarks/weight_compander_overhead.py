"""The weight compander in a training step: against the plain net and against the parametrization one would write.

Arms in turn, one process, one thread. Two questions: what the reparameterisation costs (no weight decay anywhere), and
what the paper's decay of w costs (a penalty in the loss against `CompanderStep`, which needs no graph). Memory is the
exact number of bytes that the graph of one step keeps beside the parameters.
"""

import statistics
import time

import torch
from torch import nn
from torch.nn.utils import parametrize

from wellposed.weights import CompanderStep, apply_compander

BATCH, PAIRS, STEPS = 32, 41, 1
A, B, DECAY = 0.7, 0.9, 5e-4


class Naive(nn.Module):
    """`a * atan(v / b)` as autograd sees it."""

    def __init__(self, learnable=False):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(s)) if learnable else s for s in (A, B))

    def forward(self, v):
        return self.a * torch.atan(v / self.b)

    def right_inverse(self, w):
        with torch.no_grad():
            return self.b * torch.tan(w / self.a)


def network():
    """Three convolutions and a wide head: about 1.5 million weights."""
    torch.manual_seed(0)
    widths, layers = [3, 64, 128, 256], []
    for before, after in zip(widths, widths[1:], strict=False):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256 * 16, 256), nn.ReLU(), nn.Linear(256, 100))


def naive(learnable=False):
    model = network()
    for layer in model:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            parametrize.register_parametrization(layer, "weight", Naive(learnable))
    return model


def companded(learnable="no"):
    model = network()
    apply_compander(model, A, B, learnable=learnable)
    return model


def decayed(model):
    """The paper's penalty on w, as a graph."""
    return (
        0.5 * DECAY * sum(layer.weight.square().sum() for layer in model if isinstance(layer, (nn.Conv2d, nn.Linear)))
    )


def optimizer_of(model, weight_decay=0.0):
    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": rest}]
    return torch.optim.SGD(groups, lr=0.01, momentum=0.9)


def arms():
    """`{name: (model, optimizer, extra loss)}` of both questions; the plain net of each comes first."""

    def arm(model, weight_decay=0.0, extra=None, companding=False):
        optimizer = optimizer_of(model, weight_decay)
        if companding:
            CompanderStep(model, optimizer).register()
        return model, optimizer, extra

    without = {"plain": arm(network()), "naive": arm(naive()), "compander": arm(companded())}
    with_decay = {
        "plain": arm(network(), DECAY),
        "naive": arm(naive(), extra=decayed),
        "compander": arm(companded(), DECAY, companding=True),
    }
    return {"no weight decay": without, f"weight decay {DECAY:g}": with_decay}


def kept_bytes(model, inputs, targets, extra=None):
    """Bytes of all storages that the graph of one loss keeps, parameters and inputs excepted."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss = loss if extra is None else loss + extra(model)
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers(), inputs, targets]}
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for place, size in sizes.items() if place not in own)


def compare(title, arms, inputs, targets):
    def seconds(name):
        model, optimizer, extra = arms[name]
        started = time.perf_counter()
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            (loss if extra is None else loss + extra(model)).backward()
            optimizer.step()
        return (time.perf_counter() - started) / STEPS

    for name in arms:
        seconds(name)
    times = {name: [] for name in arms}
    names = list(arms)
    for pair in range(PAIRS):
        shift = pair % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(seconds(name))
    print(f"{title}: {PAIRS} rounds of {STEPS} steps of {BATCH} images")
    for name, (model, _, extra) in arms.items():
        kept = kept_bytes(model, inputs, targets, extra) / 2**20
        print(f"  {name:<10} median {1e3 * statistics.median(times[name]):7.2f} ms, graph keeps {kept:7.2f} MiB")
    for one, other in (("naive", "plain"), ("compander", "plain"), ("compander", "naive")):
        ratios = sorted(x / y for x, y in zip(times[one], times[other], strict=True))
        low, high = ratios[PAIRS // 2 - 7], ratios[PAIRS // 2 + 7]  # 95 % for the median of 41 pairs
        print(f"  {one} / {other}: median {statistics.median(ratios):.4f} [{low:.4f}, {high:.4f}]")


def main():
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(BATCH, 3, 32, 32, generator=generator)
    targets = torch.randint(0, 100, (BATCH,), generator=generator)
    for title, group in arms().items():
        compare(title, group, inputs, targets)
    plain = kept_bytes(network(), inputs, targets)
    weights = sum(4 * p.numel() for p in network().parameters() if p.ndim > 1)
    print(
        f"memory of learned scales, beside the plain net's graph, in weight tensors of {weights / 2**20:.2f} MiB in all:"
    )
    for name, model in (("naive", naive(True)), ("compander", companded("layer"))):
        print(f"  {name:<10} {(kept_bytes(model, inputs, targets) - plain) / weights:.3f}")


if __name__ == "__main__":
    main()
