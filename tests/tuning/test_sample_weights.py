"""Learned weights of examples: the weighted loss, what a tuner makes of them, and what is refused."""

from functools import partial

import pytest
import torch
from jaxtyping import config
from torch import nn

from wellposed import BilevelProblem, Compose, Hyperparameter, Step, TensorLoader, fit
from wellposed.losses import EarlyLearning
from wellposed.objective import cross_entropy, objective
from wellposed.tuning import BOREP, ImplicitDifferentiation, OneStepUnrolled, SampleWeights, weighted_mean
from wellposed.weights import WeightDecay


@pytest.fixture
def unchecked():
    """Let bad arguments reach our own errors: jaxtyping would refuse them first."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)


def blobs(count, seed, wrong=0.0):
    """Two classes around (-1, 0) and (1, 0); `wrong` of the labels are flipped."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    inputs = torch.randn(count, 2, generator=generator) * 0.5 + torch.stack([2.0 * labels - 1, 0 * labels], 1)
    flipped = torch.zeros(count, dtype=torch.bool)
    flipped[torch.randperm(count, generator=generator)[: round(wrong * count)]] = True
    return inputs, torch.where(flipped, 1 - labels, labels), flipped


def test_the_loss_is_weighted_and_divided_by_the_number_of_examples():
    inputs, labels, _ = blobs(6, 0)
    weights = torch.tensor([0.1, 0.9, 0.5, 0.2, 0.7, 0.3])
    criterion = SampleWeights(6, init=weights)
    logits, index = nn.Linear(2, 2)(inputs), torch.tensor([3, 1, 0, 5, 2, 4])
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    expected = (weights[index] * losses).sum() / 6
    torch.testing.assert_close(criterion(losses, index), expected)
    torch.testing.assert_close(weighted_mean(losses, weights[index]), expected)
    step = Step(nn.Linear(2, 2), inputs=inputs, targets=labels, index=index, outputs=logits, num_examples=6.0)
    criterion.on_batch(step)
    torch.testing.assert_close(objective(step, criterion, cross_entropy), expected)


def test_weights_multiply_those_that_the_batch_brings():
    criterion = SampleWeights(3, init=0.5)
    step = Step(nn.Identity(), index=torch.tensor([0, 2]), weights=torch.tensor([1.0, 4.0]))
    criterion.on_batch(step)
    assert torch.equal(step.weights, torch.tensor([0.5, 2.0]))
    tokens = Step(nn.Identity(), index=torch.tensor([0, 2]), weights=torch.tensor([[1.0, 0.0], [2.0, 2.0]]))
    criterion.on_batch(tokens)
    assert torch.equal(tokens.weights, torch.tensor([[0.5, 0.0], [1.0, 1.0]]))


@pytest.mark.parametrize("chart", ["sigmoid", "softplus", "exp"])
def test_every_chart_keeps_its_weights_positive_and_starts_where_it_was_told(chart):
    criterion = SampleWeights(5, init=0.7, chart=chart)
    torch.testing.assert_close(criterion.weights(), torch.full((5,), 0.7))
    criterion.weight.raw.fill_(-12.0)
    assert bool((criterion.weights() > 0).all())
    assert not list(criterion.parameters())  # no training optimizer can reach them


def test_a_plain_loop_never_moves_the_weights():
    inputs, labels, _ = blobs(40, 0)
    method = SampleWeights(40)
    fit(nn.Linear(2, 2), TensorLoader(inputs, labels, batch_size=8), epochs=2, regularizer=method, seed=0)
    assert torch.equal(method.weights(), torch.full((40,), 0.5))


@pytest.mark.parametrize(
    "make",
    [
        partial(BOREP, outer_lr=0.3, inner_lr=0.5, z_lr=0.3, schedule="cosine"),
        partial(OneStepUnrolled, inner_lr=0.5, outer_lr=0.1),
        partial(ImplicitDifferentiation, inner_lr=0.1, outer_lr=0.5, inner_steps=4, damping=0.1),
    ],
    ids=["BOREP", "OneStepUnrolled", "ImplicitDifferentiation"],
)
def test_wrongly_labelled_examples_lose_their_weight(make):
    inputs, labels, flipped = blobs(120, 0, wrong=0.3)
    clean_inputs, clean_labels, _ = blobs(30, 1)
    method = Compose(SampleWeights(120), WeightDecay(1e-3))
    result = fit(
        nn.Linear(2, 2), TensorLoader(inputs, labels, batch_size=30, shuffle=True), epochs=40, regularizer=method,
        validation=TensorLoader(clean_inputs, clean_labels, batch_size=30), tuner=make, seed=0,
    )  # fmt: skip
    weights = method.regularizers[0]
    right, wrong = weights.weights()[~flipped], weights.weights()[flipped]
    better = float((right[:, None] > wrong).double().mean())
    assert better > 0.8, better
    found = weights.suspects(0.3)
    assert float(flipped[found].double().mean()) > 0.55 > 0.3
    assert result.tuner.history[-1].values == {}  # 120 numbers are not copied at every step


