"""Weight decay: the optimizer's, or a penalty with one strength, one a tensor, and one an example."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from wellposed import Hyperparameter, Step, TensorLoader, fit
from wellposed.hyperparameter import substituted
from wellposed.tuning import collapse, convert, response_state
from wellposed.weights import Compander, WeightDecay
from wellposed.weights.weight_decay import decayed_names, squared_norms


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 5), nn.Linear(5, 2))


def penalty(method, model, raw=None):
    with substituted({} if raw is None else {method.strength: raw}):
        return method.penalty(Step(model))


@pytest.mark.parametrize("on", ["weights", "all"])
def test_norms_are_those_of_the_decayed_tensors_in_their_order(on):
    model = network()
    parameters = dict(model.named_parameters())
    expected = [parameters[n].square().sum() for n in decayed_names(model, on)]
    torch.testing.assert_close(squared_norms(model, on), expected)
    assert len(expected) == (3 if on == "weights" else 8)


def test_one_strength_a_tensor_is_the_sum_of_their_penalties():
    model = network()
    strengths = torch.tensor([0.1, 0.2, 0.3])
    method = WeightDecay(Hyperparameter(strengths, shape=(3,)))
    weights = [p for p in model.parameters() if p.ndim >= 2]
    expected = sum(0.5 * s * w.square().sum() for s, w in zip(strengths, weights, strict=True))
    torch.testing.assert_close(penalty(method, model), expected)
    found = torch.autograd.grad(penalty(method, model), weights)
    torch.testing.assert_close(found, tuple(s * w for s, w in zip(strengths, weights, strict=True)))


def test_one_strength_an_example_gives_one_number_an_example():
    model = network()
    total = sum(p.square().sum() for p in model.parameters() if p.ndim >= 2)
    single = WeightDecay(Hyperparameter(0.1, chart="exp", per_example=True))
    raw = torch.tensor([-3.0, -2.0, 0.5])
    torch.testing.assert_close(penalty(single, model, raw), 0.5 * raw.exp() * total)
    many = WeightDecay(Hyperparameter(0.1, chart="exp", shape=(3,), per_example=True))
    raw = torch.randn(4, 3)
    norms = torch.stack(squared_norms(model))
    torch.testing.assert_close(penalty(many, model, raw), 0.5 * (raw.exp() * norms).sum(1))


@pytest.mark.parametrize("on", ["weights", "all"])
@pytest.mark.parametrize("shaped", [False, True])
def test_under_a_response_each_example_is_charged_for_its_own_weights(on, shaped):
    plain = network().double()
    count = len(squared_norms(plain, on))
    model = convert(copy.deepcopy(plain), 2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "scale" in name:
                p.copy_(torch.randn(p.shape))
    method = WeightDecay(
        Hyperparameter(0.1, chart="exp", shape=(count,) if shaped else (), per_example=True).double(), on
    )
    k = torch.randn(4, 2, dtype=torch.float64)
    raw = torch.randn((4, count) if shaped else (4,), dtype=torch.float64)
    with response_state(model).at(k):
        found = penalty(method, model, raw)
    for i in range(4):
        alone = collapse(copy.deepcopy(model), k[i])
        expected = penalty(method, alone, raw[i])
        torch.testing.assert_close(found[i], expected, rtol=1e-10, atol=0)
    # At rest it is the plain penalty, and the response's own parameters are no weights.
    torch.testing.assert_close(penalty(method, model, raw[0]), penalty(method, plain, raw[0]))


def test_a_tied_tensor_is_charged_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.decoder = nn.Embedding(7, 3), nn.Linear(3, 7, bias=False)
            self.decoder.weight = self.embedding.weight

    model = Tied()
    norm = model.embedding.weight.square().sum()
    torch.testing.assert_close(squared_norms(model), [norm])
    convert(model, 2)
    torch.testing.assert_close(squared_norms(model), [norm])


def test_a_companded_weight_is_charged_itself_also_under_swapped_parameters():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    parametrize.register_parametrization(model[0], "weight", Compander(a=0.9, b=0.7))
    torch.testing.assert_close(squared_norms(model), [m.weight.square().sum() for m in model])

    class Norms(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self):
            return torch.stack(squared_norms(self.model))

    doubled = {f"model.{n}": 2 * p for n, p in model.named_parameters()}
    found = functional_call(Norms(), doubled)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    torch.testing.assert_close(found, torch.stack([m.weight.square().sum() for m in model]))


def test_a_learnable_strength_trains_like_sgds_own_decay():
    x, y = torch.randn(20, 1, 8, 8), torch.arange(20) % 2
    loader = TensorLoader(x, y, batch_size=10)
    found = []
    for strength in (0.05, Hyperparameter(0.05), Hyperparameter(torch.full((3,), 0.05), shape=(3,))):
        model = network()
        found.append(
            fit(
                model,
                loader,
                epochs=2,
                regularizer=WeightDecay(strength),
                optimizer=lambda g: torch.optim.SGD(g, lr=0.1),
            ).model
        )
    for other in found[1:]:
        for a, b in zip(found[0].parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="strength must be >= 0, got -1"):
        WeightDecay(-1.0)
    with pytest.raises(
        ValueError, match=r"strength must have shape \(\) or \(3,\), one value for each decayed tensor, got \(2,\)"
    ):
        penalty(WeightDecay(Hyperparameter(0.1, shape=(2,))), network())
