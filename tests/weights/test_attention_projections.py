"""Split attention is torch's attention, takes adapters by name, and is joined again."""

import copy

import pytest
import torch
from torch import nn

from wellposed.weights.attention_projections import SplitAttention, join_attention, split_attention
from wellposed.weights.low_rank import LowRankLinear, add_low_rank, merge_low_rank


def attention(seed=0, **options):
    torch.manual_seed(seed)
    made = nn.MultiheadAttention(8, 2, **options)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("need_weights, average", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("masked", ["none", "padding", "causal", "both", "float", "heads"])
def test_it_is_torchs_attention(batch_first, bias, need_weights, average, masked):
    own = attention(batch_first=batch_first, bias=bias)
    split = SplitAttention(own)
    query, key, value = torch.randn(3, 4, 8), torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    if not batch_first:
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    masks = {}
    if masked in ("padding", "both"):
        masks["key_padding_mask"] = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 0, 0], [0, 0, 1, 1, 1]], dtype=torch.bool)
    if masked in ("causal", "both"):
        masks["attn_mask"] = torch.ones(4, 5, dtype=torch.bool).triu(2)
    if masked == "float":
        masks["attn_mask"] = torch.randn(4, 5)
    if masked == "heads":
        masks["attn_mask"] = torch.randn(6, 4, 5)
    options = {"need_weights": need_weights, "average_attn_weights": average, **masks}
    expected, found = own(query, key, value, **options), split(query, key, value, **options)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert (found[1] is None) == (not need_weights)
    if need_weights:
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5)


def test_unbatched_inputs_and_other_widths_of_keys_and_values():
    own = attention()
    x = torch.randn(4, 8)
    for a, b in zip(SplitAttention(own)(x, x, x), own(x, x, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    own = attention(kdim=5, vdim=6)
    q, k, v = torch.randn(3, 2, 8), torch.randn(4, 2, 5), torch.randn(4, 2, 6)
    split = SplitAttention(own)
    torch.testing.assert_close(split(q, k, v)[0], own(q, k, v)[0], rtol=1e-5, atol=1e-5)
    model = nn.ModuleDict({"inner": split})
    join_attention(model)
    torch.testing.assert_close(model["inner"](q, k, v)[0], own(q, k, v)[0])


def test_gradients_are_torchs():
    own = attention(batch_first=True)
    split, x = SplitAttention(own), torch.randn(2, 4, 8)
    for module in (own, split):
        module(x, x, x, need_weights=False)[0].square().sum().backward()
    found = torch.cat([layer.weight.grad for layer in (split.q_proj, split.k_proj, split.v_proj)])
    torch.testing.assert_close(found, own.in_proj_weight.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(split.out_proj.bias.grad, own.out_proj.bias.grad, rtol=1e-4, atol=1e-5)


def test_attention_dropout_acts_in_training_alone():
    split, x = SplitAttention(attention(dropout=0.5)), torch.randn(4, 2, 8)
    split.train()
    for weights in (True, False):
        assert not torch.equal(split(x, x, x, need_weights=weights)[0], split(x, x, x, need_weights=weights)[0])
    split.eval()
    assert torch.equal(split(x, x, x)[0], split(x, x, x)[0])


@pytest.mark.parametrize("training", [True, False])
def test_a_torch_transformer_with_adapters_on_q_and_v_alone(training):
    """In evaluation torch would take a fused path that reads in_proj_weight: it must not."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).train(training)
    x, padding = torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    plain = model(x, src_key_padding_mask=padding)
    names = split_attention(model)
    assert names == ["layers.0.self_attn", "layers.1.self_attn"]
    adapted = add_low_rank(model, rank=2, alpha=4, targets=["q_proj", "v_proj"])
    assert adapted == [f"{name}.{part}" for name in names for part in ("q_proj", "v_proj")]
    model.train(training)
    torch.testing.assert_close(
        _valid(model(x, src_key_padding_mask=padding), padding), _valid(plain, padding), rtol=1e-4, atol=1e-5
    )
    with torch.no_grad():
        quiet = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(_valid(quiet, padding), _valid(plain, padding), rtol=1e-4, atol=1e-5)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 8 and all("lora" in name for name in trained)
    for part in model.modules():
        if isinstance(part, LowRankLinear):
            nn.init.normal_(part.lora_B, std=0.3)
    moved = model(x, src_key_padding_mask=padding)
    moved.square().sum().backward()
    assert all(p.grad is not None for _, p in model.named_parameters() if p.requires_grad)
    assert not torch.allclose(_valid(moved, padding), _valid(plain, padding), atol=1e-2)
    merged = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj is a LowRankLinear; merge adapters first"):
        join_attention(merged)
    join_attention(merge_low_rank(merged))
    assert type(merged.layers[0].self_attn) is nn.MultiheadAttention and merged.use_nested_tensor
    assert not model.use_nested_tensor
    found = merged.train(training)(x, src_key_padding_mask=padding)
    torch.testing.assert_close(_valid(found, padding), _valid(moved, padding), rtol=1e-4, atol=1e-5)


def _valid(x, padding):
    # The fused path leaves zeros where all is padding, the other whatever came out.
    return x[~padding[:, : x.shape[1]]]


def test_split_and_join_give_the_weights_back_bit_for_bit():
    model = nn.Sequential(attention(batch_first=True))
    model.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    split_attention(model)
    assert not any(p.requires_grad for p in model.parameters())
    join_attention(model)
    assert list(model.state_dict()) == list(before) and not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_a_shared_layer_stays_shared_and_targets_choose():
    one, two = attention(), attention(1)
    model = nn.ModuleDict({"a": one, "b": one, "c": two})
    assert split_attention(model, targets=lambda name, module: name != "c") == ["a", "b"]
    assert model["a"] is model["b"] and model["c"] is two
    assert split_attention(model, targets=["c"]) == ["c"]


def test_wrong_use_is_named():
    with pytest.raises(ValueError, match="add_bias_kv and add_zero_attn are not supported"):
        SplitAttention(attention(add_bias_kv=True))
    with pytest.raises(ValueError, match="add_bias_kv and add_zero_attn are not supported"):
        SplitAttention(attention(add_zero_attn=True))
    with pytest.raises(ValueError, match=r"holds no nn\.MultiheadAttention"):
        split_attention(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="is an nn.MultiheadAttention itself"):
        split_attention(attention())
    with pytest.raises(ValueError, match=r"targets names 'nope', but the attention layers are \['0'\]"):
        split_attention(nn.Sequential(attention()), targets=["nope"])
    with pytest.raises(ValueError, match="targets leaves no attention layer"):
        split_attention(nn.Sequential(attention()), targets=lambda name, module: False)
    with pytest.raises(ValueError, match="holds no SplitAttention"):
        join_attention(nn.Sequential(attention()))
    x = torch.randn(2, 1, 8)
    with pytest.raises(ValueError, match="is_causal=True needs attn_mask"):
        SplitAttention(attention())(x, x, x, is_causal=True)
