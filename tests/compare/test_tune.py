"""`wellposed tune`, end to end on few rows: it learns, compares, resumes, refuses, and its snippets run."""

import json
import os
from functools import partial

import pytest
import torch
from page_checker import Checker
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from wellposed import Compose, Hyperparameter, TensorLoader, fit
from wellposed.commands import run
from wellposed.compare import seed_job, tune_job
from wellposed.compare.errors import UserError
from wellposed.compare.models import default_model
from wellposed.compare.source import read_source
from wellposed.compare.task import Task
from wellposed.compare.tune_again import load_tuning
from wellposed.compare.tune_job import prepare_tuning, run_tuning
from wellposed.compare.tune_methods import CLIP_NORM, LEARNING_RATE, Pace
from wellposed.compare.tune_options import TuneOptions
from wellposed.compare.tune_parts import USUAL
from wellposed.compare.tune_plan import choose, make_plan
from wellposed.compare.tune_record import is_tuning
from wellposed.compare.tune_result import collect_tuning
from wellposed.compare.tune_snippet import apply_values, learn_again, replay_schedule
from wellposed.compare.tune_training import run_tune_trial
from wellposed.evaluation import evaluate
from wellposed.lab.trial import Trial
from wellposed.objective import cross_entropy
from wellposed.tuning import Schedule
from wellposed.weights import EarlyStopping

SETTINGS = {"learn": "weight-decay,dropout", "epochs": 6}


@pytest.fixture(scope="module")
def iris():
    return Task.prepare(read_source("iris"))


def command(*words):
    return run(["tune", "iris", "--engine", "serial", "--workers", "1", "--epochs", "3", *words])


def trial(arm, seed=1000, study="study", **settings):
    return Trial(study, arm, "tune", "evaluate", SETTINGS | settings, seed, "f")


def trained(task, folder, arm, **settings):
    task.save(folder)
    return run_tune_trial(trial(arm, study=task.digest, **settings), str(folder))


# ---- the command -----------------------------------------------------------------------------------------------------


def test_it_learns_compares_and_writes_page_numbers_and_schedule(here, capsys):
    assert command("--seeds", "2") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "learning: weight decay ×3, dropout, label smoothing, input noise" in out
    assert "2 seeds cannot show a difference; 6 or more can" in out
    folder = here / "wellposed-report" / "tune-iris"
    assert {path.name for path in folder.iterdir()} >= {"index.html", "results.json", "schedule.json", "trials.sqlite"}
    assert not (folder / "live").exists()
    schedule = Schedule.from_json((folder / "schedule.json").read_text())
    assert schedule.total == 6  # two batches an epoch
    assert set(schedule.at(1.0)) == {"weight decay", "dropout", "label smoothing", "input noise"}
    page = Checker((folder / "index.html").read_text())
    assert page.fetched == [] and page.open == []
    assert all(not link.startswith("http") for link in page.links)
    for words in (
        "What it gained",
        "What was learned",
        "ReplaySchedule",
        "tuner = partial(SelfTuner",
        "its values, fixed",
    ):
        assert words in page.text
    result = load_tuning(folder)
    assert [arm.name for arm in result.arms] == ["untuned", "stn", "applied"]
    assert is_tuning(folder)
    assert not is_tuning(here)
    assert result.seeds == [1000, 1001]


