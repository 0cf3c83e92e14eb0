"""The training loss under a method, as tuners see it: hooks, random numbers, modes, buffers."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from wellposed import BilevelProblem, Compose, Hyperparameter, Regularizer, TensorLoader, fit
from wellposed.gradients import SharpnessAwareMinimization
from wellposed.losses import EarlyLearning, LabelSmoothing, Mixup, ProgressiveSelfDistillation
from wellposed.objective import cross_entropy
from wellposed.weights import WeightDecay


class Holding(nn.Module):
    """A network that also holds a hyperparameter, without reading it."""

    def __init__(self, body, strength):
        super().__init__()
        self.body, self.held = body, strength

    def forward(self, x):
        return self.body(x)


def batch(n=6, features=4, classes=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, features, generator=generator), torch.arange(n) % classes, torch.arange(n)


def network(*more):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), *more, nn.ReLU(), nn.Linear(8, 3))


def test_a_strength_that_acts_on_the_targets_has_a_derivative():
    alpha = Hyperparameter(0.5, 0.0, 1.0)
    method = ProgressiveSelfDistillation(6, 3, alpha, schedule="constant")
    problem = BilevelProblem.from_regularizer(network(), method, cross_entropy)
    sample = batch()
    problem.inner_grad(sample)
    problem.write_state()  # the memory is full from here on, so that the past has a share
    raw = problem.raw()
    value = problem.evaluate(problem.inner_loss, problem.params, raw, sample)
    plain = problem.evaluate(problem.outer_loss, problem.params, raw, sample)
    assert abs(float(value.detach() - plain.detach())) > 1e-4
    assert float(torch.autograd.grad(value, raw["alpha"])[0].abs()) > 1e-4


def test_a_schedule_sees_the_loops_clock():
    method = ProgressiveSelfDistillation(6, 3, Hyperparameter(0.8, 0.0, 1.0), schedule="epoch")
    problem = BilevelProblem.from_regularizer(network(), method, cross_entropy)
    sample = batch()
    problem.clock.epochs = 4
    problem.objective.on_epoch()
    problem.inner_grad(sample)
    problem.write_state()

    def share(epoch):
        problem.clock.epoch = epoch
        problem.objective.on_epoch()
        raw = problem.raw()
        return float(problem.evaluate(problem.inner_loss, problem.params, raw, sample).detach())

    first, last = share(1), share(3)
    assert first != last


def test_evaluations_draw_the_same_numbers_until_begin():
    problem = BilevelProblem.from_regularizer(
        network(), Compose(WeightDecay(Hyperparameter(0.1)), Mixup(1.0, num_classes=3)), cross_entropy
    )
    sample, raw = batch(), problem.raw()

    def value():
        return float(problem.evaluate(problem.inner_loss, problem.params, raw, sample).detach())

    first = value()
    assert value() == first
    problem.begin()
    assert value() != first
    # The batch itself is never changed: a second epoch must find it as it was.
    assert torch.equal(sample[0], batch()[0])


def test_validation_runs_in_evaluation_mode_and_oracles_keep_running_statistics():
    model = network(nn.BatchNorm1d(8), nn.Dropout(0.5))
    problem = BilevelProblem.from_regularizer(model, WeightDecay(Hyperparameter(0.1)), cross_entropy)
    sample = batch()
    before = model[1].running_mean.clone()
    vector = {n: torch.ones_like(p) for n, p in problem.params.items()}
    problem.second_derivatives(vector, sample)
    values = {float(problem.outer_grads(sample)[0]) for _ in range(3)}
    assert len(values) == 1  # no dropout
    assert torch.equal(model[1].running_mean, before)
    assert model.training
    problem.inner_grad(sample)
    assert not torch.equal(model[1].running_mean, before)


def test_tables_are_written_when_the_tuner_says_so_and_only_then():
    method = EarlyLearning(6, 3, Hyperparameter(1.0))
    problem = BilevelProblem.from_regularizer(network(), method, cross_entropy)
    table = copy.deepcopy(method.state_dict())
    sample = batch()
    vector = {n: torch.ones_like(p) for n, p in problem.params.items()}
    problem.inner_grad(sample)
    problem.hvp(vector, sample)
    assert all(torch.equal(v, table[k]) for k, v in method.state_dict().items() if isinstance(v, torch.Tensor))
    problem.write_state()
    assert any(not torch.equal(v, table[k]) for k, v in method.state_dict().items() if isinstance(v, torch.Tensor))
    problem.on_step()
    with pytest.raises(RuntimeError, match="no training evaluation was made yet"):
        problem.write_state()


def test_a_sharpness_aware_step_under_a_tuner_equals_the_one_in_fit():
    """`on_gradients` with its closure: the same perturbation, the same dropout masks."""
    inputs, targets, index = batch()
    loader = TensorLoader(inputs, targets, batch_size=6)

    def method():
        return Compose(SharpnessAwareMinimization(0.3), WeightDecay(Hyperparameter(0.01)))

    fitted = fit(
        network(nn.Dropout(0.5)), loader, epochs=1, regularizer=method(), seed=3,
        optimizer=partial(torch.optim.SGD, lr=0.1),
    ).model  # fmt: skip

    model = network(nn.Dropout(0.5))
    problem = BilevelProblem.from_regularizer(model, method(), cross_entropy)
    raw = {n: u.detach() for n, u in problem.raw().items()}
    torch.manual_seed(3)

    def evaluate():
        return problem.evaluate(problem.inner_loss, problem.params, raw, (inputs, targets, index))

    evaluate().backward()
    problem.write_state()
    problem.on_gradients(evaluate)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for a, b in zip(fitted.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_strength_held_twice_is_one_hyperparameter():
    class Holder(Regularizer):
        def __init__(self, strength):
            super().__init__()
            self.strength = strength

    strength = Hyperparameter(0.5)
    problem = BilevelProblem.from_regularizer(Holding(network(), strength), Holder(strength), cross_entropy)
    assert list(problem.hypers) == ["strength"]


def test_what_the_loss_does_not_read_is_refused_by_name():
    smoothing, unread = Hyperparameter(0.1, 0.0, 0.5), Hyperparameter(1.0)
    problem = BilevelProblem.from_regularizer(Holding(network(), unread), LabelSmoothing(smoothing), cross_entropy)
    vector = {n: torch.ones_like(p) for n, p in problem.params.items()}
    with pytest.raises(ValueError, match=r"no derivative in the hyperparameter 'held'.*SelfTuner can"):
        problem.mixed_vjp(vector, batch())


def test_a_discrete_hyperparameter_is_refused_by_the_oracles():
    class Count(Regularizer):
        def __init__(self):
            super().__init__()
            self.count = Hyperparameter(2.5, 0.0, 5.0, discrete=True)

        def penalty(self, step):
            return self.count() * step.model[0].weight.square().sum()

    problem = BilevelProblem.from_regularizer(network(), Count(), cross_entropy)
    vector = {n: torch.ones_like(p) for n, p in problem.params.items()}
    with pytest.raises(ValueError, match="no derivative in the hyperparameter 'count'"):
        problem.second_derivatives(vector, batch())


def test_its_state_continues_the_random_numbers_and_the_method():
    def problem():
        method = Compose(EarlyLearning(6, 3, Hyperparameter(1.0)), Mixup(1.0, num_classes=3))
        return BilevelProblem.from_regularizer(network(), method, cross_entropy, seed=5)

    def losses(p, n):
        found = []
        for _ in range(n):
            value, _ = p.inner_value_and_grad(batch())
            p.write_state()
            p.on_step()
            found.append(float(value))
        return found

    whole = losses(problem(), 4)
    first = problem()
    assert losses(first, 2) == whole[:2]
    second = problem()
    second.objective.load_run_state(first.objective.run_state())
    assert losses(second, 2) == whole[2:]
