"""Conversion: what responds, what stays plain, what is refused, and the way back."""

import copy

import pytest
import torch
from torch import nn

from wellposed import Hyperparameter
from wellposed.tuning import collapse, convert, response_parameters, response_state
from wellposed.tuning.response_layers import ResponseEmbedding, ResponseLayer, ResponseLinear

N = 2


def moved(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "scale" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 5))


def test_conversion_keeps_the_model_its_names_and_its_weights():
    plain = small()
    names = [n for n, _ in plain.named_parameters()]
    before = copy.deepcopy(plain.state_dict())
    model = convert(plain, N)
    assert model is plain
    added = set(response_parameters(model))
    assert [n for n, _ in model.named_parameters() if n not in added] == names
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value)
    assert len({id(m) for m in model.modules() if isinstance(m, type(response_state(model)))}) == 1
    assert isinstance(model[4], nn.Linear)


def test_the_initial_response_is_zero_in_a_delta_stn_and_small_in_an_stn():
    for delta in (True, False):
        layer = convert(nn.Linear(400, 300), N, delta=delta)
        r = layer.response
        assert float(r.weight.abs().max()) <= 1 / 20 and float(r.weight.std()) == pytest.approx(
            1 / 20 / 3**0.5, rel=0.02
        )
        for scale in (r.scale, r.bias_scale):
            assert float(scale.detach().std()) == (0.0 if delta else pytest.approx(0.01, rel=0.15))
    table = convert(nn.Embedding(300, 40), N).response.weight
    assert 0.09 < float(table.abs().max()) <= 0.1


def test_the_initial_response_depends_on_the_generator_alone():
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(found))
        model = convert(nn.Linear(3, 2), N, generator=torch.Generator().manual_seed(seed))
        found.append(model.response.weight)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_hyperparameters_may_be_given_themselves_and_are_counted_by_their_values():
    hypers = {"a": Hyperparameter(1.0), "b": Hyperparameter(1.0, shape=(3,))}
    assert response_state(convert(nn.Linear(2, 2), hypers)).size == 4


@pytest.mark.parametrize("delta", [True, False])
def test_collapsed_at_a_response_input_the_plain_model_is_the_converted_one(delta):
    model = moved(convert(small().eval(), N, delta=delta))
    x, k = torch.randn(4, 1, 8, 8), torch.randn(N)
    with response_state(model).at(k[None]):
        expected = model(x)
    plain = collapse(copy.deepcopy(model), k)
    assert [type(m) for m in plain.modules()] == [type(m) for m in small().modules()]
    assert set(plain.state_dict()) == set(small().state_dict())
    assert not plain._forward_hooks and not plain._forward_pre_hooks
    torch.testing.assert_close(plain(x), expected, rtol=0, atol=1e-5)


def test_a_delta_stn_collapses_to_its_weights_bit_for_bit_and_an_stn_at_its_rest():
    model = moved(convert(small(), N))
    weights = {n: p.clone() for n, p in model.named_parameters() if "response" not in n}
    collapse(model)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert collapse(model) is model  # plain already
    model = moved(convert(small().eval(), N, delta=False))
    response_state(model).rest.copy_(torch.tensor([0.5, -1.0]))
    x = torch.randn(4, 1, 8, 8)
    expected = model(x)
    torch.testing.assert_close(collapse(model)(x), expected, rtol=0, atol=1e-5)


def test_hooks_and_references_survive_conversion_and_collapse():
    layer = nn.Linear(3, 2, bias=False)
    nn.init.ones_(layer.weight)
    handle = layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    model = convert(nn.Sequential(layer), N)
    assert model[0] is layer
    with response_state(model).at(torch.zeros(1, N)):
        assert model(torch.ones(1, 3)).tolist() == [[6.0, 6.0]]
    collapse(model)
    assert model(torch.ones(1, 3)).tolist() == [[6.0, 6.0]]
    handle.remove()
    assert model(torch.ones(1, 3)).tolist() == [[3.0, 3.0]]


def test_excluded_and_frozen_layers_stay_plain():
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), nn.Linear(3, 3))
    model[2].requires_grad_(False)
    convert(model, N, exclude=["1"])
    assert [isinstance(m, ResponseLayer) for m in model.modules() if isinstance(m, nn.Linear)] == [
        True,
        False,
        False,
        False,
    ]
    with pytest.raises(ValueError, match=r"exclude names 'fc', which the model does not have; did you mean '0'\?"):
        convert(nn.Sequential(nn.Linear(2, 2)), N, exclude=["fc"])


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.gain = nn.Linear(3, 3), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.gain * self.inner(x)


