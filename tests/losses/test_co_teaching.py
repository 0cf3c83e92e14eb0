"""Co-teaching: who judges what, who trains on what, one optimizer against two, and what it composes with."""

import copy
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from doubles import data, flat, noisy_network, smooth_network
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from wellposed import Compose, Hyperparameter, Pair, Regularizer, Step, TensorLoader, fit
from wellposed.accumulation import Accumulation
from wellposed.batching import Paired
from wellposed.gradients import SharpnessAwareMinimization
from wellposed.losses import (
    CoTeaching,
    EarlyLearning,
    FrozenBatchNorm,
    GeneralizedCrossEntropy,
    LabelSmoothing,
    Mixup,
    co_teaching_step,
    forget_rate_at,
    generalized_cross_entropy,
    num_kept,
    small_loss,
)
from wellposed.weights import EarlyStopping, WeightAveraging

X, Y = data()
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
MODES = ("halves", "full")


def loader(batch_size=16, **options):
    return TensorLoader(X, Y, batch_size=batch_size, shuffle=True, seed=3, **options)


def train(method, model=None, epochs=2, data=None, **options):
    options = {"optimizer": SGD, **options}
    model = Pair(smooth_network(), smooth_network(77)) if model is None else model
    return fit(model, data or loader(), epochs=epochs, regularizer=method, **options).model


# ── which examples are kept ───────────────────────────────────────────────────────────────────────────────────────
@given(st.integers(1, 200), st.floats(0.0, 0.99))
def test_the_number_kept_is_the_floor_but_at_least_one(size, rate):
    assert num_kept(size, rate) == max(1, int((1 - rate) * size + 1e-9))


def test_rounding_never_loses_an_example():
    assert num_kept(10, 0.9) == 1
    assert num_kept(64, 0.0) == 64
    assert [num_kept(10, tenth / 10) for tenth in range(10)] == list(range(10, 0, -1))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.floats(0.0, 0.95))
def test_the_smallest_losses_are_kept_and_of_equals_the_earlier(losses, rate):
    found = small_loss(torch.tensor(losses, dtype=torch.float32), rate)
    expected = np.argsort(np.array(losses), kind="stable")[: num_kept(len(losses), rate)]
    assert found.tolist() == expected.tolist()


def test_losses_that_are_not_finite_are_left_out_first():
    losses = torch.tensor([torch.nan, 1.0, torch.inf, 0.5], requires_grad=True)
    assert small_loss(losses, 0.5).tolist() == [3, 1]


def test_the_schedule_rises_from_zero_to_the_rate_and_stays():
    assert [forget_rate_at(e, 0.4, 5) for e in range(8)] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4])
    assert [forget_rate_at(e, 0.4, 1) for e in range(3)] == [0.0, 0.4, 0.4]
    assert [forget_rate_at(e, 0.4, 0) for e in range(3)] == [0.4, 0.4, 0.4]
    np.testing.assert_allclose([forget_rate_at(e, 0.3, 10) for e in range(10)], np.linspace(0, 0.3, 10))


# ── one step ──────────────────────────────────────────────────────────────────────────────────────────────────────
def losses_of(network, rows):
    with torch.no_grad():
        return F.cross_entropy(copy.deepcopy(network).eval()(X[rows]), Y[rows], reduction="none")


def test_in_halves_each_network_trains_on_the_small_losses_of_the_half_that_it_did_not_judge():
    a, b = noisy_network(0), noisy_network(1)
    before = copy.deepcopy(a), copy.deepcopy(b)
    first, second = torch.arange(8), torch.arange(8, 16)
    kept_a = first[losses_of(a, first).argsort(stable=True)[:6]]
    kept_b = second[losses_of(b, second).argsort(stable=True)[:6]]
    torch.manual_seed(4)
    found = co_teaching_step(
        a, b, SGD(a.parameters()), SGD(b.parameters()), X[:16], Y[:16], 0.25, index=torch.arange(100, 116)
    )
    assert found.kept_a.tolist() == (kept_a + 100).tolist()
    assert found.kept_b.tolist() == (kept_b + 100).tolist()
    torch.manual_seed(4)
    for network, rows, loss in ((before[0], kept_b, found.loss_a), (before[1], kept_a, found.loss_b)):
        optimizer = SGD(network.parameters())
        expected = F.cross_entropy(network(X[rows]), Y[rows])
        expected.backward()
        optimizer.step()
        torch.testing.assert_close(loss, expected.detach())
    assert torch.equal(flat(a), flat(before[0]))
    assert torch.equal(flat(b), flat(before[1]))
    assert torch.equal(a[1].running_mean, before[0][1].running_mean)


