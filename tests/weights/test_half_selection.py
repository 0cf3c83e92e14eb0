"""Which half: the counts that the paper's rules give, the statistics of the draws, and what is found in real models."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch import nn

from wellposed.weights.half_discovery import discover
from wellposed.weights.half_fine_tuning import ALWAYS, HalfFineTuning
from wellposed.weights.half_fused import split_fused
from wellposed.weights.half_selection import (
    draw_frozen,
    draw_generator,
    element_mask,
    frozen_counts,
)

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEEDFORWARD = ("gate_proj", "up_proj", "down_proj")


class Block(nn.Module):
    """A Llama layer's tensors without its mathematics; `kv` is the width of keys and values."""

    def __init__(self, width=4, kv=4, hidden=12):
        super().__init__()
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        for name in ATTENTION:
            out, into = (kv, width) if name in ("k_proj", "v_proj") else (width, width)
            setattr(self.self_attn, name, nn.Linear(into, out, bias=False))
        for name in FEEDFORWARD:
            into, out = (hidden, width) if name == "down_proj" else (width, hidden)
            setattr(self.mlp, name, nn.Linear(into, out, bias=False))
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(width), nn.RMSNorm(width)


class Llama(nn.Module):
    def __init__(self, layers=4, **sizes):
        super().__init__()
        self.embed_tokens = nn.Embedding(7, 4)
        self.layers = nn.ModuleList(Block(**sizes) for _ in range(layers))
        self.norm = nn.RMSNorm(4)
        self.lm_head = nn.Linear(4, 7, bias=False)


def frozen_names(model, **options):
    method = HalfFineTuning(**options)
    method.new_stage(model)
    return {name for name, mask in method.mask().items() if mask is False}


def share(model, frozen):
    block = [(n, p.numel()) for n, p in model.named_parameters() if "layers" in n and p.ndim == 2]
    return sum(size for n, size in block if n in frozen) / sum(size for _, size in block)


def count(frozen, layer, names):
    return sum(any(f".{layer}." in f and n in f for f in frozen) for n in names)


