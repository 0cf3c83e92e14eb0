"""Noise on the inputs: its size, for each example, in training alone."""

import pytest
import torch
from torch import nn

from wellposed import Hyperparameter, Step, TensorLoader, fit
from wellposed.features import InputNoise
from wellposed.hyperparameter import substituted


def step(inputs, seed=0):
    return Step(nn.Identity(), inputs=inputs, generator=torch.Generator().manual_seed(seed))


def noise_of(method, inputs, seed=0):
    s = step(inputs, seed)
    method.on_batch(s)
    return s.inputs - inputs


def test_noise_has_the_standard_deviation_asked_for_and_comes_from_the_steps_generator():
    inputs = torch.full((200, 300), 5.0)
    noise = noise_of(InputNoise(0.3), inputs)
    assert float(noise.std()) == pytest.approx(0.3, rel=0.01) and abs(float(noise.mean())) < 0.01
    assert torch.equal(noise, noise_of(InputNoise(0.3), inputs))
    assert not torch.equal(noise, noise_of(InputNoise(0.3), inputs, seed=1))


def test_each_example_has_its_own_deviation_through_all_dimensions():
    h = Hyperparameter(0.1, 0.0, 0.6, per_example=True)
    inputs = torch.zeros(3, 2, 100, 100)
    raw = torch.tensor([-3.0, 0.0, 3.0])
    with substituted({h: raw}):
        noise, wanted = noise_of(InputNoise(h), inputs), h()
    torch.testing.assert_close(noise.flatten(1).std(1), wanted, rtol=0.03, atol=0)


def test_a_deviation_has_a_derivative_in_the_noise_that_was_drawn():
    h = Hyperparameter(0.2, 0.0, 0.6)
    raw = h.raw.clone().requires_grad_()
    with substituted({h: raw}):
        s = step(torch.zeros(4, 5))
        InputNoise(h).on_batch(s)
        (s.inputs / h().detach()).sum().backward()
    assert float(raw.grad) != 0


def test_containers_and_integers_are_left_in_shape():
    inputs = {"x": torch.zeros(2, 3), "tokens": torch.tensor([[1], [2]])}
    s = step(inputs)
    InputNoise(1.0).on_batch(s)
    assert bool(s.inputs["x"].any()) and torch.equal(s.inputs["tokens"], inputs["tokens"])
    assert s.inputs["x"].dtype == torch.float32
    assert noise_of(InputNoise(1.0), torch.zeros(2, 3, dtype=torch.float64)).dtype == torch.float64


def test_no_noise_leaves_the_inputs_themselves():
    inputs = torch.zeros(2, 3)
    s = step(inputs)
    InputNoise(0.0).on_batch(s)
    assert s.inputs is inputs


def test_evaluation_sees_no_noise():
    x, y = torch.randn(20, 3), torch.arange(20) % 2
    plain = TensorLoader(x, y, batch_size=20)
    options = {"epochs": 1, "optimizer": lambda groups: torch.optim.SGD(groups, lr=0.0), "validation": plain}
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    found = [fit(model, plain, regularizer=r, **options).history[0] for r in (None, InputNoise(3.0))]
    assert found[0]["validation_loss"] == found[1]["validation_loss"] and found[0]["loss"] != found[1]["loss"]


def test_what_is_wrong_is_refused():
    with pytest.raises(ValueError, match="InputNoise: std must be >= 0, got -1"):
        InputNoise(-1.0)
    with pytest.raises(ValueError, match="std must be >= 0, got a Hyperparameter"):
        InputNoise(Hyperparameter(0.0, -1.0, 1.0))
    with pytest.raises(ValueError, match="no floating tensor"):
        InputNoise(1.0).on_batch(step(torch.tensor([1, 2])))
    h = Hyperparameter(0.1, 0.0, 0.6, per_example=True)
    with substituted({h: torch.zeros(3)}), pytest.raises(ValueError, match=r"must have shape \(2,\), got \(3,\)"):
        InputNoise(h).on_batch(step(torch.zeros(2, 4)))
