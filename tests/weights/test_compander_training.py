"""The weight compander inside `fit`: with weight decay, averages, early stopping, sharpness, pairs, resume, tuners."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from doubles import data, flat, noisy_network, smooth_network
from torch import nn

from wellposed import BilevelProblem, Compose, Hyperparameter, Pair, Regularizer, TensorLoader, fit
from wellposed.features import Dropout
from wellposed.gradients import SharpnessAwareMinimization
from wellposed.hyperparameter import differentiable
from wellposed.losses import EarlyLearning, EarlyLearningPlus, LabelSmoothing, Mixup
from wellposed.objective import cross_entropy
from wellposed.pair import reinitialized
from wellposed.parameters import parameter_groups
from wellposed.step import Step
from wellposed.weights import (
    EarlyStopping,
    WeightAveraging,
    WeightCompander,
    WeightDecay,
    companded,
    compander_penalty,
    plain_state_dict,
    weight_tensors,
)

X, Y = data()
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
HELD = TensorLoader(X, Y, batch_size=64)
BOUND = 0.7 * math.pi / 2


def train(regularizer=None, model=None, epochs=3, **options):
    loader = TensorLoader(X, Y, batch_size=16, shuffle=True)
    options = {"optimizer": SGD, "validation": HELD, **options}
    return fit(model or noisy_network(), loader, epochs=epochs, regularizer=regularizer, **options)


def test_the_linear_compander_with_equal_scales_is_plain_training():
    neutral = WeightCompander(a=1.0, b=1.0, fn="linear")
    torch.testing.assert_close(flat(train(neutral).model), flat(train().model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rate", [0.1, 3.0])
def test_the_bound_holds_at_every_step(rate):
    largest = []

    class Watch(Regularizer):
        def on_step(self, step):
            largest.append(max(float(w.abs().max()) for w in weight_tensors(step.model).values()))

    result = train(Compose(WeightCompander(), Watch()), epochs=2, optimizer=partial(SGD, lr=rate))
    assert len(largest) == 8 and max(largest) <= BOUND * (1 + 1e-6)
    assert max(float(p.detach().abs().max()) for p in weight_tensors(result.model).values()) <= BOUND * (1 + 1e-6)
    assert all("parametrizations" not in name for name in result.model.state_dict())


class Penalty(Regularizer):
    """The paper's decay, in the loss."""

    def __init__(self, strength):
        super().__init__()
        self.strength = strength

    def penalty(self, step):
        return compander_penalty(step.model, self.strength)


@pytest.mark.parametrize("order", [1, -1])
def test_weight_decay_acts_on_the_weight_whatever_the_order(order):
    def run(decay):
        methods = [WeightCompander(a=0.5, b=0.6), decay]
        loader = TensorLoader(X.double(), Y, batch_size=16, shuffle=True)
        return flat(
            fit(
                smooth_network().double(), loader, epochs=3, regularizer=Compose(*methods[::order]), optimizer=SGD
            ).model
        )

    decayed = run(WeightDecay(0.02))
    torch.testing.assert_close(decayed, run(Penalty(0.02)), rtol=0, atol=1e-11)
    assert not torch.allclose(decayed, run(WeightDecay(0.0)), atol=1e-4)


def test_the_default_decay_of_adamw_reaches_the_weights_and_not_the_numbers_behind_them():
    def after(method, **options):
        model = smooth_network()
        for p in model.parameters():
            p.data.mul_(0.5)
        return train(method, model, epochs=1, optimizer=partial(torch.optim.AdamW, lr=1e-3, **options)).model

    # Nearly linear scales, under which both spaces are one.
    found = after(WeightCompander(a=50.0, b=50.0), weight_decay=0.5)
    torch.testing.assert_close(flat(found), flat(after(None, weight_decay=0.5)), rtol=0, atol=2e-5)
    assert not torch.allclose(flat(found), flat(after(None, weight_decay=0.0)), atol=1e-4)


