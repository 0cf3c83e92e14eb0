"""Averages of weights: against torch's own AveragedModel, against closed forms, and through a checkpoint."""

from __future__ import annotations

import copy
import functools
import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from wellposed.averaging import (
    WeightAverage,
    constant,
    exponential_moving_average_,
    inverse_ramp,
    sigmoid_decay,
    sigmoid_ramp,
)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))


def perturb(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            noise = torch.randn(tensor.shape, generator=generator).abs()
            tensor.add_(noise.round().to(tensor.dtype) if not tensor.is_floating_point() else noise.to(tensor.dtype))


def same_state(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.state_dict().values(), right.state_dict().values(), strict=True))


@given(decay=st.floats(0, 1), shapes=st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=4))
@settings(deadline=None, max_examples=50)
def test_moving_average_by_its_formula(decay, shapes):
    generator = torch.Generator().manual_seed(0)
    averages = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    expected = [decay * a + (1 - decay) * v for a, v in zip(averages, values, strict=True)]
    exponential_moving_average_(averages, values, decay)
    for a, e in zip(averages, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-14, rtol=1e-12)


def test_moving_average_of_half_precision_weights_keeps_small_updates():
    average = [torch.ones(3)]
    for _ in range(1000):
        exponential_moving_average_(average, [torch.full((3,), 1.0078125, dtype=torch.bfloat16)], 0.999)
    assert average[0].tolist() == pytest.approx([1 + 0.0078125 * (1 - 0.999**1000)] * 3, rel=1e-5)


def test_bad_arguments_of_the_moving_average():
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\], got 1.5"):
        exponential_moving_average_([torch.ones(1)], [torch.ones(1)], 1.5)
    with pytest.raises(ValueError, match="one value an average, got 1 and 0"):
        exponential_moving_average_([torch.ones(1)], [], 0.5)


def test_sigmoid_ramp_at_the_points_of_elr_plus():
    values = [sigmoid_ramp(s, 40_000) for s in (1, 20_000, 40_000, 10**6)]
    assert values[0] == pytest.approx(0.0067396, rel=1e-4)
    assert values[1:] == pytest.approx([math.exp(-1.25), 1.0, 1.0])
    assert sigmoid_ramp(0, 40_000) == pytest.approx(math.exp(-5))


def test_the_first_update_uses_step_two_or_one_half():
    assert sigmoid_decay(1, 0.997, 40_000) == 0.997 * sigmoid_ramp(2, 40_000)
    assert inverse_ramp(1, 0.997) == 0.5
    assert constant(1, 0.997) == 0.997
    assert inverse_ramp(10**6, 0.997) == 0.997


@pytest.mark.parametrize("step, length", [(1, 0), (-1, 5), (1, float("nan"))])
def test_ramp_refuses_impossible_lengths(step, length):
    with pytest.raises(ValueError, match="sigmoid_ramp: need length > 0 and step >= 0"):
        sigmoid_ramp(step, length)


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999])
def test_equals_the_averaged_model_of_torch(decay):
    model = network()
    ours = WeightAverage(model, decay)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    theirs.update_parameters(model)  # its first update copies
    for seed in range(5):
        perturb(model, seed)
        ours.update(model)
        theirs.update_parameters(model)
    averages = ours.averages()
    for name, reference in theirs.module.named_parameters():
        torch.testing.assert_close(averages[name], reference.detach(), atol=1e-6, rtol=1e-6)


def test_inverse_ramp_below_its_ceiling_is_the_plain_mean():
    model = nn.Linear(3, 1)
    average, history = WeightAverage(model, 0.9999, inverse_ramp), [model.weight.detach().clone()]
    for seed in range(6):
        perturb(model, seed)
        history.append(model.weight.detach().clone())
        average.update(model)
    torch.testing.assert_close(average.averages()["weight"], torch.stack(history).mean(0))


