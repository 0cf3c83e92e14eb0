"""BO-REP's published configuration: its files are read as they are, every arm runs, and what is missing is named."""

import csv

import numpy as np
import pytest
import torch

from wellposed.datasets.registry import ENVIRONMENT, DatasetError, DatasetNotInstalled
from wellposed.lab.study import protocol_of
from wellposed.lab.trial import Trial
from wellposed.papers.catalogue import find_card
from wellposed.studies.problems import sentiment
from wellposed.studies.problems.sentiment import noisy_tweets, read_tweets, read_vectors
from wellposed.studies.published.bo_rep import STUDY, NormPenalty, TweetClassifier, make_tuner, run
from wellposed.tuning import BOREP

VOCABULARY = [f"word{chr(97 + i)}" for i in range(20)]
TINY = {"hidden": 8, "batch_size": 8, "epochs": 2, "validation": 8, "length": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tweets of invented words: the first ten are happy, the others are not."""
    base, generator = tmp_path_factory.mktemp("tweets"), np.random.default_rng(0)

    def write(name, count, neutral=False):
        with (base / name).open("w", encoding="latin-1", newline="") as file:
            rows = csv.writer(file, quoting=csv.QUOTE_ALL)
            for i in range(count):
                happy = i % 2
                text = " ".join(VOCABULARY[10 * (1 - happy) + j] for j in generator.integers(0, 10, 1 + i % 9))
                rows.writerow([4 * happy, i, "day", "NO_QUERY", "user", text])
            if neutral:
                rows.writerow([2, 0, "day", "NO_QUERY", "user", "worda"])

    write(sentiment.TRAIN_FILE, 72)
    write(sentiment.TEST_FILE, 20, neutral=True)
    lines = [f"{w} {' '.join(f'{x:.3f}' for x in generator.normal(size=300))}" for w in [*VOCABULARY, "unused"]]
    (base / sentiment.GLOVE_FILE).write_text("\n".join([*lines, "a b " + lines[0][6:]]) + "\n", "utf-8")
    return base


@pytest.fixture
def data(folder, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, str(folder))


def trial(arm, phase="evaluate"):
    fixed = protocol_of(find_card("bo-rep")).paper.arms[arm].fixed
    return Trial("s", arm, "paper", phase, {**fixed, **TINY}, 1000 if phase == "evaluate" else 0, "f")


@pytest.mark.parametrize("arm", ["borep", "masoba", "stocbio", "clipped_masoba"])
def test_every_published_arm_runs_end_to_end(arm, data):
    assert set(protocol_of(find_card("bo-rep")).paper.arms) == {"borep", "masoba", "stocbio", "clipped_masoba"}
    result = run(trial(arm))
    assert 0 <= result.metrics["accuracy"] <= 100 and 0 <= result.metrics["auroc"] <= 1
    assert len(result.curves["accuracy"]) == 2


def test_settings_are_those_of_the_authors_code():
    fixed = protocol_of(find_card("bo-rep")).paper.arms["borep"].fixed
    found = {name: fixed[name] for name in ("outer_lr", "inner_lr", "z_lr", "beta", "period", "inner_steps", "rate")}
    assert found == {
        "outer_lr": 5e-2, "inner_lr": 5e-2, "z_lr": 1e-2, "beta": 0.9, "period": 2, "inner_steps": 10, "rate": 0.3,
    }  # fmt: skip
    assert (fixed["batch_size"], fixed["epochs"], fixed["penalty"]) == (512, 25, 1e-4)


def test_tweets_are_split_flipped_and_numbered(data):
    problem = noisy_tweets(0, 0.25, validation=12, length=6)
    assert (len(problem.train), len(problem.validation), len(problem.test)) == (60, 12, 20)
    assert int(problem.wrong.sum()) == 15
    assert problem.vectors.shape == (21, 300) and not problem.vectors[0].any()
    # The words tell the true label: those of happy tweets are the first ten.
    tables = (problem.train, problem.labels ^ problem.wrong.long()), (problem.test, problem.test_labels)
    by_word = {}
    for tokens, labels in tables:
        for row, label in zip(tokens.tolist(), labels.tolist(), strict=True):
            assert row[0] > 0
            by_word.setdefault(row[0], set()).add(label)
    assert all(len(labels) == 1 for labels in by_word.values())
    assert not torch.equal(noisy_tweets(1, 0.25, 12, 6).train, problem.train)


def test_words_behind_the_end_change_nothing(data):
    model = TweetClassifier(torch.randn(21, 300), 8, seed=0)
    short, long = torch.tensor([[3, 5]]), torch.tensor([[3, 5, 0, 0, 0]])
    torch.testing.assert_close(model(short), model(long))
    assert not model.embedding.weight.requires_grad


def test_the_penalty_is_the_norm_and_not_its_square():
    from wellposed import Step

    model = torch.nn.Linear(2, 1)
    expected = 0.5 * torch.cat([p.reshape(-1) for p in model.parameters()]).norm()
    torch.testing.assert_close(NormPenalty(0.5).penalty(Step(model)), expected)


def test_missing_and_damaged_files_are_named(folder, tmp_path, monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    with pytest.raises(DatasetNotInstalled, match="glove.840B.300d.txt in the folder that .*, which is not set"):
        STUDY.prepare(protocol_of(find_card("bo-rep")))
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    (tmp_path / sentiment.TRAIN_FILE).write_text("not,a,tweet\n")
    with pytest.raises(DatasetNotInstalled, match=r"testdata.manual.2009.06.14.csv, glove.840B.300d.txt not found in"):
        STUDY.prepare(protocol_of(find_card("bo-rep")))
    with pytest.raises(DatasetError, match="row 1 is no tweet"):
        read_tweets(tmp_path / sentiment.TRAIN_FILE)
    with pytest.raises(DatasetError, match="none of the tweets' words was found"):
        read_vectors(folder / sentiment.GLOVE_FILE, {"absent"})


def test_an_unknown_arm_is_refused():
    from bilevel_doubles import quadratic

    settings = trial("masoba").settings
    assert isinstance(make_tuner(settings, quadratic()), BOREP)
    with pytest.raises(ValueError, match="method must be 'borep'.*got 'maml'"):
        make_tuner({**settings, "method": "maml"}, quadratic())
