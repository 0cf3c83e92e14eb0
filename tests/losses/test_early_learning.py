"""ELR against its formulas, an independent port of the reference, and the invariants of its memory."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from wellposed import Hyperparameter, Step
from wellposed.losses import EarlyLearning, early_learning_penalty


def draw(rows=6, classes=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, classes, generator=generator, dtype=dtype)
    memory = torch.rand(rows, classes, generator=generator, dtype=dtype)
    memory = 0.9 * memory / memory.sum(1, keepdim=True)
    return logits, memory, torch.randint(0, classes, (rows,), generator=generator)


def test_strength_zero_and_an_empty_memory_give_cross_entropy():
    logits, _, labels = draw(dtype=torch.float32)
    index = torch.arange(6)
    loss = EarlyLearning(6, 5, strength=0.0)(logits, labels, index)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels), rtol=0, atol=1e-7)
    assert torch.equal(early_learning_penalty(logits, torch.zeros(6, 5)), torch.zeros(6))


@pytest.mark.parametrize("classes", [2, 10, 100])
@pytest.mark.parametrize("strength", [1.0, 3.0, 7.0])
def test_the_gradient_is_that_of_lemma_2(classes, strength):
    logits, t, labels = draw(20, classes, seed=classes)
    logits.requires_grad_()
    (
        F.cross_entropy(logits, labels, reduction="none") + strength * early_learning_penalty(logits, t, None)
    ).sum().backward()
    p = logits.detach().softmax(1)
    inner = (p * t).sum(1, keepdim=True)
    g = p * (inner - t) / (1 - inner)
    expected = p - F.one_hot(labels, classes) + strength * g
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=1e-12)
    assert g.sum(1).abs().max() < 1e-12


def test_the_stable_form_equals_the_naive_one_and_survives_saturation():
    logits, t, _ = draw()
    naive = torch.log(1 - (logits.softmax(1) * t).sum(1))
    torch.testing.assert_close(early_learning_penalty(logits, t, None), naive, rtol=0, atol=1e-12)
    certain = torch.tensor([[80.0, 0.0, 0.0]], requires_grad=True)
    value = early_learning_penalty(certain, torch.tensor([[1.0, 0.0, 0.0]]), None)
    value.sum().backward()
    assert float(value) == pytest.approx(-80 + math.log(2), abs=1e-4)
    assert torch.isfinite(certain.grad).all()
    logits, t, _ = draw(3, 4)
    assert torch.autograd.gradcheck(lambda z: early_learning_penalty(z, t[:3], None), logits.requires_grad_())


@pytest.mark.parametrize(("classes", "floor"), [(2, -8.5173), (10, -6.9087), (100, -4.6150)])
def test_the_clamp_ends_the_push_and_bounds_the_penalty(classes, floor):
    logits = torch.zeros(1, classes, dtype=torch.float64)
    logits[0, 0] = 60.0
    logits.requires_grad_()
    e = 1e-4
    q = torch.full((1, classes), e, dtype=torch.float64)
    q[0, 0] = 1 - e
    value = early_learning_penalty(logits, q / q.sum())
    assert float(value) == pytest.approx(
        math.log(1 - ((1 - e) ** 2 + (classes - 1) * e**2) / (1 + (classes - 2) * e)), abs=1e-6
    )
    assert float(value) == pytest.approx(floor, abs=1e-3)
    value.sum().backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_the_memory_is_a_running_average_without_bias_correction():
    method = EarlyLearning(4, 3, momentum=0.7)
    logits, labels, index = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([0]), torch.tensor([2])
    for visits in range(1, 6):
        method(logits, labels, index)
        torch.testing.assert_close(
            method.soft_targets()[2], (1 - 0.7**visits) * logits.softmax(1)[0], rtol=0, atol=1e-6
        )
    assert torch.equal(method.soft_targets()[[0, 1, 3]], torch.zeros(3, 3))


def test_bias_correction_makes_every_memory_sum_to_one():
    method = EarlyLearning(2, 3, bias_correction=True)
    step = Step(
        torch.nn.Identity(), targets=torch.tensor([0]), index=torch.tensor([1]), outputs=torch.tensor([[1.0, 0.0, 0.0]])
    )
    for _ in range(3):
        penalty = method.penalty(step)
        method.on_backward(step)
    p = step.outputs.softmax(1)
    torch.testing.assert_close(penalty / 3.0, early_learning_penalty(step.outputs, p), rtol=0, atol=1e-6)


def test_an_independent_port_of_the_reference_agrees_over_fifty_steps():
    torch.manual_seed(0)
    rows, classes = 20, 4
    table = torch.zeros(rows, classes)
    method = EarlyLearning(rows, classes, strength=3.0, momentum=0.7)
    for _ in range(50):
        index = torch.randperm(rows)[:8]
        logits, labels = torch.randn(8, classes), torch.randint(0, classes, (8,))
        clipped = torch.clamp(F.softmax(logits, dim=1), 1e-4, 1.0 - 1e-4)
        table[index] = 0.7 * table[index] + 0.3 * (clipped / clipped.sum(dim=1, keepdim=True))
        expected = F.cross_entropy(logits, labels) + 3.0 * (1 - (table[index] * clipped).sum(dim=1)).log().mean()
        torch.testing.assert_close(method(logits, labels, index), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(method.soft_targets(), table, rtol=0, atol=1e-6)


def test_without_momentum_the_penalty_is_a_function_of_the_prediction_alone():
    with pytest.warns(UserWarning, match="remembers too little"):
        method = EarlyLearning(6, 5, strength=1.0, momentum=0.0, clamp=None)
    logits, _, labels = draw(dtype=torch.float32)
    step = Step(torch.nn.Identity(), targets=labels, index=torch.arange(6), outputs=logits)
    torch.testing.assert_close(
        method.penalty(step), torch.log(1 - logits.softmax(1).square().sum(1)), rtol=0, atol=1e-6
    )


@given(st.integers(0, 10**6))
def test_the_order_of_a_batch_and_the_names_of_classes_do_not_matter(seed):
    logits, _, labels = draw(seed=seed, dtype=torch.float32)
    index, generator = torch.arange(6), torch.Generator().manual_seed(seed)
    order, rename = torch.randperm(6, generator=generator), torch.randperm(5, generator=generator)
    plain, shuffled, renamed = (EarlyLearning(6, 5) for _ in range(3))
    loss = plain(logits, labels, index)
    torch.testing.assert_close(loss, shuffled(logits[order], labels[order], index[order]), rtol=0, atol=1e-5)
    torch.testing.assert_close(plain.soft_targets(), shuffled.soft_targets(), rtol=0, atol=1e-6)
    torch.testing.assert_close(loss, renamed(logits[:, rename], rename.argsort()[labels], index), rtol=0, atol=1e-5)
    torch.testing.assert_close(plain.soft_targets()[:, rename], renamed.soft_targets(), rtol=0, atol=1e-6)


def test_a_strength_above_one_overrules_a_wrong_label():
    p0 = torch.linspace(0.001, 0.999, 99, dtype=torch.float64)
    logits = torch.stack([p0.log(), (1 - p0).log()], 1).requires_grad_()
    memory, wrong = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(99, 2), torch.ones(99, dtype=torch.int64)
    (
        F.cross_entropy(logits, wrong, reduction="none") + 3 * early_learning_penalty(logits, memory, None)
    ).sum().backward()
    assert (logits.grad[:, 0] <= 1e-12).all()
    torch.testing.assert_close(logits.grad[:, 0], p0 * (1 - 3), rtol=0, atol=1e-12)


def test_evaluation_is_cross_entropy_and_writes_nothing():
    method = EarlyLearning(6, 5)
    logits, _, labels = draw(dtype=torch.float32)
    method(logits, labels, torch.arange(6))
    before = method.soft_targets().clone()
    loss = method.eval()(logits, labels, torch.arange(6))
    assert torch.equal(loss, F.cross_entropy(logits, labels, reduction="none").mean())
    assert torch.equal(before, method.soft_targets())


def test_the_memory_carries_no_graph_and_is_saved():
    method = EarlyLearning(6, 5)
    logits, _, labels = draw(dtype=torch.float32)
    logits.requires_grad_()
    loss = method(logits, labels, torch.arange(6)) + method(logits, labels, torch.arange(6))
    loss.backward()
    assert not method.table.rows.requires_grad
    twin = EarlyLearning(6, 5)
    twin.load_state_dict(method.state_dict())
    with torch.no_grad():
        assert torch.equal(method(logits, labels, torch.arange(6)), twin(logits, labels, torch.arange(6)))


def test_label_issues_names_visited_rows_that_the_memory_disagrees_with():
    method = EarlyLearning(3, 2)
    method(torch.tensor([[3.0, 0.0], [3.0, 0.0]]), torch.tensor([0, 1]), torch.tensor([0, 1]))
    assert method.label_issues(torch.tensor([0, 1, 1])).tolist() == [False, True, False]
    with pytest.raises(ValueError, match=r"labels must have shape \(3,\), got \(2,\)"):
        method.label_issues(torch.tensor([0, 1]))


def test_rows_of_a_skipped_step_are_not_stored():
    method = EarlyLearning(3, 2, bias_correction=True)
    step = Step(
        torch.nn.Identity(), targets=torch.tensor([0, 1]), index=torch.tensor([0, 1]),
        outputs=torch.tensor([[float("inf"), 0.0], [1.0, 0.0]]),
    )  # fmt: skip
    method.on_backward(step)
    assert method.table.visited.tolist() == [False, True, False]
    assert method.visits_table.rows.tolist() == [0.0, 1.0, 0.0]


def test_a_mixed_example_shares_the_memory_of_its_partner():
    method = EarlyLearning(2, 2, strength=1.0, clamp=None)
    method.table.write(torch.tensor([0, 1]), torch.tensor([[0.9, 0.0], [0.0, 0.5]]))
    logits = torch.tensor([[0.5, -0.5]])
    step = Step(
        torch.nn.Identity(), targets=torch.tensor([[1.0, 0.0]]), index=torch.tensor([0]), outputs=logits,
        extra={"partner": torch.tensor([1]), "mix": torch.tensor([0.75])},
    )  # fmt: skip
    own = 0.7 * torch.tensor([[0.9, 0.0]]) + 0.3 * logits.softmax(1)
    memory = 0.75 * own + 0.25 * torch.tensor([[0.0, 0.5]])
    torch.testing.assert_close(method.penalty(step), early_learning_penalty(logits, memory, None))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": -1.0}, "strength must be >= 0, got -1.0"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\), got 1.0"),
        ({"eps": 0.6}, r"eps must lie in \(0, 1/num_classes\)"),
        ({"num_examples": 0}, "num_examples must be >= 1, got 0"),
        ({"num_classes": 1}, "num_classes must be >= 2, got 1"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=f"EarlyLearning: {message}"):
        EarlyLearning(**{"num_examples": 4, "num_classes": 2, **arguments})


def test_inputs_that_do_not_fit_are_refused_by_name():
    method = EarlyLearning(4, 2)
    good, labels = torch.zeros(2, 2), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"logits must have shape \(batch, 2\), got \(2, 3\)"):
        method(torch.zeros(2, 3), labels, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"index must lie in \[0, 4\), got 4"):
        method(good, labels, torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="soft targets must sum to 1"):
        method(good, torch.zeros(2, 2), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"step.index is missing"):
        method.penalty(Step(torch.nn.Identity(), outputs=good, targets=labels))


@given(
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]), st.integers(1, 4), st.integers(2, 6)
)
def test_any_dtype_and_shape(dtype, rows, classes):
    method = EarlyLearning(8, classes, dtype=torch.float16)
    loss = method(torch.zeros(rows, classes, dtype=dtype), torch.zeros(rows, dtype=torch.int64), torch.arange(rows))
    assert torch.isfinite(loss)


def test_the_strength_may_be_a_hyperparameter():
    strength = Hyperparameter(3.0)
    method = EarlyLearning(6, 5, strength)
    logits, _, labels = draw(dtype=torch.float32)
    torch.testing.assert_close(
        method(logits, labels, torch.arange(6)), EarlyLearning(6, 5, 3.0)(logits, labels, torch.arange(6))
    )
    assert strength.name == "EarlyLearning.strength"


@pytest.mark.slow
def test_in_the_linear_model_elr_keeps_the_truth_where_cross_entropy_and_strength_one_memorise():
    def final(strength, sigma):
        torch.manual_seed(0)
        v = F.normalize(torch.randn(100), dim=0)
        s = torch.randint(0, 2, (130,)) * 2 - 1
        x = s[:, None] * v + sigma * torch.randn(130, 100)
        true = (s > 0).long()
        wrong = torch.rand(130) < 0.4
        labels = torch.where(wrong, 1 - true, true)
        theta = 2 * F.normalize(torch.randn(200), dim=0).reshape(100, 2)
        theta.requires_grad_()
        method = EarlyLearning(130, 2, strength)
        for _ in range(20_000):
            loss = method(x @ theta, labels, torch.arange(130))
            (g,) = torch.autograd.grad(loss, theta)
            with torch.no_grad():
                theta -= 0.5 * g
        return float(((x @ theta).argmax(1) == true)[wrong].float().mean())

    assert final(0.0, 0.2) <= 0.05
    assert final(3.0, 0.2) >= 0.85
    assert final(1.0, 0.3) <= 0.05
