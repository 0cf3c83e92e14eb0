"""Response layers: plain at rest, the right weights for every example, exact norms, linear in k where linearised."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from wellposed.tuning import (
    collapse,
    convert,
    response_linear,
    response_squared_norm,
    response_state,
    response_weight,
)

N = 3


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def moved(model, seed=1):
    """A converted model whose response is not zero, as after some training."""
    generator = draws(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "scale" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator).to(p))
    return model


LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (6, 5)),
    "linear without bias": (lambda: nn.Linear(5, 4, bias=False), (6, 5)),
    "linear on tokens": (lambda: nn.Linear(5, 4), (6, 7, 5)),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3, padding=1), (6, 2, 9)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3, stride=2), (6, 2, 8, 8)),
    "grouped conv2d": (lambda: nn.Conv2d(4, 4, 3, groups=2, bias=False), (6, 4, 8, 8)),
    "padded conv2d": (lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), (6, 2, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (6, 2, 4, 4, 4)),
    "batch norm": (lambda: nn.BatchNorm1d(5), (6, 5)),
    "batch norm on images": (lambda: nn.BatchNorm2d(3), (6, 3, 4, 4)),
    "batch norm on volumes": (lambda: nn.BatchNorm3d(3), (6, 3, 2, 2, 2)),
    "layer norm": (lambda: nn.LayerNorm(5), (6, 5)),
    "layer norm on tokens": (lambda: nn.LayerNorm(5), (6, 7, 5)),
    "layer norm over two": (lambda: nn.LayerNorm((3, 4)), (6, 3, 4)),
    "layer norm without bias": (lambda: nn.LayerNorm(5, bias=False), (6, 7, 5)),
    "rms norm": (lambda: nn.RMSNorm(5), (6, 7, 5)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (6, 4, 5)),
    "instance norm": (lambda: nn.InstanceNorm2d(3, affine=True), (6, 3, 4, 4)),
}


def make(name, dtype=torch.float64):
    build, shape = LAYERS[name]
    torch.manual_seed(0)
    return build().to(dtype), torch.randn(shape, generator=draws(), dtype=dtype)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("delta", [True, False])
def test_without_a_response_outputs_and_gradients_are_those_of_the_plain_layer(name, delta):
    plain, x = make(name, torch.float32)
    layer = convert(copy.deepcopy(plain), N, delta=delta)
    state = response_state(layer)
    with torch.no_grad():
        for key, p in layer.named_parameters():
            if "scale" in key:
                p.zero_()
    found = []
    for model, k in ((plain, None), (layer, None), (layer, torch.zeros(1, N)), (layer, torch.randn(6, N))):
        y = model(x) if k is None else None
        if k is not None:
            with state.at(k):
                y = model(x)
        own = [p for key, p in model.named_parameters() if "response" not in key]
        found.append((y, torch.autograd.grad(y.square().sum(), own)))
    for y, gradients in found[1:]:
        torch.testing.assert_close(y, found[0][0], rtol=0, atol=1e-6)
        torch.testing.assert_close(gradients, found[0][1], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_every_example_is_computed_with_the_weights_of_its_own_response_input(name):
    if name.startswith("batch norm"):
        pytest.skip("examples of a batch share its statistics; see the evaluation mode below")
    plain, x = make(name)
    layer = moved(convert(plain, N))
    k = torch.randn(6, N, generator=draws(2), dtype=x.dtype)
    with response_state(layer).at(k):
        together = layer(x)
    for i in range(6):
        alone = collapse(copy.deepcopy(layer), k[i])
        torch.testing.assert_close(alone(x[i : i + 1]), together[i : i + 1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in LAYERS if name.startswith("batch norm")])
def test_batch_normalization_responds_by_gain_and_bias_and_keeps_its_own_statistics(name):
    plain, x = make(name)
    layer = moved(convert(copy.deepcopy(plain), N))
    k = torch.randn(6, N, generator=draws(2), dtype=x.dtype)
    with response_state(layer).at(k):
        layer(x)
    plain(x)
    torch.testing.assert_close(layer.running_mean, plain.running_mean)
    torch.testing.assert_close(layer.running_var, plain.running_var)
    assert layer.num_batches_tracked == plain.num_batches_tracked == 1
    layer.eval()
    with response_state(layer).at(k):
        together = layer(x)
    for i in range(6):
        alone = collapse(copy.deepcopy(layer), k[i])
        torch.testing.assert_close(alone(x[i : i + 1]), together[i : i + 1], rtol=0, atol=1e-12)


def test_batch_normalization_with_a_cumulative_average_or_none_is_torchs_own():
    for options in ({"momentum": None}, {"track_running_stats": False}):
        plain = nn.BatchNorm1d(4, **options)
        layer = convert(copy.deepcopy(plain), N)
        for seed in range(3):
            x = torch.randn(8, 4, generator=draws(seed))
            with response_state(layer).at(torch.zeros(1, N)):
                torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=1e-6)
        torch.testing.assert_close(dict(layer.named_buffers()).get("running_var"), plain.running_var)


def test_an_embedding_responds_by_dimension_and_keeps_its_padding():
    torch.manual_seed(0)
    layer = moved(convert(nn.Embedding(10, 4, padding_idx=0).double(), N))
    tokens = torch.tensor([[0, 3, 9], [1, 1, 0]])
    k = torch.randn(2, N, dtype=torch.float64)
    with response_state(layer).at(k):
        found = layer(tokens)
    for i in range(2):
        table = response_weight(k[i], layer.weight, layer.response.weight, layer.response.scale, channel=1)
        torch.testing.assert_close(found[i], F.embedding(tokens[i], table), rtol=0, atol=1e-12)
    assert not found[0, 0].any() and not found[1, 2].any()


@given(
    batch=st.integers(1, 5), middle=st.lists(st.integers(1, 3), max_size=2), inputs=st.integers(1, 4),
    outputs=st.integers(1, 4), n=st.integers(1, 3), dtype=st.sampled_from([torch.float32, torch.float64]),
    one_row=st.booleans(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_the_linear_response_is_a_linear_layer_with_each_examples_weight(
    batch, middle, inputs, outputs, n, dtype, one_row
):
    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    generator = draws(batch + 7 * n)
    x, k = draw(batch, *middle, inputs), draw(1 if one_row else batch, n)
    w0, w1, v = draw(outputs, inputs), draw(outputs, inputs), draw(outputs, n)
    b0, b1, c = draw(outputs), draw(outputs), draw(outputs, n)
    y = response_linear(x, k, w0, b0, w1, b1, v, c)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for i in range(batch):
        row = k[0 if one_row else i]
        expected = F.linear(x[i], w0 + torch.diag(v @ row) @ w1, b0 + (c @ row) * b1)
        torch.testing.assert_close(y[i], expected, rtol=1e-5, atol=tolerance * 10)


def test_the_squared_norm_is_that_of_each_examples_weight_and_so_is_its_derivative():
    k, w0, w1, v = (
        torch.randn(*shape, generator=draws(i), dtype=torch.float64, requires_grad=True)
        for i, shape in enumerate([(4, 3), (5, 6), (5, 6), (5, 3)])
    )
    expected = torch.stack([response_weight(row, w0, w1, v).square().sum() for row in k])
    torch.testing.assert_close(response_squared_norm(k, w0, w1, v), expected, rtol=1e-10, atol=0)
    assert torch.autograd.gradcheck(response_squared_norm, (k, w0, w1, v))
    assert torch.autograd.gradgradcheck(response_squared_norm, (k, w0, w1, v))


@pytest.mark.parametrize(
    "build", [LAYERS["linear"][0], LAYERS["conv2d"][0], LAYERS["batch norm"][0], lambda: nn.Embedding(7, 4)]
)
def test_a_layers_squared_norms_are_those_of_its_collapsed_tensors(build):
    torch.manual_seed(0)
    layer = moved(convert(build().double(), N))
    k = torch.randn(4, N, generator=draws(3), dtype=torch.float64)
    names = [name for name in layer.tensors if getattr(layer, name) is not None]
    with response_state(layer).at(k):
        found = {name: layer.squared_norm(name) for name in names}
    for i in range(4):
        alone = collapse(copy.deepcopy(layer), k[i])
        for name in names:
            torch.testing.assert_close(found[name][i], getattr(alone, name).square().sum(), rtol=1e-10, atol=0)
    with response_state(layer).at(k[:1]):
        assert layer.squared_norm(names[0]).ndim == 0
    torch.testing.assert_close(layer.squared_norm(names[0]), getattr(layer, names[0]).square().sum())


def test_a_batch_that_does_not_fit_the_response_input_is_refused_with_the_layers_name():
    model = convert(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)), N)
    with (
        response_state(model).at(torch.zeros(3, N)),
        pytest.raises(ValueError, match="0: the response input has 3 rows"),
    ):
        model(torch.zeros(6, 5))
    with (
        pytest.raises(ValueError, match=r"k must have shape \(rows, 3\), got \(3,\)"),
        response_state(model).at(torch.zeros(3)),
    ):
        pass
    convolution = convert(nn.Conv2d(1, 2, 3), N)
    with response_state(convolution).at(torch.zeros(1, N)), pytest.raises(ValueError, match="responds to batches only"):
        convolution(torch.zeros(1, 8, 8))


def test_one_row_serves_a_batch_of_any_size_and_an_input_without_batch():
    layer = moved(convert(nn.Linear(5, 4), N))
    x, k = torch.randn(3, 5), torch.randn(1, N)
    with response_state(layer).at(k):
        torch.testing.assert_close(layer(x)[1], layer(x[1]))


def test_a_response_can_be_nested_and_ends_with_its_block_also_after_an_error():
    state = response_state(convert(nn.Linear(2, 2), 1))
    one, two = torch.ones(1, 1), torch.full((1, 1), 2.0)
    with state.at(one):
        with pytest.raises(RuntimeError), state.at(two, linearized=True):
            raise RuntimeError
        assert state.current() is one and not state.linearized
    assert state.current() is None


def test_converted_layers_can_be_copied_and_pickled_and_copies_respond_apart():
    model = moved(convert(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), N))
    x, k = torch.randn(5, 3), torch.randn(5, N)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with response_state(model).at(k):
            assert response_state(copied).current() is None
            expected = model(x)
        with response_state(copied).at(k):
            torch.testing.assert_close(copied(x), expected, rtol=0, atol=0)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x

    def right_inverse(self, x):
        return x / 2


def test_a_parametrised_layer_responds_with_the_weight_that_it_makes_and_collapses_through_it():
    torch.manual_seed(0)
    layer = nn.Linear(5, 4).double()
    parametrize.register_parametrization(layer, "weight", Doubled())
    plain = type(layer)
    weight = layer.weight.detach().clone()
    moved(convert(layer, N))
    x, k = torch.randn(6, 5, dtype=torch.float64), torch.randn(N, dtype=torch.float64)
    with response_state(layer).at(k[None]):
        y = layer(x)
    wanted = response_weight(k, weight, layer.response.weight, layer.response.scale)
    collapse(layer, k)
    assert type(layer) is plain and [n for n, _ in layer.named_parameters()] == [
        "bias",
        "parametrizations.weight.original",
    ]
    torch.testing.assert_close(layer.weight, wanted)
    torch.testing.assert_close(layer.parametrizations.weight.original, wanted / 2)
    torch.testing.assert_close(layer(x), y, rtol=0, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_layers_respond_on_an_accelerator():
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)).cuda()
    model = moved(convert(model, N))
    x, k = torch.randn(6, 5).cuda(), torch.randn(6, N).cuda()
    with response_state(model).at(k):
        y = model(x)
    alone = collapse(copy.deepcopy(model), k[2])
    torch.testing.assert_close(alone(x[2:3]), y[2:3], rtol=1e-4, atol=1e-5)
