"""PS-KD against its formulas, torch's own losses, a port of the reference's loop, and the invariants of its memory."""

import os
import subprocess
import sys
import textwrap
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from doubles import data, flat, noisy_network, smooth_network
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from wellposed import Compose, Hyperparameter, Step, TensorLoader, cross_entropy, fit
from wellposed.accumulation import Accumulation
from wellposed.gradients import SharpnessAwareMinimization
from wellposed.losses import (
    GeneralizedCrossEntropy,
    Mixup,
    PredictionMemory,
    ProgressiveSelfDistillation,
    doubt,
    gradient_rescaling,
    hard_example_shift,
    progressive_targets,
)
from wellposed.losses.mixup import mix
from wellposed.losses.progressive_share import scheduled

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
X, Y = data()


def draw(rows=6, classes=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, classes, generator=generator, dtype=dtype)
    past = (2 * torch.randn(rows, classes, generator=generator, dtype=dtype)).softmax(-1)
    return logits, past, torch.randint(0, classes, (rows,), generator=generator)


def with_memory(past, **options):
    """A criterion in the last of its epochs whose memory holds `past`."""
    criterion = ProgressiveSelfDistillation(*past.shape, **{"epochs": 4, **options})
    criterion.memory.write(torch.arange(len(past)), past)
    criterion.set_epoch(3)
    return criterion


def train(method, model=None, epochs=3, **options):
    loader = TensorLoader(X, Y, batch_size=16, shuffle=True)
    return fit(model or smooth_network(), loader, epochs=epochs, regularizer=method, optimizer=SGD, **options)


# The loss


def test_without_a_share_it_is_cross_entropy_in_every_epoch():
    criterion = ProgressiveSelfDistillation(6, 5, alpha=0.0, epochs=3)
    for epoch in range(3):
        criterion.set_epoch(epoch)
        logits, _, labels = draw(seed=epoch, dtype=torch.float32)
        ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        loss, expected = criterion(ours, labels, torch.arange(6)), F.cross_entropy(theirs, labels)
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)
        loss.backward(), expected.backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-7)


@pytest.mark.parametrize("schedule", ["epoch", "step", "constant"])
def test_a_first_visit_is_cross_entropy_whatever_the_share(schedule):
    logits, _, labels = draw()
    criterion = ProgressiveSelfDistillation(6, 5, alpha=1.0, schedule=schedule, epochs=2)
    criterion.set_epoch(0, done=0.5)
    loss = criterion(logits, labels, torch.arange(6))
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels), rtol=0, atol=1e-7)


def test_the_loss_is_torchs_cross_entropy_against_the_soft_targets():
    logits, past, labels = draw()
    soft = (1 - 0.8) * F.one_hot(labels, 5).double() + 0.8 * past
    torch.testing.assert_close(progressive_targets(labels, past, 0.8), soft, rtol=0, atol=1e-15)
    criterion = with_memory(past.float())
    loss = criterion(logits, labels, torch.arange(6))
    torch.testing.assert_close(loss, F.cross_entropy(logits, soft), rtol=0, atol=1e-6)


