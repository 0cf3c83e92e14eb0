"""Predictions linearised in k: forward mode equals double backward and differences, with shared dropout masks."""

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from wellposed import BilevelProblem, Hyperparameter
from wellposed.losses import LabelSmoothing
from wellposed.objective import cross_entropy
from wellposed.tuning import HyperDropout, SelfTuner, convert, response_state
from wellposed.tuning.conversion import response_parameters
from wellposed.tuning.linearization import explained_forward_mode

N, B = 3, 5


def moved(model, seed=1):
    """A converted model whose response is not zero, as after some training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "scale" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator).to(p))
    return model


def network():
    torch.manual_seed(0)
    rate = Hyperparameter(0.4, 0.0, 0.9)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.GELU(), nn.Flatten(), HyperDropout(rate), nn.Linear(108, 6),
        nn.LayerNorm(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 4),
    )  # fmt: skip
    return moved(convert(model.double(), N))


def predict(model, x, k, linearized, seed=3):
    torch.manual_seed(seed)
    with response_state(model).at(k, linearized):
        return model(x)


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(B, 1, 8, 8, generator=generator, dtype=torch.float64)
    return network(), x, torch.randn(B, N, generator=generator, dtype=torch.float64)


def test_forward_mode_equals_double_backward_and_central_differences_with_shared_masks(case):
    model, x, k = case
    found = predict(model, x, k, True)
    zero = torch.zeros_like(k)
    base = predict(model, x, zero, False)
    step = 1e-4
    slope = (predict(model, x, step * k, False) - predict(model, x, -step * k, False)) / (2 * step)
    torch.testing.assert_close(found, base + slope, rtol=0, atol=1e-6)
    # Twice backward: the derivative, in a dummy cotangent, of the vector-Jacobian product.
    leaf, dummy = zero.clone().requires_grad_(), torch.zeros_like(base, requires_grad=True)
    pulled = torch.autograd.grad(predict(model, x, leaf, False), leaf, dummy, create_graph=True)[0]
    twice = torch.autograd.grad(pulled, dummy, k)[0]
    torch.testing.assert_close(found, base + twice, rtol=0, atol=1e-10)


def test_reverse_mode_through_the_linearised_prediction_is_the_derivative_of_the_linearised_loss(case):
    model, x, k = case
    names = response_parameters(model)
    labels = torch.tensor([0, 1, 2, 3, 0])

    def loss():
        return F.cross_entropy(predict(model, x, k, True), labels)

    parameters = dict(model.named_parameters())
    gradients = dict(zip(names, torch.autograd.grad(loss(), [parameters[n] for n in names]), strict=True))
    assert all(bool(g.any()) for n, g in gradients.items())
    generator = torch.Generator().manual_seed(1)
    step = 1e-6
    for name in names:
        direction = torch.randn(gradients[name].shape, generator=generator, dtype=torch.float64)
        values = []
        with torch.no_grad():
            for sign in (1, -1):
                parameters[name].add_(sign * step * direction)
                values.append(float(loss()))
                parameters[name].sub_(sign * step * direction)
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(
            float((gradients[name] * direction).sum()), rel=2e-5, abs=1e-9
        )


def test_the_linearised_prediction_is_linear_in_k(case):
    model, x, k = case
    model.eval()
    at = [predict(model, x, factor * k, True) for factor in (0.0, 1.0, 2.0)]
    torch.testing.assert_close(at[2] - at[1], at[1] - at[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(at[0], model(x), rtol=0, atol=1e-12)


def test_an_lstm_and_an_embedding_are_linearised_too():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.lstm, self.head = nn.Embedding(9, 4), nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 2)

        def forward(self, tokens):
            return self.head(self.lstm(self.embedding(tokens))[0])

    torch.manual_seed(0)
    model = moved(convert(Tagger().double(), N))
    tokens, k = torch.randint(0, 9, (B, 6)), torch.randn(B, N, dtype=torch.float64)
    step = 1e-4
    slope = (predict(model, tokens, step * k, False) - predict(model, tokens, -step * k, False)) / (2 * step)
    torch.testing.assert_close(predict(model, tokens, k, True), model(tokens) + slope, rtol=0, atol=1e-6)


@dataclass
class Output:
    logits: torch.Tensor
    loss: None = None


@pytest.mark.parametrize(
    ("pack", "unpack"),
    [
        (lambda y: {"logits": y}, lambda o: o["logits"]),
        (lambda y: (y, torch.arange(3)), lambda o: o[0]),
        (lambda y: [y], lambda o: o[0]),
        (Output, lambda o: o.logits),
    ],
)
def test_outputs_of_any_container_are_linearised_and_keep_their_type(pack, unpack):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            return pack(self.layer(x))

    model = moved(convert(Wrapped(), N))
    x, k = torch.randn(B, 4), torch.randn(B, N)
    outputs = predict(model, x, k, True)
    assert type(outputs) is type(pack(x))
    # The network is linear in k here, so that linearising changes nothing.
    torch.testing.assert_close(unpack(outputs), unpack(predict(model, x, k, False)))


def test_an_error_inside_the_pass_leaves_no_open_level_behind():
    model = convert(nn.Sequential(nn.Linear(4, 2)), N)
    state = response_state(model)
    for _ in range(2):
        with state.at(torch.zeros(B, N), True), pytest.raises(RuntimeError):
            model(torch.zeros(B, 3))
    torch.testing.assert_close(predict(model, torch.ones(B, 4), torch.zeros(B, N), True), model(torch.ones(B, 4)))


def test_a_copy_of_a_converted_model_is_linearised_by_its_own_state(case):
    model, x, k = case
    model.eval()
    copied = copy.deepcopy(model)
    torch.testing.assert_close(predict(copied, x, k, True), predict(model, x, k, True), rtol=0, atol=0)


class Attention(nn.Module):
    """Classes of short sequences by one head of fused attention."""

    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(F.scaled_dot_product_attention(*(layer(x)[:, None] for layer in self.layers))[:, 0].mean(1))


class Cube(torch.autograd.Function):
    """Without `jvp`, as most functions of one's own."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