def test_a_decay_that_is_learned_is_a_penalty_on_the_weight():
    method = WeightCompander(a=0.5, b=0.5, weight_decay=Hyperparameter(0.1))
    model = method.attach(smooth_network())
    assert method.parameter_groups(model) == [{"names": [one.v_name for one in companded(model)], "weight_decay": 0.0}]
    expected = 0.05 * sum(one.w.square().sum() for one in companded(model))
    torch.testing.assert_close(method.penalty(Step(model)), expected)
    assert WeightCompander().penalty(Step(model)) is None
    numbers = WeightCompander(weight_decay=0.01)
    twin = numbers.attach(smooth_network())
    groups = parameter_groups(twin, numbers.parameter_groups(twin))
    assert {n: g.get("weight_decay") for g in groups for n in g["names"]}["0.parametrizations.weight.original"] == 0.01
    with pytest.raises(ValueError, match="two methods disagree about weight_decay of '0.parametrizations.weight.or"):
        train(Compose(WeightDecay(0.1), WeightCompander(weight_decay=0.2)), smooth_network())


def test_learned_scales_train_without_decay():
    method = WeightCompander(a=0.5, b=1.0, learnable="layer", weight_decay=0.01)
    model = method.attach(smooth_network())
    decayed = {n: w["weight_decay"] for w in method.parameter_groups(model) for n in w["names"]}
    scales = [n for n in decayed if n.endswith((".a", ".b"))]
    assert len(scales) == 2 * len(companded(model)) and all(decayed[n] == 0.0 for n in scales)
    seen = []

    class Watch(Regularizer):
        def on_epoch(self, step):
            seen.append([float(p.detach()) for one in companded(step.model) for p in one.compander.parameters()])

    train(Compose(WeightCompander(a=0.5, b=1.0, learnable="layer"), WeightDecay(0.01), Watch()), smooth_network())
    assert seen[0] == [0.5, 1.0] * (len(seen[0]) // 2) and all(x != y for x, y in zip(seen[0], seen[-1], strict=True))


@pytest.mark.parametrize("learnable", ["no", "layer", "global"])
@pytest.mark.parametrize("make", [SGD, torch.optim.AdamW])
def test_a_killed_run_resumes_bit_for_bit(tmp_path, learnable, make):
    def run(epochs_before_the_kill=None):
        class Killed(Exception):
            pass

        def kill(step, entry):
            if epochs_before_the_kill is not None and entry["epoch"] == epochs_before_the_kill:
                raise Killed

        method = Compose(WeightCompander(learnable=learnable), WeightDecay(0.01), WeightAveraging(0.9))
        try:
            return flat(train(method, epochs=4, optimizer=make, checkpoint=path, on_epoch_end=kill).model)
        except Killed:
            return None

    path = tmp_path / "whole"
    whole = run()
    path = tmp_path / "killed"
    assert run(3) is None
    assert torch.equal(run(), whole)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("other", [lambda: WeightAveraging(0.9), EarlyStopping, lambda: Dropout(0.2)])
def test_averages_and_best_epochs_are_restored_before_the_weights_are_folded_in_either_order(order, other):
    methods = [WeightCompander(), other()]
    found = train(Compose(*methods[:: 1 - 2 * order]), smooth_network()).model
    assert torch.isfinite(flat(found)).all() and list(found.state_dict()) == list(smooth_network().state_dict())
    assert max(float(w.abs().max()) for w in weight_tensors(found).values()) <= BOUND * (1 + 1e-6)


def test_early_stopping_restores_the_plain_weights_of_the_best_epoch():
    states = []

    def watch(step, entry):
        states.append({name: tensor.clone() for name, tensor in plain_state_dict(step.model).items()})

    stopping = EarlyStopping()
    held = TensorLoader(torch.randn(64, 8, generator=torch.Generator().manual_seed(9)), Y, batch_size=64)
    method = Compose(stopping, WeightCompander(learnable="layer"))
    model = train(method, smooth_network(), epochs=12, validation=held, on_epoch_end=watch).model
    assert stopping.best_epoch < 12
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, states[stopping.best_epoch - 1][name], rtol=1e-6, atol=1e-7)
    assert not torch.allclose(
        flat(model), torch.cat([states[-1][n].reshape(-1) for n in dict(model.named_parameters())])
    )