def test_labels_that_are_probabilities_are_mixed_alike():
    _, past, labels = draw()
    hard = F.one_hot(labels, 5).double()
    torch.testing.assert_close(progressive_targets(hard, past, 0.3), progressive_targets(labels, past, 0.3))
    share = torch.rand(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(progressive_targets(hard, past, share), progressive_targets(labels, past, share))


def test_no_gradient_reaches_the_past():
    logits, past, labels = draw()
    past.requires_grad_(), logits.requires_grad_()
    for targets in (labels, F.one_hot(labels, 5).double()):
        soft = progressive_targets(targets, past, 0.8)
        assert not soft.requires_grad
    cross_entropy(logits, soft).sum().backward()
    assert past.grad is None and logits.grad is not None


@pytest.mark.parametrize("alpha", [0.1, 0.8])
def test_a_uniform_memory_is_torchs_label_smoothing(alpha):
    logits, _, labels = draw(dtype=torch.float32)
    criterion = with_memory(torch.full((6, 5), 0.2), alpha=alpha)
    expected = F.cross_entropy(logits, labels, label_smoothing=alpha)
    torch.testing.assert_close(criterion(logits, labels, torch.arange(6)), expected, rtol=0, atol=1e-6)


def test_the_gradient_in_the_logits_is_prediction_minus_target():
    logits, past, labels = draw()
    logits.requires_grad_()
    soft = progressive_targets(labels, past, 0.8)
    cross_entropy(logits, soft).mean().backward()
    torch.testing.assert_close(logits.grad, (logits.detach().softmax(1) - soft) / 6, rtol=0, atol=1e-12)


def test_a_memory_of_one_hot_labels_is_cross_entropy():
    logits, _, labels = draw(dtype=torch.float32)
    criterion = with_memory(F.one_hot(labels, 5).float())
    torch.testing.assert_close(criterion(logits, labels, torch.arange(6)), F.cross_entropy(logits, labels))


def test_evaluation_is_cross_entropy_needs_no_index_and_writes_nothing():
    logits, past, labels = draw(dtype=torch.float32)
    criterion = with_memory(past).eval()
    before = criterion.memory.values.rows.clone()
    torch.testing.assert_close(criterion(logits, labels), F.cross_entropy(logits, labels))
    assert torch.equal(before, criterion.memory.values.rows)


# Gradient rescaling


def logit_gradient(logits, past, labels, alpha):
    logits = logits.clone().requires_grad_()
    cross_entropy(logits, progressive_targets(labels, past, alpha)).sum().backward()
    return logits.grad


def test_the_push_on_the_true_class_is_that_of_cross_entropy_times_the_rescaling_factor():
    logits, past, labels = draw(200, 7)
    own = logit_gradient(logits, past, labels, 0.6).gather(1, labels[:, None])[:, 0]
    p, q = (x.gather(1, labels[:, None])[:, 0] for x in (logits.softmax(1), past))
    torch.testing.assert_close(-own, (1 - p) - 0.6 * (1 - q), rtol=0, atol=1e-12)
    torch.testing.assert_close(-own, (1 - p) * gradient_rescaling(logits, past, labels, 0.6), rtol=0, atol=1e-12)


def test_it_is_the_ratio_of_l1_norms_where_no_other_class_is_pushed_up():
    logits, past, labels = draw(200, 7)
    p = logits.softmax(1)
    others = ~F.one_hot(labels, 7).bool()
    # A past that is nowhere more than twice the present, off the label: so alpha = 1/2 pushes no other class up.
    past = torch.where(others, torch.minimum(past, 2 * p), past)
    past = torch.where(others, past, 0.0)
    past = past + F.one_hot(labels, 7) * (1 - past.sum(1, keepdim=True))
    inside = past.gather(1, labels[:, None])[:, 0] >= 0
    norms = logit_gradient(logits, past, labels, 0.5).abs().sum(1)
    plain = 2 * doubt(logits, labels)
    assert inside.sum() > 100
    factor = gradient_rescaling(logits, past, labels, 0.5)
    torch.testing.assert_close((norms / plain)[inside], factor[inside], rtol=0, atol=1e-10)


def test_the_l1_norm_is_at_least_twice_the_push_with_equality_iff_the_others_share_a_sign():
    logits, past, labels = draw(500, 4, seed=1)
    gradient = logit_gradient(logits, past, labels, 0.9)
    own = gradient.gather(1, labels[:, None])[:, 0].abs()
    rest = gradient.scatter(1, labels[:, None], 0.0)
    norm = gradient.abs().sum(1)
    assert (norm >= 2 * own - 1e-12).all()
    one_sign = (rest >= 0).all(1) | (rest <= 0).all(1)
    assert 0 < one_sign.sum() < 500
    torch.testing.assert_close(norm[one_sign], 2 * own[one_sign], rtol=0, atol=1e-12)
    assert (norm[~one_sign] > 2 * own[~one_sign]).all()


def test_doubt_keeps_its_digits_where_the_prediction_is_nearly_certain():
    logits = torch.tensor([[40.0, 0.0, 0.0]], dtype=torch.float64)
    assert float(doubt(logits, torch.tensor([0]))) == pytest.approx(2 * float(torch.tensor(-40.0).double().exp()))
    logits, _, labels = draw()
    torch.testing.assert_close(doubt(logits, labels), 1 - logits.softmax(1).gather(1, labels[:, None])[:, 0])


def test_the_shift_to_hard_examples_by_hand_and_zero_when_all_improve_alike():
    gamma = torch.tensor([0.1, 0.2, 0.4, 0.8], dtype=torch.float64)
    assert float(hard_example_shift(gamma, 1.5 * gamma, 0.4, gamma, 0.25)) == pytest.approx(0.0, abs=1e-15)
    stuck = torch.tensor([0.4, 0.8, 1.0, 0.8], dtype=torch.float64)  # the hardest alone did not improve
    push = gamma - 0.2 * stuck
    expected = float(push[3] / push.sum() - gamma[3] / gamma.sum())
    assert float(hard_example_shift(gamma, stuck, 0.2, gamma, 0.25)) == pytest.approx(expected)
    assert expected > 0
    with pytest.raises(ValueError, match=r"fraction must lie in \(0, 1\), got 1.0"):
        hard_example_shift(gamma, gamma, 0.2, gamma, 1.0)


# The schedule


def test_the_share_grows_linearly_and_ends_at_alpha():
    shares = [scheduled(0.8, "epoch", epoch, 10) for epoch in range(10)]
    assert shares[0] == pytest.approx(0.08)
    assert shares[4] == pytest.approx(0.4)
    assert shares[9] == 0.8
    assert all(b > a for a, b in zip(shares, shares[1:], strict=False))


def test_the_plain_loop_and_the_training_loop_choose_the_same_shares():
    seen = {}
    for schedule in ("epoch", "step", "constant"):
        method = ProgressiveSelfDistillation(64, 4, alpha=0.8, schedule=schedule)
        seen[schedule] = []
        watched = method.on_backward
        method.on_backward = lambda step, m=method, s=schedule, f=watched: (seen[s].append(m.share), f(step))
        train(method, epochs=2)
    assert seen["constant"] == [0.8] * 8
    assert seen["epoch"] == [0.4] * 4 + [0.8] * 4
    assert seen["step"] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    plain = ProgressiveSelfDistillation(64, 4, alpha=0.8, schedule="step", epochs=2)
    for number in range(8):
        plain.set_epoch(number // 4, done=(number % 4 + 1) / 4)
        assert plain.share == pytest.approx(seen["step"][number])


def test_an_epoch_beyond_the_planned_ones_warns_and_stays_at_alpha():
    criterion = ProgressiveSelfDistillation(4, 2, alpha=0.8, epochs=3)
    with pytest.warns(UserWarning, match="epoch 3 lies beyond epochs=3; alpha stays at its end"):
        criterion.set_epoch(3)
    assert criterion.share == 0.8


def test_epochs_that_are_never_announced_are_noticed():
    criterion = ProgressiveSelfDistillation(4, 2, epochs=3)
    batch = torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64), torch.arange(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(*batch)
        criterion(*batch)
        with pytest.raises(UserWarning, match="set_epoch was never called"):
            criterion(*batch)
        criterion(*batch)  # said once
        with_memory(torch.rand(4, 2).softmax(1))(*batch)


# The memory


def test_after_an_epoch_the_memory_holds_the_softmax_of_the_training_passes_bit_for_bit():
    recorded = torch.full((64, 4), float("nan"))

    class Recording(ProgressiveSelfDistillation):
        def on_backward(self, step):
            recorded[step.index] = step.outputs.softmax(1)
            super().on_backward(step)

    method = Recording(80, 4)  # 16 rows are never visited
    train(method, noisy_network(), epochs=1)
    rows = method.memory.values.rows
    assert torch.equal(rows[:64], recorded)
    torch.testing.assert_close(rows[:64].sum(1), torch.ones(64), rtol=0, atol=1e-6)
    assert method.memory.visited.tolist() == [True] * 64 + [False] * 16
    assert not rows[64:].any()


def test_a_port_of_the_reference_loop_ends_with_the_same_weights_and_memory():
    method = ProgressiveSelfDistillation(64, 4, alpha=0.8)
    ours = train(method, smooth_network(), epochs=4).model
    model = smooth_network()
    optimizer = SGD(model.parameters())
    loader = TensorLoader(X, Y, batch_size=16, shuffle=True)
    table = torch.zeros(64, 4)
    for epoch in range(4):
        alpha = 0.8 * (epoch + 1) / 4
        loader.set_epoch(epoch)
        for batch in loader:
            onehot = torch.eye(4)[batch.targets]
            if epoch == 0:
                table[batch.index] = onehot
            soft = (1 - alpha) * onehot + alpha * table[batch.index]
            logits = model(batch.inputs)
            loss = (-soft * F.log_softmax(logits, dim=1)).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            table[batch.index] = F.softmax(logits, dim=1).detach()
    torch.testing.assert_close(flat(ours), flat(model), rtol=0, atol=1e-5)
    torch.testing.assert_close(method.memory.values.rows, table, rtol=0, atol=1e-5)


@given(
    st.integers(1, 5),
    st.integers(2, 7),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from([None, 1, 2]),
)
def test_targets_lie_on_the_simplex_and_carry_no_graph(rows, classes, dtype, storage, top_k):
    criterion = ProgressiveSelfDistillation(8, classes, alpha=0.9, epochs=2, dtype=storage, top_k=top_k)
    logits = (3 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(rows))).to(dtype).requires_grad_()
    labels, index = torch.arange(rows) % classes, torch.arange(rows) + 1
    for epoch in range(2):
        criterion.set_epoch(epoch)
        loss = criterion(logits, labels, index)
    soft = criterion.soften(labels, torch.arange(rows))  # the first was never visited
    assert torch.isfinite(loss) and loss.dtype in (torch.float32, torch.float64)
    assert (soft >= 0).all() and not soft.requires_grad
    torch.testing.assert_close(soft.sum(-1), torch.ones(rows), rtol=0, atol=1e-5)
    loss.backward()


def test_an_example_that_is_first_seen_late_begins_with_its_label():
    _, past, labels = draw(dtype=torch.float32)
    criterion = ProgressiveSelfDistillation(6, 5, epochs=2)
    criterion.memory.write(torch.tensor([0, 1]), past[:2])
    criterion.set_epoch(1)
    soft = criterion.soften(labels, torch.arange(6))
    torch.testing.assert_close(soft[:2], progressive_targets(labels[:2], past[:2], 0.8))
    assert torch.equal(soft[2:], F.one_hot(labels[2:], 5).float())


def test_rows_that_are_not_finite_are_never_stored():
    _, past, _ = draw(2, 3, dtype=torch.float32)
    for top_k in (None, 2):
        criterion = with_memory(past, top_k=top_k)
        before = criterion.memory.read(torch.tensor([0]))
        criterion.store(torch.tensor([[float("inf"), 0.0, 0.0], [1.0, 0.0, 0.0]]), torch.tensor([0, 1]))
        assert torch.equal(criterion.memory.read(torch.tensor([0])), before)
        assert criterion.memory.read(torch.tensor([1])).argmax() == 0
        assert torch.isfinite(criterion.memory.read(torch.arange(2))).all()


def test_training_that_starts_late_with_an_empty_memory_is_refused():
    criterion = ProgressiveSelfDistillation(4, 2, epochs=9)
    criterion.set_epoch(5)
    with pytest.raises(RuntimeError, match="the memory is empty at epoch 5; to resume, load the state_dict"):
        criterion(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([0]))
    step = Step(nn.Identity(), targets=torch.tensor([0]), index=torch.tensor([0]), epoch=5, epochs=9)
    with pytest.raises(RuntimeError, match="the memory is empty at epoch 5"):
        ProgressiveSelfDistillation(4, 2).on_batch(step)
    twin = ProgressiveSelfDistillation(4, 2, epochs=9)
    twin.load_state_dict(with_memory(torch.full((4, 2), 0.5)).state_dict())
    twin.set_epoch(5)
    twin(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([0]))


def test_by_epoch_every_visit_of_an_epoch_sees_the_epoch_before():
    first, second, third = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]]), torch.tensor([[1.0, 0.0]])
    label, index = torch.tensor([0]), torch.tensor([2])
    by_visit, by_epoch = (ProgressiveSelfDistillation(4, 2, 1.0, epochs=1, refresh=r) for r in ("visit", "epoch"))
    by_visit.alpha = by_epoch.alpha = 1.0
    for criterion in (by_visit, by_epoch):
        criterion.epochs = 2
        criterion.set_epoch(0)
        criterion(first, label, index)
        criterion.set_epoch(1)
        criterion(second, label, index)
        criterion.set_epoch(1)  # said twice: nothing is taken over twice
    assert torch.equal(by_visit.soften(label, index), second.softmax(1))
    assert torch.equal(by_epoch.soften(label, index), first.softmax(1))
    by_epoch.store(third, torch.tensor([1]))
    by_epoch.epochs = 3
    by_epoch.set_epoch(2)
    assert torch.equal(by_epoch.memory.read(torch.tensor([2, 1])), torch.cat([second, third]).softmax(1))
    assert not by_epoch.pending.visited.any()