def test_in_full_both_judge_the_whole_batch_by_their_training_losses_and_exchange():
    a, b = smooth_network(0), smooth_network(1)
    before = copy.deepcopy(a), copy.deepcopy(b)
    found = co_teaching_step(a, b, SGD(a.parameters()), SGD(b.parameters()), X[:16], Y[:16], 0.25, mode="full")
    rows = torch.arange(16)
    easy = [losses_of(net, rows).argsort(stable=True)[:12] for net in before]
    assert found.kept_a.tolist() == easy[0].tolist()
    assert found.kept_b.tolist() == easy[1].tolist()
    for network, trained, chosen in ((before[0], a, easy[1]), (before[1], b, easy[0])):
        optimizer = SGD(network.parameters())
        F.cross_entropy(network(X[chosen]), Y[chosen]).backward()
        optimizer.step()
        torch.testing.assert_close(flat(network), flat(trained))


def test_in_halves_the_examples_that_a_network_judges_do_not_change_its_own_update():
    ends = []
    for poisoned in (False, True):
        a, b = smooth_network(0), smooth_network(1)
        inputs, labels = X[:16].clone(), Y[:16].clone()
        if poisoned:
            inputs[:8], labels[:8] = 3 * inputs[:8].flip(0), (labels[:8] + 1) % 4
        co_teaching_step(a, b, SGD(a.parameters()), SGD(b.parameters()), inputs, labels, 0.5)
        ends.append((flat(a), flat(b)))
    assert torch.equal(ends[0][0], ends[1][0])
    assert not torch.equal(ends[0][1], ends[1][1])


def test_rate_zero_keeps_everything():
    for mode, count in (("halves", 8), ("full", 16)):
        a, b = smooth_network(0), smooth_network(1)
        found = co_teaching_step(a, b, SGD(a.parameters()), SGD(b.parameters()), X[:16], Y[:16], 0.0, mode=mode)
        assert len(found.kept_a) == len(found.kept_b) == count


def test_no_gradient_flows_through_the_selection():
    a, b = smooth_network(0), smooth_network(1)
    for mode in MODES:
        method = CoTeaching(0.5, 0, mode)
        step = Step(method.attach(Pair(a, b)), inputs=X[:16], targets=Y[:16])
        method.on_batch(step)
        step.outputs = step.model(step.inputs)
        gradients = torch.autograd.grad(method.loss(step).mean(), list(a.parameters()))
        rows = method.kept.b if mode == "halves" else small_loss(losses_of(b, torch.arange(16)), 0.5)
        expected = torch.autograd.grad(F.cross_entropy(a(X[rows]), Y[rows]), list(a.parameters()))
        for found, wanted in zip(gradients, expected, strict=True):
            torch.testing.assert_close(found, wanted)