@pytest.mark.parametrize("rule", ["copy", "average", "ignore"])
def test_buffers_follow_their_rule(rule):
    model = network()
    start = copy.deepcopy(model)
    average = WeightAverage(model, 0.75, buffers=rule)
    perturb(model, 1)
    average.update(model)
    old, new = start[1].running_mean, model[1].running_mean
    expected = {"copy": new, "average": 0.75 * old + 0.25 * new, "ignore": start[1].running_mean}[rule]
    copied = average.module(start)
    torch.testing.assert_close(copied[1].running_mean, expected)
    counter = start[1] if rule == "ignore" else model[1]  # an integer is never averaged
    assert copied[1].num_batches_tracked == counter.num_batches_tracked


def test_swapped_lends_the_averages_and_gives_the_weights_back_bit_for_bit():
    model = network()
    average = WeightAverage(model, 0.5)
    perturb(model, 1)
    average.update(model)
    before = copy.deepcopy(model)
    expected = average.module(model)
    with average.swapped(model) as lent:
        assert lent is model and same_state(model, expected) and not same_state(model, before)
    assert same_state(model, before)
    with pytest.raises(KeyError), average.swapped(model):
        raise KeyError
    assert same_state(model, before)


def test_module_is_an_independent_copy_without_gradients():
    model = nn.Linear(2, 1)
    model(torch.ones(1, 2)).sum().backward()
    average = WeightAverage(model, 0.5)
    copied = average.module(model)
    assert copied.weight.grad is None and model.weight.grad is not None
    with torch.no_grad():
        copied.weight.zero_()
    assert bool(average.averages()["weight"].any())


def test_only_what_trains_is_kept_and_what_starts_to_train_joins():
    model = network()
    model[0].requires_grad_(False)
    average = WeightAverage(model, 0.5, buffers="ignore")
    assert set(average.averages()) == {"1.weight", "1.bias", "3.weight", "3.bias"}
    model[0].requires_grad_(True)
    model[3].requires_grad_(False)
    average.update(model)
    assert set(average.averages()) == {name for name, _ in model.named_parameters()}
    torch.testing.assert_close(average.averages()["0.weight"], model[0].weight.detach())


def test_state_dict_round_trip_continues_bit_for_bit():
    ramp = functools.partial(sigmoid_decay, length=10)
    model = network()
    model[0].requires_grad_(False)
    straight = WeightAverage(model, 0.9, ramp)
    model[0].requires_grad_(True)  # the checkpoint has more than the fresh object that reads it
    perturb(model, 0)
    straight.update(model)
    stream = io.BytesIO()
    torch.save(straight.state_dict(), stream)
    stream.seek(0)
    fresh = network(5)
    fresh[0].requires_grad_(False)
    resumed = WeightAverage(fresh, 0.9, ramp)
    resumed.load_state_dict(torch.load(stream, weights_only=True))
    assert resumed.updates == 1
    for seed in (1, 2):
        perturb(model, seed)
        straight.update(model)
        resumed.update(model)
    assert straight.averages().keys() == resumed.averages().keys()
    for name, tensor in straight.averages().items():
        assert torch.equal(tensor, resumed.averages()[name])


def test_half_precision_weights_are_averaged_in_float32():
    model = nn.Linear(2, 1).to(torch.bfloat16)
    average = WeightAverage(model, 0.999)
    assert {tensor.dtype for tensor in average.averages().values()} == {torch.float32}
    assert average.module(model).weight.dtype == torch.bfloat16


def test_wrappers_and_tied_weights_do_not_matter():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    average = WeightAverage(nn.DataParallel(model), 0.5)
    perturb(model, 0)
    average.update(model)
    copied = average.module(nn.DataParallel(model))
    assert copied[0].weight is copied[1].weight
    assert torch.equal(copied[0].weight, average.averages()["0.weight"])


def test_bad_settings_are_explained():
    with pytest.raises(ValueError, match=r"WeightAverage: decay must lie in \[0, 1\], got 2"):
        WeightAverage(nn.Linear(1, 1), 2.0)
    with pytest.raises(ValueError, match="the model has no '0.weight', which is averaged"):
        WeightAverage(network()).update(nn.Linear(1, 1))
