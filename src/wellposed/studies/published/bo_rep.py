"""BO-REP's hyper-cleaning of text as in the authors' code: Sentiment140, GloVe, a recurrent classifier (arXiv 2401.09587).

Where the code had no clean validation set, the upper loss is measured on clean examples here. The rivals' settings are
the same; those of the paper were not seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ...bilevel import BilevelProblem
from ...compose import Compose
from ...indexed_dataset import TensorLoader
from ...lab.protocol import Protocol
from ...lab.study import Study
from ...lab.trial import Trial, TrialResult
from ...loading import EndlessBatches
from ...objective import cross_entropy
from ...regularizer import Regularizer
from ...step import Step
from ...tuner import Tuner
from ...tuning import BOREP, SampleWeights, StocBiO, clipped_ma_soba, ma_soba
from ..problems.hyper_cleaning import START, area_under_roc
from ..problems.sentiment import Tweets, noisy_tweets, sentiment_files
from ..training import accuracy
from .images import choose_device

Settings = Mapping[str, Any]


class TweetClassifier(nn.Module):
    """Frozen word vectors, two tanh recurrent layers, the largest value of each unit over time, two linear layers."""

    def __init__(self, vectors: Tensor, hidden: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding.from_pretrained(vectors, freeze=True, padding_idx=0)
            self.recurrent = nn.RNN(vectors.shape[1], hidden, num_layers=2, batch_first=True)
            self.head = nn.Sequential(nn.Linear(hidden, hidden // 4), nn.Tanh(), nn.Linear(hidden // 4, 2))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, 2) of word numbers (batch, length)."""
        states, _ = self.recurrent(self.embedding(tokens))
        beyond = (tokens == 0).unsqueeze(-1)
        pooled = states.masked_fill(beyond, -1.0).amax(1)  # tanh is above -1
        return self.head(pooled)  # type: ignore[no-any-return]


class NormPenalty(Regularizer):
    """`strength` times the norm of all trainable parameters: the norm and not its square, as in the authors' code."""

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.strength = strength

    def penalty(self, step: Step) -> Tensor:
        squares = [p.square().sum() for p in step.model.parameters() if p.requires_grad]
        return self.strength * torch.stack(squares).sum().sqrt()


def make_tuner(settings: Settings, problem: BilevelProblem) -> Tuner:
    """The arm that `settings["method"]` names."""
    rates = float(settings["outer_lr"]), float(settings["inner_lr"]), float(settings["z_lr"])
    method, beta = settings["method"], float(settings["beta"])
    if method == "borep":
        period, inner_steps = int(settings["period"]), int(settings["inner_steps"])
        return BOREP(
            problem, *rates, beta, period=period, inner_steps=inner_steps, refine_steps=int(settings["refine_steps"])
        )
    if method == "masoba":
        return ma_soba(problem, *rates, beta)
    if method == "clipped_masoba":
        return clipped_ma_soba(problem, *rates, float(settings["clip"]), beta)
    if method == "stocbio":
        return StocBiO(problem, *rates)
    raise ValueError(f"bo-rep: method must be 'borep', 'masoba', 'clipped_masoba' or 'stocbio', got {method!r}")


def run(trial: Trial) -> TrialResult:
    """Clean the labels by one arm; accuracy on test tweets after every epoch's worth of training batches."""
    settings, device = trial.settings, choose_device(trial)
    # cuDNN's recurrent layers have no second derivative.
    with torch.backends.cudnn.flags(enabled=False) if device.type == "cuda" else nullcontext():
        data = noisy_tweets(
            trial.seed, float(settings["rate"]), int(settings["validation"]), int(settings["length"])
        )  # fmt: skip
        model = TweetClassifier(data.vectors, int(settings["hidden"]), trial.seed).to(device)
        weights = SampleWeights(len(data.labels), init=START).to(device)
        method = Compose(weights, NormPenalty(float(settings["penalty"])))
        problem = BilevelProblem.from_regularizer(model, method, cross_entropy, seed=trial.seed)
        return _tuned(trial, data, problem, weights, device)


def _tuned(
    trial: Trial, data: Tweets, problem: BilevelProblem, weights: SampleWeights, device: torch.device
) -> TrialResult:
    settings = trial.settings
    size = int(settings["batch_size"])
    loaders = [
        TensorLoader(x.to(device), y.to(device), batch_size=size, shuffle=True, drop_last=True, seed=trial.seed)
        for x, y in ((data.train, data.labels), (data.validation, data.validation_labels))
    ]
    train, validation = EndlessBatches(loaders[0], "train"), EndlessBatches(loaders[1], "validation")
    tuner = make_tuner(settings, problem)
    testing = trial.phase == "evaluate"
    inputs, labels = (data.test, data.test_labels) if testing else (data.validation, data.validation_labels)
    curve: list[float] = []
    for epoch in range(1, int(settings["epochs"]) + 1):
        while train.taken < epoch * len(loaders[0]):
            tuner.checked_step(train, validation)
        with torch.no_grad():
            logits = torch.cat([problem.model(part.to(device)).cpu() for part in inputs.split(512)])
        curve.append(accuracy(logits, labels))
    auroc = area_under_roc(weights.weights().cpu(), ~data.wrong)
    return TrialResult({"score": curve[-1], "accuracy": curve[-1], "auroc": auroc}, {"accuracy": curve})


def prepare(protocol: Protocol) -> None:
    """Look for the data before anything is trained."""
    sentiment_files()


STUDY = Study(slug="bo-rep", run=run, estimands={}, headline=("accuracy", "test accuracy, points"), prepare=prepare)