# ── as a method ───────────────────────────────────────────────────────────────────────────────────────────────────
def normalised_network(seed):
    """With BatchNorm, so that it matters whether examples are judged in evaluation mode."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 4))


@pytest.mark.parametrize("mode", MODES)
def test_one_optimizer_of_the_pair_equals_two_optimizers(mode):
    pair = train(CoTeaching(0.25, 2, mode), Pair(normalised_network(0), normalised_network(77)), epochs=3)
    a, b = normalised_network(0), normalised_network(77)
    first, second = SGD(a.parameters()), SGD(b.parameters())
    batches = loader()
    for epoch in range(3):
        batches.set_epoch(epoch)
        for batch in batches:
            rate = forget_rate_at(epoch, 0.25, 2)
            co_teaching_step(a, b, first, second, batch.inputs, batch.targets, rate, mode=mode)
    torch.testing.assert_close(flat(pair.a), flat(a), rtol=0, atol=1e-6)
    torch.testing.assert_close(flat(pair.b), flat(b), rtol=0, atol=1e-6)
    torch.testing.assert_close(pair.a[1].running_mean, a[1].running_mean, rtol=0, atol=1e-6)


def test_with_rate_zero_full_co_teaching_is_plain_training_of_both():
    pair = train(CoTeaching(0.0, 0, "full"))
    for network, seed in ((pair.a, 0), (pair.b, 77)):
        plain = fit(smooth_network(seed), loader(), epochs=2, optimizer=SGD).model
        torch.testing.assert_close(flat(network), flat(plain), rtol=0, atol=1e-6)


def test_attach_takes_a_pair_or_adds_a_network_with_fresh_parameters():
    pair = Pair(smooth_network(), smooth_network(1))
    assert CoTeaching().attach(pair) is pair
    single = smooth_network()
    made = CoTeaching().attach(single)
    assert made.a is single
    assert not torch.equal(flat(made.a), flat(made.b))
    with pytest.raises(ValueError, match="must hold two networks, got one network twice"):
        CoTeaching().attach(Pair(single, single))


def test_halves_are_judged_before_the_batch_is_cut_so_that_micro_batches_do_not_matter():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = train(CoTeaching(0.25, 0), accumulation=1)
        parts = train(CoTeaching(0.25, 0), accumulation=3)
    torch.testing.assert_close(flat(whole), flat(parts), rtol=0, atol=1e-6)
    with pytest.warns(UserWarning, match="CoTeaching couples the examples of a batch"):
        train(CoTeaching(0.25, 0, "full"), accumulation=2)


def test_inputs_targets_index_weights_and_extra_stay_together():
    method = CoTeaching(0.5, 0)
    step = Step(
        Pair(smooth_network(), smooth_network(1)), inputs={"input": X[:16]}, targets=Y[:16],
        index=torch.arange(16) + 40, weights=torch.linspace(0.5, 1.5, 16),
        extra={"source": torch.arange(16), "constant": torch.zeros(3)},
    )  # fmt: skip
    method.on_batch(step)
    assert step.weights is None
    assert step.extra["constant"].shape == (3,)
    for key, others in (("a", range(8, 16)), ("b", range(8))):
        rows = getattr(step.index, key) - 40
        assert set(rows.tolist()) <= set(others)
        assert torch.equal(getattr(step.inputs, key)["input"], X[rows])
        assert torch.equal(getattr(step.targets, key), Y[rows])
        assert torch.equal(getattr(step.extra["source"], key), rows)
    assert torch.equal(method.kept.a, step.index.b)
    assert torch.equal(method.kept.b, step.index.a)
    part = Accumulation(step, method, F.cross_entropy, parts=2)
    assert [len(s.index.a) for s in part.steps] == [2, 2]
    part.run()


def test_weights_of_examples_weigh_each_network_s_own():
    weights = torch.linspace(0.5, 1.5, 16)
    for mode in MODES:
        method = CoTeaching(0.5, 0, mode)
        pair = Pair(smooth_network(), smooth_network(1))
        step = Step(pair, inputs=X[:16], targets=Y[:16], weights=weights)
        method.on_batch(step)
        Accumulation(step, method, F.cross_entropy).run()
        rows = method.kept.b
        expected = (weights[rows] * F.cross_entropy(pair.a(X[rows]), Y[rows], reduction="none")).mean()
        for p, g in zip(pair.a.parameters(), torch.autograd.grad(expected, list(pair.a.parameters())), strict=True):
            torch.testing.assert_close(p.grad, g)


def test_inputs_of_each_network_s_own_are_judged_and_trained_on():
    own = Paired(X[:16], X[16:32])
    method = CoTeaching(0.5, 0)
    step = Step(Pair(smooth_network(), smooth_network(1)), inputs=own, targets=Y[:16])
    method.on_batch(step)
    assert torch.equal(step.inputs.a, X[:16][method.kept.b])
    assert torch.equal(step.inputs.b, X[16:32][method.kept.a])


def test_an_odd_batch_drops_its_last_example_and_says_so_once_and_a_single_one_teaches_both():
    method = CoTeaching(0.0, 0)
    pair = Pair(smooth_network(), smooth_network(1))
    with pytest.warns(UserWarning, match="a batch of 7 cannot be halved"):
        method.on_batch(Step(pair, inputs=X[:7], targets=Y[:7]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method.on_batch(Step(pair, inputs=X[:7], targets=Y[:7]))
    assert sorted([*method.kept.a.tolist(), *method.kept.b.tolist()]) == list(range(6))
    step = Step(pair, inputs=X[:1], targets=Y[:1])
    method.on_batch(step)
    assert method.kept.a.tolist() == method.kept.b.tolist() == [0]


def test_scoring_leaves_no_trace():
    pair = Pair(noisy_network(), noisy_network(1)).train()
    before = [b.clone() for b in pair.buffers()]
    state = torch.get_rng_state()
    CoTeaching(0.5, 0).on_batch(Step(pair, inputs=X[:16], targets=Y[:16]))
    assert all(torch.equal(a, b) for a, b in zip(before, pair.buffers(), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert all(part.training for part in pair.modules())


@pytest.mark.parametrize("mode", MODES)
def test_how_often_each_example_was_kept_is_counted_and_wrong_labels_are_kept_less(mode):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 8, generator=generator)
    truth = (inputs @ torch.randn(8, 4, generator=generator)).argmax(1)
    wrong = torch.rand(400, generator=generator) < 0.3
    labels = torch.where(wrong, (truth + torch.randint(1, 4, (400,), generator=generator)) % 4, truth)
    method = CoTeaching(0.3, 3, mode, num_examples=400)
    train(method, epochs=8, data=TensorLoader(inputs, labels, batch_size=40, shuffle=True))
    share = method.kept_share()
    per_judge = 20 if mode == "halves" else 40
    # Epoch 0 keeps everything and judges nothing; epoch 1 leaves out half as much.
    expected = (num_kept(per_judge, 0.15) + 6 * num_kept(per_judge, 0.3)) / (7 * per_judge)
    assert float(share.mean()) == pytest.approx(expected, abs=1e-6)
    assert share[wrong].mean() < share[~wrong].mean() - 0.3
    assert torch.equal(method.table.rows[:, 0], torch.full((400,), 7.0 * (2 if mode == "full" else 1)))
    with pytest.raises(RuntimeError, match="pass num_examples="):
        CoTeaching().kept_share()


def test_frozen_batch_norm_keeps_statistics_and_affine_parameters_bit_for_bit():
    def pair():
        networks = Pair(noisy_network(), noisy_network(1))
        train(CoTeaching(0.0, 0, "full"), networks, epochs=1)  # statistics worth keeping
        return networks

    networks = pair()
    before = {k: v.clone() for k, v in networks.state_dict().items()}
    method = CoTeaching(0.25, 0, frozen_batch_norm=True)
    found = train(method, networks)
    for name, value in found.state_dict().items():
        assert torch.equal(value, before[name]) == (".1." in name), name
    assert all(p.requires_grad for p in found.parameters())
    found.train()
    found(X)
    assert not torch.equal(found.a[1].running_mean, before["a.1.running_mean"])
    thawed = train(CoTeaching(0.25, 0), pair())
    assert not torch.equal(thawed.a[1].weight, before["a.1.weight"])
    model = nn.Sequential(nn.BatchNorm1d(8)).requires_grad_(False)
    FrozenBatchNorm(model).remove()
    assert not model[0].weight.requires_grad


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_continues_bit_for_bit(mode, tmp_path):
    def stop(step, entry):
        if step.epoch == 2:
            raise KeyboardInterrupt

    def method():
        return CoTeaching(0.25, 3, mode, num_examples=64)

    expected = method()
    whole = train(expected, smooth_network(), epochs=4)
    path = tmp_path / "run.ckpt"
    with pytest.raises(KeyboardInterrupt):
        train(method(), smooth_network(), epochs=4, checkpoint=path, on_epoch_end=stop)
    resumed = method()
    found = train(resumed, smooth_network(), epochs=4, checkpoint=path)
    assert torch.equal(flat(found), flat(whole))
    assert torch.equal(resumed.table.rows, expected.table.rows)


def test_the_loss_is_pure():
    for mode in MODES:
        method = CoTeaching(0.25, 0, mode, num_examples=64)
        step = Step(method.attach(smooth_network()), inputs=X[:16], targets=Y[:16], index=torch.arange(16))
        method.on_batch(step)
        step.outputs = step.model(step.inputs)
        before = {k: v.clone() for k, v in method.state_dict().items()}
        values = [method.loss(step) for _ in range(2)]
        assert torch.equal(*values)
        assert all(torch.equal(v, before[k]) for k, v in method.state_dict().items())


@pytest.mark.parametrize("mode", MODES)
def test_it_composes_with_methods_that_act_elsewhere(mode):
    validation = loader()
    for other in (
        Mixup(0.4, num_classes=4), SharpnessAwareMinimization(0.05), WeightAveraging(0.9), EarlyStopping(),
    ):  # fmt: skip
        for methods in ((other, CoTeaching(0.25, 0, mode)), (CoTeaching(0.25, 0, mode), other)):
            if mode == "halves" and isinstance(other, Mixup) and methods[1] is other:
                with pytest.raises(ValueError, match="gives each network its own batch, so Mixup"):
                    Compose(*methods)
                continue
            found = train(Compose(*methods), Pair(noisy_network(), noisy_network(1)), validation=validation)
            assert torch.isfinite(flat(found)).all()
            assert isinstance(found, Pair)


def test_mixed_targets_are_selected_with_their_inputs():
    seen = {}

    class Watch(Regularizer):
        def on_backward(self, step):
            seen.update(inputs=step.inputs, targets=step.targets, index=step.index, extra=step.extra)

    mixup = Mixup(1.0, num_classes=4)
    train(Compose(mixup, CoTeaching(0.5, 0), Watch()), epochs=1, data=TensorLoader(X[:8], Y[:8], batch_size=8))
    hard = F.one_hot(Y, 4).float()
    for key in "ab":
        rows, partner, own = (
            getattr(value, key) for value in (seen["index"], seen["extra"]["partner"], seen["extra"]["mix"])
        )
        weight = own[:, None]
        torch.testing.assert_close(getattr(seen["inputs"], key), torch.lerp(X[partner], X[rows], weight))
        torch.testing.assert_close(getattr(seen["targets"], key), torch.lerp(hard[partner], hard[rows], weight))


@pytest.mark.parametrize("mode", MODES)
def test_what_cannot_work_says_why(mode):
    for other in (GeneralizedCrossEntropy(), LabelSmoothing()):
        with pytest.raises(ValueError, match="at most one method may replace the task loss"):
            Compose(CoTeaching(mode=mode), other)
    with pytest.raises(TypeError, match="the model returned Paired, which holds no 'logits' tensor"):
        train(Compose(CoTeaching(0.25, 0, mode), EarlyLearning(64, 4)))
    tokens = torch.randint(0, 4, (16, 6))
    with pytest.raises(ValueError, match="criterion must return one loss for each of"):
        train(CoTeaching(mode=mode), data=TensorLoader(torch.randn(16, 6, 8), tokens, batch_size=8))


def test_a_robust_loss_may_be_the_criterion_and_the_rate_a_hyperparameter():
    rate = Hyperparameter(0.25, 0.0, 1.0)
    criterion = partial(generalized_cross_entropy, q=0.7)
    found = train(CoTeaching(rate, 0, criterion=criterion))
    assert torch.equal(flat(found), flat(train(CoTeaching(0.25, 0, criterion=criterion))))
    assert rate.name == "CoTeaching.forget_rate"


def test_it_runs_under_mixed_precision():
    for mode in MODES:
        assert torch.isfinite(flat(train(CoTeaching(0.25, 0, mode), amp=torch.bfloat16))).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_it_trains_on_an_accelerator():
    for mode in MODES:
        method = CoTeaching(0.25, 0, mode, num_examples=64)
        assert next(train(method, device="cuda").parameters()).device.type == "cuda"
        assert torch.isfinite(method.kept_share()).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"forget_rate": 1.0}, r"CoTeaching: forget_rate must lie in \[0, 1\), got 1"),
        ({"forget_rate": -0.1}, r"CoTeaching: forget_rate must be in \[0, 1\], got -0.1"),
        ({"num_gradual": -1}, "CoTeaching: num_gradual must be an integer >= 0, got -1"),
        ({"num_examples": 0}, "CoTeaching: num_examples must be >= 1, got 0"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        CoTeaching(**arguments)


def test_a_model_or_a_step_that_does_not_fit_is_refused_by_name():
    method = CoTeaching(0.25, 0)
    with pytest.raises(ValueError, match="the model must be the Pair that attach returned, got Sequential"):
        method.on_batch(Step(smooth_network(), inputs=X, targets=Y))
    step = Step(smooth_network(), inputs=X, targets=Y, outputs=torch.zeros(64, 4))
    with pytest.raises(ValueError, match="must return the outputs of two networks, got Tensor"):
        method.loss(step)
    step.outputs = (torch.zeros(64, 4), torch.zeros(64, 4))
    with pytest.raises(ValueError, match="mode 'halves' needs on_batch before the loss"):
        method.loss(step)
    with pytest.raises(ValueError, match=r"step.index is missing"):
        remembering = CoTeaching(0.25, 0, num_examples=64)
        remembering.on_batch(Step(Pair(smooth_network(), smooth_network(1)), inputs=X, targets=Y))
    with pytest.raises(ValueError, match=r"co_teaching_step: forget_rate must be in \[0, 1\], got 2"):
        a, b = smooth_network(), smooth_network(1)
        co_teaching_step(a, b, SGD(a.parameters()), SGD(b.parameters()), X, Y, 2.0)
