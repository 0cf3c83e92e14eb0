"""Nested dropout with co-teaching as published: CIFAR-10 with wrong labels, ResNet-18 (code of arXiv 2206.13140).

Stage 1 trains two networks by themselves, with compressed features, and keeps each at its best validation epoch. Stage
2 fine-tunes the two by co-teaching, with BatchNorm as it is. Settings of stage 2 begin with "stage2_".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ...compose import Compose
from ...features import FeatureCompression
from ...lab.study import Study
from ...lab.trial import Trial, TrialResult
from ...losses import CoTeaching
from ...pair import Pair
from ...regularizer import Regularizer
from ...weights import EarlyStopping
from .images import ImageTask, checkpoints, prepare
from .recipe import Recipe

_SECOND_NETWORK = 1_000_000
"""Added to the seed of the second network: far from the seeds of other trials."""


def run(trial: Trial) -> TrialResult:
    """Train and measure one arm: one network, or two that end in co-teaching."""
    settings = trial.settings
    with checkpoints(trial) as place:
        task = ImageTask(trial)
        if task.validation is None:
            raise ValueError(f"nested-dropout: held_out must leave validation examples, got {settings.get('held_out')}")
        recipe = Recipe.read(settings)

        def first_stage(part: str, seed: int) -> Any:
            # The classifier has no bias, as in the authors' code.
            return task.train(
                task.network(seed, bias=False), recipe, _method(settings), checkpoint=place(part), seed=seed
            )

        network, record = first_stage("network-a", trial.seed)
        if not settings.get("co_teaching", False):
            return task.result(network, record)
        second, _ = first_stage("network-b", trial.seed + _SECOND_NETWORK)
        pair: nn.Module = Pair(network, second)
        co_teaching = CoTeaching(float(settings["forget_rate"]), num_gradual=0, mode="halves", frozen_batch_norm=True)
        pair, record = task.train(
            pair, Recipe.read(settings, "stage2_"), _method(settings, co_teaching), checkpoint=place("pair")
        )
        return task.result(pair, record)


def _method(settings: Mapping[str, Any], *then: Regularizer) -> Regularizer:
    """The compressor that the setting `compress` names, then what follows, then the best epoch by validation."""
    kind = str(settings["compress"])
    if kind not in ("none", "nested", "dropout"):
        raise ValueError(f"nested-dropout: compress must be 'none', 'nested' or 'dropout', got {kind!r}")
    parts: list[Regularizer] = []
    if kind == "nested":
        # Not folded: the second stage goes on with the layer and its prefix.
        parts.append(FeatureCompression("nested", sigma=float(settings["sigma"]), fold=False))
    elif kind == "dropout":
        parts.append(FeatureCompression("dropout", p=float(settings["p"])))
    return Compose(*parts, *then, EarlyStopping(metric="accuracy", goal="max"))


STUDY = Study(
    slug="nested-dropout", run=run, estimands={}, headline=("accuracy", "test accuracy, points"), prepare=prepare
)