def test_what_is_finished_is_not_trained_again(here, capsys, monkeypatch):
    calls = []
    original = tune_job.run_tune_trial

    def counted(trial, **options):
        calls.append((trial.arm, trial.seed))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(trial, **options)

    monkeypatch.setattr(tune_job, "run_tune_trial", counted)
    assert command("--seeds", "2", "--learn", "dropout") == 130
    assert "Finished trials are kept; the same command continues" in " ".join(capsys.readouterr().err.split())
    assert calls == [("untuned", 1000), ("stn", 1000), ("untuned", 1001), ("stn", 1001)]
    assert command("--seeds", "2", "--learn", "dropout") == 0
    assert calls[4:] == [("stn", 1001), ("applied", 1000), ("applied", 1001)]
    # Another method needs the same untuned trainings: they are kept, too.
    assert command("--seeds", "2", "--learn", "dropout", "--method", "random", "--trials", "2") == 0
    assert calls[7:] == [("random", 1000), ("random", 1001)]
    folder = here / "wellposed-report" / "tune-iris"
    assert not (folder / "schedule.json").exists()
    assert "ReplaySchedule" not in (folder / "index.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--method", "sdn"],
            "--method must be one of stn, delta-stn, bo-rep, maid, tpe, random, got 'sdn'. Did you mean",
        ),
        (["--learn", "dropuot"], "--learn: no strength 'dropuot'. Did you mean 'dropout'? Allowed: weight-decay,"),
        (["--learn", ","], "--learn is empty; allowed: weight-decay, dropout"),
        (["--learn", "dropout,dropout"], "--learn names 'dropout' twice"),
        (["--method", "maid", "--learn", "dropout"], "--learn does not apply to --method maid"),
        (["--method", "maid", "--model", "a:b"], "--model does not apply to --method maid"),
        (["--trials", "4"], "--trials applies to tpe and random: 'stn' learns within one training"),
        (["--method", "tpe", "--trials", "1"], "--trials must be at least 2, got 1"),
        (["--seeds", "1"], "--seeds must be at least 2, got 1"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--workers", "0"], "--workers must be at least 1, got 0"),
        (["--budget", "soon"], "--budget must read like 90s, 10m or 1h, got 'soon'"),
        (["--model", "nowhere:net"], "cannot import 'nowhere'"),
        (["--method", "bo-rep", "--learn", "dropout"], "no derivative in dropout: take --method stn, tpe or random"),
        (["--learn", "label-smoothing,symmetric-cross-entropy"], "at most one method may replace the task loss"),
        (["--learn", "elr-plus"], "--method stn cannot learn elr-plus with this model: "),
        (["--target", "species"], "--target applies to CSV and Parquet only"),
    ],
)
def test_bad_input_is_one_line_before_any_work(refused, words, message):
    refused(["tune", "iris", "--engine", "serial", *words], message)


def test_a_strength_of_classification_is_refused_for_a_number_to_predict(refused):
    words = ["tune", "diabetes", "--learn", "label-smoothing"]
    refused(words, "'label-smoothing' does not apply to regression. Allowed: weight-decay,")


def test_a_budget_leaves_out_seeds_and_says_so(iris, tmp_path, monkeypatch):
    monkeypatch.setattr(seed_job, "seconds_left", lambda deadline: 0.0)
    options = TuneOptions(
        "stn", ["dropout"], budget=1000, seeds=6, epochs=1, engine="serial", workers=1, output=tmp_path
    )
    finished = run_tuning(prepare_tuning(iris, options))
    assert finished.seeds == [1000, 1001]
    assert "the budget of 1000 s allowed 2 seeds (asked: 6)" in finished.notes


def test_a_budget_too_small_for_two_seeds_is_an_error_that_says_what_to_do(iris, tmp_path):
    options = TuneOptions("stn", ["dropout"], budget=1e-6, epochs=1, engine="serial", workers=1, output=tmp_path)
    with pytest.raises(UserError, match="the budget ended before 2 seeds were done; raise --budget or lower --epochs"):
        run_tuning(prepare_tuning(iris, options))


# ---- the trainings ---------------------------------------------------------------------------------------------------