def test_an_unknown_module_with_parameters_is_refused_by_name_or_left_plain():
    with pytest.raises(ValueError, match=r"the module '1' \(Scaled\) has parameters, but no known response"):
        convert(nn.Sequential(nn.Linear(3, 3), Scaled()), N)
    for options in ({"strict": False}, {"exclude": ["1"]}):
        model = convert(nn.Sequential(nn.Linear(3, 3), Scaled()), N, **options)
        assert isinstance(model[0], ResponseLinear) and not isinstance(model[1].inner, ResponseLayer)
    with pytest.raises(ValueError, match="no layer to convert"):
        convert(Scaled(), N, strict=False)


def test_modules_that_read_their_childrens_weights_are_refused_as_a_whole():
    encoder = nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.raises(ValueError, match="TransformerEncoderLayer"):
        convert(nn.Sequential(nn.Linear(8, 8), encoder), N)
    model = convert(nn.Sequential(nn.Linear(8, 8), encoder), N, strict=False)
    assert not any(isinstance(m, ResponseLayer) for m in encoder.modules()) and isinstance(model[0], ResponseLinear)


def test_a_subclass_with_a_forward_of_its_own_is_unknown():
    class Odd(nn.Linear):
        def forward(self, input):
            return -super().forward(input)

    with pytest.raises(ValueError, match="Odd"):
        convert(nn.Sequential(Odd(2, 2)), N)


def test_a_tied_decoder_stays_plain_and_an_stn_unties_it_when_it_collapses():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder, self.embedding = nn.Linear(4, 9, bias=False), nn.Embedding(9, 4)
            self.decoder.weight = self.embedding.weight

        def forward(self, tokens):
            return self.decoder(self.embedding(tokens))

    model = moved(convert(Tied(), N, delta=False))
    assert isinstance(model.embedding, ResponseEmbedding) and not isinstance(model.decoder, ResponseLayer)
    response_state(model).rest.fill_(1.0)
    tokens = torch.arange(9)[None]
    expected = model(tokens)
    torch.testing.assert_close(collapse(model)(tokens), expected, rtol=0, atol=1e-6)
    assert model.decoder.weight is not model.embedding.weight
    delta = collapse(convert(Tied(), N))
    assert delta.decoder.weight is delta.embedding.weight


def test_what_cannot_respond_is_refused_with_a_reason():
    for build, words in [
        (lambda: nn.Embedding(5, 3, max_norm=1.0), "max_norm"),
        (lambda: nn.LSTM(3, 4, proj_size=2), "proj_size"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), "no shape yet"),
        (lambda: nn.GRU(3, 4), "GRU"),
    ]:
        with pytest.raises(ValueError, match=words):
            convert(build(), N)
    model = convert(nn.Linear(2, 2), N)
    with pytest.raises(ValueError, match="is a response layer already"):
        convert(model, N)
    with pytest.raises(ValueError, match="the model has no response layer"):
        response_state(nn.Linear(2, 2))


def test_a_layer_that_is_used_twice_is_converted_once():
    layer = nn.Linear(3, 3)
    model = convert(nn.Sequential(layer, nn.ReLU(), layer), N)
    assert len(response_parameters(model)) == 4
    with response_state(model).at(torch.ones(2, N)):
        assert model(torch.ones(2, 3)).shape == (2, 3)


def test_a_state_dict_of_a_converted_model_restores_its_rest():
    model = moved(convert(small().eval(), N, delta=False))
    response_state(model).rest.copy_(torch.tensor([0.5, -1.0]))
    other = convert(small().eval(), N, delta=False)
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("delta", [True, False])
def test_a_converted_model_compiles_without_a_graph_break(delta):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))
    moved(convert(model, N, delta=delta))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, k = torch.randn(5, 4), torch.randn(5, N)
    state = response_state(model)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), model(x))
        with state.at(k):
            y = compiled(x)
            torch.testing.assert_close(y, model(x))
            found = torch.autograd.grad(y.sum(), model[0].response.scale)
            torch.testing.assert_close(found, torch.autograd.grad(model(x).sum(), model[0].response.scale))
