"""Random search: whole trainings from one state, boxes, the best kept, hooks, divergence, resume."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from wellposed import BilevelProblem, Compose, Hyperparameter, Regularizer, TensorLoader, fit
from wellposed.gradients import SharpnessAwareMinimization
from wellposed.loading import EndlessBatches
from wellposed.losses import EarlyLearning
from wellposed.objective import cross_entropy
from wellposed.step import DivergenceError
from wellposed.tuning import RandomSearch, Search
from wellposed.tuning.search_box import Box, choose_boxes, proposed_value
from wellposed.weights import EarlyStopping, WeightDecay

BOXES = {"regularizers.0.strength": (0.1, 10.0, True), "regularizers.1.strength": (1e-6, 1e-1)}
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class Repeats(Search):
    """Proposes the initial values again and again."""

    def propose(self, history):
        return {name: value.double() for name, value in history[0].values.items()}


def data(n=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator)
    return x, (x[:, 0] + 0.5 * torch.randn(n, generator=generator) > 0).long()


def loaders(shuffle=True):
    train = TensorLoader(*data(), batch_size=8, shuffle=shuffle, seed=1)
    return train, TensorLoader(*data(22, 1), batch_size=6, seed=2)


def network(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(dropout), nn.ReLU(), nn.Linear(8, 2))


def method(*more):
    return Compose(EarlyLearning(40, 2, Hyperparameter(1.0)), WeightDecay(Hyperparameter(1e-3, chart="exp")), *more)


def searched(epochs=12, steps=20, search=RandomSearch, regularizer=None, model=None, shuffle=True, **options):
    train, validation = loaders(shuffle)
    own = {k: options.pop(k) for k in ("checkpoint", "on_epoch_end", "early_stopping") if k in options}
    options = {"boxes": BOXES, "weight_optimizer": SGD} | options
    return fit(
        model or network(), train, epochs=epochs, validation=validation, regularizer=regularizer or method(),
        tuner=partial(search, steps_per_trial=steps, **options), **own,
    )  # fmt: skip


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def quadratic(hypers, inner=None, outer=None):
    """One weight, pulled to 1 by the data and to 0 by decay; validation wants 0.5."""
    weight = torch.zeros(1, requires_grad=True)
    inner = inner or (lambda w, v, b: (w["w"] - 1).square().sum() + v["decay"] * w["w"].square().sum())
    outer = outer or (lambda w, v, b: (w["w"] - 0.5).square().sum())
    return BilevelProblem(None, inner, outer, {"w": weight}, hypers)


# ---- a trial is a training -------------------------------------------------------------------------------------------


def test_the_first_trial_is_what_fit_does_with_every_hook():
    """SAM's closure, ELR's table, batch statistics, dropout masks, clipping and the schedule: bit for bit."""
    train, _ = loaders()
    plain = fit(
        network(0.3), train, epochs=4, regularizer=method(SharpnessAwareMinimization(0.1)), optimizer=SGD,
        scheduler=CosineAnnealingLR, clip_norm=0.5,
    ).model  # fmt: skip
    result = searched(
        4, 20, regularizer=method(SharpnessAwareMinimization(0.1)), model=network(0.3),
        weight_scheduler=CosineAnnealingLR, clip_norm=0.5,
    )  # fmt: skip
    assert [trial.status for trial in result.tuner.trials] == ["finished"]
    assert torch.equal(flat(plain), flat(result.model))
    for a, b in zip(plain.buffers(), result.model.buffers(), strict=True):
        assert torch.equal(a, b)


def test_every_trial_begins_from_the_same_state():
    result = searched(12, 20, Repeats, regularizer=method(SharpnessAwareMinimization(0.1)), shuffle=False)
    trials = result.tuner.trials
    assert [trial.number for trial in trials] == [0, 1, 2]
    assert trials[0].losses == trials[1].losses == trials[2].losses


def test_a_parameter_that_a_method_froze_trains_again_in_the_next_trial():
    class Freezes(WeightDecay):
        def on_epoch(self, step):
            if step.epoch == 2 and not step.finished:
                step.replace_parameters(["4.weight"])

    starts = []

    class Watched(Repeats):
        def _begin_trial(self, train):
            found = super()._begin_trial(train)
            starts.append([n for n, p in self.problem.model.named_parameters() if p.requires_grad])
            return found

    freezes = Freezes(Hyperparameter(1e-3, chart="exp"))
    result = searched(12, 20, Watched, freezes, shuffle=False, boxes={"strength": (1e-6, 1e-1)})
    assert starts[0] == starts[1] == starts[2] == [n for n, _ in network().named_parameters()]
    assert len({trial.loss for trial in result.tuner.trials}) == 1


def test_a_parameter_without_gradient_is_not_moved_by_decay():
    weight, idle = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    loss = lambda w, v, b: v["h"] * w["w"].square().sum()  # noqa: E731
    problem = BilevelProblem(None, loss, loss, {"w": weight, "idle": idle}, {"h": Hyperparameter(0.5, 0, 1)})
    make = partial(torch.optim.SGD, lr=0.1, weight_decay=0.5)
    RandomSearch(problem, 3, weight_optimizer=make).run([0], [0], steps=3)
    assert float(idle.detach()) == 1.0
    assert float(weight.detach()) < 1.0


# ---- proposals -------------------------------------------------------------------------------------------------------


def test_the_first_trial_has_the_initial_values_and_the_others_lie_inside_their_boxes():
    tuner = searched(60, 20).tuner
    first = {name: float(value) for name, value in tuner.trials[0].values.items()}
    assert first == pytest.approx({"regularizers.0.strength": 1.0, "regularizers.1.strength": 1e-3})
    for name, (low, high, *_) in BOXES.items():
        values = [float(trial.values[name]) for trial in tuner.trials[1:]]
        assert len(set(values)) == len(values) == 14
        assert low <= min(values) < max(values) <= high
    # `values` stand where they moved: at the first step of every trial.
    moved = [i for i, info in enumerate(tuner.history) if info.values]
    assert moved == list(range(0, 300, 20))
    assert tuner.history[20].values["regularizers.0.strength"] == pytest.approx(
        float(tuner.trials[1].values["regularizers.0.strength"])
    )


@pytest.mark.parametrize("log", [False, True])
def test_proposals_are_uniform_on_their_scale(log):
    draws = Box(0.01, 10.0, log).sample((4000,), torch.Generator().manual_seed(0)).numpy()
    law = stats.loguniform(0.01, 10.0) if log else stats.uniform(0.01, 9.99)
    assert stats.kstest(draws, law.cdf).pvalue > 0.01


def test_integers_are_equally_likely_and_survive_their_chart():
    holes = Hyperparameter(1.5, 0.0, 4.0, discrete=True)
    box = choose_boxes({"holes": holes}, None, "RandomSearch")["holes"]
    assert (box.low, box.high) == (0, 3)
    draws = box.sample((4000,), torch.Generator().manual_seed(0))
    assert stats.chisquare(np.bincount(draws.long().numpy(), minlength=4)).pvalue > 0.01
    for integer in range(4):
        holes.set_(proposed_value(holes, torch.tensor(float(integer))))
        assert float(holes()) == integer


def test_a_tensor_of_values_is_proposed_entry_by_entry():
    rates = Hyperparameter(torch.tensor([0.1, 0.5, 0.9]), 0.0, 1.0)
    inner = lambda w, v, b: (v["rates"] * (w["w"] - 1).square()).sum()  # noqa: E731
    problem = quadratic({"rates": rates}, inner)
    search = RandomSearch(problem, 2)
    search.run([0], [0], steps=8)
    torch.testing.assert_close(search.trials[0].values["rates"], torch.tensor([0.1, 0.5, 0.9]))
    for trial in search.trials[1:]:
        assert trial.values["rates"].unique().numel() == 3


def test_values_at_the_ends_of_an_open_range_are_moved_inside():
    for h in (Hyperparameter(0.5, 0.0, 1.0), Hyperparameter(1.0), Hyperparameter(1.0, chart="exp")):
        for value in (0.0, 1.0):
            h.set_(proposed_value(h, torch.tensor(value)))
            assert math.isfinite(float(h.raw))


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (None, r"RandomSearch: the hyperparameter 'decay' has the infinite range \(0.0, inf\).*boxes={'decay'"),
        ({"decay": (2.0, 3.0)}, "boxes\\['decay'\\] must hold the initial value 1"),
        ({"decay": (0.1, math.inf)}, "must have finite bounds"),
        ({"decay": (3.0, 0.5)}, "must have finite bounds with low < high"),
        ({"decay": (0.0, 3.0, True)}, "must have low > 0 on a logarithmic scale, got 0"),
        ({"decay": (-1.0, 3.0)}, r"must lie inside the range \(0.0, inf\)"),
        ({"decay": (1.0,)}, r"must be \(low, high\) or \(low, high, log\)"),
        ({"decay": (0.5, 2.0), "rate": (0, 1)}, "boxes names 'rate'; the hyperparameters are"),
    ],
)
def test_a_box_that_cannot_be_drawn_from_is_refused(boxes, message):
    with pytest.raises(ValueError, match=message):
        RandomSearch(quadratic({"decay": Hyperparameter(1.0)}), 5, boxes=boxes)


def test_a_discrete_box_has_integer_bounds_inside_the_range():
    h = {"decay": Hyperparameter(1.5, 0.0, 4.0, discrete=True)}
    assert choose_boxes(h, {"decay": (1, 3)}, "x")["decay"] == Box(1.0, 3.0, discrete=True)
    for box, message in (((0.5, 3), "integer bounds"), ((0, 4), "must lie inside the range")):
        with pytest.raises(ValueError, match=message):
            choose_boxes(h, {"decay": box}, "x")


@pytest.mark.parametrize("option", ["steps_per_trial", "evaluate_every", "validation_batches", "clip_norm"])
def test_counts_out_of_range_are_refused(option):
    options = {"steps_per_trial": 3} | {option: 0}
    with pytest.raises(ValueError, match=f"RandomSearch: {option} must be .*got 0"):
        RandomSearch(quadratic({"decay": Hyperparameter(0.5, 0, 1)}), **options)


# ---- the best --------------------------------------------------------------------------------------------------------


def test_the_best_checkpoint_is_exported_with_its_hyperparameters():
    result = searched(40, 20, evaluate_every=5)
    tuner = result.tuner
    best = min(tuner.trials, key=lambda trial: trial.loss)
    assert tuner.best is best
    assert best.loss == min(loss for trial in tuner.trials for _, loss in trial.losses)
    for name, value in tuner.values().items():
        torch.testing.assert_close(value, best.values[name])
    (x, y) = data(22, 1)
    found = cross_entropy(result.model.eval()(x), y).mean().item()
    assert found == pytest.approx(best.loss, rel=1e-5)


def test_a_trial_is_as_good_as_its_best_evaluation():
    """Validation wants 0.5 and training goes on to 1: the checkpoint between them is kept."""
    problem = quadratic({"decay": Hyperparameter(1e-4, 0.0, 1e-3)})
    search = RandomSearch(problem, 40, evaluate_every=4, weight_optimizer=partial(torch.optim.SGD, lr=0.05))
    search.run([0], [0], steps=40)
    (trial,) = search.trials
    assert len(trial.losses) == 10
    assert trial.loss < 0.02 < trial.losses[-1][1]
    search.export()
    assert float((problem.params["w"] - 0.5).square().detach()) == pytest.approx(trial.loss)


def test_export_ends_the_trial_under_way():
    problem = quadratic({"decay": Hyperparameter(0.5, 0.0, 10.0)})
    search = RandomSearch(problem, 10)
    search.run([0], [0], steps=15)
    kept = search.best
    search.export()
    weight = problem.params["w"].detach().clone()
    assert search.trials[1].status == "pruned"
    search.run([0], [0], steps=1)
    assert len(search.trials) == 3
    assert kept is search.trials[0]
    assert not torch.equal(weight, problem.params["w"].detach())


def test_export_before_any_evaluation_says_how_many_steps_it_takes():
    search = RandomSearch(quadratic({"decay": Hyperparameter(0.5, 0.0, 10.0)}), 10)
    search.run([0], [0], steps=3)
    with pytest.raises(RuntimeError, match=r"no trial was evaluated yet; take at least 10 steps"):
        search.export()


def test_validation_takes_one_whole_pass_weighed_by_examples():
    model, strength = nn.Linear(4, 2), Hyperparameter(0.5, 0.0, 1.0)
    problem = BilevelProblem.from_regularizer(model, WeightDecay(strength), cross_entropy)
    search = RandomSearch(problem, 1)
    train, validation = (EndlessBatches(loader, "x") for loader in loaders())
    info = search.step(train, validation)
    (x, y) = data(22, 1)
    assert validation.taken == 4  # 6 + 6 + 6 + 4 examples
    assert info.outer_loss == pytest.approx(cross_entropy(model(x), y).mean().item(), rel=1e-6)


# ---- hooks -----------------------------------------------------------------------------------------------------------


def test_hooks_see_the_trials_own_clock_and_the_closing_epoch_comes_once():
    seen = []

    class Clocked(WeightDecay):
        def on_epoch(self, step):
            seen.append((step.epoch, step.epochs, step.number, step.total))

        def on_step(self, step):
            steps.append(step.number)

    steps = []
    searched(9, 13, regularizer=Clocked(Hyperparameter(1e-3, chart="exp")), boxes={"strength": (1e-6, 1e-1)})
    one = [(0, 3, 0, 13), (1, 3, 5, 13), (2, 3, 10, 13)]
    # Five batches an epoch: 45 steps are three trials of 13 and the beginning of a fourth, pruned by the export.
    assert seen == [*one * 3, (0, 3, 0, 13), (1, 3, 5, 13), (3, 3, 13, 13)]
    assert steps == [*list(range(13)) * 3, *range(6)]


def test_a_method_that_stops_ends_its_trial_and_not_the_search():
    class Stops(WeightDecay):
        def on_epoch(self, step):
            if step.epoch == 2:
                step.stop("enough")

    result = searched(12, 20, regularizer=Stops(Hyperparameter(1e-3, chart="exp")), boxes={"strength": (1e-6, 1e-1)})
    assert result.stopped is None
    assert [trial.steps for trial in result.tuner.trials] == [10] * 6
    # The last one had not yet come to the epoch that it would have been stopped at.
    assert [trial.status for trial in result.tuner.trials] == ["finished"] * 5 + ["pruned"]


def test_early_stopping_inside_a_method_judges_each_trial_by_itself():
    judged = []

    class Watched(EarlyStopping):
        def on_epoch(self, step):
            super().on_epoch(step)
            judged.append(self._judged)

    searched(8, 20, regularizer=method(Watched()))
    assert judged == [0, 1, 2, 3, 0, 1, 2, 3, 4]


# ---- divergence ------------------------------------------------------------------------------------------------------


def test_a_trial_that_diverges_is_the_worst_and_the_search_goes_on():
    inner = lambda w, v, b: (w["w"] - 1).square().sum() * (math.nan if float(v["decay"]) > 0.5 else 1.0)  # noqa: E731
    search = RandomSearch(quadratic({"decay": Hyperparameter(0.2, 0.0, 1.0)}, inner), 4)
    history = search.run([0], [0], steps=60)
    bad = [trial for trial in search.trials if float(trial.values["decay"]) > 0.5]
    assert bad
    assert {(trial.status, trial.loss, trial.steps) for trial in bad} == {("diverged", math.inf, 1)}
    assert sum(info.extra.get("diverged", 0) for info in history) == len(bad)
    assert search.best.loss < math.inf
    search.export()
    assert torch.isfinite(search.problem.params["w"]).all()


def test_a_search_of_nothing_but_divergence_says_so():
    inner = lambda w, v, b: (w["w"] * math.nan).sum()  # noqa: E731
    search = RandomSearch(quadratic({"decay": Hyperparameter(0.2, 0.0, 1.0)}, inner), 4)
    search.run([0], [0], steps=3)
    with pytest.raises(DivergenceError, match="RandomSearch: all 3 trials diverged"):
        search.export()


# ---- resume ----------------------------------------------------------------------------------------------------------


def test_a_killed_search_continues_bit_for_bit(tmp_path):
    """Killed in the middle of a trial; optimizer, schedule, tables, proposals and the best go on."""
    options = {"epochs": 14, "steps": 20, "evaluate_every": 7, "weight_scheduler": CosineAnnealingLR}
    whole = searched(regularizer=method(SharpnessAwareMinimization(0.1)), model=network(0.2), **options)

    class Killed(RuntimeError):
        pass

    def kill(step, entry):
        if entry["epoch"] == 7:
            raise Killed

    again = partial(searched, checkpoint=tmp_path / "search.pt", **options)
    with pytest.raises(Killed):
        again(regularizer=method(SharpnessAwareMinimization(0.1)), model=network(0.2), on_epoch_end=kill)
    resumed = again(regularizer=method(SharpnessAwareMinimization(0.1)), model=network(0.2))
    assert torch.equal(flat(whole.model), flat(resumed.model))
    assert whole.tuner.trials == resumed.tuner.trials
    assert [i.inner_loss for i in whole.tuner.history] == [i.inner_loss for i in resumed.tuner.history]
    assert [i.values for i in whole.tuner.history] == [i.values for i in resumed.tuner.history]


def test_a_state_taken_earlier_is_not_changed_by_going_on():
    def search():
        return RandomSearch(quadratic({"decay": Hyperparameter(0.5, 0.0, 10.0)}), 10, evaluate_every=3)

    first = search()
    first.run([0], [0], steps=14)
    state = first.state_dict()
    saved = copy.deepcopy(state)
    first.run([0], [0], steps=26)
    second = search()
    second.load_state_dict(state)
    second.run([0], [0], steps=26)
    assert first.trials == second.trials
    assert str(state) == str(saved)


def test_early_stopping_of_the_loop_keeps_the_search_whole():
    result = searched(16, 20, early_stopping=16)
    tuner = result.tuner
    (x, y) = data(22, 1)
    found = cross_entropy(result.model.eval()(x), y).mean().item()
    assert found == pytest.approx(tuner.best.loss, rel=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
def test_a_search_runs_on_an_accelerator():
    train, validation = loaders()
    result = fit(
        network(), train, epochs=8, validation=validation, regularizer=method(), device="cuda",
        tuner=partial(RandomSearch, steps_per_trial=20, boxes=BOXES),
    )  # fmt: skip
    assert next(result.model.parameters()).is_cuda
    assert math.isfinite(result.tuner.best.loss)


def test_a_plain_regularizer_without_hyperparameters_is_refused():
    with pytest.raises(ValueError, match="hypers is empty"):
        searched(regularizer=Regularizer())