def test_where_every_example_comes_once_an_epoch_both_ways_of_refreshing_agree():
    tables = []
    for refresh in ("visit", "epoch"):
        method = ProgressiveSelfDistillation(64, 4, refresh=refresh)
        model = train(method, noisy_network()).model
        tables.append((flat(model), method.memory.values.rows))
    assert torch.equal(tables[0][0], tables[1][0])
    assert torch.equal(tables[0][1], tables[1][1])


# Compressed memory


def test_the_top_k_are_kept_and_the_rest_is_spread_evenly():
    _, past, _ = draw(50, 9, dtype=torch.float32)
    memory = PredictionMemory(50, 9, top_k=3)
    memory.write(torch.arange(50), past)
    read = memory.read(torch.arange(50))
    values, classes = past.topk(3)
    torch.testing.assert_close(read.gather(1, classes), values)
    rest = read.scatter(1, classes, 0.0)
    expected = ((1 - values.sum(1, keepdim=True)) / 6).expand(-1, 9).scatter(1, classes, 0.0)
    torch.testing.assert_close(rest, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(read.sum(1), torch.ones(50), rtol=0, atol=1e-6)


def test_keeping_all_classes_is_the_dense_memory():
    _, past, _ = draw(50, 9, dtype=torch.float32)
    memory = PredictionMemory(50, 9, top_k=9)
    memory.write(torch.arange(50), past)
    torch.testing.assert_close(memory.read(torch.arange(50)), past, rtol=0, atol=1e-6)


@pytest.mark.parametrize("classes", [2048, 2049, 50_000])
def test_class_numbers_are_exact_also_in_half_precision(classes):
    memory = PredictionMemory(classes, classes, top_k=1, dtype=torch.float16)
    last = torch.arange(classes - 100, classes)
    memory.write(last, F.one_hot(last, classes).float())
    assert torch.equal(memory.read(last).argmax(1), last)
    assert memory.bytes_per_row == (4 if classes <= 2048 else 6)


@pytest.mark.parametrize("top_k", [None, 4])
def test_half_precision_errs_little_and_rows_still_sum_to_one(top_k):
    _, past, _ = draw(200, 30, dtype=torch.float32)
    half, full = (PredictionMemory(200, 30, top_k=top_k, dtype=d) for d in (torch.float16, torch.float32))
    for memory in (half, full):
        memory.write(torch.arange(200), past)
    rows = half.read(torch.arange(200))
    assert (rows - full.read(torch.arange(200))).abs().max() < 1e-3
    torch.testing.assert_close(rows.sum(1), torch.ones(200), rtol=0, atol=1e-6)


def test_a_memory_on_disk_holds_what_one_in_main_memory_holds(tmp_path):
    for top_k in (None, 2):
        path = tmp_path / f"rows{top_k}.npy"
        disk = ProgressiveSelfDistillation(64, 4, refresh="epoch", top_k=top_k, storage="memmap", path=path)
        main = ProgressiveSelfDistillation(64, 4, refresh="epoch", top_k=top_k)
        models = [train(method).model for method in (disk, main)]
        assert torch.equal(flat(models[0]), flat(models[1]))
        assert torch.equal(disk.memory.read(torch.arange(64)), main.memory.read(torch.arange(64)))


# Sequences


def tokens():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 4, 3, generator=generator)
    targets = torch.tensor([[1, 2, -100, -100], [-100, 0, 1, 2]])
    return logits, targets, torch.tensor([4, 0])


