"""The reference loop: arguments, loaders, schedules and errors."""

from functools import partial

import pytest
import torch
from doubles import data, flat, smooth_network
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from wellposed import DivergenceError, IndexedDataset, Regularizer, TensorLoader, fit
from wellposed.losses import EarlyLearning

X, Y = data()
SGD = partial(torch.optim.SGD, lr=0.1)


def test_fit_is_the_loop_that_anyone_would_write():
    model, by_hand = smooth_network(), smooth_network()
    loader = TensorLoader(X, Y, batch_size=16)
    fit(model, loader, epochs=2, optimizer=SGD)
    optimizer = SGD(by_hand.parameters())
    for _ in range(2):
        for batch in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(by_hand(batch.inputs), batch.targets).backward()
            optimizer.step()
    torch.testing.assert_close(flat(model), flat(by_hand))


def test_datasets_are_indexed_and_the_seed_decides_the_order():
    dataset = TensorDataset(X, Y)
    runs = [
        flat(
            fit(
                smooth_network(),
                dataset,
                epochs=2,
                batch_size=16,
                optimizer=SGD,
                seed=s,
                regularizer=EarlyLearning(64, 4),
            ).model
        )
        for s in (0, 0, 1)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_the_callers_random_state_is_given_back():
    state = torch.get_rng_state()
    fit(smooth_network(), TensorDataset(X, Y), epochs=1)
    assert torch.equal(state, torch.get_rng_state())


def test_dicts_and_pytorch_loaders_are_understood():
    rows = [{"inputs": x, "targets": y, "source": torch.tensor(3)} for x, y in zip(X, Y, strict=True)]
    seen = {}

    class Look(Regularizer):
        def on_batch(self, step):
            seen.update(step.extra)

    loader = DataLoader(IndexedDataset(rows), batch_size=16)
    assert len(fit(smooth_network(), loader, epochs=1, regularizer=Look()).history) == 1
    assert seen["source"].tolist() == [3] * 16


def test_the_schedule_is_stepped_with_the_optimizer():
    rates = []

    class Watch(Regularizer):
        def on_step(self, step):
            rates.append(step.optimizer.param_groups[0]["lr"])

    fit(smooth_network(), TensorLoader(X, Y, batch_size=32), epochs=2, optimizer=SGD, regularizer=Watch(),
        scheduler=lambda o, total: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, total))  # fmt: skip
    assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_hooks_see_the_progress_of_training():
    seen = []

    class Watch(Regularizer):
        def on_epoch(self, step):
            seen.append((step.epoch, step.progress, step.finished))

        def on_step(self, step):
            step.log("double", 2.0 * step.number)

    result = fit(smooth_network(), TensorLoader(X, Y, batch_size=32), epochs=2, regularizer=Watch())
    assert seen == [(0, 0.0, False), (1, 0.5, False), (2, 1.0, True)]
    assert [entry["double"] for entry in result.history] == [1.0, 5.0]


def test_progress_is_a_line_an_epoch(capsys):
    fit(smooth_network(), TensorLoader(X, Y), epochs=2, progress=True, validation=TensorLoader(X, Y))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("epoch 2/2  loss ")
    assert "validation accuracy" in lines[1]


def test_divergence_is_reported_with_its_epoch():
    with pytest.raises(DivergenceError, match="the training loss of epoch 1 is nan"):
        fit(smooth_network(), TensorLoader(X * float("nan"), Y), epochs=3)


def test_a_built_optimizer_is_refused_where_a_method_needs_its_own_groups():
    from wellposed.weights import WeightDecay

    model = smooth_network()
    with pytest.raises(ValueError, match="optimizer is already built, but the regularizer asks for its own"):
        fit(model, TensorLoader(X, Y), epochs=1, regularizer=WeightDecay(0.1), optimizer=SGD(model.parameters()))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs must be an integer >= 1, got 0"),
        ({"accumulation": 0}, ValueError, "accumulation must be an integer >= 1, got 0"),
        ({"clip_norm": -1.0}, ValueError, "clip_norm must be > 0, got -1.0"),
        ({"amp": torch.int8}, ValueError, "amp must be None, torch.bfloat16 or torch.float16"),
        ({"early_stopping": 3}, ValueError, "early_stopping must be >= 1 and needs validation="),
        ({"regularizer": nn.Identity()}, TypeError, "regularizer must be a Regularizer, got Identity"),
        ({"data": 5}, TypeError, "data must be a Dataset or an iterable of batches, got int"),
        ({"data": TensorDataset(X[:0], Y[:0])}, ValueError, "data is empty"),
        ({"data": [7]}, TypeError, "a loader must yield"),
    ],
)
def test_arguments_are_refused_by_name_before_any_training(options, kind, message):
    model = smooth_network()
    arguments = {"data": TensorLoader(X, Y), "epochs": 1, **options}
    with pytest.raises(kind, match=message):
        fit(model, arguments.pop("data"), **arguments)
    assert torch.equal(flat(model), flat(smooth_network()))


def test_bfloat16_autocast_trains():
    result = fit(
        smooth_network(),
        TensorLoader(X, Y, batch_size=16),
        epochs=5,
        optimizer=SGD,
        amp=torch.bfloat16,
        regularizer=EarlyLearning(64, 4),
    )
    assert result.history[-1]["loss"] < result.history[0]["loss"]
