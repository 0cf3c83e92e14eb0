"""HFT as published: Llama-2-7b on Tulu-V2, and along the eight tasks of TRACE (arXiv 2404.18466, tables 1 and 3).

Models and data are read from a folder that the user fills; nothing is downloaded. Any causal model of transformers in that
folder runs the same code. Two controls that the paper left out stand beside it: lower rates, and WiSE-FT.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ...batching import IGNORE_INDEX, Batch
from ...continual_metrics import backward_transfer, overall_performance
from ...datasets.registry import ENVIRONMENT, DatasetNotInstalled
from ...fit import fit
from ...indexed_dataset import epoch_seed
from ...lab.protocol import Protocol
from ...lab.study import Study
from ...lab.trial import Trial, TrialResult
from ...regularizer import Regularizer
from ...weights.half_fine_tuning import HalfFineTuning
from ...weights.interpolation import WeightInterpolation
from .images import checkpoints, choose_device

FOLDER = "hft"
QUESTIONS = ("nq", "triviaqa", "hotpotqa")
TRACE = ("C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten")
"""In the order in which they are learned."""
WARMUP = 0.03
NEW_TOKENS = 64

Segments = list[tuple[str, bool]]
"""A conversation as pieces of text, and whether the loss counts on them."""


def run(trial: Trial) -> TrialResult:
    """Fine-tune and measure one arm."""
    with checkpoints(
        trial
    ) as file:  # one folder for all stages: a killed run passes quickly through those that are done
        return {"tulu": _tulu, "trace": _trace}[str(trial.settings["sequence"])](trial, file)


def _tulu(trial: Trial, file: Callable[[str], Path]) -> TrialResult:
    model, tokenizer = _model(str(trial.settings["model"]), choose_device(trial))
    method = _method(trial.settings, trial.seed)
    model = _tune(model, tokenizer, tulu_conversations(), method, trial, file("tulu"))
    metrics = {}
    for name in QUESTIONS:
        asked = _answered(model, tokenizer, _questions(name))
        metrics[name] = 100.0 * _mean([max(exact_match(said, a) for a in answers) for said, answers in asked])
    return TrialResult({**metrics, "score": _mean(list(metrics.values()))})


def _trace(trial: Trial, file: Callable[[str], Path]) -> TrialResult:
    model, tokenizer = _model(str(trial.settings["model"]), choose_device(trial))
    method = _method(trial.settings, trial.seed)  # one object: every task draws another half
    scores = torch.full((len(TRACE), len(TRACE)), float("nan"), dtype=torch.float64)
    for stage, task in enumerate(TRACE):
        train: list[Segments] = [[(r["prompt"], False), (r["answer"], True)] for r in _records(task, "train")]
        model = _tune(model, tokenizer, train, method, trial, file(task))
        for number, seen in enumerate(TRACE[: stage + 1]):
            test = [(r["prompt"], [r["answer"]]) for r in _records(seen, "test")]
            found = [score_of(seen)(said, a[0]) for said, a in _answered(model, tokenizer, test)]
            scores[stage, number] = 100.0 * _mean(found)
    performance = overall_performance(scores)
    return TrialResult({"score": performance, "backward_transfer": backward_transfer(scores, over="all")})


def prepare(protocol: Protocol) -> None:
    """Look for the files of all arms before any of them trains."""
    for arm in protocol.arms.values():
        _path(str(arm.fixed["model"]), "config.json")
        if arm.fixed["sequence"] == "tulu":
            _path("tulu-v2.jsonl")
            for name in QUESTIONS:
                _path("closed-book", f"{name}.jsonl")
        else:
            for task in TRACE:
                for part in ("train", "test"):
                    _path("trace", task, f"{part}.json")


# ── training ──────────────────────────────────────────────────────────────────────────────────────────────────────
class Conversations:
    """Batches of tokenised conversations, each padded to its longest; the order hangs on (seed, epoch) alone."""

    def __init__(self, rows: Sequence[tuple[list[int], list[int]]], batch_size: int, seed: int, padding: int) -> None:
        self.rows, self.batch_size, self.seed, self.padding = rows, batch_size, seed, padding
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch))
        order = torch.randperm(len(self.rows), generator=generator).tolist()
        for start in range(0, len(order), self.batch_size):
            yield self._batch([self.rows[i] for i in order[start : start + self.batch_size]])

    def _batch(self, rows: Sequence[tuple[list[int], list[int]]]) -> Batch:
        length = max(len(tokens) for tokens, _ in rows)
        inputs = torch.full((len(rows), length), self.padding)
        seen, targets = torch.zeros_like(inputs), torch.full_like(inputs, IGNORE_INDEX)
        for i, (tokens, labels) in enumerate(rows):
            inputs[i, : len(tokens)] = torch.tensor(tokens)
            seen[i, : len(tokens)] = 1
            targets[i, : len(tokens) - 1] = torch.tensor(labels[1:])  # each position predicts the next token
        return Batch({"input_ids": inputs, "attention_mask": seen, "use_cache": False}, targets)


def _tune(
    model: nn.Module, tokenizer: Any, data: Sequence[Segments], method: Regularizer | None, trial: Trial, file: Path
) -> nn.Module:
    settings = trial.settings
    rows = [tokenised(tokenizer, segments, int(settings["max_length"])) for segments in data]
    loader = Conversations(rows, int(settings["batch_size"]), trial.seed, tokenizer.pad_token_id or 0)
    return fit(
        model,
        loader,
        epochs=int(settings["epochs"]),
        regularizer=method,
        optimizer=partial(torch.optim.AdamW, lr=float(settings["learning_rate"]), weight_decay=0.0),
        scheduler=linear_decay,
        accumulation=int(settings["accumulation"]),
        clip_norm=1.0,
        seed=trial.seed,
        checkpoint=file,
    ).model


def linear_decay(optimizer: Optimizer, total: int) -> LambdaLR:
    """Linear warm-up over 3 % of the steps, then linear decay to zero."""
    warm = max(1, round(WARMUP * total))
    return LambdaLR(optimizer, lambda step: min((step + 1) / warm, max(0.0, (total - step) / max(1, total - warm))))


def _method(settings: Mapping[str, Any], seed: int) -> Regularizer | None:
    if settings["method"] == "hft":
        return HalfFineTuning(seed=seed)
    return WeightInterpolation(float(settings["alpha"])) if settings["method"] == "fft-wise" else None


def tokenised(tokenizer: Any, segments: Segments, longest: int) -> tuple[list[int], list[int]]:
    """Tokens, and labels that ignore what is not to be learned; cut at `longest`."""
    tokens: list[int] = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    labels = [IGNORE_INDEX] * len(tokens)
    for text, learned in segments:
        piece = list(tokenizer.encode(text, add_special_tokens=False))
        if learned and tokenizer.eos_token_id is not None:
            piece.append(tokenizer.eos_token_id)
        tokens += piece
        labels += piece if learned else [IGNORE_INDEX] * len(piece)
    return tokens[:longest], labels[:longest]


def tulu_conversations() -> list[Segments]:
    """Tulu-V2 in its own format; the loss counts on what the assistant says."""
    found = []
    for record in _lines("tulu-v2.jsonl"):
        segments: Segments = []
        for message in record["messages"]:
            segments.append((f"<|{message['role']}|>\n", False))
            segments.append((message["content"] + "\n", message["role"] == "assistant"))
        found.append(segments)
    return found


# ── measuring ─────────────────────────────────────────────────────────────────────────────────────────────────────
@torch.no_grad()
def _answered(
    model: nn.Module, tokenizer: Any, asked: Sequence[tuple[str, list[str]]]
) -> Iterator[tuple[str, list[str]]]:
    """What the model says greedily to each prompt, beside the right answers."""
    device = next(model.parameters()).device
    model.eval()
    for prompt, answers in asked:
        tokens = tokenised(tokenizer, [(prompt, False)], 1 << 20)[0]
        inputs: Tensor = torch.tensor([tokens], device=device)
        made = model.generate(  # type: ignore[operator]
            input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=NEW_TOKENS, do_sample=False,
            pad_token_id=tokenizer.pad_token_id or 0,
        )  # fmt: skip
        yield tokenizer.decode(made[0, len(tokens) :], skip_special_tokens=True).strip(), answers


def exact_match(said: str, answer: str) -> float:
    """1 if both are equal after lower case, without articles, punctuation and further lines.

    Example:
        >>> exact_match("The Eiffel Tower.", "eiffel tower")
        1.0
    """
    return float(_plain(said.split("\n")[0]) == _plain(answer))


def _plain(text: str) -> str:
    kept = "".join(" " if c in string.punctuation else c for c in text.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def longest_common_subsequence(said: str, answer: str) -> float:
    """ROUGE-L: the F1 of the longest common subsequence of words.

    Example:
        >>> round(longest_common_subsequence("a b c d", "a c d"), 3)
        0.857
    """
    a, b = said.split(), answer.split()
    row = [0] * (len(b) + 1)
    for word in a:
        before = row[:]
        for j, other in enumerate(b):
            row[j + 1] = before[j] + 1 if word == other else max(before[j + 1], row[j])
    return 2.0 * row[-1] / (len(a) + len(b)) if a and b else 0.0


def edit_similarity(said: str, answer: str) -> float:
    """Share of characters that two texts have in common, in order."""
    return difflib.SequenceMatcher(None, said, answer, autojunk=False).ratio()


def score_of(task: str) -> Callable[[str, str], float]:
    """How a task of TRACE is scored."""
    if task in ("MeetingBank", "20Minuten"):
        return longest_common_subsequence
    return edit_similarity if task == "Py150" else exact_match


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def _model(name: str, device: torch.device) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer  # an extra of its own

    folder = str(_path(name, "config.json").parent)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)
    if device.type != "cpu":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.to(device), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _questions(name: str) -> list[tuple[str, list[str]]]:
    records = _lines("closed-book", f"{name}.jsonl")
    return [(f"<|user|>\nAnswer with a few words. {r['question']}\n<|assistant|>\n", r["answers"]) for r in records]


def _records(task: str, part: str) -> list[dict[str, str]]:
    records: list[dict[str, str]] = json.loads(_path("trace", task, f"{part}.json").read_text("utf-8"))
    return records


def _lines(*parts: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _path(*parts).read_text("utf-8").splitlines() if line.strip()]


def _path(*parts: str) -> Path:
    root = os.environ.get(ENVIRONMENT)
    path = Path(root or ".").joinpath(FOLDER, *parts)
    if root is None or not path.is_file():
        raise DatasetNotInstalled(
            f"hft: needs {'/'.join(parts)} in the folder {FOLDER} of the folder that the environment variable {ENVIRONMENT} "
            f"names ({'not set' if root is None else root}); `wellposed show hft` says what else; nothing is downloaded"
        )
    return path


STUDY = Study(slug="hft", run=run, estimands={}, headline=("score", "score, points"), prepare=prepare)
