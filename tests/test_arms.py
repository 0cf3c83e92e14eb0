"""The arms that everyone would try first: each reduces to plain training, and all pairs compose."""

import copy
import warnings
from functools import partial
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from doubles import data, flat, noisy_network, smooth_network
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from wellposed import Compose, Hyperparameter, Regularizer, Step, TensorLoader, fit, squared_error
from wellposed.features import Dropout, FeatureCompression
from wellposed.gradients import SharpnessAwareMinimization, perturbed
from wellposed.losses import (
    CoTeaching,
    EarlyLearning,
    EarlyLearningPlus,
    GeneralizedCrossEntropy,
    LabelSmoothing,
    Mixup,
    PastModelTeacher,
    ProgressiveSelfDistillation,
    SymmetricCrossEntropy,
    smoothed_cross_entropy,
)
from wellposed.losses.mixup import draw_coefficients
from wellposed.weights import EarlyStopping, WeightAveraging, WeightCompander, WeightDecay

X, Y = data()
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
HELD = TensorLoader(X, Y, batch_size=64)


def train(regularizer=None, model=None, epochs=3, targets=Y, **options):
    loader = TensorLoader(X, targets, batch_size=16, shuffle=True)
    options = {"optimizer": SGD, "validation": HELD, **options}
    return fit(model or noisy_network(), loader, epochs=epochs, regularizer=regularizer, **options)


PLAIN = flat(train().model)


@pytest.mark.parametrize(
    "neutral",
    [
        lambda: SharpnessAwareMinimization(0.0),
        lambda: WeightDecay(0.0),
        lambda: WeightAveraging(0.0, warmup=False),
    ],
)
def test_a_neutral_setting_is_plain_training_bit_for_bit(neutral):
    assert torch.equal(flat(train(neutral()).model), PLAIN)


def test_dropout_of_rate_zero_is_plain_training_bit_for_bit():
    assert torch.equal(flat(train(Dropout(0.0), smooth_network()).model), flat(train(None, smooth_network()).model))


def test_label_smoothing_equals_torch_and_handles_tokens_and_soft_targets():
    logits = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(0, 5, (6, 4))
    targets[0, :2] = -100
    expected = F.cross_entropy(logits.transpose(1, 2), targets, label_smoothing=0.2, reduction="none")
    torch.testing.assert_close(smoothed_cross_entropy(logits, targets, 0.2), expected)
    soft = F.one_hot(targets[1], 5).float()
    torch.testing.assert_close(smoothed_cross_entropy(logits[1], soft, 0.2), expected[1])
    step = Step(nn.Identity(), targets=targets[1], outputs=logits[1])
    torch.testing.assert_close(LabelSmoothing(0.2).loss(step), expected[1])


def test_mixup_mixes_inputs_and_targets_alike_and_tells_the_partner():
    step = Step(
        nn.Identity(),
        inputs=X[:8],
        targets=Y[:8],
        index=torch.arange(8) + 100,
        generator=torch.Generator().manual_seed(0),
    )
    Mixup(1.0, num_classes=4).on_batch(step)
    c, partner = step.extra["mix"][:, None], step.extra["partner"] - 100
    hard = F.one_hot(Y[:8], 4).float()
    torch.testing.assert_close(step.inputs, c * X[:8] + (1 - c) * X[:8][partner])
    torch.testing.assert_close(step.targets, c * hard + (1 - c) * hard[partner])
    assert (c >= 0.5).all()


def test_mixup_draws_follow_the_beta_distribution():
    draws = draw_coefficients(20_000, 0.4, torch.Generator().manual_seed(0), per_sample=True)
    expected = torch.distributions.Beta(0.4, 0.4).sample((20_000,))
    assert abs(float(draws.mean() - torch.maximum(expected, 1 - expected).mean())) < 0.01
    assert len(set(draw_coefficients(5, 0.4, torch.Generator().manual_seed(0), False).tolist())) == 1


def test_mixup_finds_the_number_of_classes_by_itself_and_mixes_real_targets():
    assert torch.isfinite(flat(train(Mixup(0.4), smooth_network()).model)).all()
    model = nn.Linear(8, 1)
    values = X[:, 0].clone()
    fit(model, TensorLoader(X, values), epochs=2, regularizer=Mixup(0.4), criterion=squared_error)
    with pytest.raises(TypeError, match="inputs must be floating tensors, got torch.int64"):
        Mixup(0.4, num_classes=2).mixed(torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0, 1]))


