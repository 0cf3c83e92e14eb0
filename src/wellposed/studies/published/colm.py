"""CoLM as published: LoRA on Phi-2, MathInstruct, 64 of 128 examples a step (arXiv 2407.19580, section 5).

Beside the paper's arms stands the control that it left out: small sources kept, the rest at random.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ...batching import IGNORE_INDEX, Batch
from ...datasets.registry import ENVIRONMENT, DatasetNotInstalled
from ...fit import fit
from ...gradients.mini_batch_coreset import MiniBatchCoreset
from ...gradients.source_shares import small_sources
from ...indexed_dataset import epoch_seed
from ...lab.protocol import Protocol
from ...lab.study import Study
from ...lab.trial import Trial, TrialResult
from ...regularizer import Regularizer
from .images import checkpoints, choose_device

MODEL, DATA, DOMAINS = "phi-2", "math-instruct", ("in-domain", "out-of-domain")
PROMPT = "Below is an instruction that describes a task.\n\n### Instruction:\n{instruction}\n\n### Response:"
PARTS = 8
"""Checkpoints in a run."""

ADAPTED = {"phi": ("q_proj", "k_proj", "v_proj", "fc1", "fc2")}
OTHERS_ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj")

Settings = Mapping[str, Any]


def folders() -> tuple[Path, Path]:
    """The model's and the data's, in the folder that WELLPOSED_DATA names.

    Raises:
        DatasetNotInstalled: naming what is missing and where it was looked for.
    """
    root = os.environ.get(ENVIRONMENT)
    base = Path(root or ".")
    wanted = [base / MODEL / "config.json", base / DATA / "train.json"]
    missing = [str(file) for file in wanted if not file.is_file()]
    missing += [str(base / DATA / name) for name in DOMAINS if not list((base / DATA / name).glob("*.json"))]
    if root is None or missing:
        raise DatasetNotInstalled(
            f"colm needs the model {MODEL}/ and the data {DATA}/ (train.json and {', '.join(DOMAINS)}/*.json) in the folder "
            f"that the environment variable {ENVIRONMENT} names ({'not set' if root is None else root}); missing: "
            f"{', '.join(missing) or 'the folder'}. Nothing is downloaded"
        )
    return base / MODEL, base / DATA


class TextPools:
    """Pools of instructions with their answers, as token numbers, targets and sources; an epoch is a part of the run.

    Args:
        rows: dicts with `instruction`, `output` and `source`.
        tokenizer: of the model.
        pool: examples of a pool.
        steps: pools in an epoch.
        length: longest sequence, in tokens.
        seed: of the order.
    """

    def __init__(
        self, rows: Sequence[Mapping[str, Any]], tokenizer: Any, pool: int, steps: int, length: int, seed: int
    ) -> None:
        if not 1 <= pool <= len(rows):
            raise ValueError(f"TextPools: pool must lie in [1, {len(rows)}], the training set, got {pool}")
        self.rows, self.tokenizer, self.pool, self.steps, self.length = rows, tokenizer, pool, steps, length
        self.seed, self.epoch = seed, 0
        names = sorted({str(row["source"]) for row in rows})
        self.sources = torch.tensor([names.index(str(row["source"])) for row in rows])

    def set_epoch(self, epoch: int) -> None:
        """Which part of the run comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        per_pass = len(self.rows) // self.pool
        for number in range(self.epoch * self.steps, (self.epoch + 1) * self.steps):
            around, place = divmod(number, per_pass)
            generator = torch.Generator().manual_seed(epoch_seed(self.seed, around))
            order = torch.randperm(len(self.rows), generator=generator)
            yield self.batch(order[place * self.pool : (place + 1) * self.pool])

    def batch(self, index: Tensor) -> Batch:
        """Some examples, padded on the right; a target at each position is the next token of an answer."""
        sequences, starts = [], []
        for i in index.tolist():
            prompt = self.tokenizer(PROMPT.format(instruction=self.rows[i]["instruction"]))["input_ids"]
            answer = self.tokenizer(" " + str(self.rows[i]["output"]), add_special_tokens=False)["input_ids"]
            sequences.append([*prompt, *answer, self.tokenizer.eos_token_id][: self.length + 1])
            starts.append(len(prompt))
        longest = max(len(sequence) for sequence in sequences) - 1
        tokens = torch.full((len(index), longest), self.tokenizer.eos_token_id)
        targets, mask = torch.full_like(tokens, IGNORE_INDEX), torch.zeros_like(tokens)
        for row, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
            count = len(sequence) - 1
            tokens[row, :count] = torch.tensor(sequence[:-1])
            mask[row, :count] = 1
            targets[row, start - 1 : count] = torch.tensor(sequence[start:])
        inputs = {"input_ids": tokens, "attention_mask": mask, "use_cache": False}
        return Batch(inputs, targets, index, None, {"source": self.sources[index]})