def test_untuned_is_plain_training_stopped_early(iris, tmp_path):
    """The same network, batches, schedule and checkpoint as `fit` with `EarlyStopping`, bit for bit."""
    found = trained(iris, tmp_path, "untuned")
    data = iris.tensors(1000)
    network = default_model(iris, 1000)
    plan = make_plan([entry for entry in USUAL if entry.name in ("weight-decay", "dropout")], network, iris)
    pace = Pace(2, 6)
    validation = TensorLoader(data["validation_inputs"], data["validation_targets"])
    result = fit(
        network, TensorLoader(data["train_inputs"], data["train_targets"], shuffle=True, seed=1000), epochs=6,
        validation=validation, regularizer=Compose(plan.method, EarlyStopping()), clip_norm=CLIP_NORM, seed=1000,
        optimizer=partial(torch.optim.SGD, lr=LEARNING_RATE, momentum=0.9, nesterov=True),
        scheduler=lambda optimizer, steps: LambdaLR(optimizer, lambda step: pace.factor(step // 2)),
    )  # fmt: skip
    assert found.metrics["validation_loss"] == evaluate(result.model, validation, cross_entropy)["loss"]
    test = TensorLoader(data["test_inputs"], data["test_targets"])
    assert found.metrics["test_loss"] == evaluate(result.model, test, cross_entropy)["loss"]
    assert found.artifacts["values"] == plan.values()


@pytest.mark.parametrize("arm", ["stn", pytest.param("delta-stn", marks=pytest.mark.slow), "bo-rep"])
def test_methods_that_learn_within_a_training_move_their_values_epoch_by_epoch(iris, tmp_path, arm):
    found = trained(iris, tmp_path, arm, epochs=30)
    decay = found.curves["weight decay 0.weight"]
    assert len(decay) == 30
    assert decay[0] != decay[-1]
    kept = found.curves["epoch"].index(found.metrics["kept"])
    assert found.curves["validation loss"][kept] == min(found.curves["validation loss"])
    # The values are those of the epoch that was kept, with its weights.
    assert found.artifacts["values"]["weight decay 0.weight"] == pytest.approx(decay[kept])
    assert found.metrics["validation_loss"] == pytest.approx(min(found.curves["validation loss"]), rel=1e-4)
    schedule = Schedule.from_json(found.artifacts["schedule"])
    assert schedule.values[-1]["weight decay"] == pytest.approx(
        [found.curves[f"weight decay {i}.weight"][-1] for i in (0, 2, 4)]
    )
    moved = found.curves["dropout"][0] != found.curves["dropout"][-1]
    assert moved == (arm != "bo-rep")
    assert list(found.artifacts["left_out"]) == (["dropout"] if arm == "bo-rep" else [])


@pytest.mark.parametrize("arm", ["random", "tpe"])
def test_searches_report_one_point_for_each_training(iris, tmp_path, arm):
    found = trained(iris, tmp_path, arm, trials=3)
    assert found.metrics["trainings"] == 3
    assert found.curves["training"] == [1.0, 2.0, 3.0]
    assert found.curves["dropout"][0] == pytest.approx(0.05)
    best = int(found.metrics["kept"]) - 1
    assert found.curves["validation loss"][best] == min(found.curves["validation loss"])
    assert found.artifacts["values"]["dropout"] == pytest.approx(found.curves["dropout"][best])
    assert found.artifacts["schedule"] is None
    # Its first training is the untuned one.
    assert found.curves["validation loss"][0] == pytest.approx(
        min(trained(iris, tmp_path, "untuned").curves["validation loss"])
    )


def test_applied_values_are_those_of_the_best_training_of_a_search(iris, tmp_path):
    found = trained(iris, tmp_path, "random", trials=3)
    values = json.dumps(found.artifacts["values"])
    again = trained(iris, tmp_path, "applied", values=values)
    assert again.artifacts["values"] == pytest.approx(found.artifacts["values"])
    # Batches go on from trial to trial, so that only the first training is the same one: the losses are near, not equal.
    assert again.metrics["validation_loss"] == pytest.approx(found.metrics["validation_loss"], rel=0.5)


def test_nothing_is_learned_from_the_test_set(iris, tmp_path):
    first = trained(iris, tmp_path / "a", "stn", epochs=10)
    other = Task.prepare(read_source("iris"))
    other.targets = other.targets.copy()
    other.targets[other.parts["test"]] = (other.targets[other.parts["test"]] + 1) % 3
    second = trained(other, tmp_path / "b", "stn", epochs=10)
    assert first.artifacts == second.artifacts
    assert first.curves == second.curves
    assert first.metrics["validation"] == second.metrics["validation"]
    assert first.metrics["test"] != second.metrics["test"]


def test_a_seed_that_diverges_counts_as_the_worst(iris, tmp_path, monkeypatch):
    monkeypatch.setattr("wellposed.compare.tune_methods.LEARNING_RATE", 1e25)
    monkeypatch.setattr("wellposed.compare.tune_methods.CLIP_NORM", 1e25)
    options = TuneOptions("random", ["dropout"], seeds=2, epochs=2, trials=2, engine="serial", output=tmp_path)
    prepared = tune_job.Prepared(
        iris, options, make_plan(choose(["dropout"], iris), default_model(iris, 0), iris), "m", 2
    )
    result, schedule = collect_tuning(run_tuning(prepared))
    assert schedule is None
    assert [arm.failures for arm in result.arms] == [[1000, 1001]] * 2
    assert result.tuned.scores == [iris.worst_score] * 2
    assert result.tuned.losses == pytest.approx([1.0986, 1.0986], abs=1e-4)
    assert "2 of 2 seeds diverged or failed and count as 33 points (wellposed.step.DivergenceError" in result.notes[-1]


@pytest.mark.slow
def test_numbers_to_predict_are_tuned_too(here, capsys):
    words = [
        "tune",
        "diabetes",
        "--method",
        "tpe",
        "--trials",
        "2",
        "--seeds",
        "2",
        "--epochs",
        "2",
        "--engine",
        "serial",
    ]
    assert run(words) == 0
    result = load_tuning(here / "wellposed-report" / "tune-diabetes")
    assert (result.metric, result.loss_name) == ("R²", "squared error")
    assert [s["label"] for s in result.strengths] == ["weight decay", "dropout", "input noise"]
    assert result.tuned.trainings == 2


# ---- MAID: a linear model ---------------------------------------------------------------------------------------------


def test_maid_says_plainly_that_it_learns_a_linear_model_and_names_the_features(here, capsys):
    assert run(["tune", "iris", "--method", "maid", "--seeds", "2", "--engine", "serial"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "logistic regression, 4 features with a penalty each" in out
    assert "not of a network" in out
    assert "MAID learned the penalties of a linear model (logistic regression), not those of a network" in out
    assert "penalty of petal length (cm)" in out
    folder = here / "wellposed-report" / "tune-iris"
    result = load_tuning(folder)
    assert [arm.name for arm in result.arms] == ["untuned", "maid", "single"]
    assert all(v == pytest.approx(0.1) for values in result.untuned.values.values() for v in values)
    assert len({values[0] for values in result.arms[2].values.values()}) == 1
    assert len({values[0] for values in result.tuned.values.values()}) > 1
    assert "BilevelLogisticRegression().fit(X, y, X_val, y_val)" in result.usage
    assert "Penalties in ascending order" in (folder / "index.html").read_text()
    (folder / "index.html").unlink()
    assert run(["report", "tune-iris"]) == 0
    assert (folder / "index.html").is_file()


def test_the_linear_model_at_its_initial_penalties_is_ridge_regression():
    """Against scikit-learn's, on standardised features."""
    from sklearn.linear_model import Ridge

    from wellposed.compare.tune_linear import redrawn, run_linear_trial

    task = Task.prepare(read_source("diabetes"))
    found = run_linear_trial(task, Trial("s", "untuned", "tune", "evaluate", {}, 1003, "f"))
    parts = redrawn(task, 1003)
    x, y = task.inputs.astype(float), task.targets.astype(float)
    train, test = parts["train"], parts["test"]
    mean, scale = x[train].mean(0), x[train].std(0)
    ridge = Ridge(alpha=0.1 * len(train)).fit((x[train] - mean) / scale, y[train])
    error = ((ridge.predict((x[test] - mean) / scale) - y[test]) ** 2).mean()
    assert found.metrics["test_loss"] == pytest.approx(error, rel=1e-4)


def test_a_seed_of_a_linear_model_redraws_training_and_validation_rows_alone(iris):
    from wellposed.compare.tune_linear import redrawn

    first, second = redrawn(iris, 1000), redrawn(iris, 1001)
    for parts in (first, second):
        rows = torch.cat([torch.from_numpy(part) for part in parts.values()])
        assert sorted(rows.tolist()) == list(range(150))
        assert parts["test"].tolist() == iris.parts["test"].tolist()
        assert len(parts["validation"]) == 30
        assert {int(c) for c in iris.targets[parts["validation"]]} == {0, 1, 2}
    assert first["train"].tolist() != second["train"].tolist()


# ---- your model ------------------------------------------------------------------------------------------------------


def test_each_dropout_layer_and_each_hyperparameter_of_a_model_of_ones_own_is_learned(here, capsys):
    (here / "mine.py").write_text(
        "from torch import nn\n"
        "from wellposed import Hyperparameter\n"
        "from wellposed.tuning import HyperDropout\n"
        "def net(input_shape, num_outputs):\n"
        "    return nn.Sequential(nn.Linear(input_shape[0], 16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 16),\n"
        "        HyperDropout(Hyperparameter(0.1, 0.0, 0.5)), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, num_outputs))\n"
    )
    assert command("--seeds", "2", "--learn", "dropout", "--model", "mine:net", "--epochs", "8") == 0
    result = load_tuning(here / "wellposed-report" / "tune-iris")
    assert set(result.tuned.values) == {"dropout 1", "dropout 6", "4.rate"}
    assert "DropoutLayers({'1': " in result.usage
    assert "model.get_submodule('4.rate').set_(" in result.usage


class Scaled(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body, self.scale = body, Hyperparameter(0.3, 0.0, 1.0)

    def forward(self, x):
        return self.body(x) * self.scale()


def plans(task):
    with_layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
    own = Scaled(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
    return {
        "usual": (make_plan(choose(None, task), default_model(task, 0), task), default_model(task, 0)),
        "layers": (make_plan(choose(["dropout", "elr"], task), with_layers, task), with_layers),
        "own": (make_plan(choose(["label-smoothing"], task), own, task), own),
        "arm": (make_plan(choose(["mixup"], task), default_model(task, 0), task), default_model(task, 0)),
    }


@pytest.mark.parametrize("name", ["usual", "layers", "own", "arm"])
def test_the_lines_that_apply_what_was_learned_run(iris, tmp_path, name):
    plan, model = plans(iris)[name]
    data = iris.tensors(0)
    dataset = torch.utils.data.TensorDataset(data["train_inputs"], data["train_targets"])
    validation = torch.utils.data.TensorDataset(data["validation_inputs"], data["validation_targets"])
    names = {"model": model, "dataset": dataset, "validation": validation}
    values = {label: 1.5 * value for label, value in plan.values().items()}
    schedule = Schedule()
    for step, factor in ((0, 1.0), (2, 1.2)):
        schedule.record(step, {label: factor * value for label, value in plan.present().items()})
    path = tmp_path / "schedule.json"
    path.write_text(schedule.to_json())
    method = "stn" if name != "arm" else "bo-rep"
    texts = [
        apply_values(plan, values, 1),
        replay_schedule(plan, plan.values(), str(path), 1),
        learn_again(plan, plan.values(), method, 1),
    ]
    if name == "arm":  # mixup draws its coefficient with alpha: no derivative, so BO-REP is not offered for it
        texts = texts[:2]
    for text in texts:
        found = dict(names)
        exec(text, found)
        assert found["result"].history[0]["loss"] > 0
    if name == "usual":
        # A self-tuning network learns from perturbations that differ between the examples of a batch.
        assert texts[2].count("per_example=True") == 4
        found = dict(names)
        exec(texts[0], found)
        decay, dropout, smoothing, noise = found["method"]
        assert decay.strength().tolist() == pytest.approx([1.5e-4] * 3, rel=1e-3)
        assert (dropout.p, smoothing.smoothing, noise.std) == pytest.approx((0.075, 0.03, 0.075))


def test_a_method_of_the_catalogue_is_learned_by_its_name(iris, tmp_path):
    found = trained(iris, tmp_path, "stn", learn="elr", epochs=20)
    assert found.curves["elr strength"][0] == pytest.approx(3.0, rel=0.2)
    assert found.curves["elr strength"][0] != found.curves["elr strength"][-1]


def test_two_strengths_that_exclude_each_other_are_refused(iris):
    with pytest.raises(UserError, match="--learn label-smoothing,generalized-cross-entropy: Compose: at most one"):
        make_plan(choose(["label-smoothing", "generalized-cross-entropy"], iris), default_model(iris, 0), iris)


def test_the_command_is_listed_and_imports_no_torch():
    import subprocess
    import sys

    code = (
        "import sys; from wellposed.commands import run; run(['tune', '--help']); "
        "run(['tune', 'iris', '--method', 'x']); assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "COLUMNS": "120"}
    )
    assert done.returncode == 0, done.stderr
    assert "--learn" in done.stdout
