"""Comparisons with invented numbers, shaped as real ones, for the tests of what a person sees."""

from __future__ import annotations

import numpy as np

from wellposed.compare.ranking import ArmRuns
from wellposed.compare.result import ArmReport, ComparisonResult

ARMS = {
    "elr": ("early-learning (ELR)", 3.4, 1.02, {"strength": 2.6, "momentum": 0.7}),
    "generalized-cross-entropy": ("generalized cross-entropy", 2.6, 1.01, {"q": 0.74}),
    "symmetric-cross-entropy": ("symmetric cross-entropy", 2.1, 1.03, {"alpha": 0.1}),
    "mixup": ("mixup", 1.3, 1.08, {"alpha": 0.93}),
    "sharpness-aware": ("sharpness-aware (SAM)", 1.0, 2.04, {"rho": 0.11}),
    "weight-averaging": ("weight averaging (EMA)", 0.6, 1.05, {"decay": 0.99}),
    "label-smoothing": ("label smoothing", 0.4, 1.0, {"smoothing": 0.3}),
    "dropout": ("dropout", 0.2, 1.06, {"p": 0.42}),
    "early-stopping": ("early stopping", 0.0, 1.0, {}),
    "weight-decay": ("weight decay", -0.4, 1.0, {"strength": 0.0021}),
    "elr-plus": ("early-learning plus (ELR+)", 3.0, 3.9, {"strength": 3.1, "alpha": 0.2, "decay": 0.97}),
    "plain": ("plain training", -3.2, 0.99, {}),
}


def invented(
    n_arms: int = 12,
    n_seeds: int = 12,
    noise: float = 0.4,
    effect: float = 1.0,
    regression: bool = False,
    failing: str | None = None,
    memory: bool = True,
) -> ComparisonResult:
    """A result whose gains over early stopping are those of `ARMS` times `effect`."""
    random = np.random.default_rng(0)
    names = [*list(ARMS)[: n_arms - 2], "early-stopping", "plain"] if n_arms < 9 else list(ARMS)[:n_arms]
    names = [name for name in dict.fromkeys(names) if not (regression and "cross-entropy" in name)]
    shared = random.normal(0, 0.4, n_seeds)
    seeds = list(range(1000, 1000 + n_seeds))
    arms = [_arm(name, seeds, shared, noise, effect, random, name == failing, memory) for name in dict.fromkeys(names)]
    notes = [f"{a.label}: {len(a.runs.failures)} seeds diverged ({a.error})" for a in arms if a.runs.failures]
    result = ComparisonResult(
        name="diabetes" if regression else "digits",
        data="442 rows, 10 features, a number to predict" if regression else "1,797 rows, images 8x8, 10 classes",
        split="split once: 1,079 training / 359 validation / 359 test (seed 0)",
        model="MLP 64-256-256-10",
        metric="R²" if regression else "accuracy",
        kind="regression" if regression else "classification",
        noise=noise,
        test_rows=359,
        seeds=seeds,
        rounds=8,
        arms=arms,
        usage="from wellposed.losses import EarlyLearning\n"
        "criterion = EarlyLearning(num_examples=1079, num_classes=10, strength=2.6, momentum=0.7)\n"
        "loss = criterion(model(inputs), targets, index)      # index: the example's position in the data set",
        winner="",
        command="wellposed compare digits --noise 0.4",
        machine={
            "cores": 2, "memory_gib": 8.0, "platform": "Linux x86_64", "python": "3.11.9", "torch": "2.6.0",
            "numpy": "2.1.0", "wellposed": "0.1.0",
        },
        fingerprint="0123456789abcdef",
        commit=None,
        seconds=271.3,
        notes=notes,
        issues={"count": 236, "path": "label_issues.csv", "label": "early-learning (ELR)"} if not noise
        else {"count": 0, "path": None, "label": "early-learning (ELR)", "precision": 0.91, "recall": 0.83},
    )  # fmt: skip
    result.winner = result.ranking().winner.name
    return result


def _arm(
    name: str,
    seeds: list[int],
    shared: np.ndarray,
    noise: float,
    effect: float,
    random: np.random.Generator,
    fails: bool,
    memory: bool,
) -> ArmReport:
    label, gain, time, own = ARMS[name]
    n = len(seeds)
    scores = (91 + effect * gain + shared + random.normal(0, 0.45, n)).round(2).tolist()
    seconds: list[float | None] = (2.1 * time * random.normal(1, 0.02, n)).tolist()
    mebibytes: list[int | None] = [
        int(2**20 * (390 + 20 * time + random.normal(0, 3))) if memory else None for _ in seeds
    ]
    failures = seeds[1::4] if fails else []
    for i, seed in enumerate(seeds):
        if seed in failures:
            scores[i], seconds[i], mebibytes[i] = 10.0, None, None
    curves = {
        part: [] for part in ("epoch", "train", "memorized", "validation", "test") if noise or part != "memorized"
    }
    epochs = np.arange(2, 41, 2)
    for i in range(n - len(failures)):
        curves["epoch"].append(epochs.astype(float).tolist())
        rise = 1 - np.exp(-epochs / (4 + random.random()))
        forget = np.clip((epochs - 15) / 60, 0, 1) * max(0.0, 6 - gain)
        curves["test"].append((scores[i] * rise - forget + random.normal(0, 0.3, len(epochs))).round(2).tolist())
        curves["train"].append(((60 if noise else 98) * rise + 4 * forget * bool(noise)).round(2).tolist())
        curves["validation"].append(((54 if noise else 91) * rise - forget).round(2).tolist())
        if noise:
            curves["memorized"].append((2 + 6 * forget).round(2).tolist())
    settings = {"learning_rate": 0.0473, "weight_decay": 0.0013, "epochs": 40, **own}
    return ArmReport(
        name=name,
        label=label,
        about="One sentence in plain words.",
        link="arXiv 2007.00151",
        runs=ArmRuns(name, label, scores, seconds, mebibytes, failures),
        settings=settings,
        space={"learning_rate": "0.005 to 0.3, log scale", "epochs": "one of 20, 40"},
        tuning=[{"settings": settings, "score": s} for s in (51.8, 53.2, None, 54.0, 50.3, 53.9, 52.0, 51.0)],
        curves=curves,
        details={"epochs": 40.0, "score": 54.0, "test_nll": 0.67},
        stopped=random.integers(9, 18, n).astype(float).tolist() if name == "early-stopping" else [],
        error="DivergenceError: the loss is not finite" if failures else None,
    )
