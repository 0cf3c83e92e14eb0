"""Mails as word sequences: splits, padding, and a problem whose strengths reach every layer; on invented mails."""

import json

import pytest
import torch

from wellposed.datasets import DatasetNotInstalled
from wellposed.hyperparameter import substituted
from wellposed.loading import EndlessBatches
from wellposed.studies.problems import mail_sequences as module
from wellposed.studies.problems.mail_sequences import (
    BOXES,
    DECAY,
    LAYERS,
    SMOOTHING,
    MailReader,
    mail_sequences,
    reading_problem,
)
from wellposed.tuning import BOREP
from wellposed.weights.weight_decay import decayed_names


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Thirty mails: spam says "money", ham does not, and hard ham says something else."""
    base = tmp_path_factory.mktemp("mails")
    groups = ["spam-1"] * 10 + ["easy-ham-1"] * 14 + ["hard-ham-1"] * 6
    names = [f"{group}/{i}.txt" for i, group in enumerate(groups)]
    for name, group in zip(names, groups, strict=True):
        path = base / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        word = {"spam-1": "money", "easy-ham-1": "dinner", "hard-ham-1": "newsletter"}[group]
        path.write_text(f"Subject: {word}\n\n{word} " + "and " * int(path.stem))
    (base / "data" / "file_list.json").write_text(json.dumps(names))
    return base


def split(folder, seed=0, train=12, validation=6):
    return mail_sequences(seed, train, validation, length=5, buckets=50, folder=folder)


def test_parts_are_apart_redrawn_and_hold_no_hard_ham(folder):
    data = split(folder)
    assert [tuple(part.shape) for part in (data.train, data.validation, data.test)] == [(12, 5), (6, 5), (6, 5)]
    words = torch.cat([data.train, data.validation, data.test])
    labels = torch.cat([data.labels, data.validation_labels, data.test_labels])
    assert int(labels.sum()) == 10 and len(labels) == 24
    # The first word tells the label, in all parts by the same number.
    spam, ham = (set(words[labels == label, 0].tolist()) for label in (1, 0))
    assert len(spam) == len(ham) == 1 and not spam & ham
    again, other = split(folder), split(folder, seed=1)
    assert torch.equal(again.train, data.train) and not torch.equal(other.train, data.train)


def test_sizes_that_leave_nothing_and_absent_mails_are_named(folder, monkeypatch):
    with pytest.raises(ValueError, match=r"train \+ validation must be < 24, the number of mails, got 24"):
        split(folder, train=18)
    with pytest.raises(ValueError, match="must be >= 1, got 12 and 0"):
        split(folder, validation=0)
    monkeypatch.setattr(module, "locate", lambda entry: None)
    with pytest.raises(DatasetNotInstalled, match="wellposed data get spam-assassin"):
        mail_sequences(0, 1, 1)


def test_the_mean_is_over_the_words_that_are_there():
    reader = MailReader(buckets=20, width=3, hidden=4)
    words = torch.tensor([[5, 7, 3, 0, 0], [0, 0, 0, 0, 0]])
    states, _ = reader.recurrent(reader.embedding(words[:1, :3]))
    torch.testing.assert_close(reader(words)[:1], reader.head(states.mean(1)))
    torch.testing.assert_close(reader(words)[1], reader.head.bias)
    first, same, other = (MailReader(20, 3, 4, seed) for seed in (0, 0, 1))
    assert torch.equal(first.head.weight, same.head.weight) and not torch.equal(first.head.weight, other.head.weight)


def test_each_layer_has_its_decay_and_labels_are_smoothed(folder):
    data = split(folder)
    reader = MailReader(50, 3, 4)
    problem = reading_problem(reader)
    names = decayed_names(reader)
    assert [name.partition(".")[0] for name in names] == ["embedding", "recurrent", "recurrent", "head"]
    assert len(names) == len(LAYERS) and {n.rpartition(".")[2] for n in problem.hypers} == set(BOXES)
    batch = data.train, data.labels
    raw = problem.raw()
    loss = problem.evaluate(problem.inner_loss, problem.params, raw, batch)
    parameters = dict(reader.named_parameters())
    decay = 0.5 * DECAY * sum(parameters[name].square().sum() for name in names)
    plain = torch.nn.functional.cross_entropy(reader(data.train), data.labels, label_smoothing=SMOOTHING)
    torch.testing.assert_close(loss, plain + decay)
    slope = torch.autograd.grad(loss, raw["regularizers.1.strength"])[0]
    torch.testing.assert_close(slope, torch.stack([0.5 * DECAY * parameters[n].square().sum() for n in names]))
    with substituted({}):
        outer = problem.evaluate(problem.outer_loss, problem.params, raw, batch)
    torch.testing.assert_close(outer, torch.nn.functional.cross_entropy(reader(data.train), data.labels))


def test_bo_rep_learns_the_strengths_with_exact_second_derivatives(folder):
    data = split(folder)
    problem = reading_problem(MailReader(50, 3, 4))
    before = {name: h.raw.clone() for name, h in problem.hypers.items()}
    train = EndlessBatches([(data.train, data.labels)], "train")
    validation = EndlessBatches([(data.validation, data.validation_labels)], "validation")
    tuner = BOREP(problem, 0.1, 0.5, 0.1, refine_steps=4)
    for _ in range(3):
        tuner.step(train, validation)
    assert problem.fallback is None
    assert all(bool((h.raw != before[name]).all()) for name, h in problem.hypers.items())
    counts = problem.counts
    assert (counts.inner_grad, counts.outer_grads, counts.hvp, counts.mixed_vjp) == (4 + 6, 3, 3, 3)