def test_token_targets_are_softened_token_by_token_and_ignored_ones_do_not_count():
    logits, targets, index = tokens()
    criterion = ProgressiveSelfDistillation(5, 3, epochs=2, lengths=torch.tensor([3, 0, 0, 0, 2]))
    criterion.set_epoch(0)
    torch.testing.assert_close(
        criterion(logits, targets, index), F.cross_entropy(logits.transpose(1, 2), targets), rtol=0, atol=1e-6
    )
    criterion.set_epoch(1)
    soft = criterion.soften(targets, index)
    valid = targets != -100
    expected = progressive_targets(targets[valid], logits.softmax(-1)[valid], 0.8)
    torch.testing.assert_close(soft[valid], expected, rtol=0, atol=1e-6)
    assert not soft[~valid].any()
    other = 2 * logits
    loss = criterion(other, targets, index)
    torch.testing.assert_close(loss, F.cross_entropy(other[valid], expected), rtol=0, atol=1e-6)


def test_the_memory_of_tokens_holds_no_padding_and_does_not_depend_on_it():
    logits, targets, index = tokens()
    criterion = ProgressiveSelfDistillation(5, 3, epochs=2, lengths=torch.tensor([3, 0, 0, 0, 2]))
    assert len(criterion.memory.values) == 5
    criterion.set_epoch(0)
    criterion(logits, targets, index)
    assert criterion.memory.visited.all()
    criterion.set_epoch(1)
    soft = criterion.soften(targets, index)
    padded = torch.tensor([[-100, -100, -100, 1, 2], [0, 1, -100, 2, -100]])
    found = criterion.soften(padded, index)
    assert torch.equal(found[padded != -100], soft[targets != -100])


