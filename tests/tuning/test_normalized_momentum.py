"""Normalised momentum: the length of a step, indifference to scale, groups, and a life with torch's schedulers."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from wellposed.tuning import NormalizedMomentum
from wellposed.tuning.normalized_momentum import apply_step, joint_norm, momentum_average, step_factor


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def trained(optimizer_of, steps=5, scale=1.0):
    model = network()
    optimizer = optimizer_of(model)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        (scale * model(torch.randn(8, 3, generator=generator)).square().mean()).backward()
        optimizer.step()
    return model, optimizer


@given(
    scale=st.floats(1e-4, 1e6),
    beta=st.sampled_from([0.0, 0.5, 0.9]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_every_step_has_the_length_lr_whatever_the_gradient(scale, beta, dtype):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.zeros(s, dtype=dtype, requires_grad=True) for s in ((3, 2), (4,), ())]
    optimizer = NormalizedMomentum(tensors, lr=0.1, beta=beta)
    for _ in range(3):
        before = [t.detach().clone() for t in tensors]
        for t in tensors:
            t.grad = scale * torch.randn(t.shape, generator=generator, dtype=dtype)
        optimizer.step()
        moved = joint_norm([t.detach() - b for t, b in zip(tensors, before, strict=True)])
        assert abs(float(moved) / 0.1 - 1) < (1e-5 if dtype == torch.float32 else 1e-6)


def test_for_one_number_it_is_sign_descent_with_momentum():
    x = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer, momentum = NormalizedMomentum([x], lr=0.25, beta=0.5), 0.0
    for gradient in (3.0, -1.0, -4.0, 1e5):
        before = x.item()
        x.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        momentum = 0.5 * momentum + 0.5 * gradient
        assert x.item() - before == pytest.approx(-0.25 * (1 if momentum > 0 else -1), rel=1e-9)


def test_the_path_does_not_depend_on_the_scale_of_the_loss():
    small, _ = trained(lambda m: NormalizedMomentum(m.parameters(), lr=0.05), scale=1e-2)
    large, _ = trained(lambda m: NormalizedMomentum(m.parameters(), lr=0.05), scale=1e4)
    for a, b in zip(small.parameters(), large.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_one_norm_for_all_groups_or_one_for_each():
    def lengths(group_norm):
        a, b = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
        optimizer = NormalizedMomentum([{"params": [a], "lr": 0.1}, {"params": [b]}], lr=1.0, group_norm=group_norm)
        a.grad, b.grad = torch.tensor([1e-3, 0.0]), torch.tensor([0.0, 10.0])
        optimizer.step()
        return float(a.detach().norm()), float(b.detach().norm())

    assert lengths(True) == pytest.approx((0.1, 1.0), rel=1e-5)
    assert lengths(False) == pytest.approx((1e-5, 1.0), rel=1e-3)


def test_a_zero_gradient_moves_nothing_and_parameters_without_gradient_stay():
    x, other = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = NormalizedMomentum([x, other], lr=0.1)
    optimizer.step()
    x.grad = torch.zeros(3)
    optimizer.step()
    assert torch.equal(x, torch.ones(3)) and torch.equal(other, torch.ones(2))
    assert other not in optimizer.state


def test_half_precision_parameters_keep_momentum_and_norm_in_float32():
    x = torch.zeros(4, dtype=torch.float16, requires_grad=True)
    optimizer = NormalizedMomentum([x], lr=0.5, beta=0.0)
    x.grad = torch.full((4,), 3e4, dtype=torch.float16)  # its square overflows float16
    optimizer.step()
    assert optimizer.state[x]["momentum"].dtype == torch.float32
    torch.testing.assert_close(x.detach(), torch.full((4,), -0.25, dtype=torch.float16))


def test_state_dict_continues_bit_for_bit():
    make = lambda m: NormalizedMomentum(m.parameters(), lr=0.05)  # noqa: E731
    model, optimizer = trained(make)
    other = network()
    other.load_state_dict(model.state_dict())
    resumed = make(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (other, resumed)):
        o.zero_grad()
        m(torch.ones(2, 3)).square().mean().backward()
        o.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_schedulers_and_closures_work_as_for_any_optimizer():
    x = torch.tensor([4.0], requires_grad=True)
    optimizer = NormalizedMomentum([x], lr=0.5, beta=0.0)
    schedule = CosineAnnealingLR(optimizer, 40)

    def closure():
        optimizer.zero_grad()
        loss = (x - 1.0).square().sum()
        loss.backward()
        return loss

    losses = []
    for _ in range(40):
        losses.append(optimizer.step(closure).item())
        schedule.step()
    assert losses[0] == 9.0 and losses[-1] < 1e-3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": 0.0}, "NormalizedMomentum: lr must be > 0, got 0.0"),
        ({"beta": 1.0}, r"beta must lie in \[0, 1\), got 1.0"),
        ({"beta": -0.1}, r"beta must lie in \[0, 1\), got -0.1"),
        ({"eps": 0.0}, "eps must be > 0, got 0.0"),
    ],
)
def test_bad_arguments_are_refused_with_their_value(options, message):
    with pytest.raises(ValueError, match=message):
        NormalizedMomentum([torch.zeros(1, requires_grad=True)], **options)


def test_sparse_gradients_are_refused():
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = NormalizedMomentum(table.parameters(), lr=0.1)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step()


def test_momentum_without_memory_is_the_gradient():
    gradient = [torch.randn(3), torch.randn(2, 2)]
    found = momentum_average([torch.randn(3), torch.randn(2, 2)], gradient, beta=0.0)
    assert all(torch.equal(a, b) for a, b in zip(found, gradient, strict=True))


@given(problems=st.integers(1, 4), size=st.integers(1, 5))
def test_independent_problems_get_what_each_would_get_alone(problems, size):
    generator = torch.Generator().manual_seed(problems + 10 * size)
    direction = [torch.randn(problems, size, generator=generator), torch.randn(problems, generator=generator)]
    together = [torch.zeros(problems, size), torch.zeros(problems)]
    lengths = 0.1 * torch.arange(1.0, problems + 1)
    apply_step(together, direction, lengths * step_factor(joint_norm(direction, independent=1)))
    for i in range(problems):
        alone = [torch.zeros(size), torch.zeros(())]
        own = [d[i] for d in direction]
        apply_step(alone, own, float(lengths[i]) * step_factor(joint_norm(own)))
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a, b[i])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_the_step_is_the_same_on_an_accelerator():
    x = torch.zeros(4, device="cuda", requires_grad=True)
    optimizer = NormalizedMomentum([x], lr=0.1)
    x.grad = torch.arange(4.0, device="cuda")
    optimizer.step()
    torch.testing.assert_close(x.detach().norm().cpu(), torch.tensor(0.1))
