"""Replay on another kind of processor: the code that an entry belongs to and the present code, side by side.

Matrix products round differently from processor to processor, and training amplifies that: on another machine than the
entry's no trial agrees to ten digits, whatever the code. What a replay must show is that a change of the code changed no
number. So the trials run twice here: by the tree of a commit whose fingerprint is the entry's, and by the present one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .replay import is_current

_PROGRAM = """
import json, sys
from pathlib import Path
import wellposed
if not Path(wellposed.__file__).resolve().is_relative_to(Path(sys.argv[4]).resolve()):
    sys.exit(f"the package was not found in {sys.argv[4]}, but in {wellposed.__file__}")
from wellposed.lab.replay import replay_trials
from wellposed.lab.runner import run_trials
from wellposed.lab.store import Store
from wellposed.lab.study_run import default_workers, study_fingerprint
from wellposed.papers.catalogue import find_card
from wellposed.studies.finding import find_study

slug, entry, folder = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
card, study = find_card(slug), find_study(slug)
fingerprint = study_fingerprint(study)
(folder / "fingerprint").write_text(fingerprint)
if len(sys.argv) > 5 and fingerprint not in sys.argv[5:]:
    sys.exit(0)  # another code: nothing is worth running
wanted = replay_trials(entry, study, card, fingerprint)
done = list({trial.key: trial for trial in wanted.values()}.values())
found = run_trials(done, study.run, Store(folder / "trials.sqlite"), workers=default_workers(), engine="loky")
outcomes = {trial.key: outcome for trial, outcome in zip(done, found)}
metrics = {}
for (arm, place), trial in wanted.items():
    outcome = outcomes[trial.key]
    metrics[f"{arm} {place}"] = None if outcome is None else [outcome.status, dict(outcome.metrics or {})]
(folder / "metrics.json").write_text(json.dumps(metrics))
"""


class ReplayError(RuntimeError):
    """A replay beside another commit could not be made."""


def replay_beside(slug: str, entry: Mapping[str, Any], revision: str, project: Path) -> list[str]:
    """Repeat an entry's trials by the code of `revision` and by the present code, and compare them bit for bit.

    Args:
        slug: of the paper.
        entry: of the ledger.
        revision: a commit of this project at which the entry was current.
        project: a checkout of the project.

    Returns:
        One sentence for each trial that came out otherwise; none if all agreed.

    Raises:
        ReplayError: if the revision does not exist, does not hold the entry's code, or a run fails.
    """
    with tempfile.TemporaryDirectory(prefix="wellposed-") as name, _tree(project, revision) as old:
        folder = Path(name)
        (folder / "entry.json").write_text(json.dumps(entry), "utf-8")
        found = {}
        known = [str(entry["fingerprint"]), str(entry.get("replay", {}).get("fingerprint", ""))]
        for side, tree, accepted in (("then", old, known), ("now", project, [])):
            place = folder / side
            place.mkdir()
            found[side] = _metrics(slug, folder / "entry.json", place, tree, accepted)
            if side == "then" and not is_current(entry, (place / "fingerprint").read_text("utf-8")):
                raise ReplayError(f"{slug}: {revision!r} does not hold the code that the entry belongs to")
    return _differences(found["then"], found["now"])


def _metrics(slug: str, entry: Path, place: Path, tree: Path, accepted: list[str]) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(tree / "src")}
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        environment.setdefault(name, "1")
    command = [sys.executable, "-c", _PROGRAM, slug, str(entry), str(place), str(tree), *accepted]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ReplayError(f"{slug}: the trials could not run: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    file = place / "metrics.json"
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    found = [f"{name} ran then and not now" for name in sorted(set(then) - set(now))]
    found += [f"{name} runs now and did not then" for name in sorted(set(now) - set(then))]
    for name in sorted(set(then) & set(now)):
        if then[name] == now[name]:
            continue
        (status, old), (other, new) = (side or ["missing", {}] for side in (then[name], now[name]))
        changed = [metric for metric in old if old[metric] != new.get(metric)] if status == other else []
        what = f"{changed[0]} is {new.get(changed[0])}, was {old[changed[0]]}" if changed else f"{other}, was {status}"
        found.append(f"{name}: {what}")
    return found


@contextmanager
def _tree(project: Path, revision: str) -> Iterator[Path]:
    """The project's files at a revision, in a folder of their own."""
    with tempfile.TemporaryDirectory(prefix="wellposed-") as name:
        archive = subprocess.run(["git", "-C", str(project), "archive", revision], capture_output=True)
        if archive.returncode:
            raise ReplayError(f"git knows no revision {revision!r} in {project}")
        subprocess.run(["tar", "-x", "-C", name], input=archive.stdout, check=True)
        yield Path(name)
