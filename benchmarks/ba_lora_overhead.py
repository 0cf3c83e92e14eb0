"""BA-LoRA's price: its spectrum three ways, a step with each term against plain LoRA, and one model as teacher against two.

python benchmarks/ba_lora_overhead.py [pairs] [--tiny]
"""

import copy
import statistics
import sys
import time
from functools import partial

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from wellposed import Step
from wellposed.accumulation import Accumulation
from wellposed.losses.adapter_teacher import FrozenCopyTeacher, InitialAdapterTeacher
from wellposed.losses.bias_alleviating import BiasAlleviatingLoRA
from wellposed.losses.logit_spectrum import (
    head_factor,
    logits_in_head_basis,
    randomized_singular_values,
    spectral_concentration,
)
from wellposed.losses.logit_terms import LogitConsistency, LogitDiversity
from wellposed.losses.spectral_term import SpectralConcentration
from wellposed.objective import cross_entropy
from wellposed.regularizer import Regularizer

PAIRS = 15
LARGE = {"hidden": 256, "layers": 4, "vocabulary": 32_000, "batch": 4, "length": 64}
TINY = {"hidden": 32, "layers": 1, "vocabulary": 500, "batch": 2, "length": 12}
K = 10


def compared(runs, pairs, reference):
    """Seconds of each function in turn, forwards and backwards, after one round to warm up; a line for each."""
    times = {name: [] for name in runs}
    for number in range(pairs + 1):
        for name in list(runs) if number % 2 else list(runs)[::-1]:
            started = time.perf_counter()
            runs[name]()
            if number > 0:
                times[name].append(time.perf_counter() - started)
    for name, values in times.items():
        ratios = sorted(a / b for a, b in zip(values, times[reference], strict=True))
        # 95 % for the median: order statistics of the binomial distribution, normal approximation.
        rank = max(0, int((pairs - 1.96 * pairs**0.5) / 2))
        print(
            f"  {name:<34} median {1e3 * statistics.median(values):9.2f} ms; / {reference}: "
            f"{statistics.median(ratios):.3f} [{ratios[rank]:.3f}, {ratios[-1 - rank]:.3f}], {pairs} pairs"
        )


def spectra(sizes, pairs):
    """Value and gradient in the hidden states, from the hidden states on: the logits are there anyway for the task."""
    rows = sizes["batch"] * sizes["length"]
    torch.manual_seed(0)
    weight = torch.randn(sizes["vocabulary"], sizes["hidden"])
    hidden = torch.randn(rows, sizes["hidden"], requires_grad=True)
    started = time.perf_counter()
    factor = head_factor(weight)
    print(f"\nspectrum of {rows} x {sizes['vocabulary']} logits, {sizes['hidden']} features, k = {K}")
    print(f"  factor of the head, once: {1e3 * (time.perf_counter() - started):.0f} ms")
    logits = (hidden @ weight.T).detach().requires_grad_()

    def head():
        spectral_concentration(logits_in_head_basis(hidden, factor), K, "frobenius").backward()

    def lowrank():
        values = torch.svd_lowrank(logits, q=min(K + 5, *logits.shape), niter=2)[1]
        (-values[:K].sum() / logits.norm()).backward()

    runs = {
        "basis of the head (exact)": head,
        "torch.svd_lowrank of the logits": lowrank,
        "ours, randomized": lambda: spectral_concentration(logits, K, "frobenius", "randomized").backward(),
        "svdvals of the logits (exact)": lambda: spectral_concentration(logits, K, "frobenius", "exact").backward(),
    }
    compared(runs, pairs, "basis of the head (exact)")
    exact = torch.linalg.svdvals(logits.detach())[:K].sum()
    for name, values in (
        ("basis of the head", torch.linalg.svdvals(logits_in_head_basis(hidden.detach(), factor))[:K]),
        ("randomized", randomized_singular_values(logits.detach(), K)),
    ):
        print(f"  {name}: sum of the leading values off by {abs(float(values.sum() / exact) - 1):.1e}")


def causal(sizes):
    torch.manual_seed(0)
    hidden = sizes["hidden"]
    configuration = LlamaConfig(
        vocab_size=sizes["vocabulary"], hidden_size=hidden, intermediate_size=2 * hidden,
        num_hidden_layers=sizes["layers"], num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    return LlamaForCausalLM(configuration)


def with_adapter(pretrained):
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    configuration = LoraConfig(r=8, lora_alpha=8, init_lora_weights="pissa", target_modules=targets)
    return get_peft_model(copy.deepcopy(pretrained), configuration)


class Trainer:
    """One model with its method, driven as `fit` does."""

    def __init__(self, pretrained, method, sizes):
        self.method = method
        self.model = method.attach(with_adapter(pretrained))
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, sizes["vocabulary"], (sizes["batch"], sizes["length"] + 1), generator=generator)
        self.inputs, self.targets = {"input_ids": ids[:, :-1]}, ids[:, 1:]

    def step(self):
        self.optimizer.zero_grad()
        # Late in training: schedules that begin at a fifth have begun.
        pool = Step(self.model, self.optimizer, self.inputs, self.targets, number=50, total=100)
        Accumulation(pool, self.method, cross_entropy).run()
        self.optimizer.step()


def steps(sizes, pairs):
    pretrained = causal(sizes)
    top_k = min(20, sizes["vocabulary"])
    methods = {
        "plain LoRA": Regularizer(),
        "consistency": LogitConsistency(0.025),
        "diversity": LogitDiversity(0.005, form="topk_entropy", top_k=top_k),
        "spectrum, basis of the head": SpectralConcentration(0.005, k=K, norm="frobenius", head="lm_head"),
        "spectrum, randomized": SpectralConcentration(0.005, k=K, norm="frobenius", method="randomized"),
        "BA-LoRA": BiasAlleviatingLoRA("generation", head="lm_head"),
    }
    parameters = sum(p.numel() for p in pretrained.parameters())
    print(f"\na training step, {parameters / 1e6:.1f} million parameters, {sizes['batch']} x {sizes['length']} tokens")
    compared({name: Trainer(pretrained, m, sizes).step for name, m in methods.items()}, pairs, "plain LoRA")


def teachers(sizes, pairs):
    pretrained = causal(sizes)
    found = {
        "one model (first adapter kept)": InitialAdapterTeacher(),
        "two models": FrozenCopyTeacher(copy.deepcopy(pretrained)),
    }
    trainers = {name: Trainer(pretrained, LogitConsistency(0.025, teacher=t), sizes) for name, t in found.items()}
    base = held(trainers["two models"].model)
    print(f"\na step with a teacher; the adapted model holds {base / 2**20:.2f} MiB")
    for name, teacher in found.items():
        print(f"  {name:<34} keeps {held(teacher) / 2**20:9.3f} MiB more ({held(teacher) / base:.3f} of the model)")
    compared({name: partial(Trainer.step, trainer) for name, trainer in trainers.items()}, pairs, "two models")


def held(module: nn.Module) -> int:
    """Bytes of the parameters and buffers of a module, shared ones once."""
    tensors = {id(t): t for t in [*module.parameters(), *module.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def main(arguments):
    torch.set_num_threads(1)
    sizes = TINY if "--tiny" in arguments else LARGE
    pairs = next((int(a) for a in arguments if a.isdigit()), PAIRS)
    spectra(sizes, pairs)
    steps(sizes, pairs)
    teachers(sizes, pairs)


if __name__ == "__main__":
    main(sys.argv[1:])
