"""`ComparisonResult`: everything the terminal, the page and the files say about a comparison."""

from __future__ import annotations

import csv
import io
import json
import statistics as plain
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..lab.files import write_atomically
from ..lab.trial import Outcome
from .arms import REFERENCE, search_space
from .comparison import Finished
from .outcomes import by_name, failure_note, first_error, good_seeds
from .ranking import ArmRuns, Ranking, rank
from .snippet import rounded, script, usage

VERSION = 1


@dataclass
class ArmReport:
    """One arm as the report shows it; curves are lists by seed."""

    name: str
    label: str
    about: str
    link: str
    runs: ArmRuns
    settings: dict[str, Any]
    space: dict[str, str]
    tuning: list[dict[str, Any]]
    curves: dict[str, list[list[float]]]
    details: dict[str, float]
    stopped: list[float]
    error: str | None = None


@dataclass
class ComparisonResult:
    """All that a comparison found; written to `results.json` and read back by `wellposed report`."""

    name: str
    data: str
    split: str
    model: str
    metric: str
    kind: str
    noise: float
    test_rows: int
    seeds: list[int]
    rounds: int
    arms: list[ArmReport]
    usage: str
    winner: str
    command: str
    machine: dict[str, Any]
    fingerprint: str
    commit: str | None
    seconds: float
    notes: list[str] = field(default_factory=list)
    issues: dict[str, Any] | None = None
    version: int = VERSION

    def ranking(self) -> Ranking:
        """The arms ranked against early stopping."""
        return rank([arm.runs for arm in self.arms], REFERENCE)


def collect(finished: Finished) -> ComparisonResult:
    """Gather what a comparison left behind."""
    task = finished.task
    arms = []
    for arm in finished.arms:
        by_seed = finished.outcomes[arm.name]
        tuned = finished.tuned[arm.name]
        space = {name: _space_text(part) for name, part in search_space(arm, task).items()}
        tuning = [{"settings": {k: rounded(v) for k, v in s.items()}, "score": score} for s, score in tuned.history]
        settings = {k: rounded(v) for k, v in tuned.settings.items()}
        arms.append(
            ArmReport(
                arm.name,
                arm.label,
                arm.about,
                arm.link,
                _runs(arm.name, arm.label, by_seed, task.worst_score),
                settings,
                space,
                tuning,
                by_name(outcome.curves for outcome in by_seed.values()),
                _details(by_seed),
                [o.metrics["best_epoch"] for o in by_seed.values() if "best_epoch" in o.metrics],
                first_error(by_seed),
            )
        )
    notes = [*task.notes, *finished.notes]
    for report in arms:
        worst = f"{task.worst_score:.0f} points"
        notes += failure_note(report.label, report.runs.failures, finished.seeds, worst, report.error)
    result = ComparisonResult(
        task.name, task.describe(), task.describe_split(), finished.model, task.metric, task.kind, task.noise,
        task.sizes["test"], finished.seeds, finished.rounds, arms, "", "", finished.options.command, finished.machine,
        finished.fingerprint, finished.commit, finished.seconds, notes,
    )  # fmt: skip
    result.winner = result.ranking().winner.name
    winner = next(arm for arm in finished.arms if arm.name == result.winner)
    result.usage = usage(winner, task, finished.tuned[winner.name].settings)
    return result


def write_files(result: ComparisonResult, finished: Finished) -> None:
    """Write results.json, results.csv, apply.py and, where a method suspects labels, label_issues.csv."""
    folder = finished.options.output
    winner = next(arm for arm in finished.arms if arm.name == result.winner)
    text = script(
        winner, finished.task, finished.tuned[winner.name].settings, str(folder / "data"), finished.options.model
    )
    write_atomically(folder / "apply.py", text)
    result.issues = _label_issues(finished, folder)
    write_atomically(folder / "results.csv", _csv(result))
    write_atomically(folder / "results.json", json.dumps(asdict(result), indent=1))


