"""ELR+: two networks, averages of the other network's weights, mixup, and its options."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from doubles import data, flat, noisy_network, smooth_network

from wellposed import Pair, Step, TensorLoader, fit
from wellposed.losses import EarlyLearningPlus, early_learning_penalty
from wellposed.losses.early_learning_plus import refined_labels

X, Y = data()
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def run(method, model=None, epochs=2, **options):
    return fit(
        model or smooth_network(),
        TensorLoader(X, Y, batch_size=16, shuffle=True),
        epochs=epochs,
        regularizer=method,
        optimizer=SGD,
        **options,
    )


def test_it_returns_a_pair_of_different_networks_whose_logits_are_averaged():
    model = run(EarlyLearningPlus(64, 4)).model
    assert isinstance(model, Pair)
    assert not torch.equal(flat(model.a), flat(model.b))
    model.eval()
    torch.testing.assert_close(model(X), (model.a(X) + model.b(X)) / 2)


def test_the_memory_of_a_network_is_fed_by_the_average_of_the_other_on_unmixed_inputs():
    method = EarlyLearningPlus(64, 4, momentum=0.7, alpha=1.0)
    pair = method.attach(smooth_network())
    step = Step(pair, inputs=X[:8], targets=Y[:8], index=torch.arange(8), generator=torch.Generator().manual_seed(0))
    clean = step.inputs.clone()
    method.on_batch(step)
    step.outputs = pair(step.inputs)
    method.on_backward(step)
    for own, other in (("a", "b"), ("b", "a")):
        expected = 0.3 * method.averages[other](clean).softmax(1)
        torch.testing.assert_close(method.tables[own].rows[:8], expected)
    assert not torch.equal(step.inputs.a, step.inputs.b)


def test_without_mixup_the_loss_is_cross_entropy_plus_penalty_of_both_networks():
    method = EarlyLearningPlus(64, 4, strength=2.0, alpha=0.0)
    pair = method.attach(smooth_network())
    step = Step(pair, inputs=X[:8], targets=Y[:8], index=torch.arange(8))
    method.on_batch(step)
    step.outputs = pair(step.inputs)
    expected = sum(
        F.cross_entropy(z, Y[:8], reduction="none") + 2.0 * early_learning_penalty(z, step.extra[f"elr+ memory {k}"])
        for k, z in zip("ab", step.outputs, strict=True)
    )
    torch.testing.assert_close(method.loss(step), expected)


def test_the_average_follows_the_ramp_from_the_live_network_to_its_decay():
    method = EarlyLearningPlus(64, 4, decay=0.5, ramp="inverse")
    pair = method.attach(smooth_network())
    start = flat(method.averages["a"]).clone()
    with torch.no_grad():
        for p in pair.a.parameters():
            p.add_(1.0)
    method.on_step(Step(pair, number=0, total=10))
    torch.testing.assert_close(flat(method.averages["a"]), start + 0.5)


def test_labels_are_refined_only_for_mixed_pairs():
    memory = torch.tensor([[0.6, 0.2, 0.2], [0.0, 0.0, 0.0]])
    one_hot = torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])
    torch.testing.assert_close(refined_labels(one_hot, memory), one_hot)
    mixed = torch.tensor([[0.8, 0.2, 0.0], [0.5, 0.5, 0.0]])
    torch.testing.assert_close(refined_labels(mixed, memory), torch.tensor([[12 / 13, 1 / 13, 0], [0.5, 0.5, 0]]))


@pytest.mark.parametrize(
    "options",
    [{"ramp_strength": True, "refine_labels": True}, {"per_sample": True}, {"keep": "averages"}, {"ramp": "inverse"}],
)
def test_every_option_trains_with_batchnorm_and_micro_batches(options):
    model = run(EarlyLearningPlus(64, 4, decay=0.9, **options), noisy_network(), accumulation=2).model.eval()
    assert torch.isfinite(model(X)).all()


def test_it_resumes_bit_for_bit(tmp_path):
    whole = run(EarlyLearningPlus(64, 4), epochs=3).model

    class Stop(Exception):
        pass

    def stop(step, entry):
        if step.epoch == 2:
            raise Stop

    path = tmp_path / "elr.ckpt"
    with pytest.raises(Stop):
        run(EarlyLearningPlus(64, 4), epochs=3, checkpoint=path, on_epoch_end=stop)
    resumed = run(EarlyLearningPlus(64, 4), epochs=3, checkpoint=path).model
    assert torch.equal(flat(whole), flat(resumed))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"alpha": -1}, "alpha must be >= 0, got -1"),
        ({"strength": -2.0}, "strength must be >= 0"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=f"EarlyLearningPlus: {message}"):
        EarlyLearningPlus(4, 2, **arguments)
