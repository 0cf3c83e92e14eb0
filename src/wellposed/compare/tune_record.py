"""What results of `wellposed tune` have in common, of data and of a study: two arms to compare, and their files."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ..lab.files import write_atomically

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

VERSION = 1
KIND = "tune"

Arm = TypeVar("Arm")


class TwoArms(Generic[Arm]):
    """Arms of which the first keeps the settings as they were, and the second is the method."""

    arms: list[Arm]

    @property
    def untuned(self) -> Arm:
        """What is left as it was: initial values, or registered defaults."""
        return self.arms[0]

    @property
    def tuned(self) -> Arm:
        """The method."""
        return self.arms[1]


def write_tuning(result: DataclassInstance, schedule: str | None, folder: str | Path) -> None:
    """Write results.json and, where values changed along training, schedule.json."""
    path = Path(folder)
    write_atomically(path / "results.json", json.dumps(asdict(result), indent=1))
    if schedule is not None:
        write_atomically(path / "schedule.json", schedule)
    else:
        (path / "schedule.json").unlink(missing_ok=True)  # of another method, in the same folder


def is_tuning(folder: str | Path) -> bool:
    """Whether a report's folder was written by `wellposed tune`."""
    try:
        content: Any = json.loads((Path(folder) / "results.json").read_text("utf-8"))
        return content.get("report") == KIND
    except (OSError, ValueError, AttributeError):
        return False
