"""Half fine-tuning's step and memory beside full fine-tuning, a plain freezer and LoRA: in turn, one process.

    python benchmarks/hft_step.py          # a model of about 13 million parameters
    python benchmarks/hft_step.py small    # to see that it runs

Bytes of gradients and optimizer state are counted, not measured. Of a step's three units of matrix products (forward,
backward to the inputs, backward to the weights) freezing half of the weights saves half a unit: at most 16.7 %.
"""

import statistics
import sys
import time

import torch
import torch.nn.functional as F

from wellposed.studies.problems.tiny_llama import TinyLlama
from wellposed.weights.half_fine_tuning import HalfFineTuning
from wellposed.weights.low_rank import LowRankAdaptation

VOCABULARY, RANK = 256, 8
SIZES = {"small": (64, 2, 16, 4, 5), "full": (512, 4, 64, 8, 61)}
"""Width, layers, length, batch, rounds."""


def in_layers(name, module):
    return name.startswith("layers.")


def plain_freezer(model, frozen):
    """As many tensors of the layers as HFT freezes, from the first on."""
    names = [name for name, _ in model.named_parameters() if name.startswith("layers.")]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in names[:frozen])
    return model


def models(width, layers, length):
    def fresh():
        return TinyLlama(VOCABULARY, length, width, heads=4, layers=layers)

    half = fresh()
    frozen = len(HalfFineTuning(seed=0).new_stage(half).frozen)
    lora = LowRankAdaptation(
        RANK, targets=in_layers, trainable=["embed_tokens.weight", "norm.weight", "lm_head.weight"]
    )
    found = {
        "full fine-tuning": fresh(),
        "HFT": half,
        "plain freezer": plain_freezer(fresh(), frozen),
        f"LoRA, rank {RANK}": lora.attach(fresh()),
    }
    try:
        import peft
    except ImportError:
        return found
    theirs = fresh()
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names), theirs)
    for name, parameter in theirs.named_parameters():
        if name in ("embed_tokens.weight", "norm.weight", "lm_head.weight"):
            parameter.requires_grad_(True)
    return {**found, f"PEFT LoRA, rank {RANK}": theirs}


def trained_share(model):
    """Share of the layers' matrices that needs a gradient."""
    sizes = [
        (p.numel(), p.requires_grad) for n, p in model.named_parameters() if n.startswith("layers.") and p.ndim == 2
    ]
    return sum(size for size, trains in sizes if trains) / sum(size for size, _ in sizes)


def main():
    torch.set_num_threads(1)
    width, layers, length, batch, rounds = SIZES["small" if "small" in sys.argv[1:] else "full"]
    arms = models(width, layers, length)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (batch, length), generator=generator)
    targets = torch.randint(VOCABULARY, (batch, length), generator=generator)
    optimizers = {
        name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, foreach=True)
        for name, model in arms.items()
    }

    def seconds(name):
        started = time.perf_counter()
        optimizers[name].zero_grad()
        F.cross_entropy(arms[name](tokens, length).flatten(0, 1), targets.flatten()).backward()
        optimizers[name].step()
        return time.perf_counter() - started

    for name in arms:
        seconds(name), seconds(name)
    times = {name: [] for name in arms}
    for number in range(rounds):
        for name in list(arms) if number % 2 else list(arms)[::-1]:
            times[name].append(seconds(name))

    print(f"{'':<20} trained    state MB   gradients MB   ms a step   ratio to full [95 %]   by FLOPs")
    base = times["full fine-tuning"]
    for name, model in arms.items():
        state = sum(
            value.numel() * value.itemsize
            for values in optimizers[name].state.values()
            for value in values.values()
            if isinstance(value, torch.Tensor)
        )
        gradients = sum(p.numel() * p.itemsize for p in model.parameters() if p.requires_grad)
        ratios = sorted(a / b for a, b in zip(times[name], base, strict=True))
        cut = max(0, round(rounds / 2 - 0.98 * rounds**0.5) - 1)  # 95 % for the median
        allowed = (2 + trained_share(model)) / 3
        print(
            f"{name:<20} {sum(p.numel() for p in model.parameters() if p.requires_grad):>9,} {state / 1e6:>9.2f} "
            f"{gradients / 1e6:>14.2f} {1e3 * statistics.median(times[name]):>11.2f}   "
            f"{statistics.median(ratios):.3f} [{ratios[cut]:.3f}, {ratios[-1 - cut]:.3f}]"
            f"{'':<7}{f'{allowed:.3f}' if 'LoRA' not in name else '-':>8}"
        )


if __name__ == "__main__":
    main()
