"""A finished tuning, of data or of a study, read back from its folder and rendered again."""

from __future__ import annotations

import json
from pathlib import Path

from .page import write_page
from .tune_record import KIND, VERSION
from .tune_report import tune_page
from .tune_result import TuneResult, tune_result_from
from .tune_study.page import study_page
from .tune_study.result import StudyTuneResult, study_result_from


def load_tuning(folder: str | Path) -> TuneResult | StudyTuneResult:
    """Read what `write_tuning` wrote, of data or of a study.

    Raises:
        ValueError: if it was written by another version, or is no such result.
    """
    path = Path(folder) / "results.json"
    try:
        content = json.loads(path.read_text("utf-8"))
        if content.get("report") != KIND or content.get("version") != VERSION:
            raise ValueError(f"{path} is no result of wellposed tune of version {VERSION}")
        return study_result_from(content) if content.get("study") else tune_result_from(content)
    except (OSError, json.JSONDecodeError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no readable result ({error})") from error


def render_tuning(folder: str | Path) -> Path:
    """Write the page of a finished tuning anew; returns its path.

    Raises:
        ValueError: as `load_tuning`.
        WriteError: if it cannot be written; an older page is intact.
    """
    result = load_tuning(folder)
    page = study_page(result) if isinstance(result, StudyTuneResult) else tune_page(result)
    return write_page(page, folder)