def test_sam_takes_the_gradient_at_the_perturbed_point():
    model = smooth_network()
    before = copy.deepcopy(model)
    fit(
        model,
        TensorLoader(X, Y, batch_size=64),
        epochs=1,
        regularizer=SharpnessAwareMinimization(0.1),
        optimizer=partial(torch.optim.SGD, lr=0.5),
    )
    parameters = list(before.parameters())
    g = torch.autograd.grad(F.cross_entropy(before(X), Y), parameters)
    norm = torch.sqrt(sum((x**2).sum() for x in g))
    with torch.no_grad():
        for p, x in zip(parameters, g, strict=True):
            p.add_(0.1 * x / norm)
    second = torch.autograd.grad(F.cross_entropy(before(X), Y), parameters)
    with torch.no_grad():
        for p, x, y in zip(parameters, g, second, strict=True):
            p.sub_(0.1 * x / norm).sub_(0.5 * y)
    torch.testing.assert_close(flat(model), flat(before))


def test_a_perturbation_gives_the_weights_back_exactly_also_after_an_error():
    w, g = torch.randn(100), torch.randn(100)
    before = w.clone()
    with pytest.raises(KeyError), perturbed([w], [g], 0.3, adaptive=True):
        assert not torch.equal(w, before)
        raise KeyError
    assert torch.equal(w, before)


def test_weight_averaging_equals_torch_swa_utils():
    model = smooth_network()
    reference = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))

    def watch(step, entry):
        reference.update_parameters(step.model)

    loader = TensorLoader(X, Y, batch_size=64)
    found = fit(
        model, loader, epochs=5, regularizer=WeightAveraging(0.9, warmup=False), optimizer=SGD, on_epoch_end=watch
    ).model
    torch.testing.assert_close(flat(found), flat(reference.module))


