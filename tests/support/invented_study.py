"""Records of studies with invented numbers, shaped as real ones, for the tests of what a person sees."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from wellposed.lab.record import make_record
from wellposed.lab.study import Case, Condition, Seed, Study, claim_values, judge_claims, protocol_of
from wellposed.lab.study_run import ArmRecord, StudyOptions, StudyRun
from wellposed.lab.trial import Outcome
from wellposed.papers.catalogue import Card, Claim

CLAIMS = (
    Claim("beats-rivals", "effect", "Steady targets end above every rival.", True, "acc(steady) - acc(rival), in points",
          0.5, "one third of the paper's gain", "plain training memorises >= 15 % of the wrong labels", "points"),
    Claim("keeps-what-it-learned", "equivalence", "It does not lose what it learned early.", False,
          "acc(last epoch) - acc(best epoch)", 1.0, "more than a point is memorisation", "", "points", True),
    Claim("fewer-errors", "effect", "Two networks make fewer errors than one.", False, "ln(err(one) / err(two))", 0.29,
          "one third of ln(27.5 / 11.4), the paper's ablation", "as beats-rivals", "log ratio"),
    Claim("any-size", "effect", "It helps at any number of examples.", False, "acc(steady) - acc(plain) at each size",
          3.0, "half of the paper's gain", "", "points"),
    Claim("as-fast", "equivalence", "It needs as many epochs.", False, "epochs(steady) - epochs(plain)", 2.0,
          "two epochs are not noticed", "", "epochs"),
    Claim("gradient", "exact", "Its gradient is that of lemma 2.", False, "200 random cases, tolerance 1e-12"),
    Claim("bound", "exact", "The memory stays on the simplex.", False, "three cases, tolerance 1e-12"),
    Claim("imagenet", "scale", "ImageNet, ResNet-50: 76.4 % against 74.1 (plain).",
          command="wellposed run invented --scale paper"),
)  # fmt: skip

_RATE = {"low": 0.01, "high": 0.2, "log": True, "default": 0.05}
_ARMS: list[dict[str, Any]] = [
    {"name": "plain", "label": "plain training", "group": "40 % noise", "fixed": {"loss": "ce"}},
    {"name": "stop", "label": "plain training, early stopped", "group": "40 % noise", "trials_of": "plain",
     "score": "score_stop"},
    {"name": "robust", "label": "a robust loss whose long name does not fit on a line", "group": "40 % noise",
     "fixed": {"loss": "robust"}, "search": {"q": {"low": 0.2, "high": 0.9, "default": 0.7}}},
    {"name": "steady", "label": "steady targets", "role": "method", "group": "40 % noise", "fixed": {"loss": "steady"},
     "search": {"strength": {"low": 0.5, "high": 10.0, "log": True, "default": 3.0}}},
    {"name": "two", "label": "steady targets, two networks", "role": "method", "group": "80 % noise",
     "fixed": {"loss": "two"}},
    {"name": "one", "label": "one network", "role": "control", "group": "80 % noise", "settings_of": "two",
     "fixed": {"loss": "one"}},
    {"name": "witness", "label": "plain training, untuned", "role": "witness", "group": "40 % noise", "shared": False,
     "fixed": {"loss": "ce", "learning_rate": 0.05}},
    {"name": "linear", "label": "steady targets, linear", "role": "method", "shared": False, "fixed": {"loss": "lin"}},
]  # fmt: skip
_PAPER = {
    "seeds": 3,
    "metric": "accuracy",
    "data": "ImageNet, 1,000 classes, in the folder that DATA names",
    "cost": "8 GPUs for two days",
    "arms": [
        {"name": "plain", "label": "plain training", "published": 74.1, "fixed": {"loss": "ce"}},
        {"name": "steady", "label": "steady targets", "role": "method", "published": 76.4, "fixed": {"loss": "steady"}},
    ],
}
_MEANS = {"plain": 81.0, "stop": 84.6, "robust": 85.6, "steady": 87.4, "two": 61.0, "one": 52.0, "witness": 74.0}
_SECONDS = {
    "plain": 2.1,
    "stop": 2.1,
    "robust": 2.2,
    "steady": 2.3,
    "two": 9.8,
    "one": 3.0,
    "witness": 2.0,
    "linear": 0.4,
}


def invented_card(**changes: Any) -> Card:
    """The card; keywords replace its attributes."""
    card = Card(
        slug="invented",
        name="Steady targets (ST)",
        acronyms=("ST",),
        title="Steady targets keep networks from memorising",
        authors=("First Author", "Second Author"),
        arxiv="2001.00001",
        date="2020-01",
        venue="A conference 2020",
        acts_on="the loss",
        summary="It holds each prediction to its own past.",
        use_when="labels are noisy",
        not_when="labels are clean",
        try_first="early stopping",
        status="built",
        deviations=("The memory starts at the first prediction, not at zero.",),
        study="invented",
        cost="about 20 minutes on two cores",
        claims=CLAIMS,
        protocol={
            "problem": "digits, 1000 train, 597 test; 40 or 80 % wrong labels; perceptron 64-512-512-10",
            "redraws": "the split, the noise, the initialisation, the batch order",
            "seeds": 12,
            "tuning_rounds": 20,
            "tuning_seeds": 3,
            "score": "accuracy on the noisy validation fold",
            "worst": {"accuracy": 10.0, "errors": 537.0, "best": 10.0, "epochs": 60.0},
            "shared": {"learning_rate": _RATE},
            "smoke": {"epochs": 1},
            "arms": _ARMS,
            "paper": _PAPER,
        },
    )
    return dataclasses.replace(card, **changes)


def _study(memorised: float, defect: bool) -> Study:
    def regime(seeds: Any) -> list[Condition]:
        return [Condition("plain training memorises >= 15 % of the wrong labels", memorised, memorised >= 0.15)]

    def rivals(seed: Seed) -> dict[str, float]:
        return {name: seed["steady"]["accuracy"] - seed[name]["accuracy"] for name in ("plain", "stop", "robust")}

    def sizes(seed: Seed) -> dict[str, float]:
        gain = seed["steady"]["accuracy"] - seed["plain"]["accuracy"] - 4.0
        return {"9 examples": gain, "10 examples": gain / 2, "100 examples": gain / 4 - 0.3}

    cases = [Case(f"case {n}", 1e-15 * n, 1e-12) for n in range(1, 201)]
    failing = [Case("n = 2", 1e-15, 1e-12), Case("n = 3", 2e-3, 1e-12), Case("n = 4", math.nan, 1e-12)]
    return Study(
        slug="invented",
        run=lambda trial: None,  # type: ignore[arg-type, return-value]
        estimands={
            "beats-rivals": rivals,
            "keeps-what-it-learned": lambda seed: seed["steady"]["accuracy"] - seed["steady"]["best"],
            "fewer-errors": lambda seed: math.log(seed["one"]["errors"] / seed["two"]["errors"]),
            "any-size": sizes,
            "as-fast": lambda seed: seed["steady"]["epochs"] - seed["plain"]["epochs"],
        },
        regimes={"beats-rivals": regime, "fewer-errors": regime},
        exact={"gradient": lambda: cases, "bound": lambda: failing if defect else cases[:3]},
        headline=("accuracy", "test accuracy, points"),
    )


def _outcome(name: str, seed: int, shared: float, effect: float, random: np.random.Generator, epochs: int) -> Outcome:
    seconds = _SECONDS[name] * random.normal(1, 0.02)
    if name == "linear":
        return Outcome("finished", {"truth": float(random.normal(0.9, 0.02))}, {"step": [0.0, 1.0]}, seconds=seconds)
    gain = effect if name == "steady" else 1.0
    accuracy = float(_MEANS["robust"] + gain * (_MEANS[name] - _MEANS["robust"]) if name == "steady" else _MEANS[name])
    accuracy += shared + float(random.normal(0, 0.45))
    rise = 1 - np.exp(-np.arange(1, epochs + 1) / 5)
    forget = np.clip((np.arange(epochs) - 15) / 45, 0, 1) * max(0.0, 88 - accuracy) / 2
    curves = {
        "test": (accuracy * rise + forget.max() - forget).tolist(),
        "validation": (0.6 * accuracy * rise).tolist(),
        "train": (62 * rise + forget).tolist(),
        "memorized": (2 + 4 * forget).tolist(),
    }
    metrics = {
        "accuracy": accuracy, "best": accuracy + abs(float(random.normal(0.2, 0.1))), "errors": 597 * (1 - accuracy / 100),
        "epochs": float(random.integers(28, 32)), "score": 0.6 * accuracy,
    }  # fmt: skip
    return Outcome("finished", metrics, curves, seconds=seconds)


def invented(
    scale: str = "laptop",
    effect: float = 1.0,
    seeds: int | None = None,
    memorised: float = 0.31,
    defect: bool = True,
    diverged: str | None = None,
    failed: str | None = None,
    overrides: dict[str, Any] | None = None,
    curves: bool = True,
    card: Card | None = None,
) -> dict[str, Any]:
    """A record: the method's gain over the strongest rival is 1.8 points times `effect`.

    Args:
        scale: of the run.
        effect: see above; 0 refutes the primary claim as absent, -1 as reversed.
        seeds: that replace the card's number.
        memorised: what the regime finds; below 0.15 it is not reached.
        defect: whether an exact claim fails.
        diverged, failed: arm of which two seeds diverged, or one failed.
        overrides: settings as of `--set`.
        curves: whether training curves are kept; without them pages are drawn in half the time.
        card: in place of `invented_card()`.
    """
    card = card or invented_card()
    study, protocol, random = _study(memorised, defect), protocol_of(card), np.random.default_rng(0)
    if scale == "paper":
        assert protocol.paper is not None
        protocol = dataclasses.replace(protocol, arms=protocol.paper.arms, seeds=protocol.paper.seeds)
    count = seeds or (2 if scale == "smoke" else protocol.seeds)
    numbers = [1000 + i for i in range(count)]
    shared = random.normal(0, 0.4, count)
    arms: dict[str, ArmRecord] = {}
    for name, arm in protocol.arms.items():
        outcomes: list[Outcome | None] = [
            _outcome(name, seed, shift, effect, random, 1 if scale == "smoke" else 40)
            for seed, shift in zip(numbers, shared, strict=True)
        ]
        if name == diverged:
            outcomes[:2] = [Outcome("diverged", seconds=0.3, error="DivergenceError: the loss is nan")] * 2
        if name == failed:
            outcomes[1] = Outcome("failed", error="Traceback ...\nKeyError: 'a <defect>'")
        for outcome in outcomes if not curves else ():
            assert outcome is not None
            outcome.curves.clear()
        tuned = arm.space or arm.trials_of
        drawn = [{"learning_rate": 0.05 * 1.1**k, **({"q": 0.7} if name == "robust" else {})} for k in range(20)]
        history = [(dict(s), None if k == 3 else 48.0 + 0.3 * k) for k, s in enumerate(drawn if tuned else [])]
        settings = {**arm.fixed, **(drawn[-1] if tuned or arm.settings_of else {})}
        arms[name] = ArmRecord(arm, settings, history[:1] if scale == "smoke" else history, outcomes)
    by_seed = [
        Seed(s, {name: arm.outcomes[i] for name, arm in arms.items()}, protocol.worst) for i, s in enumerate(numbers)
    ]
    options = StudyOptions(
        scale, Path("report"), seeds, overrides or {}, command=f"wellposed run invented --scale {scale}"
    )
    run = StudyRun(
        study=study,
        card=card,
        protocol=protocol,
        options=options,
        seeds=numbers,
        arms=arms,
        verdicts=judge_claims(study, card, by_seed) if scale == "laptop" else {},
        values={c.id: claim_values(study, c, by_seed) for c in card.claims if c.id in study.estimands and failed is None}
        if scale == "smoke"
        else {},
        fingerprint="0123456789abcdef",
        commit="48ae779906d2+",
        machine={"cores": 2, "memory_gib": 8.0, "platform": "Linux x86_64", "python": "3.11.9", "torch": "2.6.0",
                 "numpy": "2.1.0", "wellposed": "0.1.0"},
        date="2026-01-02",
        seconds=1271.3,
        compute_seconds=2390.0,
    )  # fmt: skip
    return make_record(run)
