"""Trials are named by what defines them, and results are plain numbers or refused by name."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wellposed.lab.trial import Trial, TrialResult, checked_result


def trial(settings, **changes):
    fields = {"study": "s", "arm": "a", "scale": "smoke", "phase": "tune", "seed": 0, "fingerprint": "f"} | changes
    return Trial(settings=settings, **fields)


@given(
    st.dictionaries(st.text(max_size=5), st.one_of(st.integers(), st.floats(allow_nan=False), st.text(), st.booleans()))
)
def test_the_key_does_not_depend_on_the_order_of_settings(settings):
    assert trial(settings).key == trial(dict(reversed(settings.items()))).key


@pytest.mark.parametrize("pair", [(1, 1.0), (0.0, -0.0), (0.1, np.float64(0.1)), (3, np.int64(3)), (10**30, 10**30)])
def test_equal_numbers_are_one_setting(pair):
    assert trial({"x": pair[0]}).key == trial({"x": pair[1]}).key


@pytest.mark.parametrize("pair", [(1, True), (1, "1"), (0.1, 0.1 + 1e-16), (2**53, 2**53 + 1)])
def test_different_settings_are_different_trials(pair):
    same = pair[0] == pair[1] and type(pair[0]) is type(pair[1])
    assert (trial({"x": pair[0]}).key == trial({"x": pair[1]}).key) == same


@pytest.mark.parametrize("name", ["study", "arm", "scale", "fingerprint"])
def test_everything_that_defines_a_trial_changes_its_key(name):
    assert trial({}).key != trial({}, **{name: "other"}).key
    assert trial({}).key != trial({}, seed=1).key
    assert trial({}).key != trial({}, phase="evaluate", seed=1000).key


def test_wrong_trials_are_refused_by_name():
    with pytest.raises(TypeError, match=r"setting 'x' must be a text, a number or a truth value, got \[1\]"):
        trial({"x": [1]})
    with pytest.raises(ValueError, match="phase must be 'tune' or 'evaluate', got 'train'"):
        trial({}, phase="train")


def test_results_become_plain_numbers():
    found = checked_result(TrialResult({"a": torch.tensor(0.5)}, {"c": np.arange(2)}, {"n": [1]}))
    assert (found.metrics, found.curves, found.artifacts) == ({"a": 0.5}, {"c": [0.0, 1.0]}, {"n": [1]})
    assert type(found.curves["c"][0]) is float


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "must return a TrialResult, got NoneType"),
        (TrialResult({"a": "high"}), "metric 'a' must be a number, got 'high'"),
        (TrialResult({}, {"c": [None]}), "curve 'c' must be a number, got None"),
        (TrialResult({}, {}, {"rows": {1, 2}}), "artifact 'rows' must be what JSON can hold"),
    ],
)
def test_results_that_cannot_be_stored_are_refused_by_name(result, message):
    with pytest.raises(TypeError, match=message):
        checked_result(result)
