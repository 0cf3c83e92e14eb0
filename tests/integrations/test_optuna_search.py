"""Optuna's samplers and pruners over whole trainings."""

import math
from functools import partial

import optuna
import pytest
import torch
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import TrialState
from torch import nn

from wellposed import BilevelProblem, Compose, Hyperparameter, TensorLoader, fit
from wellposed.integrations import OptunaSearch
from wellposed.losses import EarlyLearning
from wellposed.weights import WeightDecay

optuna.logging.set_verbosity(optuna.logging.WARNING)


def quadratic(hypers, inner=None):
    """One weight, pulled to 1 by the data and to 0 by decay; validation wants 0.5."""
    weight = torch.zeros(1, requires_grad=True)
    inner = inner or (lambda w, v, b: (w["w"] - 1).square().sum() + v["decay"] * w["w"].square().sum())
    outer = lambda w, v, b: (w["w"] - 0.5).square().sum()  # noqa: E731
    return BilevelProblem(None, inner, outer, {"w": weight}, hypers)


def decay(**options):
    return {"decay": Hyperparameter(8.0, 0.0, 10.0, **options)}


def searched(hypers, trials, steps=15, inner=None, **options):
    make = partial(torch.optim.SGD, lr=0.03)
    search = OptunaSearch(quadratic(hypers, inner), steps, weight_optimizer=make, **options)
    search.run([0], [0], steps=trials * steps)
    return search


def test_proposals_are_those_of_optuna_told_the_same_losses():
    search = searched(decay(), 12, seed=3)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=3, n_startup_trials=4))
    study.enqueue_trial({"decay": 8.0})
    for trial in search.trials:
        asked = study.ask({"decay": FloatDistribution(0.0, 10.0)})
        assert float(trial.values["decay"]) == pytest.approx(asked.params["decay"], rel=1e-6)
        asked.report(trial.loss, trial.steps)
        study.tell(asked, trial.loss)
    assert search.best.loss == search.study.best_value < search.trials[0].loss


def test_a_sampler_of_ones_own_is_used():
    grid = optuna.samplers.GridSampler({"decay": [1.0, 2.0, 3.0, 4.0, 5.0]}, seed=0)
    search = searched(decay(), 4, sampler=grid)
    assert float(search.trials[0].values["decay"]) == pytest.approx(8.0)
    found = sorted(float(trial.values["decay"]) for trial in search.trials[1:])
    assert len(found) == 3
    assert set(torch.tensor(found).round(decimals=4).tolist()) <= {1.0, 2.0, 3.0, 4.0, 5.0}


def test_every_entry_of_a_tensor_and_every_integer_is_a_parameter_of_its_own():
    hypers = {
        "rates": Hyperparameter(torch.tensor([0.2, 0.8]), 0.0, 1.0),
        "count": Hyperparameter(2.5, 0.0, 5.0, discrete=True),
        "decay": Hyperparameter(1e-3, chart="exp"),
    }
    seen = []

    def inner(w, v, b):
        seen.append(float(v["count"]))
        return (v["rates"].sum() * (w["w"] - 1).square() + v["decay"] * w["w"].square() * v["count"]).sum()

    search = searched(hypers, 10, inner=inner, boxes={"decay": (1e-5, 1e-1)})
    assert search.distributions == {
        "rates[0]": FloatDistribution(0.0, 1.0),
        "rates[1]": FloatDistribution(0.0, 1.0),
        "count": IntDistribution(0, 4),
        "decay": FloatDistribution(1e-5, 1e-1, log=True),
    }
    first = search.study.trials[0].params
    assert (first["rates[0]"], first["count"], first["decay"]) == pytest.approx((0.2, 2, 1e-3))
    for trial, told in zip(search.trials, search.study.trials, strict=True):
        assert trial.values["rates"].tolist() == pytest.approx([told.params["rates[0]"], told.params["rates[1]"]])
        assert math.floor(float(trial.values["count"])) == told.params["count"]
    assert seen[::15] == [told.params["count"] for told in search.study.trials]


