"""Two towers, one for images and one for texts, that classify by the nearest text: CLIP in small.

A class is named by a row of candidates (its attributes, or the embedding of its name). Tuning sees base classes only; what
it does to others shows when the candidates are exchanged.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...batching import Batch
from ...step import mode
from .compositional_images import ATTRIBUTES, CLASSES, PIXELS, attributes_of, draw_images

WIDTH, EMBEDDING, OUTPUTS = 128, 24, 48
BASE_CLASSES = NOVEL_CLASSES = 20
SHOTS, TARGET_STRENGTH = 4, 0.3
PRETRAINING_STEPS, PRETRAINING_BATCH, PRETRAINING_RATE = 500, 192, 2e-3
TEST_IMAGES = 4000


class AttributeText(nn.Module):
    """The text tower: an embedding of each attribute, joined, and a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(count, EMBEDDING) for count in ATTRIBUTES)
        wide = EMBEDDING * len(ATTRIBUTES)
        self.body = nn.Sequential(nn.Linear(wide, 96), nn.GELU(), nn.Linear(96, OUTPUTS))

    def embed(self, candidates: Int[Tensor, "classes 4"]) -> Float[Tensor, "classes 96"]:
        """What a prompt is added to."""
        return torch.cat([table(candidates[:, i]) for i, table in enumerate(self.tables)], 1)

    def forward(self, embedded: Float[Tensor, "classes 96"]) -> Float[Tensor, "classes 48"]:
        return self.body(embedded)


class PairedTowers(nn.Module):
    """Logits `exp(log_scale) <f(x), h(t)>` of unit outputs, over the present candidates.

    Args:
        image: from images to (batch, outputs).
        text: with `embed`, from candidates to vectors, and `forward`, from these to (classes, outputs).
        log_scale: of the logits.

    Attributes:
        candidates: (classes, ...): what names the classes; exchanged by `among`.
        prompt: a vector added to every embedded candidate, or None.
    """

    candidates: Tensor

    def __init__(
        self, image: nn.Module, text: nn.Module, candidates: Tensor, log_scale: float = math.log(14.0)
    ) -> None:
        super().__init__()
        self.image, self.text = image, text
        self.log_scale = nn.Parameter(torch.tensor(log_scale))
        self.prompt: nn.Parameter | None = None
        self.register_buffer("candidates", candidates, persistent=False)

    def forward(self, images: Tensor) -> Float[Tensor, "batch classes"]:
        embedded = self.text.embed(self.candidates)  # type: ignore[operator]
        texts = self.text(embedded if self.prompt is None else embedded + self.prompt)
        return self.log_scale.exp() * F.normalize(self.image(images), dim=1) @ F.normalize(texts, dim=1).T

    def among(self, candidates: Tensor) -> PairedTowers:
        """The same towers, frozen, for other classes; a copy that can be trained apart."""
        other = copy.deepcopy(self).requires_grad_(False)
        other.candidates = candidates
        return other

    def add_prompt(self) -> None:
        """A learned vector before the text tower, zero at first: what CoOp's shared context comes to in this model."""
        embedded = self.text.embed(self.candidates)  # type: ignore[operator]
        self.prompt = nn.Parameter(torch.zeros_like(embedded[0]))


@torch.no_grad()
def share_right(model: PairedTowers, test: TestSet) -> float:
    """Share of right answers among the test set's own candidates, in evaluation mode."""
    kept = model.candidates
    model.candidates = test.candidates
    try:
        with mode(model, False):
            found = torch.cat([model(part).argmax(1) for part in test.images.split(2000)])
    finally:
        model.candidates = kept
    return float((found == test.labels).double().mean())


def harmonic_mean(base: float, novel: float) -> float:
    """2 / (1 / base + 1 / novel), 0 where one of them is.

    Example:
        >>> round(harmonic_mean(0.6, 0.3), 3), harmonic_mean(0.0, 1.0)
        (0.4, 0.0)
    """
    return 0.0 if min(base, novel) <= 0 else 2 * base * novel / (base + novel)


@dataclass(frozen=True)
class TestSet:
    """Images with labels among their own candidates."""

    __test__ = False  # no class of tests, whatever its name says

    images: Tensor
    labels: Tensor
    candidates: Tensor


