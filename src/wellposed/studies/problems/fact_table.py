"""Knowledge, and new tasks that overwrite it: a random table of facts, then sequences to shift, reverse and swap.

Stage 0 learns the facts (`FACT k1 k2 SEP` -> v) beside a copy task; stages 1 to 3 learn one task each on sequences of four
tokens (`TAG x1 x2 x3 x4 SEP` -> y1 y2 y3 y4). Batches are drawn fresh, from generators that hang on the seed alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ...batching import Batch
from ...fit import fit
from .tiny_llama import TinyLlama

CONTENT, LENGTH, SHIFT = 32, 4, 5
SEPARATOR, FACT, COPY = CONTENT, CONTENT + 1, CONTENT + 2
VOCABULARY, LONGEST = 48, 2 * LENGTH + 1
FACTS_A_BATCH, COPIES_A_BATCH, COPY_WEIGHT = 96, 24, 0.25

TASKS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "shift": lambda x: (x + SHIFT) % CONTENT,
    "reverse": lambda x: x.flip(1),
    "swap": lambda x: x[:, [1, 0, 3, 2]],
}
"""The tasks of stages 1 to 3, in their order: from (batch, 4) content tokens to as many."""

_TAGS = {name: COPY + 1 + number for number, name in enumerate(TASKS)}
_STREAMS = {"facts": 0, "knowledge": 1, "train": 2, "validation": 3, "test": 4}


def stream(seed: int, name: str, stage: int = 0) -> torch.Generator:
    """The random numbers of one purpose; seeds, purposes and stages do not meet.

    Example:
        >>> a, b = stream(0, "train", 1), stream(0, "test", 1)
        >>> bool((torch.rand(4, generator=a) == torch.rand(4, generator=b)).any())
        False
    """
    state = np.random.SeedSequence([seed, _STREAMS[name], stage]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


@dataclass(frozen=True)
class FactTable:
    """Facts as the model reads them, and their values."""

    questions: Int[Tensor, "facts 4"]
    values: Int[Tensor, " facts"]

    @torch.no_grad()
    def recall(self, model: nn.Module) -> float:
        """Share of the facts that a model answers rightly."""
        return float((model(self.questions, 1)[:, 0].argmax(-1) == self.values).double().mean())


def fact_table(seed: int, facts: int = 300) -> FactTable:
    """Distinct pairs of keys, each with a random value.

    Raises:
        ValueError: for more facts than there are pairs.

    Example:
        >>> table = fact_table(0, 10)
        >>> table.questions.shape, len(torch.unique(table.questions, dim=0))
        (torch.Size([10, 4]), 10)
    """
    if not 1 <= facts <= CONTENT**2:
        raise ValueError(f"fact_table: facts must lie in [1, {CONTENT**2}], got {facts}")
    generator = stream(seed, "facts")
    pairs = torch.randperm(CONTENT**2, generator=generator)[:facts]
    values = torch.randint(CONTENT, (facts,), generator=generator)
    columns = [torch.full_like(pairs, FACT), pairs // CONTENT, pairs % CONTENT, torch.full_like(pairs, SEPARATOR)]
    return FactTable(torch.stack(columns, 1), values)


def task_sequences(
    task: str, count: int, generator: torch.Generator
) -> tuple[Int[Tensor, "count 9"], Int[Tensor, "count 4"]]:
    """Fresh sequences of a task: what the model reads (all but the last answer), and the four answers.

    Example:
        >>> tokens, answers = task_sequences("reverse", 2, stream(0, "train"))
        >>> bool((tokens[:, 1:5].flip(1) == answers).all() and (tokens[:, 6:] == answers[:, :3]).all())
        True
    """
    content = torch.randint(CONTENT, (count, LENGTH), generator=generator)
    answers = content if task == "copy" else TASKS[task](content)
    tag = torch.full((count, 1), COPY if task == "copy" else _TAGS[task])
    separator = torch.full((count, 1), SEPARATOR)
    return torch.cat([tag, content, separator, answers[:, :-1]], 1), answers


@torch.no_grad()
def task_accuracy(model: nn.Module, tokens: Tensor, answers: Tensor) -> float:
    """Share of right tokens, given the right ones before them."""
    right = [(model(t, LENGTH).argmax(-1) == a) for t, a in zip(tokens.split(256), answers.split(256), strict=True)]
    return float(torch.cat(right).double().mean())


def stage_batches(task: str, steps: int, batch: int, generator: torch.Generator) -> list[Batch]:
    """One batch of fresh sequences a step."""
    tokens, answers = task_sequences(task, steps * batch, generator)
    return [Batch((t, LENGTH), a) for t, a in zip(tokens.split(batch), answers.split(batch), strict=True)]


class Knowledge(nn.Module):
    """Facts and copies in one call: one row of logits a token to predict."""

    def __init__(self, model: TinyLlama) -> None:
        super().__init__()
        self.model = model

    def forward(self, facts: Tensor, copies: Tensor) -> Float[Tensor, "rows vocabulary"]:
        return torch.cat([self.model(facts, 1).flatten(0, 1), self.model(copies, LENGTH).flatten(0, 1)])


def knowledge_batches(table: FactTable, steps: int, generator: torch.Generator) -> list[Batch]:
    """Batches of stage 0; weights make the loss the mean over facts plus a quarter of the mean over copied tokens."""
    copied = COPIES_A_BATCH * LENGTH
    rows = FACTS_A_BATCH + copied
    weights = torch.cat(
        [torch.full((FACTS_A_BATCH,), rows / FACTS_A_BATCH), torch.full((copied,), COPY_WEIGHT * rows / copied)]
    )
    batches = []
    for _ in range(steps):
        chosen = torch.randint(len(table.values), (FACTS_A_BATCH,), generator=generator)
        copies, answers = task_sequences("copy", COPIES_A_BATCH, generator)
        targets = torch.cat([table.values[chosen], answers.flatten()])
        batches.append(Batch((table.questions[chosen], copies), targets, None, weights))
    return batches


def warm_cosine(optimizer: Optimizer, total: int, warmup: int) -> LambdaLR:
    """Linear warm-up over `warmup` steps, then half a cosine down to zero at step `total`.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> schedule = warm_cosine(optimizer, 4, 2)
        >>> [round(schedule.lr_lambdas[0](step), 2) for step in range(5)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))

    return LambdaLR(optimizer, factor)


def knowing_model(seed: int, table: FactTable, steps: int = 450, learning_rate: float = 4e-3) -> TinyLlama:
    """Stage 0: a model that has learned the facts."""
    model = TinyLlama(VOCABULARY, LONGEST, seed=seed)
    fit(
        Knowledge(model),
        knowledge_batches(table, steps, stream(seed, "knowledge")),
        epochs=1,
        optimizer=partial(torch.optim.AdamW, lr=learning_rate, weight_decay=0.01, fused=True),
        scheduler=partial(warm_cosine, warmup=min(20, steps)),
        seed=seed,
    )
    return model.eval()