def test_a_trial_that_diverges_is_told_as_pruned():
    inner = lambda w, v, b: (w["w"] - 1).square().sum() * (math.nan if float(v["decay"]) < 5 else 1.0)  # noqa: E731
    search = searched(decay(), 10, inner=inner)
    for trial, told in zip(search.trials, search.study.trials, strict=True):
        assert (trial.status == "diverged") == (told.state == TrialState.PRUNED) == (float(trial.values["decay"]) < 5)
    assert any(trial.status == "diverged" for trial in search.trials)


def test_halving_ends_what_is_behind_and_spends_the_steps_on_more_trials():
    # Without decay validation wants half of what training wants, so that loss at every rung orders the trials.
    pruned = searched(decay(), 12, steps=90, pruner="halving", evaluate_every=5, sampler="random")
    rungs = {trial.steps for trial in pruned.trials if trial.status == "pruned"}
    assert rungs
    assert rungs <= {10, 30}
    assert len(pruned.trials) > 12
    whole = [trial for trial in pruned.trials if trial.status == "finished"]
    ended = [trial for trial in pruned.trials if trial.status == "pruned" and trial.steps == 10]
    at_first_rung = lambda trial: dict(trial.losses)[10]  # noqa: E731
    assert min(map(at_first_rung, whole)) < min(map(at_first_rung, ended))
    states = [trial.state for trial in pruned.study.trials]
    assert states.count(TrialState.COMPLETE) == len(whole)


def test_the_median_and_a_pruner_of_ones_own_are_asked():
    threshold = optuna.pruners.ThresholdPruner(upper=1e-9)
    search = searched(decay(), 3, pruner=threshold, evaluate_every=5)
    assert {trial.steps for trial in search.trials} == {5}
    assert {trial.status for trial in search.trials} == {"pruned"}
    assert isinstance(searched(decay(), 1, pruner="median", evaluate_every=5).study.pruner, optuna.pruners.MedianPruner)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "bayes"}, r"sampler must be one of \['tpe', 'random'\] or an Optuna sampler, got 'bayes'"),
        ({"pruner": "asha", "evaluate_every": 5}, r"pruner must be None, one of \['halving', 'median'\]"),
        ({"pruner": "halving"}, "pruner needs evaluations inside a trial; give evaluate_every below .* = 15, got 15"),
        ({"startup_trials": 0}, "startup_trials must be >= 1, got 0"),
        ({"boxes": {"rate": (0, 1)}}, "OptunaSearch: boxes names 'rate'"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        searched(decay(), 1, **options)


def test_it_is_quiet_and_leaves_the_callers_verbosity(capfd):
    optuna.logging.set_verbosity(optuna.logging.INFO)
    try:
        searched(decay(), 3)
        assert optuna.logging.get_verbosity() == optuna.logging.INFO
        assert capfd.readouterr().err == ""
    finally:
        optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.mark.parametrize("options", [{}, {"pruner": "halving", "evaluate_every": 7}])
def test_a_killed_search_continues_bit_for_bit(tmp_path, options):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 4, generator=generator)
    y = (x[:, 0] > 0).long()

    def run(**more):
        torch.manual_seed(0)
        method = Compose(EarlyLearning(40, 2, Hyperparameter(1.0)), WeightDecay(Hyperparameter(1e-3, chart="exp")))
        boxes = {"regularizers.0.strength": (0.1, 10.0, True), "regularizers.1.strength": (1e-6, 1e-1)}
        return fit(
            nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), TensorLoader(x, y, batch_size=8, shuffle=True),
            epochs=30, validation=TensorLoader(x, y), regularizer=method,
            tuner=partial(OptunaSearch, steps_per_trial=20, boxes=boxes, startup_trials=2, **options), **more,
        ).tuner  # fmt: skip

    class Killed(RuntimeError):
        pass

    def kill(step, entry):
        if entry["epoch"] == 19:
            raise Killed

    whole = run()
    with pytest.raises(Killed):
        run(checkpoint=tmp_path / "search.pt", on_epoch_end=kill)
    resumed = run(checkpoint=tmp_path / "search.pt")
    assert whole.trials == resumed.trials
    assert [t.params for t in whole.study.trials] == [t.params for t in resumed.study.trials]