def test_suspects_are_the_smallest_weights():
    criterion = SampleWeights(5, init=torch.tensor([0.2, 0.9, 0.1, 0.8, 0.85]))
    assert criterion.suspects().tolist() == [True, False, True, False, False]
    assert criterion.suspects(0.2).tolist() == [False, False, True, False, False]
    with pytest.raises(ValueError, match=r"share must lie in \[0, 1\], got 2"):
        criterion.suspects(2)


def test_a_method_with_a_table_works_under_bo_rep_and_its_strength_is_learned():
    inputs, labels, _ = blobs(60, 0, wrong=0.3)
    clean = blobs(30, 1)[:2]
    strength = Hyperparameter(1.0, chart="exp")
    method = EarlyLearning(60, 2, strength=strength, momentum=0.7)
    tuner = partial(BOREP, outer_lr=0.05, inner_lr=0.2, z_lr=0.1, refine_steps=4)
    result = fit(
        nn.Linear(2, 2), TensorLoader(inputs, labels, batch_size=20, shuffle=True), epochs=15, regularizer=method,
        validation=TensorLoader(*clean, batch_size=30), tuner=tuner, seed=0,
    )  # fmt: skip
    assert bool(method.table.visited.all()) and float(method.soft_targets().sum(1).mean()) > 0.5
    moves = torch.tensor([info.values["strength"] for info in result.tuner.history]).log()
    torch.testing.assert_close(moves.diff()[1:].abs(), torch.full((len(moves) - 2,), 0.05), rtol=1e-3, atol=1e-5)


def test_the_table_is_written_by_training_steps_alone():
    inputs, labels, _ = blobs(8, 0)
    method = EarlyLearning(8, 2, strength=Hyperparameter(1.0))
    problem = BilevelProblem.from_regularizer(nn.Linear(2, 2), method, cross_entropy)
    batches = [
        next(iter(TensorLoader(inputs[i : i + 1], labels[i : i + 1], index=torch.tensor([i])))) for i in range(8)
    ]
    train = iter(batches)
    BOREP(problem, 0.1, 0.1, 0.1, inner_steps=3, refine_steps=2).step(train, iter(batches[:1]))
    # Two steps of refinement and three of the first period wrote; the two of second derivatives did not.
    assert method.table.visited.tolist() == [True] * 5 + [False] * 3


def test_fit_with_bo_rep_resumes_bit_for_bit(tmp_path):
    def run(**options):
        torch.manual_seed(0)
        inputs, labels, _ = blobs(40, 0, wrong=0.3)
        method = SampleWeights(40)
        tuner = partial(BOREP, outer_lr=0.3, inner_lr=0.5, z_lr=0.3, refine_steps=5, schedule="cosine")
        result = fit(
            nn.Linear(2, 2), TensorLoader(inputs, labels, batch_size=10, shuffle=True), regularizer=method, epochs=4,
            validation=TensorLoader(*blobs(20, 1)[:2], batch_size=10, shuffle=True), tuner=tuner, seed=0, **options,
        )  # fmt: skip
        return result.model.weight.detach().clone(), method.weights()

    class Killed(Exception):
        pass

    def kill(step, entry):
        if entry["epoch"] == 2:
            raise Killed

    path, whole = tmp_path / "run.pt", run()
    with pytest.raises(Killed):
        run(checkpoint=path, on_epoch_end=kill)
    resumed = run(checkpoint=path)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n": 0}, "SampleWeights: n must be >= 1, got 0"),
        ({"n": 3, "chart": "identity"}, "chart must be 'sigmoid', 'softplus' or 'exp', got 'identity'"),
        ({"n": 3, "init": 1.0}, r"'SampleWeights.weight': init must lie strictly inside \(0.0, 1.0\), got 1.0"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_refused_with_their_value(options, message):
    with pytest.raises(ValueError, match=message):
        SampleWeights(**options)


def test_a_missing_or_foreign_index_is_refused():
    method = SampleWeights(3)
    with pytest.raises(ValueError, match="SampleWeights: step.index is missing; wrap the data set in IndexedDataset"):
        method.on_batch(Step(nn.Identity()))
    problem = BilevelProblem.from_regularizer(nn.Linear(2, 2), method, cross_entropy)
    with pytest.raises(ValueError, match="step.index is missing"):
        problem.inner_grad((torch.zeros(2, 2), torch.tensor([0, 1])))
    for index in ([0, 3], [-1, 0]):
        with pytest.raises(ValueError, match=r"index must lie in \[0, 3\)"):
            method(torch.zeros(2), torch.tensor(index))
