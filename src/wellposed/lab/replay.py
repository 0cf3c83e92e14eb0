"""Replay: are a study's numbers still those of the present code? Some of its trials run again, and must agree exactly.

A change to the training loop makes every study stale, though most changes change no number. A replay repeats the
evaluation trials of two seeds, of every arm, with the settings that the ledger keeps. If every metric is the same to
ten digits, the entry is stamped with the present fingerprint, beside the one that it was made with; if one differs, the
study must run again. It is evidence, not proof: it repeats one trial in six. Exact claims have no seeds: they are computed
again whole, and what comes out replaces what stood there.
"""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..papers.catalogue import Card
from .fingerprint import commit_of
from .record import rounded_number, verdict_entry
from .runner import run_trials
from .store import Store
from .study import Study, judge_claims, protocol_of
from .study_run import study_fingerprint
from .trial import Outcome, Trial

_EXACT = ("verdict", "qualifier", "cases", "largest_error", "counterexample")


@dataclass(frozen=True)
class Replay:
    """What came of a replay.

    Attributes:
        stamp: what the entry gets where all agreed, else None.
        differences: one sentence for each trial that came out otherwise.
        exact: the exact claims' verdicts, computed again, by claim.
        trials: how many ran.
    """

    stamp: dict[str, Any] | None
    differences: list[str]
    trials: int
    exact: dict[str, dict[str, Any]]


def is_current(entry: Mapping[str, Any], fingerprint: str) -> bool:
    """Whether an entry was made with the code of `fingerprint`, or replayed with it."""
    return fingerprint in (entry.get("fingerprint"), entry.get("replay", {}).get("fingerprint"))


def replay(
    entry: Mapping[str, Any],
    study: Study,
    card: Card,
    *,
    workers: int = 1,
    engine: str = "loky",
    on_done: Callable[[Trial, Outcome], None] | None = None,
) -> Replay:
    """Run the first and the last evaluation seed of every arm again, and compare every metric.

    Args:
        entry: of the ledger.
        study, card: of the same slug.
        workers, engine, on_done: as `run_trials` takes them.
    """
    fingerprint = study_fingerprint(study)
    trials = replay_trials(entry, study, card, fingerprint)
    with tempfile.TemporaryDirectory(prefix="wellposed-") as folder:
        store = Store(Path(folder) / "trials.sqlite")
        done = list({trial.key: trial for trial in trials.values()}.values())
        found = run_trials(done, study.run, store, workers=workers, engine=engine, on_done=on_done)
        store.close()
    outcomes = {trial.key: outcome for trial, outcome in zip(done, found, strict=True)}
    differences = []
    for (name, place), trial in trials.items():
        difference = _difference(entry["arms"][name], place, outcomes[trial.key])
        if difference:
            differences.append(f"{name}, seed {trial.seed}: {difference}")
    stamp = None
    if not differences:
        seeds = sorted({trial.seed for trial in done})
        stamp = {
            "fingerprint": fingerprint, "commit": commit_of(__file__), "date": datetime.date.today().isoformat(),
            "trials": len(done), "seeds": seeds,
        }  # fmt: skip
    return Replay(stamp, differences, len(done), _exact_verdicts(study, card))


def stamped(entry: Mapping[str, Any], found: Replay) -> dict[str, Any]:
    """The entry as a replay that agreed leaves it."""
    claims = []
    for claim in entry["claims"]:
        kept = {k: v for k, v in claim.items() if claim["id"] not in found.exact or k not in _EXACT}
        claims.append({**kept, **found.exact.get(claim["id"], {})})
    return {**entry, "claims": claims, "replay": found.stamp}


def replayed_beside(entry: Mapping[str, Any], study: Study, card: Card, revision: str, trials: int) -> Replay:
    """What a replay leaves that agreed with the code of `revision`, on this machine; see `lab.replay_beside`."""
    places = sorted({0, len(entry["seeds"]) - 1})
    stamp = {
        "fingerprint": study_fingerprint(study), "commit": commit_of(__file__), "date": datetime.date.today().isoformat(),
        "trials": trials, "seeds": [entry["seeds"][place] for place in places], "beside": revision,
    }  # fmt: skip
    return Replay(stamp, [], trials, _exact_verdicts(study, card))


def _exact_verdicts(study: Study, card: Card) -> dict[str, dict[str, Any]]:
    claims = [claim for claim in card.claims if claim.kind == "exact"]
    return {name: verdict_entry(v) for name, v in judge_claims(study, card, [], claims=claims).items()}


def replay_trials(entry: Mapping[str, Any], study: Study, card: Card, fingerprint: str) -> dict[tuple[str, int], Trial]:
    """The trials to repeat, by arm and place of the seed in the entry."""
    arms = protocol_of(card).arms
    places = sorted({0, len(entry["seeds"]) - 1})
    return {
        (name, place): Trial(
            f"study:{study.slug}", arms[name].trials_of or name, entry["scale"], "evaluate", arm["settings"],
            entry["seeds"][place], fingerprint,
        )
        for name, arm in entry["arms"].items()
        for place in places
    }  # fmt: skip


def _difference(arm: Mapping[str, Any], place: int, outcome: Outcome | None) -> str:
    status = "missing" if outcome is None else outcome.status
    if status != arm["status"][place]:
        return f"{status}, the ledger says {arm['status'][place]}"
    if outcome is None or status != "finished":
        return ""
    for metric, values in arm["metrics"].items():
        found = rounded_number(outcome.metrics.get(metric))
        if found != values[place]:
            return f"{metric} is {found}, the ledger says {values[place]}"
    return ""
