"""The protocol of a study: arms, spaces and budgets, read from the card, where they are registered before the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .space import Space, parse_space
from .trial import FIRST_EVALUATION_SEED, Setting

ROLES = ("method", "baseline", "control", "witness")
MIN_SEEDS = 8
_ARM_KEYS = (
    "name", "label", "group", "role", "fixed", "search", "shared", "rounds", "score", "trials_of", "settings_of",
    "metric",
)  # fmt: skip
_KEYS = (
    "problem", "redraws", "seeds", "tuning_rounds", "tuning_seeds", "score", "worst", "shared", "smoke", "paper", "arms",
)  # fmt: skip
_PAPER_KEYS = ("seeds", "metric", "data", "cost", "arms")


@dataclass(frozen=True)
class StudyArm:
    """One arm of a study.

    Attributes:
        name, label: as tables and pages show it.
        role: "method" (the paper's), "baseline" (what users would try), "control" (isolates a cause), or "witness"
            (shows whether the phenomenon exists).
        fixed: settings handed to the run as they are.
        space: what is tuned: the shared knobs and its own.
        rounds: configurations that tuning tries; 0 for an arm with nothing to tune.
        score: metric that tuning maximises.
        trials_of: takes the tuning trials of this arm, and chooses among them by its own score.
        settings_of: starts from the tuned settings of this arm.
        group: heading under which pages show it, e.g. the problem that it runs on.
        metric: what tables show of it in the place of the study's headline metric, e.g. that of its best epoch.
    """

    name: str
    label: str
    role: str
    fixed: Mapping[str, Setting]
    space: Space
    rounds: int
    score: str = "score"
    trials_of: str = ""
    settings_of: str = ""
    group: str = ""
    metric: str = ""


@dataclass(frozen=True)
class PaperProtocol:
    """What a card's `[protocol.paper]` writes down: the published configuration, run as it is, without tuning.

    Attributes:
        metric: that is compared with the published number.
        data, cost: in words: what must be where, and what a run takes.
        seeds: evaluation seeds.
        arms: by name.
        published: the paper's number, of the arms that it reports.
    """

    metric: str
    data: str
    cost: str
    seeds: int
    arms: Mapping[str, StudyArm]
    published: Mapping[str, float]


@dataclass(frozen=True)
class Protocol:
    """What a card's `[protocol]` registers.

    Attributes:
        problem, redraws, score: in words: data and model; what a seed re-draws; what tuning maximises.
        seeds: evaluation seeds 1000, 1001, ...: how many.
        tuning_rounds: configurations an arm.
        tuning_seeds: seeds 0, 1, ... over which a configuration's score is averaged: how many.
        arms: by name, in the card's order.
        worst: what a diverged trial counts as, by metric.
        smoke: settings that the scale "smoke" overrides.
        paper: the published configuration, or None.
    """

    problem: str
    redraws: str
    score: str
    seeds: int
    tuning_rounds: int
    tuning_seeds: int
    arms: Mapping[str, StudyArm]
    worst: Mapping[str, float] = field(default_factory=dict)
    smoke: Mapping[str, Setting] = field(default_factory=dict)
    paper: PaperProtocol | None = None

    @property
    def evaluation_seeds(self) -> list[int]:
        """The seeds that the verdicts rest on."""
        return list(range(FIRST_EVALUATION_SEED, FIRST_EVALUATION_SEED + self.seeds))


def parse_protocol(table: Mapping[str, Any], owner: str) -> Protocol:
    """Read a card's `[protocol]`.

    Args:
        table: as TOML gives it.
        owner: the card's slug, named in errors.

    Raises:
        ValueError: naming the key that is unknown, missing or out of range.

    Example:
        >>> arms = [{"name": "ce", "search": {}}, {"name": "ce_stop", "trials_of": "ce", "score": "stop"}]
        >>> table = dict(problem="p", redraws="r", score="s", seeds=12, tuning_rounds=20, tuning_seeds=3, arms=arms,
        ...              shared={"lr": {"low": 0.01, "high": 0.1, "log": True}})
        >>> protocol = parse_protocol(table, "elr")
        >>> list(protocol.arms["ce"].space), protocol.arms["ce_stop"].rounds
        (['lr'], 0)
    """
    where = f"{owner}: protocol"
    _check_keys(table, _KEYS, where)
    for name in ("problem", "redraws", "score", "seeds", "tuning_rounds", "tuning_seeds", "arms"):
        if name not in table:
            raise ValueError(f"{where}: the key {name!r} is missing")
    for name, least in (("seeds", MIN_SEEDS), ("tuning_rounds", 1), ("tuning_seeds", 1)):
        if not isinstance(table[name], int) or table[name] < least:
            raise ValueError(f"{where}: {name} must be an integer >= {least}, got {table[name]!r}")
    shared = parse_space(table.get("shared", {}), f"{where}: shared")
    arms: dict[str, StudyArm] = {}
    for entry in table["arms"]:
        arm = _parse_arm(entry, shared, table["tuning_rounds"], where)
        if arm.name in arms:
            raise ValueError(f"{where}: the arm {arm.name!r} exists twice")
        for what, base in (("trials_of", arm.trials_of), ("settings_of", arm.settings_of)):
            if base and base not in arms:
                raise ValueError(f"{where}: arm {arm.name!r}: {what} must name an arm above it, got {base!r}")
        arms[arm.name] = arm
    return Protocol(
        table["problem"], table["redraws"], table["score"], table["seeds"], table["tuning_rounds"],
        table["tuning_seeds"], arms, dict(table.get("worst", {})), dict(table.get("smoke", {})),
        _parse_paper(table["paper"], where) if "paper" in table else None,
    )  # fmt: skip


def _parse_paper(table: Mapping[str, Any], where: str) -> PaperProtocol:
    where = f"{where}.paper"
    _check_keys(table, _PAPER_KEYS, where)
    if missing := [name for name in _PAPER_KEYS if name not in table]:
        raise ValueError(f"{where}: the key {missing[0]!r} is missing")
    arms: dict[str, StudyArm] = {}
    published: dict[str, float] = {}
    for entry in table["arms"]:
        plain = {name: value for name, value in entry.items() if name != "published"}
        arm = _parse_arm({**plain, "shared": False}, {}, 0, where)
        arms[arm.name] = arm
        if "published" in entry:  # controls that the paper left out have no number
            published[arm.name] = float(entry["published"])
    return PaperProtocol(table["metric"], table["data"], table["cost"], table["seeds"], arms, published)


def _parse_arm(entry: Mapping[str, Any], shared: Space, rounds: int, where: str) -> StudyArm:
    name = entry.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}: every arm needs a name, got {dict(entry)}")
    where = f"{where}: arm {name!r}"
    _check_keys(entry, _ARM_KEYS, where)
    role = entry.get("role", "baseline")
    if role not in ROLES:
        raise ValueError(f"{where}: role must be one of {list(ROLES)}, got {role!r}")
    derived = entry.get("trials_of", "") or entry.get("settings_of", "")
    # An arm that takes another's settings has the shared knobs from there, unless it asks for them by name.
    wanted = entry.get("shared", not derived)
    names = list(shared) if wanted is True else [] if wanted is False else list(wanted)
    if unknown := sorted(set(names) - set(shared)):
        raise ValueError(f"{where}: shared must name knobs among {sorted(shared)}, got {unknown[0]!r}")
    own = parse_space(entry.get("search", {}), where)
    fixed = dict(entry.get("fixed", {}))
    space = {k: v for k, v in {**{n: shared[n] for n in names}, **own}.items() if k not in fixed}
    count = entry.get("rounds", rounds if space else 0)
    if not isinstance(count, int) or count < 0 or (count == 0 and space) or (count > 0 and not space):
        raise ValueError(f"{where}: rounds must be >= 1 with something to search and 0 without, got {count!r}")
    if entry.get("trials_of") and (space or entry.get("settings_of") or fixed):
        raise ValueError(f"{where}: trials_of takes another arm's trials as they are: no search, fixed or settings_of")
    return StudyArm(
        name, entry.get("label", name), role, fixed, space, count, entry.get("score", "score"),
        entry.get("trials_of", ""), entry.get("settings_of", ""), entry.get("group", ""),
        entry.get("metric", ""),
    )  # fmt: skip


def _check_keys(table: Mapping[str, Any], allowed: tuple[str, ...], where: str) -> None:
    if unknown := sorted(set(table) - set(allowed)):
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; allowed: {', '.join(allowed)}")