@dataclass(frozen=True)
class FewShotTask:
    """Pre-trained towers, a few images of base classes, and what tuning on them is judged by.

    Attributes:
        towers: frozen, with the base classes as candidates; `among` makes the copy to train.
        images, labels: the shots.
        tests: "base" and "novel" (their harmonic mean is the score), and others by name.
    """

    towers: PairedTowers
    images: Tensor
    labels: Tensor
    tests: Mapping[str, TestSet]


class StepLoader:
    """Exactly `steps` batches, cut from one shuffled pass over the examples after another.

    Example:
        >>> loader = StepLoader(torch.arange(5.0), torch.arange(5), batch_size=2, steps=4, seed=0)
        >>> [len(batch.targets) for batch in loader], len(loader)
        ([2, 2, 2, 2], 4)
    """

    def __init__(self, inputs: Tensor, targets: Tensor, batch_size: int, steps: int, seed: int) -> None:
        if batch_size < 1 or steps < 1:
            raise ValueError(f"StepLoader: batch_size and steps must be >= 1, got {batch_size} and {steps}")
        self.inputs, self.targets = inputs, targets
        generator = torch.Generator().manual_seed(seed)
        passes = -(-batch_size * steps // len(targets))
        order = torch.cat([torch.randperm(len(targets), generator=generator) for _ in range(passes)])
        self.batches = order[: batch_size * steps].split(batch_size)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for chosen in self.batches:
            yield Batch(self.inputs[chosen], self.targets[chosen], chosen)


# ── the towers of compositional images ────────────────────────────────────────────────────────────────────────────────
@lru_cache(maxsize=4)
def pretrained_towers(seed: int, steps: int = PRETRAINING_STEPS) -> PairedTowers:
    """Towers trained on all 320 classes: plain images, a quarter of domain 2 among them in every fourth step.

    All arms of a seed share them; a process keeps the last few.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        image = nn.Sequential(
            nn.Linear(PIXELS, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, OUTPUTS)
        )
        towers = PairedTowers(image, AttributeText(), attributes_of(torch.arange(CLASSES)))
    optimizer = torch.optim.AdamW(towers.parameters(), PRETRAINING_RATE, foreach=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for number in range(steps):
        labels = torch.randint(CLASSES, (PRETRAINING_BATCH,), generator=generator)
        other = PRETRAINING_BATCH // 4 if number % 4 == 0 else 0
        parts = [draw_images(labels[:other], generator, 2)] if other else []
        images = torch.cat([*parts, draw_images(labels[other:], generator)])
        optimizer.zero_grad()
        F.cross_entropy(towers(images), labels).backward()
        optimizer.step()
        scheduler.step()
    return towers.requires_grad_(False)


@lru_cache(maxsize=4)
def compositional_task(seed: int, pretraining_steps: int = PRETRAINING_STEPS, tests: int = TEST_IMAGES) -> FewShotTask:
    """Four shots of twenty base classes in the target domain, and tests on these, on twenty novel ones, and in domain 2.

    Args:
        seed: re-draws everything: pre-training, classes, shots and test images.
        pretraining_steps: of the towers.
        tests: images of each test set.
    """
    towers = pretrained_towers(seed, pretraining_steps)
    generator = torch.Generator().manual_seed(1_000_003 + seed)
    order = torch.randperm(CLASSES, generator=generator)
    base, novel = order[:BASE_CLASSES], order[BASE_CLASSES : BASE_CLASSES + NOVEL_CLASSES]
    labels = torch.arange(BASE_CLASSES).repeat_interleave(SHOTS)
    images = draw_images(base[labels], generator, 1, TARGET_STRENGTH)

    def drawn(classes: Tensor, domain: int) -> TestSet:
        answers = torch.randint(len(classes), (tests,), generator=generator)
        pictures = draw_images(classes[answers], generator, domain, TARGET_STRENGTH)
        return TestSet(pictures, answers, attributes_of(classes))

    sets = {"base": drawn(base, 1), "novel": drawn(novel, 1), "d2": drawn(base, 2)}
    return FewShotTask(towers.among(attributes_of(base)), images, labels, sets)