def test_token_targets_in_the_loop_do_not_depend_on_how_a_batch_is_cut():
    torch.manual_seed(0)
    inputs = torch.randn(8, 4, 5)
    targets = torch.randint(0, 3, (8, 4))
    targets[0, 1:] = targets[5, :2] = -100
    results = []
    for parts in (1, 4):
        torch.manual_seed(1)
        method = ProgressiveSelfDistillation(8, 3, lengths=4, top_k=2, dtype=torch.float16)
        loader = TensorLoader(inputs, targets, batch_size=4, shuffle=True)
        model = fit(nn.Linear(5, 3), loader, epochs=3, regularizer=method, optimizer=SGD, accumulation=parts).model
        results.append((flat(model), method.memory.read(torch.arange(32))))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=1e-3)
    assert results[0][1].any(1).sum() == (targets != -100).sum()


def test_a_mask_of_the_batch_leaves_tokens_out_too():
    _, targets, index = tokens()
    method = ProgressiveSelfDistillation(5, 3, lengths=4)
    mask = torch.tensor([[True, False, True, True]] * 2)
    step = Step(nn.Identity(), targets=targets, index=index, extra={"valid": mask})
    method.on_batch(step)
    assert torch.equal(step.extra["valid"], mask & (targets != -100))
    assert torch.equal(step.targets.sum(-1) > 0, step.extra["valid"])


def test_soft_targets_of_tokens_keep_their_normalizer():
    soft = torch.rand(2, 4, 3).softmax(-1)
    method = ProgressiveSelfDistillation(5, 3, lengths=4)
    step = Step(nn.Identity(), targets=soft, index=torch.tensor([0, 3]))
    method.on_batch(step)
    assert "valid" not in step.extra
    torch.testing.assert_close(step.targets, soft)


# Mixed inputs


