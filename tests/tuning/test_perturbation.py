"""Perturbations of hyperparameters, their entropy, and what a batch-level reader may see."""

import pytest
import torch
import torch.nn.functional as F

from wellposed import Hyperparameter
from wellposed.tuning import perturbation_entropy
from wellposed.tuning.batch_level import OnlyPerExample
from wellposed.tuning.perturbation import Perturbations


def hypers():
    return {
        "rate": Hyperparameter(0.2, 0.0, 0.8, per_example=True),
        "decay": Hyperparameter(1e-4, chart="exp", shape=(3,), per_example=True),
        "alpha": Hyperparameter(1.0),
        "holes": Hyperparameter(2.5, 0.0, 6.0, discrete=True, per_example=True),
    }


def test_the_entropy_is_that_of_the_gaussian():
    scale = torch.tensor([0.3, 1.0, 7.0])
    expected = torch.distributions.Normal(torch.zeros(3), scale).entropy().sum()
    torch.testing.assert_close(perturbation_entropy(scale), expected, rtol=0, atol=1e-6)
    assert perturbation_entropy(scale.bfloat16()).dtype == torch.float32
    assert perturbation_entropy(scale.double()).dtype == torch.float64


def test_each_example_has_its_own_draw_but_for_what_is_drawn_once_a_batch():
    parts = Perturbations(hypers())
    noise = parts.draw(50, torch.Generator().manual_seed(0))
    assert noise.shape == (50, 6)
    once = parts.slices["alpha"]
    assert len(noise[:, once].unique()) == 1
    others = [i for i in range(6) if i != once.start]
    assert all(len(noise[:, i].unique()) == 50 for i in others)
    assert parts.draw(1, torch.Generator()).shape == (1, 6)
    alone = Perturbations({"alpha": Hyperparameter(1.0), "beta": Hyperparameter(1.0)})
    assert alone.draw(50, torch.Generator()).shape == (1, 2)


def test_draws_are_standard_normal_and_come_from_the_generator():
    parts = Perturbations(hypers())
    noise = parts.draw(20_000, torch.Generator().manual_seed(0))[:, 0]
    assert abs(float(noise.mean())) < 0.03 and abs(float(noise.std()) - 1) < 0.03
    assert torch.equal(noise, parts.draw(20_000, torch.Generator().manual_seed(0))[:, 0])


def test_a_vector_is_handed_out_by_name_and_comes_back():
    parts = Perturbations(hypers())
    raw = torch.arange(18.0).reshape(3, 6)
    found = parts.split(raw)
    assert found["rate"].tolist() == [0.0, 6.0, 12.0]
    assert found["decay"].tolist() == [[1.0, 2.0, 3.0], [7.0, 8.0, 9.0], [13.0, 14.0, 15.0]]
    assert found["alpha"].shape == () and float(found["alpha"]) == 4.0
    u = torch.linspace(-1, 1, 6)
    parts.write(u)
    torch.testing.assert_close(parts.vector(), u)


def test_bounded_values_stay_strictly_inside_after_ten_thousand_random_steps():
    own = {"rate": Hyperparameter(0.5, 0.0, 1.0), "free": Hyperparameter(0.0, low=-torch.inf)}
    parts = Perturbations(own)
    u, generator = parts.vector(), torch.Generator().manual_seed(0)
    for step in range(10_000):
        u += torch.randn(2, generator=generator) + 0.05
        parts.clamp_(u)
        if step % 100 == 99:
            parts.write(u)
            assert 0 < float(own["rate"].value) < 1
    assert float(u[0]) <= 15 and float(u[1]) > 100


def test_whoever_reads_a_value_of_each_example_for_the_batch_is_told_so():
    h = hypers()
    stand_in = OnlyPerExample.of("rate", "on_gradients")
    for name in h:
        with pytest.raises(
            ValueError, match="'rate' has per_example=True, but on_gradients reads it for the whole batch"
        ):
            h[name].from_raw(stand_in)
    with pytest.raises(ValueError, match="per_example=False"):
        F.softplus(stand_in)
