"""An invented paper with a study whose answer is known: 'method' beats 'plain' by `gain`, give or take a little."""

import hashlib

from wellposed.lab.study import Case, Condition, Figure, Study
from wellposed.lab.trial import TrialResult
from wellposed.papers.catalogue import Card, Claim
from wellposed.step import DivergenceError

TRUE_GAIN = 2.0


def noise(*parts):
    """A repeatable number in [-1, 1)."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**31 - 1


def run(trial):
    settings = trial.settings
    if settings.get("explodes") and trial.phase == "evaluate" and trial.seed == 1003:
        raise DivergenceError("the loss is nan")
    if settings.get("breaks") and trial.phase == "evaluate" and trial.seed == 1003:
        raise KeyError("a defect")
    quality = -((float(settings.get("rate", 0.5)) - 0.7) ** 2) + TRUE_GAIN * (settings["kind"] == "method")
    found = {"score": quality, "late_score": quality - float(settings.get("rate", 0.5))}
    if trial.phase == "evaluate":
        found["accuracy"] = 70 + quality + 0.5 * noise(settings["kind"], trial.seed)
        found["memorised"] = 0.3
    return TrialResult(found, {"test": [60.0, found.get("accuracy", 0.0)]})


def gain(seed):
    return {name: seed["method"]["accuracy"] - seed[name]["accuracy"] for name in ("plain", "late")}


def regime(seeds):
    value = sum(seed["witness"]["memorised"] for seed in seeds) / len(seeds)
    return [Condition("memorises >= 15 %", value, value >= 0.15)]


STUDY = Study(
    slug="invented",
    run=run,
    estimands={
        "gains": gain,
        "no-harm": lambda seed: seed["method"]["accuracy"] - seed["twin"]["accuracy"],
        "huge": lambda seed: seed["method"]["accuracy"] - seed["plain"]["accuracy"],
    },
    regimes={"gains": regime, "huge": regime},
    exact={"identity": lambda: [Case("n = 1", 0.0, 1e-12), Case("n = 2", 1e-15, 1e-12)]},
    headline=("accuracy", "test accuracy, points"),
    figures=lambda run: [Figure("A figure", "What it shows.", "<svg></svg>")],
)

CLAIMS = (
    Claim("gains", "effect", "It beats both.", True, "acc", 0.0, "two standard errors", "memorises", "points"),
    Claim("no-harm", "equivalence", "It is as good as its twin.", False, "acc", 1.0, "a point", non_inferiority=True),
    Claim("huge", "effect", "It gains ten points.", False, "acc", 10.0, "a third", "memorises", "points"),
    Claim("identity", "exact", "One is one."),
    Claim("large", "scale", "It helps at scale.", command="wellposed run invented --scale paper"),
)

PROTOCOL = {
    "problem": "numbers",
    "redraws": "noise",
    "seeds": 8,
    "tuning_rounds": 5,
    "tuning_seeds": 2,
    "score": "score",
    "worst": {"accuracy": 10.0},
    "shared": {"rate": {"low": 0.1, "high": 1.0}},
    "smoke": {"steps": 1},
    "arms": [
        {"name": "plain", "label": "plain", "fixed": {"kind": "plain"}},
        {"name": "late", "label": "plain, by its late score", "trials_of": "plain", "score": "late_score"},
        {"name": "method", "label": "the method", "role": "method", "fixed": {"kind": "method"}},
        {"name": "twin", "role": "control", "settings_of": "method", "fixed": {"twin": True}},
        {"name": "tuned_twin", "role": "control", "settings_of": "method", "rounds": 3, "search": {"q": {"choices": [1, 2]}}},
        {"name": "witness", "role": "witness", "shared": False, "fixed": {"kind": "plain", "rate": 0.2}},
    ],
}  # fmt: skip


def card(**protocol):
    """The invented paper's card; keywords replace entries of its protocol."""
    return Card(
        "invented", "Invented regularization", ("INV",), "Inventing regularization", ("A. Nobody",), "2001.00001",
        "2020-01", "the weights", "It is invented.", "never", "always", "anything else", status="built",
        claims=CLAIMS, protocol={**PROTOCOL, **protocol}, study="invented", deviations=("It is invented.",),
    )  # fmt: skip


def explosive_card():
    """The method diverges on one evaluation seed."""
    return card(arms=_changed("method", explodes=True))


def broken_card():
    """The method fails on one evaluation seed."""
    return card(arms=_changed("method", breaks=True))


def _changed(name, **fixed):
    return [{**a, "fixed": {**a.get("fixed", {}), **fixed}} if a["name"] == name else a for a in PROTOCOL["arms"]]
