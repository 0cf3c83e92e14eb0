"""A converted LSTM is torch's own at rest and under a response of zero, and has each sequence's weights else."""

import copy

import pytest
import torch
from torch import nn

from wellposed.tuning import collapse, convert, response_state

N, B, T = 2, 3, 5
KINDS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "two layers": {"num_layers": 2},
    "both ways": {"bidirectional": True, "num_layers": 2},
    "without bias": {"bias": False},
}


def make(kind):
    torch.manual_seed(0)
    plain = nn.LSTM(4, 6, **KINDS[kind]).double()
    shape = (B, T, 4) if plain.batch_first else (T, B, 4)
    return plain, torch.randn(shape, dtype=torch.float64)


def moved(layer):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if "scale" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return layer


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_response_it_is_torchs_lstm(kind):
    plain, x = make(kind)
    layer = convert(copy.deepcopy(plain), N)
    y, (h, c) = plain(x)
    for k in (None, torch.zeros(1, N, dtype=torch.float64), torch.zeros(B, N, dtype=torch.float64)):
        if k is None:
            found = layer(x)
        else:
            with response_state(layer).at(k):
                found = layer(x)
        torch.testing.assert_close(found, (y, (h, c)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_every_sequence_runs_with_the_weights_of_its_own_response_input(kind):
    plain, x = make(kind)
    layer = moved(convert(plain, N))
    k = torch.randn(B, N, dtype=torch.float64)
    with response_state(layer).at(k):
        y, (h, c) = layer(x)
    for i in range(B):
        alone = collapse(copy.deepcopy(layer), k[i])
        part = (slice(i, i + 1),) if plain.batch_first else (slice(None), slice(i, i + 1))
        expected, (eh, ec) = alone(x[part])
        torch.testing.assert_close(y[part], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close((h[:, i : i + 1], c[:, i : i + 1]), (eh, ec), rtol=0, atol=1e-12)


def test_a_given_first_state_is_used():
    plain, x = make("two layers")
    layer = convert(copy.deepcopy(plain), N)
    state = torch.randn(2, B, 6, dtype=torch.float64), torch.randn(2, B, 6, dtype=torch.float64)
    with response_state(layer).at(torch.zeros(B, N, dtype=torch.float64)):
        torch.testing.assert_close(layer(x, state), plain(x, state), rtol=0, atol=1e-12)


def test_dropout_between_layers_acts_in_training_alone():
    layer = moved(convert(nn.LSTM(4, 6, num_layers=2, dropout=0.5), N))
    x, k = torch.randn(T, B, 4), torch.randn(B, N)
    with response_state(layer).at(k):
        torch.manual_seed(0)
        first, second = layer(x)[0], layer(x)[0]
        assert not torch.equal(first, second)
        layer.eval()
        torch.testing.assert_close(layer(x)[0], layer(x)[0], rtol=0, atol=0)


def test_norms_are_those_of_the_collapsed_tensors_and_what_has_no_batch_is_refused():
    layer = moved(convert(nn.LSTM(4, 6).double(), N))
    k = torch.randn(B, N, dtype=torch.float64)
    with response_state(layer).at(k):
        found = {name: layer.squared_norm(name) for name in layer.tensors}
        with pytest.raises(ValueError, match="takes batches"):
            layer(torch.zeros(T, 4, dtype=torch.float64))
        with pytest.raises(TypeError, match="PackedSequence"):
            layer(nn.utils.rnn.pack_sequence([torch.zeros(T, 4, dtype=torch.float64)]))
    assert set(found) == {"weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"}
    for i in range(B):
        alone = collapse(copy.deepcopy(layer), k[i])
        for name, norms in found.items():
            torch.testing.assert_close(norms[i], getattr(alone, name).square().sum(), rtol=1e-10, atol=0)