# ── counts ────────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("layers", [2, 6, 32])
def test_an_even_number_of_layers_freezes_exactly_half(layers):
    model = Llama(layers)
    frozen = frozen_names(model, seed=layers)
    assert share(model, frozen) == 0.5
    assert all(count(frozen, i, ATTENTION) == 2 for i in range(layers))
    assert sorted(count(frozen, i, FEEDFORWARD) for i in range(layers)) == [1] * (layers // 2) + [2] * (layers // 2)
    assert all(count(frozen, i, ("input_layernorm", "post_attention")) == 1 for i in range(layers))
    assert not {n for n in frozen if "layers" not in n}


@pytest.mark.parametrize("layers", [1, 3, 5])
def test_an_odd_number_freezes_a_sixth_of_a_layer_less(layers):
    frozen = frozen_names(Llama(layers), seed=layers)
    feedforward = [count(frozen, i, FEEDFORWARD) for i in range(layers)]
    assert sorted(feedforward)[layers - layers // 2 :] == [2] * (layers // 2) and min(feedforward) == 1
    assert sum(feedforward) / (3 * layers) == pytest.approx(0.5 - 1 / (6 * layers))


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.3, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("members", [2, 3, 4])
def test_rule_6_at_other_ratios(ratio, members):
    for layers in (1, 4, 7):
        counts = frozen_counts(ratio, members, layers, draw_generator(0, 0))
        least = math.floor(ratio * members + 1e-9)
        assert sum(counts) == math.floor(ratio * members * layers + 1e-9)
        assert set(counts) <= {least, least + 1}


def test_layer_and_model_level():
    model = Llama(6)
    frozen = frozen_names(model, strategy="layer", seed=1)
    layers = {int(name.split(".")[1]) for name in frozen}
    assert len(layers) == 3 and frozen == {
        n for n, _ in model.named_parameters() if n.startswith("layers") and int(n.split(".")[1]) in layers
    }
    frozen = frozen_names(Llama(6), strategy="model", seed=1)
    assert len(frozen) == 6 * 9 // 2 and all("layers" in name for name in frozen)
    counts = [count(frozen_names(Llama(2), strategy="model", seed=s), 0, ATTENTION) for s in range(40)]
    assert len(set(counts)) > 2  # no structure: not 2 of 4 in every layer


def test_single_scalars():
    mask = element_mask((5, 7), 0.5, draw_generator(3, 1))
    assert int((~mask).sum()) == 17 and mask.shape == (5, 7)
    method = HalfFineTuning(strategy="element", ratio=0.25)
    report = method.new_stage(Llama(2))
    masks = method.mask()
    assert masks["lm_head.weight"] is True and int((~masks["layers.0.mlp.up_proj.weight"]).sum()) == 12
    assert report.frozen_share == pytest.approx(0.25)


# ── statistics ────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_draws_are_uniform_and_independent_between_stages():
    units = discover(Llama(4), None, ALWAYS)
    names = [u.name for u in units]
    drawn = np.zeros((2, 2000, len(names)), dtype=bool)
    for seed in range(2000):
        for stage in (0, 1):
            frozen = {u.name for u in draw_frozen(units, 0.5, "category", "modules", draw_generator(seed, stage))}
            drawn[stage, seed] = [name in frozen for name in names]
    assert np.abs(drawn.mean(1) - 0.5).max() < 0.05
    for layer in range(4):
        attention = [i for i, u in enumerate(units) if u.layer == layer and u.category == "attention"]
        for a, b in combinations(attention, 2):
            assert abs((drawn[0, :, a] & drawn[0, :, b]).mean() - 1 / 6) < 0.04
    for i in range(len(names)):
        table = np.array([[(~a & ~b).sum(), (~a & b).sum(), (a & ~b).sum(), (a & b).sum()]
                          for a, b in [(drawn[0, :, i], drawn[1, :, i])]]).reshape(2, 2)  # fmt: skip
        expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
        # Of 36 tests one falls below 1e-3 by chance in 28 runs; the seeds are fixed.
        assert chi2.sf(((table - expected) ** 2 / expected).sum(), 1) > 1e-4, names[i]


def test_the_same_seed_and_stage_give_the_same_half():
    first = frozen_names(Llama(4), seed=5)
    assert frozen_names(Llama(4), seed=5) == first != frozen_names(Llama(4), seed=6)


# ── an independent script's rule ──────────────────────────────────────────────────────────────────────────────────────
def rule_of_the_script(layers, attention, two_of_three, feedforward, norms):
    """Names frozen at ratio 0.5 on Llama, from lists of choices: written down from the rules, not from our code.

    Every parameter of a chosen module is frozen; embeddings, head and final norm are skipped.
    """
    frozen = set()
    for layer in range(layers):
        frozen |= {f"layers.{layer}.self_attn.{name}.weight" for name in attention[layer]}
        chosen = feedforward[layer][: 2 if layer in two_of_three else 1]
        frozen |= {f"layers.{layer}.mlp.{name}.weight" for name in chosen}
        frozen.add(f"layers.{layer}.{norms[layer]}.weight")
    return frozen


def test_the_frozen_names_are_those_of_the_script_given_the_same_choices():
    frozen = frozen_names(Llama(4), seed=2)

    def chosen(layer, names):
        return [n for n in names if any(f".{layer}." in f and f".{n}." in f for f in frozen)]

    feedforward = [chosen(i, FEEDFORWARD) for i in range(4)]
    norms = [chosen(i, ("input_layernorm", "post_attention_layernorm"))[0] for i in range(4)]
    two = {i for i in range(4) if len(feedforward[i]) == 2}
    assert len(two) == 2
    assert rule_of_the_script(4, [chosen(i, ATTENTION) for i in range(4)], two, feedforward, norms) == frozen


# ── grouped queries and fused matrices ────────────────────────────────────────────────────────────────────────────────
def attention_shares(balance, kv=1):
    model = Llama(8, width=4, kv=kv)
    sizes = {n: p.numel() for n, p in model.named_parameters() if "self_attn" in n}
    found = []
    for seed in range(10):
        frozen = frozen_names(Llama(8, width=4, kv=kv), seed=seed, balance=balance)
        for layer in range(8):
            own = {n: s for n, s in sizes.items() if f".{layer}." in n}
            found.append(sum(s for n, s in own.items() if n in frozen) / sum(own.values()))
    return np.array(found)


def test_grouped_query_attention_is_balanced_by_scalars():
    by_modules, by_params = attention_shares("modules"), attention_shares("params")
    # Query and output have 0.4 of the scalars each, keys and values 0.1.
    assert by_modules.min() == pytest.approx(0.2) and by_modules.max() == pytest.approx(0.8)
    np.testing.assert_allclose(by_params, 0.5)


def test_balance_by_scalars_is_the_papers_rule_where_matrices_are_equal():
    model = Llama(6)
    frozen = frozen_names(model, balance="params", seed=3)
    assert share(model, frozen) == 0.5 and all(count(frozen, i, ATTENTION) == 2 for i in range(6))
    assert sorted(count(frozen, i, FEEDFORWARD) for i in range(6)) == [1, 1, 1, 2, 2, 2]


def test_many_experts_are_balanced_without_listing_all_subsets():
    block = nn.ModuleDict({f"e{i}": nn.ModuleDict({"w1": nn.Linear(3, 3, bias=False)}) for i in range(40)})
    model = nn.ModuleDict({"layers": nn.ModuleList([block])})
    assert len(frozen_names(model, balance="params")) == 20


class Fused(nn.Module):
    """Phi-3's layer: 4 query rows, 2 key and 2 value rows in one matrix; gate and up in another."""

    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        self.self_attn.qkv_proj, self.self_attn.o_proj = nn.Linear(4, 8), nn.Linear(4, 4)
        self.mlp.gate_up_proj, self.mlp.down_proj = nn.Linear(4, 12), nn.Linear(6, 4)


def test_fused_matrices_are_refused_or_split_by_rows():
    model = nn.ModuleDict({"layers": nn.ModuleList([Fused(), Fused()])})
    with pytest.raises(ValueError, match=r"qkv_proj' fuses 3 matrices.*balance='params'"):
        HalfFineTuning().new_stage(model)
    method = HalfFineTuning(balance="params", seed=1)
    report = method.new_stage(model)
    blocks = {"self_attn.qkv_proj": [(0, 4), (4, 6), (6, 8)], "mlp.gate_up_proj": [(0, 6), (6, 12)]}
    partial = 0
    for layer in range(2):
        for name, rows in blocks.items():
            weight = method.mask()[f"layers.{layer}.{name}.weight"]
            bias = method.mask()[f"layers.{layer}.{name}.bias"]
            if isinstance(weight, bool):
                assert weight is bias
                continue
            partial += 1
            assert all(len(weight[a:b].unique()) == 1 for a, b in rows)
            assert torch.equal(weight.all(1), bias)
    assert partial >= 2 and 0.35 < report.frozen_share < 0.65


def test_gpt2s_transposed_layers_are_split_by_columns():
    transformers = pytest.importorskip("transformers")
    cfg = transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, n_positions=6)
    model = transformers.GPT2LMHeadModel(cfg)
    units = discover(model, None, ALWAYS)
    assert {(u.name.split(".", 2)[-1].split(".", 1)[1], u.category, u.fused) for u in units} == {
        ("attn.c_attn", "attention", 3), ("attn.c_proj", "attention", 1), ("mlp.c_fc", "feed-forward", 1),
        ("mlp.c_proj", "feed-forward", 1), ("ln_1", "norm", 1), ("ln_2", "norm", 1),
    }  # fmt: skip
    method = HalfFineTuning(balance="params", seed=0)
    method.new_stage(model)
    for name, mask in method.mask().items():
        if "c_attn" in name and isinstance(mask, torch.Tensor):
            blocks = mask.reshape(-1, 3, 8)  # (inputs, matrix, columns), or the bias
            assert all(len(blocks[:, i].unique()) == 1 for i in range(3))
    with pytest.raises(ValueError, match="c_attn"):
        HalfFineTuning().new_stage(model)


def test_interleaved_fusion_is_refused():
    block = nn.ModuleDict({"attention": nn.ModuleDict({"query_key_value": nn.Linear(4, 12), "dense": nn.Linear(4, 4)})})
    model = nn.ModuleDict({"layers": nn.ModuleList([block])})
    with pytest.raises(ValueError, match="cannot split 'layers.0.attention.query_key_value'"):
        HalfFineTuning(balance="params").new_stage(model)
    units = discover(model, None, ALWAYS)
    assert split_fused([u for u in units if u.fused == 1], {}, ()) == [u for u in units if u.fused == 1]


# ── discovery ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("kind", "config", "attention", "feedforward", "norms"),
    [
        ("LlamaForCausalLM", "LlamaConfig", 4, 3, 2),
        ("Olmo2ForCausalLM", "Olmo2Config", 4, 3, 4),
        ("Qwen3ForCausalLM", "Qwen3Config", 4, 3, 4),
        ("BertForSequenceClassification", "BertConfig", 4, 2, 2),
        ("T5ForConditionalGeneration", "T5Config", None, None, None),
    ],
)
def test_matrices_are_found_in_models_of_transformers(kind, config, attention, feedforward, norms):
    transformers = pytest.importorskip("transformers")
    small = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 9,
    }
    if kind.startswith("T5"):
        small = {"d_model": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2, "d_kv": 4, "vocab_size": 9}
    model = getattr(transformers, kind)(getattr(transformers, config)(**small))
    units = discover(model, None, ALWAYS)
    if attention is None:  # encoder layers with 4 attention matrices, decoder layers with 8
        per_layer = [sum(u.layer == n and u.category == "attention" for u in units) for n in range(4)]
        assert sorted(per_layer) == [4, 4, 8, 8] and sum(u.category == "feed-forward" for u in units) == 8
        return
    for layer in (0, 1):
        counts = [
            sum(u.layer == layer and u.category == c for u in units) for c in ("attention", "feed-forward", "norm")
        ]
        assert counts == [attention, feedforward, norms]
    assert all(u.category != "outside" for u in units)


