"""BA-LoRA as published: Llama-2-7b learns mathematics from MetaMathQA through adapters of rank 128 (arXiv 2408.04556).

Beside it LoRA, PiSSA, and PiSSA with the consistency term alone, each at four learning rates. The teacher is the model with
its first adapters, and the spectrum is exact, in the basis of the frozen head; the authors keep a second model and a
randomized spectrum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from ...fit import fit
from ...lab.protocol import Protocol
from ...lab.study import Study
from ...lab.trial import Trial, TrialResult
from ...losses.bias_alleviating import BiasAlleviatingLoRA
from ...losses.logit_terms import LogitConsistency
from ...losses.strength_schedule import cosine_decay
from ...regularizer import Regularizer
from ..problems.math_questions import (
    MODEL,
    TESTS,
    TRAIN,
    TokenBatches,
    math_folder,
    read_examples,
    read_questions,
    share_right,
)
from .images import choose_device

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
HEAD = "lm_head"

METHODS: Mapping[str, Callable[[], Regularizer | None]] = {
    "plain": lambda: None,
    "kl": lambda: LogitConsistency(0.025, schedule="cosine"),
    "trio": lambda: BiasAlleviatingLoRA("generation", head=HEAD),
}


def run(trial: Trial) -> TrialResult:
    """Train one arm on MetaMathQA, and ask it GSM8K and MATH; accuracies in points."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings, seed, device, folder = trial.settings, trial.seed, choose_device(trial), math_folder()
    place = str(folder / MODEL)
    tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)
    loaded: Any = partial(AutoModelForCausalLM.from_pretrained, local_files_only=True, dtype=torch.bfloat16)
    pretrained = loaded(place).to(device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(
            pretrained,
            LoraConfig(
                r=int(settings["rank"]),
                lora_alpha=float(settings["alpha"]),  # type: ignore[arg-type]
                lora_dropout=0.0,
                target_modules=TARGETS,
                init_lora_weights=True if settings["init"] == "true" else settings["init"],  # type: ignore[arg-type]
                task_type="CAUSAL_LM",
            ),
        )
    batches = TokenBatches(
        read_examples(folder / TRAIN, int(settings["examples"])),
        tokenizer, int(settings["batch_size"]), int(settings["length"]), seed, device,
    )  # fmt: skip
    result = fit(
        model,
        batches,
        epochs=int(settings["epochs"]),
        regularizer=METHODS[str(settings["method"])](),
        optimizer=partial(torch.optim.AdamW, lr=float(settings["learning_rate"]), weight_decay=0.0),
        scheduler=partial(warmed_up_cosine, warmup=float(settings["warmup"])),
        accumulation=int(settings["micro_batches"]),
        amp=torch.bfloat16,
        seed=seed,
    )
    limit = int(settings.get("questions", 0)) or None
    metrics = {
        name: share_right(
            result.model, tokenizer, read_questions(folder / file)[:limit], int(settings["answer_tokens"])
        )
        for name, file in TESTS.items()
    }  # fmt: skip
    return TrialResult({"score": metrics["gsm8k"], "loss": result.history[-1]["loss"], **metrics})


def warmed_up_cosine(optimizer: torch.optim.Optimizer, total: int, warmup: float) -> LambdaLR:
    """Up from 0 over a share of the steps, then down to 0 along half a cosine."""
    first = math.ceil(warmup * total)

    def factor(step: int) -> float:
        if step < first:
            return step / first
        return cosine_decay((step - first) / max(1, total - first), floor=0.0)

    return LambdaLR(optimizer, factor)


def prepare(protocol: Protocol) -> None:
    """Look for the model and the data before any training."""
    math_folder()


STUDY = Study(slug="ba-lora", run=run, estimands={}, headline=("gsm8k", "GSM8K accuracy, points"), prepare=prepare)
