"""Attaching and folding the weight compander: what is companded, what stays the same, what is refused."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from wellposed import Hyperparameter
from wellposed.hyperparameter import substituted
from wellposed.weights import (
    Compander,
    WeightCompander,
    apply_compander,
    companded,
    fold_compander,
    load_plain_state_dict,
    plain_state_dict,
    uncompand,
)
from wellposed.weights.compander_attach import check_options
from wellposed.weights.compander_functions import COMPANDER_FUNCTIONS, number
from wellposed.weights.compander_module import check_scales

every_function = pytest.mark.parametrize("fn", COMPANDER_FUNCTIONS)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(4 * 16, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3),
    )  # fmt: skip


X = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(0))


class Tied(nn.Module):
    """An embedding whose weight the head shares, and two linear layers that share another."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 4)
        self.embedding.weight.data.mul_(0.3)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.second(self.first(self.embedding(tokens)).relu()))


@every_function
@given(dtype=st.sampled_from([torch.float32, torch.float64]), learnable=st.sampled_from(["no", "layer", "global"]))
def test_attaching_and_folding_leave_the_network_what_it_is(fn, dtype, learnable):
    model = network().to(dtype).eval()
    before, plain = model(X.to(dtype)), copy.deepcopy(model.state_dict())
    tensors = dict(model.named_parameters())
    names = apply_compander(model, fn=fn, learnable=learnable)
    assert names == ["0.weight", "4.weight", "7.weight"]
    torch.testing.assert_close(model(X.to(dtype)), before, rtol=0, atol=1e-6)
    assert all(one.w.dtype == dtype and one.w.shape == plain[one.name].shape for one in companded(model))
    # The optimizer that a user has built keeps its parameters.
    assert all(one.v is tensors[one.name] for one in companded(model))
    folded = fold_compander(model)
    torch.testing.assert_close(folded(X.to(dtype)), before, rtol=0, atol=1e-6)
    assert list(folded.state_dict()) == list(plain)
    assert all(p is tensors[n] for n, p in folded.named_parameters())
    assert type(folded[0]) is nn.Conv2d


def test_weights_alone_are_companded_and_each_layer_once():
    model = network()
    names = apply_compander(model)
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(names) == len(layers) == 3
    kept = {n for n, _ in model.named_parameters() if "parametrizations" not in n}
    assert kept == {"0.bias", "1.weight", "1.bias", "4.bias", "5.weight", "5.bias", "7.bias"}
    embedding = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2))
    assert apply_compander(copy.deepcopy(embedding)) == ["1.weight"]
    embedding[0].weight.data.clamp_(-1, 1)
    assert apply_compander(embedding, types=(nn.Linear, nn.Embedding)) == ["0.weight", "1.weight"]


def test_folding_and_attaching_again_gives_the_same_numbers():
    model = network()
    apply_compander(model, a=0.5, b=0.8)
    with torch.no_grad():
        for one in companded(model):
            one.v.copy_(
                uncompand(0.9 * math.pi / 4 * torch.linspace(-1, 1, one.v.numel()).reshape(one.v.shape), 0.5, 0.8)
            )
    before = [one.v.clone() for one in companded(model)]
    apply_compander(fold_compander(model), a=0.5, b=0.8)
    for one, v in zip(companded(model), before, strict=True):
        torch.testing.assert_close(one.v.detach(), v, rtol=1e-5, atol=0)


def test_a_tensor_that_layers_share_is_companded_once_and_stays_shared():
    model, tokens = Tied(), torch.tensor([[0, 3, 6]])
    before = model(tokens)
    assert apply_compander(model, a=0.9) == ["first.weight", "head.weight"]
    torch.testing.assert_close(model(tokens), before)
    assert len(companded(model)) == 2 and len(companded(model, ties=True)) == 4
    assert len([p for p in model.parameters() if p.ndim == 2]) == 2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(tokens).square().sum().backward()
    optimizer.step()
    assert torch.equal(model.first.weight, model.second.weight)
    assert torch.equal(model.head.weight, model.embedding.weight)
    trained, plain = model(tokens), plain_state_dict(model)
    fold_compander(model)
    torch.testing.assert_close(model(tokens), trained)
    assert model.first.weight is model.second.weight and model.head.weight is model.embedding.weight
    assert model.first.weight.grad is None
    assert set(plain) == set(model.state_dict())
    assert all(torch.allclose(plain[name], tensor) for name, tensor in model.state_dict().items())