def load_result(folder: str | Path) -> ComparisonResult:
    """Read what `write_files` wrote.

    Raises:
        ValueError: if it was written by another version, or is no result.
    """
    path = Path(folder) / "results.json"
    try:
        content = json.loads(path.read_text("utf-8"))
        if content.get("version") != VERSION:
            raise ValueError(f"{path} has version {content.get('version')}, this wellposed reads {VERSION}")
        content["arms"] = [ArmReport(**{**arm, "runs": ArmRuns(**arm["runs"])}) for arm in content["arms"]]
        return ComparisonResult(**content)
    except (OSError, json.JSONDecodeError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no readable result ({error})") from error


def _runs(name: str, label: str, by_seed: Mapping[int, Outcome], worst: float) -> ArmRuns:
    good = good_seeds(by_seed)
    return ArmRuns(
        name,
        label,
        [good[seed].metrics["test"] if seed in good else worst for seed in by_seed],
        [good[seed].metrics["train_seconds"] if seed in good else None for seed in by_seed],
        [good[seed].peak_memory if seed in good else None for seed in by_seed],
        [seed for seed in by_seed if seed not in good],
    )


def _details(by_seed: Mapping[int, Outcome]) -> dict[str, float]:
    names = {n for o in by_seed.values() for n in o.metrics if n.startswith("test_")} | {"score", "epochs"}
    found = {}
    for name in sorted(names):
        values = [o.metrics[name] for o in by_seed.values() if name in o.metrics]
        if values:
            found[name] = plain.fmean(values)
    return found


def _label_issues(finished: Finished, folder: Path) -> dict[str, Any] | None:
    """Training rows whose label most seeds of a method suspect, with the class it would give them."""
    for arm in finished.arms:
        outcomes = [o for o in finished.outcomes[arm.name].values() if "label_issues" in o.artifacts]
        if not outcomes:
            continue
        votes: Counter[int] = Counter()
        suggested: dict[int, Counter[int]] = {}
        for outcome in outcomes:
            for position, label in zip(outcome.artifacts["label_issues"], outcome.artifacts["suggested"], strict=True):
                votes[position] += 1
                suggested.setdefault(position, Counter())[label] += 1
        task = finished.task
        rows = task.parts["train"]
        chosen = sorted(position for position, count in votes.items() if 2 * count > len(outcomes))
        if task.noise:
            # Labels are flipped anew for every seed, so no list of rows makes sense; but here the truth is known.
            rates = {
                name: plain.fmean(o.metrics[f"issue_{name}"] for o in outcomes) for name in ("precision", "recall")
            }
            return {"count": 0, "path": None, "label": arm.label, **rates}
        out = io.StringIO()
        writer = csv.writer(out)
        writer.writerow(["row", "given", "suggested", "share_of_runs"])
        for position in chosen:
            row = rows[position]
            best = suggested[position].most_common(1)[0][0]
            given = task.classes[int(task.targets[row])]
            writer.writerow(
                [int(task.row_ids[row]), given, task.classes[best], f"{votes[position] / len(outcomes):.2f}"]
            )
        write_atomically(folder / "label_issues.csv", out.getvalue())
        return {"count": len(chosen), "path": str(folder / "label_issues.csv"), "label": arm.label}
    return None


def _csv(result: ComparisonResult) -> str:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["arm", "seed", f"test_{result.metric}", "train_seconds", "peak_memory_bytes"])
    for arm in result.arms:
        for line in zip(result.seeds, arm.runs.scores, arm.runs.seconds, arm.runs.memory, strict=True):
            writer.writerow([arm.name, *line])
    return out.getvalue()


def _space_text(part: Any) -> str:
    if hasattr(part, "choices"):
        return "one of " + ", ".join(map(str, part.choices))
    return f"{part.low:g} to {part.high:g}{', log scale' if part.log else ''}"
