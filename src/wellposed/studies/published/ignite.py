"""IGNITE and IGNITE-2 as published: gradient ascent on TF-Bind-8 and TF-Bind-10 (arXiv 2503.04242, authors' scripts).

Both tasks are complete tables of all sequences, so that designs are scored exactly. Ant and D'Kitty need a physics
simulator and are not written down.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...datasets.registry import ENVIRONMENT, DatasetNotInstalled
from ...fit import fit
from ...gradients import SurrogateSharpness, best_designs, offline_optimize, percentile_report, surrogate_sharpness
from ...indexed_dataset import TensorLoader
from ...lab.protocol import Protocol
from ...lab.study import Study
from ...lab.trial import Trial, TrialResult
from ...regularizer import Regularizer
from ..problems.offline_tasks import LETTERS, decode_sequences, sequence_logits
from .images import checkpoints, choose_device

FOLDER = "design-bench"
TASKS: Mapping[str, tuple[int, int, int]] = {"tf-bind-8": (8, 32_898, 32_898), "tf-bind-10": (10, 524_288, 10_000)}
"""Length of the sequences, how many of the lowest values are offered, and how many of these are drawn."""

METHODS: Mapping[str, Callable[[Mapping[str, Any]], Regularizer | None]] = {
    "base": lambda s: None,
    "ignite": lambda s: SurrogateSharpness(
        s["rho"], s["eps"], s["lam"], s["lam_lr"], hvp="finite_difference", r=s["r"], clamp=False
    ),
    "ignite2": lambda s: SurrogateSharpness(s["rho"], lam=s["lam"], mode="penalty", hvp="finite_difference", r=s["r"]),
}


class GaussianHead(nn.Module):
    """Two hidden layers with LeakyReLU of slope 0.3; mean and log standard deviation, kept softly between learned bounds.

    Example:
        >>> mean, log_std = GaussianHead(4, 8)(torch.zeros(3, 4))
        >>> mean.shape, bool((log_std > math.log(0.1)).all())
        (torch.Size([3]), True)
    """

    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(d, width), nn.LeakyReLU(0.3), nn.Linear(width, width), nn.LeakyReLU(0.3), nn.Linear(width, 2)
        )
        self.lowest = nn.Parameter(torch.tensor(math.log(0.1)))
        self.highest = nn.Parameter(torch.tensor(math.log(0.2)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.body(x).unbind(1)
        log_std = self.highest - F.softplus(self.highest - log_std)
        return mean, self.lowest + F.softplus(log_std - self.lowest)


def gaussian_negative_log_likelihood(outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    """(batch,), in nats.

    Example:
        >>> gaussian_negative_log_likelihood((torch.zeros(1), torch.zeros(1)), torch.zeros(1))
        tensor([0.9189])
    """
    mean, log_std = outputs
    return 0.5 * ((targets - mean) / log_std.exp()).square() + log_std + 0.5 * math.log(2 * math.pi)


def read_table(name: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """All sequences of a task, (n, length) of letters 0 to 3, and their values, (n,).

    Raises:
        DatasetNotInstalled: saying what is missing and where it was looked for.
        ValueError: for an unknown task, or a table that is not complete.
    """
    if name not in TASKS:
        raise ValueError(f"ignite: task must be one of {list(TASKS)}, got {name!r}")
    root = os.environ.get(ENVIRONMENT)
    files = [Path(root or ".") / FOLDER / f"{name}-{part}.npy" for part in "xy"]
    if root is None or not all(file.is_file() for file in files):
        raise DatasetNotInstalled(
            f"ignite: {name} needs {files[0].name} (sequences of the letters 0 to 3) and {files[1].name} (their values) in the "
            f"folder {FOLDER} of the folder that the environment variable {ENVIRONMENT} names "
            f"({'not set' if root is None else root}); nothing is downloaded"
        )
    x, y = np.load(files[0]), np.load(files[1]).reshape(-1).astype(np.float64)
    length = TASKS[name][0]
    if x.shape != (LETTERS**length, length) or len(y) != len(x):
        raise ValueError(f"ignite: {files[0].name} must hold all {LETTERS**length} sequences, got shape {x.shape}")
    return x, y


def run(trial: Trial) -> TrialResult:
    """Train and search one arm."""
    settings, device = trial.settings, choose_device(trial)
    sequences, values = read_table(str(settings["task"]))
    _, lower, count = TASKS[str(settings["task"])]
    place = {int(code): i for i, code in enumerate(_codes(sequences))}
    offered = np.argsort(values, kind="stable")[:lower]
    chosen = np.sort(np.random.default_rng(trial.seed).choice(offered, count, replace=False))
    raw = torch.from_numpy(sequence_logits(sequences[chosen])).float()
    y = torch.from_numpy(values[chosen]).float()
    mean, scale = raw.mean(0), raw.std(0)
    x, target = ((raw - mean) / scale).to(device), ((y - y.mean()) / y.std()).to(device)
    with torch.random.fork_rng([]):
        torch.manual_seed(trial.seed)
        network = GaussianHead(x.shape[1], int(settings["width"])).to(device)
    with checkpoints(trial) as file:
        model = fit(
            network,
            TensorLoader(x, target, batch_size=int(settings["batch_size"]), shuffle=True, seed=trial.seed),
            epochs=int(settings["epochs"]),
            criterion=gaussian_negative_log_likelihood,
            regularizer=METHODS[str(settings["method"])](settings),
            optimizer=partial(torch.optim.Adam, lr=float(settings["learning_rate"])),
            seed=trial.seed,
            checkpoint=file("network"),
        ).model
    found = offline_optimize(model, best_designs(x, target), steps=int(settings["steps"]))
    designs = decode_sequences((found.cpu() * scale + mean).double().numpy())
    truth = torch.from_numpy(values[[place[int(code)] for code in _codes(designs)]])
    report = percentile_report((truth - values.min()) / (values.max() - values.min()))
    metrics = {f"s{int(percent)}": score for percent, score in report.items()}
    for name, inputs in (("train", x[:8192]), ("designs", found)):
        metrics[f"norm_{name}"] = float(surrogate_sharpness(model, inputs, rho=1.0))
    return TrialResult({**metrics, "score": metrics["s100"]})


def prepare(protocol: Protocol) -> None:
    """Look for the tables of all arms before any of them trains."""
    for name in dict.fromkeys(str(arm.fixed["task"]) for arm in protocol.arms.values()):
        read_table(name)


def _codes(sequences: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    codes: np.ndarray[Any, Any] = sequences.astype(np.int64) @ (LETTERS ** np.arange(sequences.shape[1]))
    return codes


STUDY = Study(slug="ignite", run=run, estimands={}, headline=("s100", "best design's score"), prepare=prepare)