def mixed_step(rows=4):
    generator = torch.Generator().manual_seed(5)
    step = Step(
        nn.Identity(), inputs=X[:rows], targets=Y[:rows], index=torch.arange(rows), generator=generator, epochs=1
    )
    return step


def test_behind_mixup_the_rows_of_both_partners_are_mixed():
    past = torch.rand(4, 4, generator=torch.Generator().manual_seed(1)).softmax(1)
    method = with_memory(past)
    step = mixed_step()
    Compose(Mixup(1.0, num_classes=4, per_sample=True), method).on_batch(step)
    own, partner = step.extra["mix"], step.extra["partner"]
    labels = mix(F.one_hot(Y[:4], 4).float(), own, partner)
    torch.testing.assert_close(step.targets, 0.2 * labels + 0.8 * mix(past, own, partner), rtol=0, atol=1e-6)
    # Softening first and mixing afterwards is the same.
    other = mixed_step()
    Compose(method, Mixup(1.0, num_classes=4, per_sample=True)).on_batch(other)
    torch.testing.assert_close(other.targets, step.targets, rtol=0, atol=1e-6)


def test_a_pair_of_which_one_was_never_visited_keeps_its_mixed_label():
    method = ProgressiveSelfDistillation(4, 4)
    method.memory.write(torch.tensor([0]), torch.tensor([[0.1, 0.2, 0.3, 0.4]]))
    step = mixed_step()
    Mixup(1.0, num_classes=4).on_batch(step)
    before = step.targets.clone()
    method.on_batch(step)
    torch.testing.assert_close(step.targets, before, rtol=0, atol=1e-7)


def test_tokens_of_two_sequences_are_not_mixed():
    method = ProgressiveSelfDistillation(4, 3, lengths=2)
    extra = {"partner": torch.tensor([1, 0]), "mix": torch.tensor([0.6, 0.6])}
    step = Step(nn.Identity(), targets=torch.rand(2, 2, 3).softmax(-1), index=torch.tensor([0, 1]), extra=extra)
    with pytest.raises(ValueError, match="the tokens of two sequences do not correspond"):
        method.on_batch(step)


# In the loop


@pytest.mark.parametrize("parts", [2, 4])
def test_gradients_do_not_depend_on_how_a_batch_is_cut(parts):
    whole, cut = (ProgressiveSelfDistillation(64, 4) for _ in range(2))
    a = train(Compose(whole, SharpnessAwareMinimization(0.05))).model
    b = train(Compose(cut, SharpnessAwareMinimization(0.05)), accumulation=parts).model
    torch.testing.assert_close(flat(a), flat(b), rtol=0, atol=1e-6)
    torch.testing.assert_close(whole.memory.values.rows, cut.memory.values.rows, rtol=0, atol=1e-6)


def test_a_loss_for_hard_labels_behind_it_says_so():
    with pytest.raises(ValueError, match="targets must be integer classes"):
        train(Compose(ProgressiveSelfDistillation(64, 4), GeneralizedCrossEntropy()), epochs=1)


def test_the_class_branch_of_a_dict_is_softened_alone():
    method = ProgressiveSelfDistillation(6, 5, 1.0, output_key="classes", target_key="labels")
    _, past, labels = draw(dtype=torch.float32)
    method.memory.write(torch.arange(6), past)
    targets = {"labels": labels, "boxes": torch.rand(6, 4)}
    step = Step(nn.Identity(), targets=targets, index=torch.arange(6))
    method.on_batch(step)
    assert step.targets["boxes"] is targets["boxes"]
    assert targets["labels"] is labels
    torch.testing.assert_close(step.targets["labels"], past)
    step.outputs = {"classes": torch.zeros(6, 5), "boxes": torch.zeros(6, 4)}
    method.on_backward(step)
    torch.testing.assert_close(method.memory.read(torch.arange(6)), torch.full((6, 5), 0.2))
    with pytest.raises(
        TypeError, match=r"output_key: the model's outputs hold no tensor 'classes'; they are \['boxes'\]"
    ):
        method.head.logits({"boxes": torch.zeros(6, 4)})
    with pytest.raises(TypeError, match=r"target_key: the targets hold no tensor 'labels'; they are \['boxes'\]"):
        method.head.targets({"boxes": torch.zeros(6, 4)})


