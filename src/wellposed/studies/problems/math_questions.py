"""Mathematics in words: MetaMathQA to learn from, GSM8K and MATH to be asked, all read from the user's own files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ...batching import IGNORE_INDEX, Batch
from ...datasets.registry import ENVIRONMENT, DatasetError, DatasetNotInstalled

FOLDER = "ba-lora"
MODEL, TRAIN = "llama-2-7b", "MetaMathQA-395K.json"
TESTS = {"gsm8k": "gsm8k_test.jsonl", "math": "math_test.jsonl"}
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{question}\n\n### Response:"
)
"""The prompt of Alpaca, which PiSSA and its successors train with."""


@dataclass(frozen=True)
class Question:
    """A question with the answer that counts, as text."""

    text: str
    answer: str


def math_folder() -> Path:
    """The folder with the model and the three files, in the folder that WELLPOSED_DATA names.

    Raises:
        DatasetNotInstalled: naming what is missing and where it was looked for.
    """
    base = os.environ.get(ENVIRONMENT)
    wanted = [MODEL, TRAIN, *TESTS.values()]
    where = f"the folder {FOLDER} of the folder that the environment variable {ENVIRONMENT} names"
    if not base:
        raise DatasetNotInstalled(
            f"BA-LoRA needs {', '.join(wanted)} in {where}, which is not set. Nothing is downloaded"
        )
    folder = Path(base) / FOLDER
    if missing := [name for name in wanted if not (folder / name).exists()]:
        raise DatasetNotInstalled(f"BA-LoRA: {', '.join(missing)} not found in {folder}. Nothing is downloaded")
    return folder


def read_examples(path: Path, count: int) -> list[tuple[str, str]]:
    """The first `count` pairs of a question and its worked answer: fields `query` and `response` of a JSON list.

    Raises:
        DatasetError: for a file of another form, or with fewer examples.
    """
    try:
        found = [(str(entry["query"]), str(entry["response"])) for entry in json.loads(path.read_text("utf-8"))[:count]]
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{path}: needs a JSON list of entries with 'query' and 'response' ({error!r})") from error
    if len(found) < count:
        raise DatasetError(f"{path}: needs {count} examples, has {len(found)}")
    return found


def read_questions(path: Path) -> list[Question]:
    """Questions of GSM8K (`question`, `answer` after ####) or of MATH (`problem`, `solution` with a box), one a line.

    Raises:
        DatasetError: for a line of another form, naming it.
    """
    found = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if "question" in entry:
                found.append(Question(entry["question"], entry["answer"].rpartition("####")[2].strip()))
            else:
                found.append(Question(entry["problem"], boxed(entry["solution"])))
        except (ValueError, KeyError, AttributeError) as error:
            raise DatasetError(
                f"{path}, line {number}: needs 'question' and 'answer', or 'problem' and 'solution' with \\boxed{{...}} "
                f"({error!r})"
            ) from error
    return found


def boxed(solution: str) -> str:
    r"""What the last `\boxed{...}` of a solution holds, braces inside it balanced.

    Raises:
        ValueError: if there is none.

    Example:
        >>> boxed(r"so \boxed{\frac{1}{2}}.")
        '\\frac{1}{2}'
    """
    start = solution.rfind("\\boxed{")
    if start < 0:
        raise ValueError("no \\boxed{...}")
    depth, inside = 0, solution[start + len("\\boxed") :]
    for place, letter in enumerate(inside):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return inside[1:place]
    raise ValueError("\\boxed{ is not closed")


def is_right(response: str, answer: str) -> bool:
    r"""Whether the text behind the last "The answer is:" equals the answer: as a number, else letter by letter.

    Spaces, dollar signs, thousands separators, `\left`, `\right` and the size of fractions do not count.

    Example:
        >>> is_right("3 + 4 = 7. The answer is: 7.0", "7"), is_right("7", "7")
        (True, False)
    """
    _, marker, given = response.rpartition("The answer is:")
    if not marker:
        return False
    given, wanted = _plain(given.strip().splitlines()[0] if given.strip() else ""), _plain(answer)
    try:
        return abs(float(given) - float(wanted)) < 1e-6
    except ValueError:
        return given == wanted


def _plain(text: str) -> str:
    text = re.sub(r"\\left|\\right|\\!|\\,|\\\$|[\s$]", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    return re.sub(r"(?<=\d),(?=\d{3}\b)", "", text).rstrip(".")


class TokenBatches:
    """Prompts with their responses as batches for `fit`: targets are the next tokens, and the prompt has none.

    Args:
        examples: questions and responses.
        tokenizer: as transformers has them.
        batch_size: sequences a step.
        length: tokens of a sequence at most; what is longer is cut.
        seed: of the order.
        device: where batches go.
    """

    def __init__(
        self,
        examples: Sequence[tuple[str, str]],
        tokenizer: Any,
        batch_size: int,
        length: int,
        seed: int,
        device: torch.device | None = None,
    ) -> None:
        self.batch_size, self.seed, self.device = batch_size, seed, device or torch.device("cpu")
        self.rows = [_encoded(tokenizer, question, response, length) for question, response in examples]
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(self.seed + 7919 * self.epoch))
        for chosen in order.split(self.batch_size):
            ids, labels = (
                torch.nn.utils.rnn.pad_sequence([self.rows[i][part] for i in chosen], True, value)
                for part, value in ((0, 0), (1, IGNORE_INDEX))
            )
            lengths = torch.tensor([len(self.rows[i][0]) for i in chosen])
            mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
            inputs = {"input_ids": ids[:, :-1].to(self.device), "attention_mask": mask[:, :-1].to(self.device)}
            # Aligned: the outputs at t predict the targets at t.
            yield Batch(inputs, labels[:, 1:].to(self.device), chosen)


def _encoded(
    tokenizer: Any, question: str, response: str, length: int
) -> tuple[Int[Tensor, " tokens"], Int[Tensor, " tokens"]]:
    prompt = tokenizer(PROMPT.format(question=question))["input_ids"]
    answer = tokenizer(response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    ids = torch.tensor((prompt + answer)[:length])
    labels = ids.clone()
    labels[: len(prompt)] = IGNORE_INDEX
    return ids, labels


@torch.no_grad()
def share_right(
    model: Any, tokenizer: Any, questions: Sequence[Question], answer_tokens: int, batch_size: int = 16
) -> float:
    """Share of questions that greedy decoding answers rightly, in points.

    Args:
        model: a causal model of transformers, or PEFT's around it.
        tokenizer: its own.
        questions: what is asked.
        answer_tokens: of a response at most.
        batch_size: questions at once.
    """
    model.eval()
    device, right = next(model.parameters()).device, 0
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    for first in range(0, len(questions), batch_size):
        part = questions[first : first + batch_size]
        prompts = [tokenizer(PROMPT.format(question=q.text))["input_ids"] for q in part]
        width = max(map(len, prompts))
        # Padded on the left, so that every response begins where its prompt ends.
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        made = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=answer_tokens, do_sample=False, pad_token_id=pad
        )
        for question, row in zip(part, made[:, width:], strict=True):
            right += is_right(tokenizer.decode(row, skip_special_tokens=True), question.answer)
    return 100.0 * right / len(questions)
