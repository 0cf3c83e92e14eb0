"""The record of a study: everything that its page, the terminal and the ledger say, as plain data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..papers.catalogue import Claim
from .files import write_atomically
from .study import Seed, claim_level
from .study_run import ArmRecord, StudyRun
from .trial import Outcome
from .verdicts import Contrast, Verdict

VERSION = 1
FILE = "study.json"
_DIGITS = 10


def make_record(run: StudyRun) -> dict[str, Any]:
    """All of a finished run as JSON can hold it; numbers keep ten digits.

    Keys: version, slug, scale, date, command, commit, fingerprint, machine, seconds, compute_seconds, seeds,
    as_registered, protocol, headline, arms (by name: label, group, role, settings, tuning, status, metrics, seconds,
    errors, curves) and claims (see `claim_entry`); at the scale "paper" also paper.
    """
    protocol = run.protocol
    record = {
        "version": VERSION,
        "slug": run.card.slug,
        "scale": run.options.scale,
        "date": run.date,
        "command": run.options.command,
        "commit": run.commit,
        "fingerprint": run.fingerprint,
        "machine": run.machine,
        "seconds": round(run.seconds, 1),
        "compute_seconds": round(run.compute_seconds, 1),
        "seeds": run.seeds,
        "as_registered": run.as_registered,
        "protocol": {
            "problem": protocol.problem,
            "redraws": protocol.redraws,
            "score": protocol.score,
            "tuning_rounds": protocol.tuning_rounds,
            "tuning_seeds": protocol.tuning_seeds,
        },
        "headline": list(run.study.headline),
        "arms": {name: _arm(arm) for name, arm in run.arms.items()},
        "claims": [claim_entry(run, claim) for claim in run.card.claims] if run.options.scale != "paper" else [],
    }
    if run.options.scale == "paper" and protocol.paper is not None:
        record["paper"] = {"metric": protocol.paper.metric, "published": dict(protocol.paper.published)}
    return record


def write_record(record: Mapping[str, Any], folder: str | Path) -> Path:
    """Write `study.json`."""
    return write_atomically(Path(folder) / FILE, json.dumps(record, sort_keys=True, indent=1, allow_nan=False) + "\n")


def read_record(folder: str | Path) -> dict[str, Any]:
    """Read `study.json`.

    Raises:
        ValueError: if it is missing, damaged, or was written by another version.
    """
    path = Path(folder) / FILE
    try:
        record: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; run the study first") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}); run the study again: finished trials are kept") from error
    if record.get("version") != VERSION:
        raise ValueError(f"{path} was written by another version; run the study again: finished trials are kept")
    return record


def ledger_entry(record: Mapping[str, Any]) -> dict[str, Any]:
    """What `results/SLUG.json` keeps of a record: no curves, no tuning history, nothing that the machine's owner typed."""
    kept = {k: v for k, v in record.items() if k not in ("command", "headline", "as_registered", "figures")}
    kept["arms"] = {
        name: {
            **{k: v for k, v in arm.items() if k not in ("curves", "errors")},
            "tuning": {k: v for k, v in arm["tuning"].items() if k != "history"},
        }
        for name, arm in record["arms"].items()
    }
    return kept


def seeds_of(entry: Mapping[str, Any], worst: Mapping[str, float]) -> list[Seed]:
    """The seeds of a record or ledger entry, so that its claims can be computed again."""
    seeds = []
    for place, number in enumerate(entry["seeds"]):
        outcomes: dict[str, Outcome | None] = {}
        for name, arm in entry["arms"].items():
            metrics = {m: v[place] for m, v in arm["metrics"].items() if v[place] is not None}
            outcomes[name] = Outcome(arm["status"][place], metrics) if arm["status"][place] != "missing" else None
        seeds.append(Seed(number, outcomes, worst))
    return seeds


