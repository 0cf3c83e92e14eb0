"""LoRA layers: what they compute (beside PEFT's), what trains, what is merged, what is refused."""

from functools import partial

import pytest
import torch
from torch import nn

from wellposed import TensorLoader, fit
from wellposed.weights import LowRankAdaptation, LowRankLinear, add_low_rank, merge_low_rank, principal_factors


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


X = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def moved(model):
    """Give every B something to do."""
    generator = torch.Generator().manual_seed(2)
    for part in model.modules():
        if isinstance(part, LowRankLinear):
            with torch.no_grad():
                part.lora_B += torch.randn(part.lora_B.shape, generator=generator, dtype=part.lora_B.dtype)
    return model


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_an_adapted_model_starts_as_the_model(init):
    model, plain = network(), network()
    add_low_rank(model, rank=2, alpha=3.0, init=init)
    torch.testing.assert_close(model(X), plain(X), rtol=0, atol=1e-12)


def test_principal_factors_are_the_best_approximation_of_their_rank():
    weight = network()[2].weight.detach()
    a, b = principal_factors(weight, 3, scaling=2.0)
    u, s, vh = torch.linalg.svd(weight)
    torch.testing.assert_close(2.0 * b @ a, (u[:, :3] * s[:3]) @ vh[:3], rtol=0, atol=1e-12)
    torch.testing.assert_close(a @ a.T, b.T @ b, rtol=0, atol=1e-12)  # evenly shared


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_layers_equal_pefts(init):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(
        network(torch.float32),
        peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0", "2"], init_lora_weights=init == "kaiming" or init),
    )
    ours = network(torch.float32)
    add_low_rank(ours, rank=2, alpha=4, targets=["0", "2"], init=init)
    generator = torch.Generator().manual_seed(3)
    for number in ("0", "2"):
        layer, other = ours.get_submodule(number), theirs.get_submodule(f"base_model.model.{number}")
        with torch.no_grad():
            if init == "kaiming":
                other.lora_A["default"].weight.copy_(layer.lora_A)
                noise = torch.randn(layer.lora_B.shape, generator=generator)
                layer.lora_B += noise
                other.lora_B["default"].weight += noise
            else:
                product = other.scaling["default"] * other.lora_B["default"].weight @ other.lora_A["default"].weight
                torch.testing.assert_close(layer.scaling * layer.lora_B @ layer.lora_A, product, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours(X.float()), theirs(X.float()), rtol=0, atol=1e-5)


def test_merged_logits_equal_the_adapted_ones_and_nothing_is_left():
    model = network()
    add_low_rank(model, rank=2, alpha=5.0)
    before = moved(model)(X)
    merged = merge_low_rank(model)
    torch.testing.assert_close(merged(X), before, rtol=0, atol=1e-12)
    assert not any(isinstance(part, LowRankLinear) for part in merged.modules())
    with pytest.raises(ValueError, match="merged before"):
        merge_low_rank(merged)


def test_scaling_zero_gives_the_base_back():
    model, plain = network(), network()
    add_low_rank(model, rank=2)
    moved(model)
    for part in model.modules():
        if isinstance(part, LowRankLinear):
            part.scaling = 0.0
    assert torch.equal(model(X), plain(X))


def test_a_shared_layer_stays_shared():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3)
            self.b = self.a

        def forward(self, x):
            return self.b(self.a(x))

    model = Tied()
    add_low_rank(model, rank=1)
    assert model.a is model.b
    moved(model)
    before = model(torch.eye(3))
    merge_low_rank(model)
    assert model.a is model.b
    torch.testing.assert_close(model(torch.eye(3)), before)


def test_only_the_adapter_and_what_is_asked_for_trains():
    model = LowRankAdaptation(rank=2, targets=["0"], trainable=["4.bias"]).attach(network())
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.lora_A", "0.lora_B", "4.bias"]


def test_training_moves_the_merged_weight_and_leaves_the_rest():
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(3))
    loader = TensorLoader(x, (x[:, 0] > 0).long(), batch_size=10)
    plain = network(torch.float32)
    optimizer = partial(torch.optim.AdamW, lr=0.05)
    model = fit(
        network(torch.float32), loader, epochs=5, optimizer=optimizer, regularizer=LowRankAdaptation(2, targets=["2"])
    ).model
    assert torch.equal(model[0].weight, plain[0].weight) and torch.equal(model[4].bias, plain[4].bias)
    change = model[2].weight - plain[2].weight
    assert change.norm() > 0.05
    assert torch.linalg.matrix_rank(change.double(), rtol=1e-4) == 2


def test_dropout_acts_in_training_mode_alone():
    model = network()
    add_low_rank(model, rank=2, dropout=0.5)
    moved(model)
    model.eval()
    assert torch.equal(model(X), model(X))
    model.train()
    assert not torch.equal(model(X), model(X))


def test_the_same_seed_draws_the_same_adapter():
    a, b, c = (LowRankAdaptation(rank=2, seed=seed).attach(network()) for seed in (0, 0, 1))
    assert torch.equal(a[0].lora_A, b[0].lora_A)
    assert not torch.equal(a[0].lora_A, c[0].lora_A)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LowRankLinear(nn.Linear(2, 2), 0), "rank must be an integer of at least 1, got 0"),
        (lambda: LowRankLinear(nn.Linear(2, 2), 1, alpha=0.0), "alpha must be positive, got 0.0"),
        (lambda: LowRankLinear(nn.Linear(2, 2), 1, dropout=1.0), r"dropout must lie in \[0, 1\), got 1.0"),
        (lambda: LowRankLinear(nn.Linear(2, 2), 1, init="zeros"), "init must be 'kaiming' or 'pissa', got 'zeros'"),
        (lambda: LowRankLinear(nn.Linear(2, 2), 1, dropout=0.1, init="pissa"), "dropout must be 0 with init='pissa'"),
        (lambda: LowRankLinear(nn.Linear(2, 9), 3, init="pissa"), "rank must be at most 2"),
        (lambda: add_low_rank(nn.Linear(2, 2), 1), "single nn.Linear"),
        (lambda: add_low_rank(network(), 1, targets=["q_proj"]), r"targets names 'q_proj'.*\['0', '2', '4'\]"),
        (lambda: add_low_rank(network(), 1, targets=lambda name, part: False), "leaves no linear layer"),
        (lambda: add_low_rank(nn.Sequential(nn.MultiheadAttention(4, 2)), 1), "'0.out_proj'.*split_attention"),
        (lambda: merge_low_rank(network()), "no low-rank layer"),
        (lambda: LowRankAdaptation(rank=0), "rank must be an integer of at least 1, got 0"),
        (lambda: LowRankAdaptation(rank=1, trainable=["head"]).attach(network()), "trainable names 'head'"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_a_model_is_adapted_once():
    model = network()
    add_low_rank(model, rank=1)
    with pytest.raises(ValueError, match="already"):
        add_low_rank(model, rank=1)