def test_biases_follow_their_matrices():
    block = nn.ModuleDict({name: nn.Linear(2, 2) for name in ATTENTION})
    frozen = frozen_names(nn.ModuleDict({"layers": nn.ModuleList([block])}))
    assert len(frozen) == 4 and all(n.replace("weight", "bias") in frozen for n in frozen)


def test_tied_tensors_are_one_and_train():
    model = Llama(2)
    model.lm_head.weight = model.embed_tokens.weight
    method = HalfFineTuning(ratio=1.0, trainable_always=("lm_head",))
    report = method.new_stage(model)
    assert method.mask()["embed_tokens.weight"] is True and "lm_head.weight" not in method.mask()
    assert report.trainable == model.embed_tokens.weight.numel()
    assert [p is model.lm_head.weight for p in method.trainable_parameters()] == [True]


def test_own_groups_replace_the_discovery():
    def four():
        return nn.ModuleDict({name: nn.Linear(2, 2) for name in "abcd"})

    frozen = frozen_names(four(), groups=[["a", "b"], ["c.weight", "d"]])
    assert len({n.split(".")[0] for n in frozen} & {"a", "b"}) == 1 and len({"c.weight", "d.weight"} & frozen) == 1
    for groups, message in (
        ([["e"]], "names 'e'"), ([["a", "a.bias"]], "holds 'a.bias' twice"), ([[]], "groups is empty"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            HalfFineTuning(groups=groups).new_stage(four())


def test_a_model_without_layers_is_named():
    with pytest.raises(ValueError, match="no layers with matrices of a known name"):
        HalfFineTuning().new_stage(nn.Sequential(nn.Linear(2, 2)))


def test_the_report_counts_what_is_frozen():
    model = Llama(4)
    report = HalfFineTuning(seed=1).new_stage(model)
    rows = {row.category: row for row in report.rows}
    assert (rows["attention"].units, rows["attention"].frozen_units) == (16, 8)
    assert (rows["feed-forward"].units, rows["feed-forward"].frozen_units) == (12, 6)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == report.trainable
    assert "50.0 %" in str(report) and report.frozen_share == 0.5 and len(report.frozen) == 18