def test_under_autocast_the_numbers_and_their_function_stay_in_single_precision():
    seen = set()

    class Watch(Regularizer):
        def on_gradients(self, step):
            seen.update((one.v.dtype, one.v.grad.dtype, one.w.dtype) for one in companded(step.model))

    found = train(Compose(WeightCompander(), Watch()), smooth_network(), amp=torch.bfloat16).model
    assert seen == {(torch.float32,) * 3}
    torch.testing.assert_close(flat(found), flat(train(WeightCompander(), smooth_network()).model), rtol=0, atol=0.1)


def test_an_average_of_companded_weights_is_an_average_of_their_numbers():
    averaging = WeightAveraging(0.5, warmup=False)
    numbers, average = [], []

    class Watch(Regularizer):
        def on_step(self, step):
            numbers.append([one.v.detach().clone() for one in companded(step.model)])

        def finish(self, model):
            average.extend(one.v.detach().clone() for one in companded(model))
            return model

    train(Compose(WeightCompander(), Watch(), averaging), smooth_network(), epochs=1)
    expected = numbers[0]
    for later in numbers[1:]:
        expected = [0.5 * e + 0.5 * v for e, v in zip(expected, later, strict=True)]
    for found, wanted in zip(average, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_sharpness_comes_before_an_adaptive_compander_and_the_wrong_order_says_so():
    adam = {"optimizer": partial(torch.optim.Adam, lr=1e-2)}
    right = Compose(SharpnessAwareMinimization(0.05), WeightCompander())
    assert torch.isfinite(flat(train(right, smooth_network(), **adam).model)).all()
    with pytest.raises(RuntimeError, match="put WeightCompander after methods that evaluate the batch again"):
        train(Compose(WeightCompander(), SharpnessAwareMinimization(0.05)), smooth_network(), **adam)
    # Without anything prepared the order does not matter.
    either = [
        flat(train(Compose(*pair), smooth_network()).model)
        for pair in (
            (SharpnessAwareMinimization(0.05), WeightCompander()),
            (WeightCompander(), SharpnessAwareMinimization(0.05)),
        )
    ]
    assert torch.equal(*either)


def test_clipping_sees_the_gradient_of_the_weight_under_an_adaptive_optimizer():
    seen = {}

    class Watch(Regularizer):
        def on_gradients(self, step):
            seen["after"] = [one.v.grad.clone() for one in companded(step.model)]

    class Before(Regularizer):
        def on_gradients(self, step):
            seen["slopes"] = [one.compander.slope(one.v.detach()) for one in companded(step.model)]
            seen["before"] = [one.v.grad.clone() for one in companded(step.model)]

    train(
        Compose(Before(), WeightCompander(0.6, 0.9), Watch()),
        smooth_network(),
        epochs=1,
        optimizer=partial(torch.optim.Adam, lr=1e-3),
        clip_norm=1.0,
    )
    for before, after, slope in zip(seen["before"], seen["after"], seen["slopes"], strict=True):
        torch.testing.assert_close(after, before / slope)


def test_a_skipped_step_of_a_gradient_scaler_leaves_the_groups_as_they_were():
    class Poison(Regularizer):
        def loss(self, step):
            loss = F.cross_entropy(step.logits, step.targets, reduction="none")
            return loss * (float("inf") if step.number % 2 else 1.0)

    decays = []

    def watch(step, entry):
        decays.append([group["weight_decay"] for group in step.optimizer.param_groups])

    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    model = train(
        Compose(Poison(), WeightCompander(), WeightDecay(0.01)),
        smooth_network(),
        optimizer=torch.optim.AdamW,
        scaler=scaler,
        on_epoch_end=watch,
    ).model
    assert torch.isfinite(flat(model)).all()
    assert decays == [decays[0]] * 3 and sorted(decays[0]) == [0.0, 0.01]


@pytest.mark.parametrize("accumulation", [1, 4])
def test_gradients_do_not_depend_on_how_the_batch_is_cut(accumulation):
    method = Compose(WeightCompander(a=0.5, b=0.4), WeightDecay(0.05))
    found = train(method, smooth_network(), accumulation=accumulation).model
    expected = train(Compose(WeightCompander(a=0.5, b=0.4), WeightDecay(0.05)), smooth_network()).model
    torch.testing.assert_close(flat(found), flat(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("learnable", ["layer", "global"])
def test_both_networks_of_a_pair_are_companded_each_with_scales_of_its_own(learnable):
    first = smooth_network()
    second = reinitialized(first, torch.Generator().manual_seed(1))
    model = WeightCompander(learnable=learnable).attach(Pair(first, copy.deepcopy(second)))
    a, b = ({id(p) for one in companded(net) for p in one.compander.parameters()} for net in (model.a, model.b))
    assert a and not a & b
    # Before a method that copies the networks: two of the user's own, or a second one drawn anew.
    for start in (Pair(smooth_network(), second), smooth_network()):
        method = Compose(WeightCompander(learnable=learnable), EarlyLearningPlus(64, 4, decay=0.9))
        found = train(method, start, epochs=2).model
        assert torch.isfinite(flat(found)).all() and all("parametrizations" not in n for n in found.state_dict())


@pytest.mark.parametrize(
    "other",
    [
        lambda: LabelSmoothing(0.1),
        lambda: Mixup(0.4, num_classes=4),
        lambda: EarlyLearning(64, 4),
        lambda: Dropout(0.2),
        lambda: WeightDecay(0.01),
        lambda: WeightAveraging(0.9),
        EarlyStopping,
    ],
)
def test_it_composes_with_the_everyday_methods_under_batchnorm_dropout_and_accumulation(other):
    for method in (WeightCompander(), WeightCompander(a=0.5, b=1.0, learnable="layer")):
        found = train(Compose(method, other()), noisy_network(), epochs=2, accumulation=2, optimizer=None).model
        assert torch.isfinite(flat(found)).all()


def test_a_tuner_sees_exact_derivatives_in_the_scales():
    a, b = Hyperparameter(0.6), Hyperparameter(0.5)
    method = WeightCompander(a=a, b=b)
    model = method.attach(smooth_network().double())
    problem = BilevelProblem.from_regularizer(model, method, cross_entropy)
    assert set(problem.hypers) == {"a", "b"} and a.name == "WeightCompander.a"
    batch = (X[:16].double(), Y[:16])
    vector = {
        n: torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).double() for n, p in problem.params.items()
    }
    product = problem.hvp(vector, batch)
    mixed = problem.mixed_vjp(vector, batch)
    assert problem.fallback is None
    # Central differences of the first derivative, along the vector.
    step, gradients, slopes = 1e-5, [], []
    for sign in (1, -1):
        moved = {n: (p + sign * step * vector[n]).detach().requires_grad_() for n, p in problem.params.items()}
        with differentiable([a, b]) as leaves:
            loss = problem.inner_loss(moved, {}, batch)
            found = torch.autograd.grad(loss, [*moved.values(), *leaves])
        gradients.append(found[: len(moved)])
        slopes.append(found[len(moved) :])
    for n, plus, minus in zip(vector, *gradients, strict=True):
        torch.testing.assert_close(product[n], (plus - minus) / (2 * step), rtol=1e-4, atol=1e-7)
    for n, plus, minus in zip(("a", "b"), *slopes, strict=True):
        torch.testing.assert_close(mixed[n], ((plus - minus) / (2 * step)).to(mixed[n]), rtol=1e-3, atol=1e-5)


def test_a_copy_of_the_method_does_not_carry_the_loop_along():
    method = WeightCompander()
    kept = []

    class Copy(Regularizer):
        def on_step(self, step):
            kept.append(copy.deepcopy(method))

    train(Compose(method, Copy()), smooth_network(), epochs=1)
    assert all(one._stepper is None for one in kept)
    with pytest.raises(ValueError, match=r"WeightCompander: step.optimizer is missing"):
        method.on_gradients(Step(WeightCompander().attach(nn.Linear(2, 2))))


def test_a_learned_decay_penalises_the_weights_and_not_what_lies_under_them():
    model = WeightCompander(a=0.5, b=0.4).attach(smooth_network())
    found = WeightDecay(Hyperparameter(0.1)).penalty(Step(model))
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    torch.testing.assert_close(found, 0.05 * sum(w.square().sum() for w in weights))
    learned = WeightCompander(a=0.5, b=0.4, learnable="layer").attach(smooth_network())
    under = [one.v for one in companded(learned)]
    found = WeightDecay(Hyperparameter(0.1)).penalty(Step(learned))
    torch.testing.assert_close(found, 0.05 * sum(v.square().sum() for v in under))
