"""A rate for each dropout layer."""

import pytest
import torch
from torch import nn

from wellposed import BilevelProblem, Hyperparameter
from wellposed.compare.tune_dropout import DropoutLayers, dropout_layers
from wellposed.objective import cross_entropy
from wellposed.tuning import HyperDropout, HyperDropout2d, RandomSearch


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Dropout2d(0.1), nn.Flatten(), nn.Linear(144, 8), nn.Dropout(0.2), nn.Linear(8, 2)
    )


def test_every_layer_gets_its_own_rate_and_ends_as_it_was():
    rates = {"1": Hyperparameter(0.3, 0.0, 0.9), "4": 0.5}
    method = DropoutLayers(rates)
    model = method.attach(network())
    assert isinstance(model[1], HyperDropout2d)
    assert model[4].p == 0.5
    dropped = model[1](torch.ones(50, 4, 2, 2))
    assert torch.equal(dropped.amax((2, 3)), dropped.amin((2, 3)))  # whole channels
    rates["1"].set_(0.7)
    model = method.finish(model)
    assert type(model[1]) is nn.Dropout2d
    assert model[1].p == pytest.approx(0.7)


def test_its_rates_are_the_problems_hyperparameters_once_each():
    rates = {"1": Hyperparameter(0.3, 0.0, 0.9), "4": Hyperparameter(0.2, 0.0, 0.9)}
    method = DropoutLayers(rates)
    problem = BilevelProblem.from_regularizer(method.attach(network()), method, cross_entropy)
    assert sorted(map(id, problem.hypers.values())) == sorted(map(id, rates.values()))
    batch = (torch.randn(8, 1, 8, 8), torch.arange(8) % 2, torch.arange(8))
    search = RandomSearch(problem, 2)
    search.run([batch], [batch], steps=6)
    search.export()
    # A hyperparameter inside the model is a buffer of it: going back to the best state must bring back its value.
    for name, h in problem.hypers.items():
        torch.testing.assert_close(h(), search.best.values[name])
    assert isinstance(problem.model[4], HyperDropout)


def test_wrong_names_and_rates_are_refused():
    assert dropout_layers(network()) == ["1", "4"]
    with pytest.raises(ValueError, match="rates names '3'; the model's dropout layers are"):
        DropoutLayers({"3": 0.1}).attach(network())
    with pytest.raises(ValueError, match=r"DropoutLayers: rates\['1'\] must be in \[0, 1\], got 1.5"):
        DropoutLayers({"1": 1.5})
