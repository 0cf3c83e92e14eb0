"""The main job, end to end, on few seeds: it ranks, resumes, and its snippets run."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from wellposed.commands import run
from wellposed.compare.arms import applicable_arms, build_regularizer, search_space
from wellposed.compare.command_line import parse_duration
from wellposed.compare.comparison import Options, compare
from wellposed.compare.errors import UserError
from wellposed.compare.result import collect, load_result
from wellposed.compare.snippet import usage
from wellposed.compare.source import read_source
from wellposed.compare.task import Task


@pytest.fixture(scope="module")
def iris():
    return Task.prepare(read_source("iris"), 0.2)


def command(*words, cwd):
    return subprocess.run(
        [sys.executable, "-m", "wellposed.cli", *words], cwd=cwd, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
    )  # fmt: skip


def test_compare_ranks_writes_a_report_and_runs_nothing_twice(tmp_path):
    words = (
        "compare",
        "iris",
        "--noise",
        "0.2",
        "--methods",
        "elr",
        "--seeds",
        "3",
        "--tuning-trials",
        "1",
        "--engine",
        "serial",
    )
    first = command(*words, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "150 rows, 4 features, 3 classes" in first.stdout
    assert "early-learning (ELR)" in first.stdout
    assert "3 seeds cannot show a difference" in first.stdout
    folder = tmp_path / "wellposed-report" / "iris"
    page = (folder / "index.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    assert {arm["name"] for arm in json.loads((folder / "results.json").read_text())["arms"]} == {
        "plain",
        "early-stopping",
        "elr",
    }
    assert len((folder / "results.csv").read_text().splitlines()) == 1 + 3 * 3
    script = command_python(folder / "apply.py", tmp_path)
    assert script.returncode == 0, script.stderr
    assert script.stdout.startswith("test accuracy: ")
    before = (folder / "results.csv").read_text()
    second = command(*words, cwd=tmp_path)
    assert second.returncode == 0
    assert (folder / "results.csv").read_text() == before  # times are measured, so equal ones were not measured again
    (folder / "index.html").unlink()
    assert command("report", "iris", cwd=tmp_path).returncode == 0
    assert (folder / "index.html").is_file()
    assert load_result(folder).name == "iris"


def command_python(path, cwd):
    return subprocess.run([sys.executable, str(path)], cwd=cwd, capture_output=True, text=True, timeout=120)


def test_nine_arms_or_more_take_part_in_classification(iris):
    arms = applicable_arms(iris)
    assert len(arms) >= 9
    assert {"plain", "early-stopping", "weight-decay", "dropout", "label-smoothing", "mixup", "elr"} <= {
        a.name for a in arms
    }
    for arm in arms:
        space = search_space(arm, iris)
        assert {"learning_rate", "epochs"} <= set(space)
        assert ("weight_decay" in space) == (arm.name != "plain")


def test_every_arm_can_be_built_and_its_usage_runs(iris, tmp_path):
    data = iris.tensors(0)
    inputs, targets, index = data["train_inputs"][:16], data["train_targets"][:16], torch.arange(16)
    dataset = torch.utils.data.TensorDataset(inputs, targets)
    for arm in applicable_arms(iris):
        settings = {name: part.middle() for name, part in search_space(arm, iris).items()}
        build_regularizer(arm, iris, settings)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        names = {
            "torch": torch, "model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "inputs": inputs,
            "targets": targets, "index": index, "dataset": dataset, "validation": dataset, "all_labels": data["train_targets"],
        }  # fmt: skip
        exec(usage(arm, iris, settings).replace("epochs=40", "epochs=1"), names)
        if "loss" in names and names["loss"].grad_fn is not None:
            assert torch.isfinite(names["loss"])


def test_regression_and_imbalance_are_compared_too(tmp_path):
    task = Task.prepare(read_source("diabetes"))
    options = Options(
        methods=["dropout", "weight-decay"], seeds=2, rounds=1, engine="serial", workers=1, output=tmp_path
    )
    result = collect(compare(task, options))
    assert result.metric == "R²"
    assert {arm.name for arm in result.arms} == {"plain", "early-stopping", "weight-decay", "dropout"}
    assert all(np.isfinite(arm.runs.scores).all() for arm in result.arms)
    with pytest.raises(UserError, match=r"'elr' does not apply to regression. Methods that do: plain, "):
        applicable_arms(task, ["elr"])


def test_tuning_touches_no_test_set(tmp_path, monkeypatch):
    task = Task.prepare(read_source("iris"))
    rows = set()
    original = Task.score

    def watch(self, outputs, targets):
        rows.add(len(targets))
        return original(self, outputs, targets)

    from wellposed.compare.training import run_trial
    from wellposed.lab.trial import Trial

    task.save(tmp_path)
    monkeypatch.setattr(Task, "score", watch)
    monkeypatch.setattr(task, "parts", task.parts)
    settings = {"learning_rate": 0.05, "weight_decay": 1e-3, "epochs": 2}
    found = run_trial(Trial("s", "early-stopping", "compare", "tune", settings, 0, "f"), str(tmp_path))
    assert not [name for name in found.metrics if name.startswith("test")]
    assert not found.curves
    assert rows == {task.sizes["validation"]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "nothing.csv", "--target", "y"], "no file 'nothing.csv'"),
        (["compare", "digitz"], "Did you mean 'digits'?"),
        (["compare", "digits", "--noise", "1.5"], "--noise must lie in [0, 1), got 1.5"),
        (["compare", "digits", "--methods", "elx"], "no method 'elx'. Did you mean 'elr'?"),
        (["compare", "digits", "--budget", "soon"], "--budget must read like 90s, 10m or 1h, got 'soon'"),
        (["compare", "digits", "--seeds", "1"], "--seeds must be at least 2, got 1"),
        (["compare", "digits", "--model", "nowhere:net"], "cannot import 'nowhere'"),
        (["compare", "digits", "--workers", "0x"], "valid integer"),
        (["show", "er"], "no paper 'er'. Did you mean 'elr'?"),
        (["report", "nowhere"], "no finished study or comparison 'nowhere'"),
        (["data", "get", "mnits"], "no data set 'mnits'. Did you mean 'mnist'?"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(refused, words, message):
    refused(words, message)


def test_the_small_commands_answer(capsys):
    assert run(["papers", "label", "noise"]) == 0
    out = capsys.readouterr().out
    assert out.index("elr") < out.index("nested-dropout")
    for words in (["papers"], ["show", "elr"], ["show", "hft"], ["data", "list"], ["data", "get", "digits"]):
        assert run(words) == 0
    assert "ships with scikit-learn" in capsys.readouterr().out
    assert run(["papers", "xyzzy"]) == 1


def test_durations():
    assert (parse_duration("90"), parse_duration("1.5h"), parse_duration("2m")) == (90, 5400, 120)


def test_help_does_not_import_torch():
    code = "import sys; from wellposed.commands import run; run(['--help']); run(['papers']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
