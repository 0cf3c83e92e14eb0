"""Peak memory belongs to the trial that took it, not to the process's past."""

import numpy as np
import pytest

from wellposed.lab import memory
from wellposed.lab.memory import PeakMemory


def peak_of(megabytes):
    peak = PeakMemory()
    peak.start()
    np.ones(megabytes * 2**17).sum()
    return peak.read()


def test_a_small_piece_of_work_after_a_large_one_reports_its_own_peak():
    large, small = peak_of(200), peak_of(1)
    if large is None:
        pytest.skip("this system does not tell the peak")
    assert large - small > 150 * 2**20


def test_where_the_system_cannot_tell_there_is_no_number(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "absent" / "clear_refs")
    assert peak_of(1) is None