def adapted_model(folder: Path, rank: int, seed: int) -> tuple[nn.Module, Any]:
    """The model under LoRA (alpha 4 rank, dropout 0.05), and its tokenizer."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    targets = list(ADAPTED.get(model.config.model_type, OTHERS_ADAPTED))
    config = LoraConfig(
        r=rank, lora_alpha=4 * rank, lora_dropout=0.05, target_modules=targets, task_type="CAUSAL_LM"
    )  # fmt: skip
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return get_peft_model(model, config), tokenizer


def compared_tensor(model: nn.Module) -> str:
    """Name of the last layer's LoRA B of the value projection."""
    return [name for name, _ in model.named_parameters() if re.search(r"v_proj\.lora_B\.\w+\.weight$", name)][-1]


def method_of(settings: Settings, model: nn.Module, sources: Tensor, seed: int) -> MiniBatchCoreset | None:
    """The arm's selection; None trains on the whole pool."""
    name = str(settings["method"])
    make: dict[str, Callable[[], MiniBatchCoreset | None]] = {
        "random": lambda: None,
        "keep_random": lambda: MiniBatchCoreset(small_sources=small_sources(sources), ranking="random", seed=seed),
        "colm": lambda: MiniBatchCoreset(
            small_sources=small_sources(sources),
            feature="zo",
            fixed_z=True,
            topk=int(settings["topk"]),
            seed=seed,
            parameter=compared_tensor(model),
            chunk_size=2 * int(settings["micro_batch"]),
        ),
    }
    if name not in make:
        raise ValueError(f"colm: method must be one of {list(make)}, got {name!r}")
    return make[name]()


def run(trial: Trial) -> TrialResult:
    """Train one arm, and answer the questions of all test sets."""
    settings, device = trial.settings, choose_device(trial)
    model_folder, data = folders()
    rows = json.loads((data / "train.json").read_text("utf-8"))
    model, tokenizer = adapted_model(model_folder, int(settings["rank"]), trial.seed)
    steps = int(settings["steps"])
    parts = math.gcd(PARTS, steps)
    pools = TextPools(rows, tokenizer, int(settings["pool"]), steps // parts, int(settings["length"]), trial.seed)
    method: Regularizer | None = method_of(settings, model, pools.sources, trial.seed)
    trained_on = int(settings["pool"]) // (1 if method is None else 2)
    with checkpoints(trial) as place:
        trained = fit(
            model,
            pools,
            epochs=parts,
            regularizer=method,
            optimizer=partial(torch.optim.AdamW, lr=float(settings["learning_rate"]), weight_decay=0.0),
            scheduler=_warm_cosine,
            accumulation=max(1, trained_on // int(settings["micro_batch"])),
            clip_norm=1.0,
            amp=torch.bfloat16 if device.type == "cuda" else None,
            device=device,
            seed=trial.seed,
            checkpoint=place("adapter"),
        ).model
    found = {}
    for domain in DOMAINS:
        sets = [json.loads(file.read_text("utf-8")) for file in sorted((data / domain).glob("*.json"))]
        shares = [right_answers(trained, tokenizer, questions, settings) for questions in sets]
        found[domain] = sum(shares) / len(shares)
    accuracy = found["in-domain"]
    return TrialResult({"score": accuracy, "accuracy": accuracy, "out_of_domain": found["out-of-domain"]})


@torch.no_grad()
def right_answers(
    model: nn.Module, tokenizer: Any, questions: Sequence[Mapping[str, Any]], settings: Settings, batch: int = 16
) -> float:
    """Share of questions, in points, whose answer is the last number of the text that the model goes on with."""
    model.eval()
    device = next(model.parameters()).device
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    right = 0
    for start in range(0, len(questions), batch):
        asked = questions[start : start + batch]
        prompts = [PROMPT.format(instruction=question["instruction"]) for question in asked]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(device)
        allowed = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        output = model.generate(  # type: ignore[operator]
            **allowed, max_new_tokens=int(settings.get("new_tokens", 512)), do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(same_number(text, str(q["answer"])) for text, q in zip(texts, asked, strict=True))
    return 100.0 * right / max(1, len(questions))


def same_number(text: str, answer: str) -> bool:
    """Whether the last number of a text is the last one of an answer, to four digits.

    Example:
        >>> same_number("so 3 + 4 makes 1,007.0", "1007"), same_number("I do not know", "7")
        (True, False)
    """
    found = [re.findall(r"-?\d[\d,]*\.?\d*", part) for part in (text, answer)]
    if not all(found):
        return False
    given, wanted = (float(numbers[-1].replace(",", "")) for numbers in found)
    return math.isclose(given, wanted, rel_tol=1e-4, abs_tol=1e-6)


def prepare(protocol: Protocol) -> None:
    """Look for model and data before anything is trained."""
    folders()


def _warm_cosine(optimizer: Optimizer, total: int) -> LambdaLR:
    """Linear warm-up over 3 % of the steps, then half a cosine to zero."""
    warm = max(1, round(0.03 * total))

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))

    return LambdaLR(optimizer, factor)


STUDY = Study(slug="colm", run=run, estimands={}, headline=("accuracy", "in-domain accuracy, points"), prepare=prepare)
