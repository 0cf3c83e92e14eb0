"""Splits, standardisation and flips."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from wellposed.compare.errors import UserError
from wellposed.compare.models import check_model, default_model, describe_model
from wellposed.compare.source import Source, read_source
from wellposed.compare.task import Task, split


@given(st.integers(20, 200), st.integers(2, 5), st.integers(0, 100))
def test_splits_are_disjoint_complete_and_stratified(rows, classes, seed):
    labels = np.arange(rows) % classes
    parts = split(labels, rows, seed)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(rows))
    for part in parts.values():
        counts = np.bincount(labels[part], minlength=classes)
        assert counts.max() - counts.min() <= 1


def make(rows=200, kind="classification", noise=0.0, positive=0.5):
    random = np.random.default_rng(0)
    x = (5 + 3 * random.normal(size=(rows, 4))).astype(np.float32)
    y = (
        (random.random(rows) < positive).astype(np.int64)
        if kind == "classification"
        else (x[:, 0] * 10).astype(np.float32)
    )
    return Task.prepare(
        Source("made", x, y, kind, ("no", "yes") if kind == "classification" else (), row_ids=np.arange(rows)), noise
    )


def test_the_training_part_alone_decides_the_scale():
    task = make()
    train = task.inputs[task.parts["train"]]
    np.testing.assert_allclose(train.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(train.std(0), 1, atol=1e-5)
    assert abs(task.inputs[task.parts["test"]].mean(0)).max() > 1e-3
    regression = make(kind="regression")
    assert regression.targets[regression.parts["train"]].std() == pytest.approx(1, abs=1e-5)


def test_flips_have_their_rate_spare_the_test_set_and_never_keep_the_label():
    task = Task.prepare(read_source("digits"), 0.4)
    rates = []
    for seed in range(5):
        data = task.tensors(seed)
        wrong = data["train_targets"] != data["true_targets"]
        rates.append(float(wrong.float().mean()))
        assert torch.equal(data["test_targets"], torch.from_numpy(task.targets[task.parts["test"]]))
    assert abs(np.mean(rates) - 0.4) < 4 * np.sqrt(0.24 / (5 * task.sizes["train"]))
    assert len(set(rates)) > 1
    assert torch.equal(task.tensors(3)["train_targets"], task.tensors(3)["train_targets"])


@given(st.lists(st.integers(5, 60), min_size=2, max_size=6), st.integers(0, 1000))
def test_each_class_has_its_share_in_every_part(counts, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    parts = split(labels, len(labels), seed)
    for name, share in (("train", 0.6), ("validation", 0.2), ("test", 0.2)):
        found = np.bincount(labels[parts[name]], minlength=len(counts))
        assert (found >= 1).all()
        assert (abs(found - share * np.array(counts)) <= 1).all()


@given(st.integers(20, 500), st.integers(0, 1000))
def test_splits_without_classes_are_disjoint_complete_and_decided_by_the_seed(rows, seed):
    parts = split(None, rows, seed)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(rows))
    assert abs(len(parts["test"]) - rows / 5) <= 1
    assert all(np.array_equal(part, split(None, rows, seed)[name]) for name, part in parts.items())


@given(st.integers(0, 1000), st.floats(1e-3, 1e6))
def test_what_the_test_rows_hold_changes_nothing_about_the_others(seed, factor):
    random = np.random.default_rng(seed)
    x, y = random.normal(size=(60, 3)).astype(np.float32), np.arange(60) % 2
    task = Task.prepare(Source("a", x, y, "classification", ("no", "yes")))
    test = task.parts["test"]
    other = x.copy()
    other[test] = other[test] * factor + 1
    again = Task.prepare(Source("a", other, y, "classification", ("no", "yes")))
    for name in ("train", "validation"):
        np.testing.assert_array_equal(task.parts[name], again.parts[name])
        np.testing.assert_array_equal(task.inputs[task.parts[name]], again.inputs[task.parts[name]])


@pytest.mark.parametrize("value", [0.0, 0.1, -3.3e5, 1e-20])
def test_a_column_that_is_constant_in_training_is_zero_everywhere(value):
    random = np.random.default_rng(0)
    x, y = random.normal(size=(50, 2)).astype(np.float32), np.arange(50) % 2
    parts = split(y, 50)
    x[:, 1] = value
    x[parts["test"], 1] = 1e6
    task = Task.prepare(Source("a", x, y, "classification", ("no", "yes")))
    assert not task.inputs[:, 1].any()
    assert task.inputs[:, 0].any()


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("noise", [0.1, 0.5, 0.9])
def test_flips_are_symmetric(classes, noise):
    rows = 6000
    y = np.arange(rows) % classes
    names = tuple(map(str, range(classes)))
    task = Task.prepare(
        Source("a", np.random.default_rng(0).normal(size=(rows, 1)).astype(np.float32), y, "classification", names),
        noise,
    )
    noisy, known = task.noisy_targets(3), np.concatenate([task.parts["train"], task.parts["validation"]])
    flipped = noisy[known] != y[known]
    assert abs(flipped.mean() - noise) < 4 * np.sqrt(noise * (1 - noise) / len(known))
    shifts = np.bincount((noisy[known] - y[known])[flipped] % classes, minlength=classes)[1:]
    share = 1 / (classes - 1)
    assert (abs(shifts / flipped.sum() - share) <= 4 * np.sqrt(share * (1 - share) / flipped.sum())).all()
    np.testing.assert_array_equal(noisy[task.parts["test"]], y[task.parts["test"]])
    assert not np.array_equal(noisy, task.noisy_targets(4))


def test_without_noise_every_seed_sees_the_same_labels():
    task = make()
    assert torch.equal(task.tensors(0)["train_targets"], task.tensors(1)["train_targets"])
    assert torch.equal(task.tensors(0)["train_targets"], task.tensors(0)["true_targets"])


def test_the_digest_tells_noise_and_data_apart():
    assert make().digest == make().digest
    assert len({make().digest, make(noise=0.2).digest, make(rows=199).digest, make(kind="regression").digest}) == 4


@pytest.mark.parametrize("noise", [1.5, -0.1, 1.0])
def test_noise_out_of_range_is_refused(noise):
    with pytest.raises(UserError, match=r"--noise must lie in \[0, 1\), got"):
        make(noise=noise)


def test_noise_on_regression_is_refused():
    with pytest.raises(UserError, match="applies to classification only"):
        make(kind="regression", noise=0.1)


def test_the_metric_follows_the_balance_of_the_classes():
    assert make().metric == "accuracy"
    assert make(positive=0.1).metric == "balanced accuracy"
    task = make(kind="regression")
    assert task.metric == "R²"
    targets = torch.tensor([1.0, 2.0, 3.0])
    assert task.score(targets[:, None], targets) == pytest.approx(100)


def test_a_task_survives_saving_and_loading(tmp_path):
    task = Task.prepare(read_source("digits"), 0.2)
    task.save(tmp_path)
    again = Task.load(tmp_path)
    assert again.digest == task.digest
    assert again.describe() == task.describe() == "1,797 rows, images 8x8, 10 classes"
    assert torch.equal(again.tensors(4)["train_targets"], task.tensors(4)["train_targets"])


def test_default_models_fit_the_data_and_are_seeded():
    digits, table = Task.prepare(read_source("digits")), make()
    assert describe_model(default_model(digits, 0), digits) == "MLP 64-256-256-10"
    assert describe_model(default_model(table, 0), table) == "MLP 4-256-256-2"
    first, second, other = (next(default_model(table, s).parameters()) for s in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    images = Source(
        "i",
        np.zeros((40, 3, 20, 20), np.float32),
        np.arange(40) % 2,
        "classification",
        ("a", "b"),
        row_ids=np.arange(40),
    )
    task = Task.prepare(images)
    model = default_model(task, 0)
    assert model(torch.zeros(2, 3, 20, 20)).shape == (2, 2)
    assert describe_model(model, task).startswith("CNN, ")


MODELS = """
import torch
def good(input_shape, num_outputs): return torch.nn.Linear(input_shape[0], num_outputs)
def nothing(): return 5
def wide(): return torch.nn.Linear(4, 7)
def narrow(): return torch.nn.Linear(3, 2)
def broken(): raise RuntimeError("no weights")
def frozen(): return torch.nn.Linear(4, 2).requires_grad_(False)
"""


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mine_models:nothing", "must return a torch.nn.Module, got int"),
        ("mine_models:wide", r"must return a tensor of shape \(2, 2\), got \(2, 7\)"),
        ("mine_models:narrow", r"a forward pass on inputs of shape \(2, 4\) failed"),
        ("mine_models:broken", "calling it failed: RuntimeError: no weights"),
        ("mine_models:frozen", "has no parameter that trains"),
        ("mine_models:absent", "has no function 'absent'"),
        ("not_there_at_all:x", "cannot import 'not_there_at_all'"),
        ("mine_models", "must read module:function, got 'mine_models'"),
    ],
)
def test_a_wrong_model_is_refused_before_any_training(spec, message, tmp_path, monkeypatch):
    (tmp_path / "mine_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    assert isinstance(check_model("mine_models:good", make()), nn.Linear)
    with pytest.raises(UserError, match=message):
        check_model(spec, make())