def test_weight_decay_equals_the_optimizers_own_on_weights():
    model = smooth_network()
    decayed, spared = [p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": spared, "weight_decay": 0.0}]
    expected = train(None, model, optimizer=torch.optim.SGD(groups, lr=0.1, momentum=0.9)).model
    found = train(WeightDecay(0.05), smooth_network(), optimizer=partial(SGD, weight_decay=0.3)).model
    assert torch.equal(flat(found), flat(expected))
    learnable = train(WeightDecay(Hyperparameter(0.05)), smooth_network()).model
    torch.testing.assert_close(flat(learnable), flat(expected), rtol=1e-4, atol=1e-5)


def test_dropout_keeps_names_and_leaves_a_plain_model():
    model = smooth_network()
    names = list(model.state_dict())
    method = Dropout(0.5)
    method.attach(model)
    assert list(model.state_dict()) == names
    model.train()
    assert not torch.equal(model(X), model(X))
    copy.deepcopy(model)
    assert torch.equal(method.finish(model)(X), model(X))
    present = noisy_network()
    method = Dropout(0.1)
    method.attach(present)
    assert present[4].p == 0.1
    method.finish(present)
    assert present[4].p == 0.3
    with pytest.raises(ValueError, match="no dropout, linear or convolutional layer"):
        Dropout(0.5).attach(nn.ReLU())


def test_early_stopping_restores_the_epoch_that_validation_preferred():
    losses, states = [], []

    def watch(step, entry):
        losses.append(entry["validation_loss"])
        states.append({k: v.clone() for k, v in step.model.state_dict().items()})

    stopping = EarlyStopping()
    held = TensorLoader(torch.randn(64, 8, generator=torch.Generator().manual_seed(9)), Y, batch_size=64)
    model = train(stopping, smooth_network(), epochs=12, validation=held, on_epoch_end=watch).model
    best = min(range(12), key=losses.__getitem__)
    assert best < 11
    assert stopping.best_epoch == best + 1
    assert all(torch.equal(states[best][k], v) for k, v in model.state_dict().items())


def test_patience_ends_training_and_says_why():
    held = TensorLoader(torch.randn(64, 8, generator=torch.Generator().manual_seed(9)), Y, batch_size=64)
    result = train(None, smooth_network(), epochs=60, validation=held, early_stopping=3)
    assert len(result.history) < 60
    assert "no better validation loss in 3 epochs" in result.stopped


ARMS = {
    "smoothing": lambda: LabelSmoothing(0.1),
    "gce": lambda: GeneralizedCrossEntropy(0.7),
    "sce": lambda: SymmetricCrossEntropy(),
    "mixup": lambda: Mixup(0.4, num_classes=4),
    "average": lambda: WeightAveraging(0.9),
    "sam": lambda: SharpnessAwareMinimization(0.05),
    "decay": lambda: WeightDecay(0.01),
    "dropout": lambda: Dropout(0.2),
    "stopping": lambda: EarlyStopping(),
    "elr": lambda: EarlyLearning(64, 4),
    "ps-kd": lambda: ProgressiveSelfDistillation(64, 4),
    "past-model": lambda: PastModelTeacher(4),
    "nested": lambda: FeatureCompression("nested", sigma=4.0),
    "compander": lambda: WeightCompander(),
    "elr+": lambda: EarlyLearningPlus(64, 4, decay=0.9),
    "co-teaching": lambda: CoTeaching(0.2, 0, "full"),
    "co-teaching halves": lambda: CoTeaching(0.2, 0, "halves"),
}
PAIRED = {"elr+", "co-teaching", "co-teaching halves"}  # two networks, two outputs
REPLACING, HARD = {"smoothing", "gce", "sce", *PAIRED}, {"gce", "sce"}
SOFTENING = {"mixup", "ps-kd", "past-model"}  # targets become probabilities
ONE_OUTPUT = {"elr", "ps-kd"}  # a memory of the one network's predictions
WEIGHING = {"compander", "decay"}  # both own the decay of the same weights


def refusal(a, b):
    """What a pair that cannot work raises, and when: at construction, or in the first step. None: it works."""
    pair = {a, b}
    if pair <= REPLACING:
        return "at most one method may replace the task loss"
    if pair & SOFTENING and pair & HARD:
        return "targets must be integer classes"
    if pair & PAIRED and pair & ONE_OUTPUT:
        return "returned Paired, which holds no 'logits' tensor"
    return None


@pytest.mark.parametrize(("a", "b"), list(combinations(ARMS, 2)))
def test_all_pairs_compose_or_say_why_not(a, b):
    message = refusal(a, b)
    if message is not None:
        with pytest.raises((ValueError, TypeError), match=message):
            train(Compose(ARMS[a](), ARMS[b]()), smooth_network(), epochs=1)
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*couples the examples of a batch")
        found = train(Compose(ARMS[a](), ARMS[b]()), noisy_network(), epochs=2, accumulation=2)
    assert torch.isfinite(flat(found.model)).all()


def test_what_changes_the_model_must_come_before_what_copies_it():
    with pytest.raises(ValueError, match="a method that changes the model must come before"):
        train(Compose(ARMS["elr+"](), ARMS["compander"]()), smooth_network(), epochs=1)


@pytest.mark.parametrize("name", [name for name in ARMS if type(ARMS[name]()).on_batch is not Regularizer.on_batch])
def test_what_rewrites_the_batch_must_come_before_what_gives_each_network_its_own(name):
    if name in REPLACING:
        return
    for pairing in ("co-teaching halves", "elr+"):
        with pytest.raises(ValueError, match="gives each network its own batch"):
            Compose(ARMS[pairing](), ARMS[name]())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LabelSmoothing(1.5), r"LabelSmoothing: smoothing must be in \[0, 1\], got 1.5"),
        (lambda: Mixup(0.0), "Mixup: alpha must be > 0, got 0.0"),
        (lambda: WeightAveraging(1.0), r"WeightAveraging: decay must lie in \[0, 1\), got 1.0"),
        (lambda: SharpnessAwareMinimization(-0.1), "SharpnessAwareMinimization: rho must be >= 0, got -0.1"),
        (lambda: WeightDecay(-1.0), "WeightDecay: strength must be >= 0, got -1.0"),
        (lambda: Dropout(1.0), r"Dropout: p must lie in \[0, 1\), got 1.0"),
        (lambda: EarlyStopping(0), "EarlyStopping: patience must be >= 1 or None, got 0"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