class Cubed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return Cube.apply(self.layer(x)).mean(1)


def trained(network, **options):
    """Losses of two steps, the second with a response that is not zero."""
    torch.manual_seed(0)
    smoothing = LabelSmoothing(Hyperparameter(0.1, 0.0, 0.5, per_example=True))
    tuner = SelfTuner(BilevelProblem.from_regularizer(network(), smoothing, cross_entropy), train_steps=1, **options)
    batch = torch.randn(B, 3, 4), torch.arange(B) % 2
    return tuner, [info.inner_loss for info in tuner.run([batch], [batch], 2)]


@pytest.mark.parametrize(
    ("network", "operation"),
    [(Attention, "_scaled_dot_product_flash_attention"), (Cubed, "You must implement the jvp function")],
)
def test_an_operation_without_forward_mode_derivative_is_named_with_the_ways_out(network, operation):
    with pytest.raises(NotImplementedError, match=f"SelfTuner: .*{operation}.*linearize=False.*MATH.*'eager'") as found:
        trained(network)
    assert "please file an issue" not in str(found.value).lower()
    assert isinstance(found.value.__cause__, NotImplementedError) and "forward" in str(found.value.__cause__)


def test_both_ways_out_of_a_fused_attention_train():
    assert all(torch.isfinite(torch.tensor(trained(Attention, linearize=False)[1])))
    with sdpa_kernel(SDPBackend.MATH):
        tuner, losses = trained(Attention)
    assert all(torch.isfinite(torch.tensor(losses)))
    names = response_parameters(tuner.problem.model)
    assert any(bool(tuner.problem.params[n].any()) for n in names if "scale" in n)  # the response was learned


def test_an_error_of_the_same_kind_for_another_reason_passes_unchanged():
    error = NotImplementedError("forward is not written yet")
    with pytest.raises(NotImplementedError) as found, explained_forward_mode("SelfTuner"):
        raise error
    assert found.value is error
