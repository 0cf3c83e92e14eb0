"""Arms: methods and controls that a comparison can run, as the catalogue describes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

from .reading import build, card_files, read_toml

TASKS = ("classification", "regression")


@dataclass(frozen=True)
class Arm:
    """One entry of a comparison.

    Attributes:
        name: unique, as `--methods` takes it.
        label: in tables.
        about: one sentence in plain words.
        factory: "module:Class" of a Regularizer; empty for plain training.
        link: reference.
        from_data: keywords of the class that the data fill in.
        tasks: "classification", "regression".
        fixed: keywords with fixed values.
        usage: lines for a plain loop, with {settings}, {num_examples}, {num_classes} to fill in.
        search: the arm's own knobs, as `wellposed.lab.tuning.parse_space` reads them.
        paper: slug of its card, or empty.
    """

    name: str
    label: str
    about: str
    factory: str = ""
    link: str = ""
    from_data: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ("classification",)
    fixed: dict[str, Any] = field(default_factory=dict)
    usage: str = ""
    search: dict[str, Any] = field(default_factory=dict)
    paper: str = ""

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in TASKS:
                raise ValueError(f"arm {self.name!r}: tasks must be among {list(TASKS)}, got {task!r}")
        if self.factory and self.factory.count(":") != 1:
            raise ValueError(f"arm {self.name!r}: factory must read 'module:Class', got {self.factory!r}")


@cache
def load_arms() -> tuple[Arm, ...]:
    """All arms: what everyone would try first, then those of the papers, in the order of their files.

    Raises:
        ValueError: for a field that is unknown or missing, naming the file, or for a name used twice.

    Example:
        >>> [arm.name for arm in load_arms()][:2]
        ['plain', 'early-stopping']
    """
    arms: list[Arm] = []
    for path in sorted(card_files(), key=lambda p: (p.stem != "everyday", p.stem)):
        for entry in read_toml(path).get("arms", []):
            paper = "" if path.stem == "everyday" else path.stem
            arm = build(Arm, {**entry, "paper": paper}, f"{path.name}: arm {entry.get('name')!r}")
            if any(arm.name == other.name for other in arms):
                raise ValueError(f"{path.name}: the arm {arm.name!r} exists twice")
            arms.append(arm)
    return tuple(arms)