def test_weights_out_of_range_are_refused_by_layer_and_nothing_is_touched():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(1, 200))
    before = copy.deepcopy(model.state_dict())
    largest = float(model[1].weight.detach().abs().max())
    assert largest > 0.99
    message = (
        rf"'1.weight': max \|w\| = {largest:g} exceeds 0.777544 = 0.99 x 0.785398, the bound of arctan with a = 0.5"
    )
    with pytest.raises(ValueError, match=message):
        apply_compander(model, a=0.5, b=1.0)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert apply_compander(model, a=0.5, skip=["1"]) == ["0.weight"]


def test_clipping_says_what_it_changes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 200))
    before = model[0].weight.detach().clone()
    limit = 0.95 * 0.5 * math.pi / 2
    count = int((before.abs() > limit).sum())
    with pytest.warns(UserWarning, match=rf"clipped {count} of 200 weights to 0.746128, which changes the network"):
        apply_compander(model, a=0.5, out_of_range="clip")
    torch.testing.assert_close(model[0].weight, before.clamp(-limit, limit))
    model[0].parametrizations.weight.original.data.fill_(math.nan)
    with pytest.raises(ValueError, match="max .w. = nan exceeds"):
        apply_compander(fold_compander(model), a=0.5, out_of_range="clip")
    huge = nn.Sequential(nn.Linear(2, 2))
    huge[0].weight.data.fill_(100.0)
    with pytest.raises(ValueError, match="too large for arsinh: v would overflow; raise a"):
        apply_compander(huge, fn="arsinh", out_of_range="clip")


@pytest.mark.parametrize("log_space", [False, True])
def test_learned_scales_are_two_for_the_network_or_two_for_each_layer(log_space):
    for learnable, count in (("no", 0), ("layer", 6), ("global", 2)):
        model = network()
        plain = sum(p.numel() for p in model.parameters())
        apply_compander(model, a=0.5, b=1.0, learnable=learnable, log_space=log_space)
        assert sum(p.numel() for p in model.parameters()) == plain + count
        pairs = [tuple(number(scale) for scale in one.compander.scales()) for one in companded(model)]
        assert pairs == [pytest.approx((0.5, 1.0))] * 3
        assert (len({id(one.compander) for one in companded(model)}) == 1) == (learnable == "global")
    model(X).square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == () for p in companded(model)[0].compander.parameters())