def _arm(record: ArmRecord) -> dict[str, Any]:
    names = sorted({name for o in record.outcomes if o is not None for name in o.metrics})
    curves = sorted({name for o in record.outcomes if o is not None for name in o.curves})
    scores = [score for _, score in record.tuning if score is not None]
    return {
        "label": record.arm.label,
        "group": record.arm.group,
        "role": record.arm.role,
        "settings": dict(record.settings),  # every digit, so that the trial can be repeated
        "tuning": {
            "rounds": len(record.tuning),
            "of": record.arm.trials_of or record.arm.settings_of,
            "score": rounded_number(max(scores, default=None)),
            "default_score": rounded_number(record.tuning[0][1]) if record.tuning else None,
            "space": {name: _describe(part) for name, part in record.arm.space.items()},
            "history": [
                {"settings": {k: rounded_number(v) for k, v in settings.items()}, "score": rounded_number(score)}
                for settings, score in record.tuning
            ],
        },
        "status": [o.status if o is not None else "missing" for o in record.outcomes],
        "metrics": {
            name: [rounded_number(o.metrics.get(name)) if o is not None else None for o in record.outcomes]
            for name in names
        },
        "seconds": [round(o.seconds, 3) if o is not None else None for o in record.outcomes],
        "errors": [o.error.strip().splitlines()[-1] for o in record.outcomes if o is not None and o.error],
        "curves": {name: [[rounded_number(v) for v in seed] for seed in record.curves(name)] for name in curves},
    }


def _describe(part: Any) -> str:
    if hasattr(part, "choices"):
        return "one of " + ", ".join(str(choice) for choice in part.choices)
    return f"{part.low:g} to {part.high:g}" + (" (log)" if part.log else "")


def claim_entry(run: StudyRun, claim: Claim) -> dict[str, Any]:
    """A claim with its verdict; verdict is "not judged" at the scale "smoke"."""
    entry: dict[str, Any] = {
        "id": claim.id,
        "kind": claim.kind,
        "primary": claim.primary,
        "statement": claim.statement,
        "unit": claim.unit,
        "margin": claim.margin,
        "non_inferiority": claim.non_inferiority,
        "verdict": "not judged",
        "qualifier": "",
    }
    verdict = run.verdicts.get(claim.id)
    if verdict is not None:
        entry |= verdict_entry(verdict)
    elif claim.id in run.values:
        entry["level"] = rounded_number(claim_level(run.card, claim))
        entry["contrasts"] = {
            n: {"values": [rounded_number(v) for v in column]} for n, column in run.values[claim.id].items()
        }
    if claim.command:
        entry["command"] = claim.command
    return entry


def verdict_entry(verdict: Verdict) -> dict[str, Any]:
    """A verdict as the ledger keeps it; `estimate` and `interval` are those of the weakest contrast."""
    entry: dict[str, Any] = {"verdict": verdict.word, "qualifier": verdict.qualifier}
    weakest = verdict.weakest
    if weakest is not None:
        entry |= {
            "level": rounded_number(verdict.level),
            "weakest": weakest.name,
            "estimate": rounded_number(weakest.interval.estimate),
            "interval": [rounded_number(weakest.interval.low), rounded_number(weakest.interval.high)],
            "sign_flip_p": rounded_number(weakest.p),
            "contrasts": {contrast.name: _contrast(contrast) for contrast in verdict.contrasts},
            "regime": [
                {"text": c.text, "value": rounded_number(c.value), "holds": c.holds} for c in verdict.conditions
            ],
        }
    if verdict.cases:
        case = verdict.counterexample
        entry["cases"] = verdict.cases
        entry["largest_error"] = rounded_number(verdict.worst)
        if case is not None:
            entry["counterexample"] = {
                "name": case.name,
                "error": rounded_number(case.error),
                "tolerance": case.tolerance,
            }
    return entry


def _contrast(contrast: Contrast) -> dict[str, Any]:
    return {
        "values": [rounded_number(v) for v in contrast.values],
        "estimate": rounded_number(contrast.interval.estimate),
        "interval": [rounded_number(contrast.interval.low), rounded_number(contrast.interval.high)],
        "refuting_interval": [rounded_number(contrast.refuting.low), rounded_number(contrast.refuting.high)],
        "sign_flip_p": rounded_number(contrast.p),
    }


def rounded_number(value: Any) -> Any:
    """Ten significant digits; what is not finite becomes null, which JSON can hold."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    number = float(value)
    return float(f"{number:.{_DIGITS}g}") if math.isfinite(number) else None


def claims_by_id(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The claims of a record or entry, by id."""
    return {claim["id"]: claim for claim in record["claims"]}


def primary_claim(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The claim that decides the paper's line."""
    found: Sequence[dict[str, Any]] = [claim for claim in record["claims"] if claim["primary"]]
    return found[0] if found else None


__all__ = [
    "claim_entry", "claims_by_id", "ledger_entry", "make_record", "primary_claim", "read_record",
    "rounded_number", "seeds_of", "verdict_entry", "write_record",
]  # fmt: skip