@pytest.mark.parametrize(
    "make",
    [
        lambda: ProgressiveSelfDistillation(64, 4),
        lambda: ProgressiveSelfDistillation(64, 4, refresh="epoch", schedule="step"),
        lambda: ProgressiveSelfDistillation(64, 4, top_k=2, dtype=torch.float16),
        lambda: Compose(Mixup(0.4, num_classes=4), ProgressiveSelfDistillation(64, 4)),
    ],
)
def test_an_interrupted_run_continues_bit_for_bit(make, tmp_path):
    def interrupted(step, entry):
        if entry["epoch"] == 3:
            raise KeyboardInterrupt

    whole, killed, resumed = make(), make(), make()
    expected = train(whole, noisy_network(), epochs=4)
    path = tmp_path / "run.ckpt"
    with pytest.raises(KeyboardInterrupt):
        train(killed, noisy_network(), epochs=4, checkpoint=path, on_epoch_end=interrupted)
    found = train(resumed, noisy_network(), epochs=4, checkpoint=path)
    assert torch.equal(flat(found.model), flat(expected.model))
    assert [e["loss"] for e in found.history] == [e["loss"] for e in expected.history]
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_a_plain_loop_continues_bit_for_bit_from_the_state_dict():
    def run(criterion, logits, epochs):
        losses = []
        for epoch in epochs:
            criterion.set_epoch(epoch)
            losses.append(criterion(logits[epoch], torch.arange(6) % 5, torch.arange(6)))
        return torch.stack(losses)

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 6, 5, generator=generator)
    for refresh in ("visit", "epoch"):
        make = partial(ProgressiveSelfDistillation, 6, 5, epochs=4, refresh=refresh)
        first, second = make(), make()
        expected = run(make(), logits, range(4))
        before = run(first, logits, range(2))
        second.load_state_dict(first.state_dict())
        assert torch.equal(torch.cat([before, run(second, logits, range(2, 4))]), expected)


SCRIPT = """
    import sys
    sys.path[:0] = [{support!r}]
    import torch
    import torch.distributed as dist
    from functools import partial
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
    from doubles import data, smooth_network
    from wellposed import IndexedDataset, fit
    from wellposed.losses import ProgressiveSelfDistillation

    rank, folder = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    X, Y = data()
    dataset = IndexedDataset(TensorDataset(X, Y))

    class Joined:
        "What the two ranks see, in the batches of one process."
        def __init__(self):
            self.samplers = [DistributedSampler(dataset, 2, r, seed=5) for r in range(2)]
        def __len__(self):
            return 4
        def set_epoch(self, epoch):
            for s in self.samplers:
                s.set_epoch(epoch)
        def __iter__(self):
            first, second = (list(s) for s in self.samplers)
            for k in range(0, 32, 8):
                index = torch.tensor(first[k:k + 8] + second[k:k + 8])
                yield X[index], Y[index], index

    def run(loader, name):
        tables = {{}}
        for kind, options in {{"dense": {{}}, "top": {{"top_k": 2, "dtype": torch.float16, "refresh": "epoch"}}}}.items():
            method = ProgressiveSelfDistillation(64, 4, **options)
            sgd = partial(torch.optim.SGD, lr=0.1)
            model = fit(smooth_network(), loader, epochs=3, regularizer=method, optimizer=sgd).model
            tables[kind] = method.memory.read(torch.arange(64))
            tables[kind + " weights"] = torch.cat([p.detach().flatten() for p in model.parameters()])
        torch.save(tables, f"{{folder}}/{{name}}.pt")

    dist.init_process_group("gloo", init_method=f"file://{{folder}}/meet", rank=rank, world_size=2)
    run(DataLoader(dataset, batch_size=8, sampler=DistributedSampler(dataset, seed=5)), f"rank{{rank}}")
    dist.destroy_process_group()
    if rank == 0:
        run(Joined(), "single")
"""


def test_two_ranks_with_a_distributed_sampler_hold_the_memory_of_one_process(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(textwrap.dedent(SCRIPT).format(support=str(Path(__file__).parents[1] / "support")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script)]
    runs = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for run in runs:
        _, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors
    first, second, single = (torch.load(tmp_path / f"{name}.pt") for name in ("rank0", "rank1", "single"))
    for name, value in single.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-6 if name.startswith("dense") else 1e-3)


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 1.2}, r"alpha must be in \[0, 1\], got 1.2"),
        ({"alpha": Hyperparameter(0.5, 0.0, 2.0)}, r"alpha must be in \[0, 1\], got a Hyperparameter"),
        ({"num_examples": 0}, "num_examples must be >= 1, got 0"),
        ({"num_classes": 1}, "num_classes must be >= 2, got 1"),
        ({"epochs": 0}, "epochs must be an integer >= 1 or None, got 0"),
        ({"schedule": "cosine"}, "schedule must be 'epoch', 'step' or 'constant', got 'cosine'"),
        ({"refresh": "never"}, "refresh must be 'visit' or 'epoch', got 'never'"),
        ({"top_k": 3}, r"top_k must lie in \[1, 2\] or be None, got 3"),
        ({"lengths": torch.tensor([1, -1, 1, 1])}, r"lengths must hold .* of each of 4 examples"),
        ({"lengths": torch.tensor([1, 1])}, r"lengths must hold .* got shape \(2,\)"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(arguments, message):
    from jaxtyping import config

    config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match=message):
            ProgressiveSelfDistillation(**{"num_examples": 4, "num_classes": 2, **arguments})
    finally:
        config.update("jaxtyping_disable", False)