def test_scales_of_half_precision_weights_are_not_rounded():
    for dtype in (torch.bfloat16, torch.float16):
        model = nn.Sequential(nn.Linear(8, 8)).to(dtype)
        before = model[0].weight.detach().clone()
        apply_compander(model, a=0.7, b=0.7, learnable="layer")
        assert model[0].weight.dtype == dtype and companded(model)[0].compander.a.dtype == torch.float32
        torch.testing.assert_close(model[0].weight, before, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_deviations_measure_each_layer_with_its_own_unit():
    model = network()
    deviations = [float(model[i].weight.detach().std(correction=0)) for i in (0, 4, 7)]
    apply_compander(model, a=2.5, b=2.0, units="deviation")
    for one, deviation in zip(companded(model), deviations, strict=True):
        assert one.compander.scales() == pytest.approx((2.5 * deviation, 2.0 * deviation))
        assert one.compander.bound == pytest.approx(2.5 * deviation * math.pi / 2)
    # torch's uniform initialisation reaches sqrt(3) deviations.
    with pytest.raises(ValueError, match=r"'0.weight': max .w."):
        apply_compander(network(), a=1.1, b=1.1, units="deviation")
    zero = nn.Sequential(nn.Linear(2, 2))
    nn.init.zeros_(zero[0].weight)
    with pytest.raises(ValueError, match=r"'0.weight' has equal weights"):
        apply_compander(zero, units="deviation")


def test_a_shared_hyperparameter_reaches_every_layer_and_a_tuner_differentiates_it():
    a = Hyperparameter(2.5, low=0.0)
    model = network().double()
    apply_compander(model, a=a, b=2.5, units="deviation")
    assert all("raw" not in name for name, _ in model.named_parameters())
    assert all(one.compander.a is a for one in companded(model))
    u = a.raw.detach().clone().double().requires_grad_()
    with substituted({a: u}):
        total = sum((one.w**3).sum() for one in companded(model))
    (found,) = torch.autograd.grad(total, u)
    value = torch.tensor(float(a()), dtype=torch.float64)
    expected = sum((3 * one.w**3).sum() / value for one in companded(model)) * torch.autograd.functional.jacobian(
        a.from_raw, u
    )
    torch.testing.assert_close(found, expected.detach(), rtol=1e-6, atol=1e-9)
    before = model(X.double())
    a.set_(3.0)
    assert not torch.allclose(model(X.double()), before)


def test_the_state_dict_alone_reproduces_the_weights():
    for options in ({"a": 0.9, "b": 0.6}, {"learnable": "layer", "log_space": True}, {"a": Hyperparameter(0.8)}):
        model = network().eval()
        apply_compander(model, **options)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.01)
        other = {**options, **{k: 0.7 for k in ("a", "b") if isinstance(options.get(k), float)}}
        twin = network(seed=1).eval()
        apply_compander(twin, **copy.deepcopy(other))
        twin.load_state_dict(model.state_dict())
        assert torch.equal(twin(X), model(X))
        assert torch.equal(copy.deepcopy(model)(X), model(X))
        assert all(isinstance(value, torch.Tensor) for value in model.state_dict().values())
    wrong = network()
    apply_compander(wrong, fn="tanh", learnable="layer", log_space=True)
    right = network()
    apply_compander(right, learnable="layer", log_space=True)
    with pytest.raises(ValueError, match="the state is of fn='arctan', not 'tanh'"):
        wrong.load_state_dict(right.state_dict())


def test_checkpoints_of_the_plain_network_pass_through_the_inverse():
    plain, model = network(seed=3).eval(), network().eval()
    apply_compander(model, a=0.6, b=0.9)
    assert str(load_plain_state_dict(model, plain.state_dict())) == "<All keys matched successfully>"
    torch.testing.assert_close(model(X), plain(X), rtol=0, atol=1e-6)
    for name, tensor in plain_state_dict(model).items():
        torch.testing.assert_close(tensor, plain.state_dict()[name])
    # Not by itself: the numbers of a plain checkpoint are no v.
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(plain.state_dict())
    before = copy.deepcopy(model.state_dict())
    state = plain.state_dict()
    state["4.weight"] = state["4.weight"] + 1.0
    with pytest.raises(ValueError, match=r"load_plain_state_dict: '4.weight': max .w. = .* exceeds"):
        load_plain_state_dict(model, state)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    tied, other = Tied(), Tied()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.5)
    apply_compander(tied, a=0.9)
    load_plain_state_dict(tied, other.state_dict())
    tokens = torch.tensor([1, 5])
    torch.testing.assert_close(tied(tokens), other(tokens))


def test_layers_that_read_fused_weights_are_left_plain_with_a_warning():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(4, 4)
            self.attention = nn.MultiheadAttention(4, 2)
            self.head = nn.Linear(4, 2)

    with pytest.warns(UserWarning, match=r"left plain, .*: 'rnn' \(LSTM\), 'attention' \(MultiheadAttention\); list"):
        assert apply_compander(Mixed()) == ["head.weight"]
    assert apply_compander(Mixed(), skip=["rnn", "attention"]) == ["head.weight"]
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        before = layer(x)
        with pytest.warns(UserWarning, match="MultiheadAttention"):
            assert apply_compander(layer) == ["linear1.weight", "linear2.weight"]
        torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-6)


def test_a_weight_that_is_parametrized_already_is_stacked_only_when_asked():
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)))
    x = torch.randn(2, 4)
    before = model(x)
    with pytest.raises(ValueError, match=r"'0.weight' is already parametrized; skip it, or pass stack=True"):
        apply_compander(model)
    assert apply_compander(model, stack=True) == ["0.weight"]
    torch.testing.assert_close(model(x), before)
    with torch.no_grad():
        model[0].parametrizations.weight.original1.mul_(1e6)
        model[0].parametrizations.weight.original0.mul_(1e6)
    assert model[0].weight.abs().max() <= 0.7 * math.pi / 2 * (1 + 1e-6)
    trained = model(x)
    torch.testing.assert_close(fold_compander(model)(x), trained)
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    spectral = nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 3)))
    with pytest.warns(UserWarning, match="have no exact inverse; its weights moved by up to"):
        apply_compander(spectral, a=1.0, b=1.0, stack=True)


def test_what_does_not_train_or_has_no_shape_is_not_companded():
    frozen = network()
    frozen[0].requires_grad_(False)
    assert apply_compander(frozen) == ["4.weight", "7.weight"]
    with pytest.raises(ValueError, match=r"no layer to compand that trains; types = \['Linear', 'Conv1d'"):
        apply_compander(nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="'0.weight' has no shape yet; call the lazy module once first"):
        apply_compander(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(
        ValueError, match=r"skip names '4.wieght', which the model does not have; did you mean '4.weight'"
    ):
        apply_compander(network(), skip=["4.wieght"])
    sparse = nn.Sequential(nn.Embedding(3, 2, sparse=True))
    with pytest.raises(ValueError, match="'0.weight' has sparse gradients; pass sparse=False to the layer"):
        apply_compander(sparse, a=9.0, types=(nn.Embedding,))
    old = nn.Sequential(nn.Linear(2, 2))
    del old[0]._parameters["weight"]
    old[0].weight = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"'0.weight' is no parameter"):
        apply_compander(old)


def test_the_parametrization_can_be_registered_by_hand_and_assigned_to():
    layer = nn.Linear(3, 2)
    parametrize.register_parametrization(layer, "weight", Compander(a=0.7, b=0.5))
    layer.weight = torch.full((2, 3), 0.4)
    torch.testing.assert_close(layer.weight, torch.full((2, 3), 0.4))
    with pytest.raises(ValueError, match=r"Compander: max \|w\| = 2 exceeds 1.08856 = 0.99 x 1.09956"):
        layer.weight = torch.full((2, 3), 2.0)
    assert (
        repr(Compander(learnable=True, log_space=True)) == "Compander(a=0.7, b=0.7, fn='arctan', learned in log space)"
    )


def test_folding_a_copy_leaves_the_original_alone():
    model = network().eval()
    apply_compander(model)
    before = model(X)
    twin = fold_compander(copy.deepcopy(model))
    assert torch.equal(model(X), before) and len(companded(model)) == 3
    torch.testing.assert_close(twin(X), before, rtol=0, atol=1e-6)
    assert type(twin[0]) is nn.Conv2d
    torch.testing.assert_close(fold_compander(model)(X), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Compander(a=-1.0), "Compander: a must be >= 0, got -1.0"),
        (lambda: apply_compander(network(), a=0.0), "apply_compander: a must be > 0 and finite, got 0.0"),
        (lambda: WeightCompander(b=math.inf), "WeightCompander: b must be > 0 and finite, got inf"),
        (lambda: WeightCompander(a=Hyperparameter(0.7), learnable="layer"), "WeightCompander: a is a Hyperparameter"),
        (lambda: WeightCompander(weight_decay=-1.0), "WeightCompander: weight_decay must be >= 0, got -1.0"),
        (lambda: Compander(unit=0.0), "Compander: unit must be > 0 and finite, got 0.0"),
        (lambda: check_scales("X", 1.0, 1.0, "sine", False), r"X: fn must be one of \['arctan', .*\], got 'sine'"),
        (lambda: check_options("X", "yes", "absolute", "raise"), r"X: learnable must be one of \['no', .*got 'yes'"),
        (lambda: check_options("X", "no", "sd", "raise"), r"X: units must be one of .*got 'sd'"),
        (lambda: check_options("X", "no", "absolute", "wrap"), r"X: out_of_range must be one of .*got 'wrap'"),
        (lambda: check_options("X", "global", "deviation", "raise"), "X: units='deviation' differ by layer"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_scales_follow_the_weights_to_an_accelerator():
    model = network().cuda()
    before = model.eval()(X.cuda())
    apply_compander(model, learnable="layer")
    torch.testing.assert_close(model(X.cuda()), before, rtol=0, atol=1e-5)
    assert all(p.is_cuda for p in model.parameters())