def test_inputs_that_do_not_fit_are_refused_by_name():
    criterion = ProgressiveSelfDistillation(4, 2, epochs=1)
    good, labels, index = torch.zeros(2, 2), torch.tensor([0, 1]), torch.tensor([0, 3])
    with pytest.raises(ValueError, match=r"logits must have shape \(batch, 2\), got \(2, 3\)"):
        criterion.store(torch.zeros(2, 3), index)
    with pytest.raises(ValueError, match=r"index must lie in \[0, 4\), got 4"):
        criterion(good, labels, torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="index is missing"):
        criterion(good, labels)
    with pytest.raises(ValueError, match=r"targets must lie in \[0, 2\) or be -100, got 2"):
        criterion(good, torch.tensor([0, 2]), index)
    with pytest.raises(ValueError, match=r"targets must lie in \[0, 2\) or be -100, got -1"):
        criterion.soften(torch.tensor([0, -1]), index)
    with pytest.raises(ValueError, match=r"got \(2, 3\); for sequences pass lengths="):
        criterion.soften(torch.zeros(2, 3, dtype=torch.int64), index)
    with pytest.raises(ValueError, match=r"probabilities of shape \(2, 2\), got torch.float32 of shape \(2, 3\)"):
        criterion.soften(torch.zeros(2, 3), index)
    with pytest.raises(ValueError, match=r"epochs is missing.*pass epochs=, or schedule='constant'"):
        ProgressiveSelfDistillation(4, 2)(good, labels, index)
    with pytest.raises(ValueError, match="step.index is missing"):
        criterion.on_batch(Step(nn.Identity(), targets=labels))
    words = ProgressiveSelfDistillation(4, 2, lengths=2, schedule="constant")
    with pytest.raises(ValueError, match="example 3 has 3 target tokens, but lengths gives it 2"):
        words.soften(torch.zeros(1, 3, dtype=torch.int64), torch.tensor([3]))
    with pytest.raises(ValueError, match=r"with lengths, targets must be classes \(batch, length\)"):
        words.soften(torch.zeros(2, dtype=torch.int64), index)
    with pytest.raises(ValueError, match=r"logits must have shape \(batch, length, 2\), got \(2, 2\)"):
        words.store(good, index)
    with pytest.raises(ValueError, match=r"index must lie in \[0, 4\), got 1 to 4"):
        words.soften(torch.zeros(2, 2, dtype=torch.int64), torch.tensor([1, 4]))


def test_a_checkpoint_of_another_data_set_is_refused():
    with pytest.raises(RuntimeError, match="the checkpoint holds 4 rows"):
        ProgressiveSelfDistillation(5, 2).load_state_dict(ProgressiveSelfDistillation(4, 2).state_dict())


def test_a_label_that_is_ignored_gives_no_loss_and_no_gradient():
    logits, past, labels = draw(dtype=torch.float32)
    labels[2] = -100
    logits.requires_grad_()
    loss = with_memory(past)(logits, labels, torch.arange(6))
    kept = labels != -100
    soft = progressive_targets(labels[kept], past[kept], 0.8)
    torch.testing.assert_close(loss, F.cross_entropy(logits[kept], soft))
    loss.backward()
    assert not logits.grad[2].any()


def test_alpha_may_be_a_hyperparameter():
    _, past, labels = draw(dtype=torch.float32)
    alpha = Hyperparameter(0.8, 0.0, 1.0)
    soft = with_memory(past, alpha=alpha).soften(labels, torch.arange(6))
    torch.testing.assert_close(soft, with_memory(past).soften(labels, torch.arange(6)))
    assert alpha.name == "ProgressiveSelfDistillation.alpha"
    train(ProgressiveSelfDistillation(64, 4, Hyperparameter(0.5, 0.0, 1.0)), epochs=2)


def test_mixed_precision_trains_and_stores_float32_probabilities():
    method = ProgressiveSelfDistillation(64, 4)
    train(method, amp=torch.bfloat16)
    torch.testing.assert_close(method.memory.values.rows.sum(1), torch.ones(64), rtol=0, atol=1e-6)


def test_a_micro_batch_is_evaluated_against_targets_of_the_whole_pool():
    method = with_memory(torch.rand(64, 4).softmax(1))
    model = smooth_network()
    step = Step(model, inputs=X[:10], targets=Y[:10], index=torch.arange(10), epoch=1, epochs=2)
    soft = method.soften(Y[:10], torch.arange(10))
    method.on_batch(step)
    torch.testing.assert_close(step.targets, soft)
    Accumulation(step, method, cross_entropy, parts=3).run()
    expected = torch.autograd.grad(F.cross_entropy(model(X[:10]), soft), list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_an_accelerator_it_ends_as_on_the_cpu():
    tables = []
    for device in ("cpu", "cuda"):
        method = ProgressiveSelfDistillation(64, 4, top_k=3)
        train(method, device=device)
        tables.append(method.memory.read(torch.arange(64)))
    torch.testing.assert_close(tables[0], tables[1], rtol=0, atol=1e-4)
