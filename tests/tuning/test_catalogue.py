"""Every method of the library is tunable by at least one tuner, unchanged; what is not is refused by name."""

import importlib
import inspect
import pkgutil
from functools import partial

import pytest
import torch
from torch import nn

import wellposed
from wellposed import Compose, Hyperparameter, Regularizer, TensorLoader, fit
from wellposed.features import Cutout, Dropout, FeatureCompression, InputNoise
from wellposed.gradients import (
    ConservativeObjective,
    MiniBatchCoreset,
    RegularizedGradient,
    SharpnessAwareMinimization,
    SurrogateSharpness,
)
from wellposed.losses import (
    BiasAlleviatingLoRA,
    CoTeaching,
    EarlyLearning,
    EarlyLearningPlus,
    GeneralizedCrossEntropy,
    LabelSmoothing,
    LogitConsistency,
    LogitDiversity,
    Mixup,
    PastModelTeacher,
    ProgressiveSelfDistillation,
    SpectralConcentration,
    StoredTeacher,
    SymmetricCrossEntropy,
)
from wellposed.tuning import BOREP, OneStepUnrolled, SampleWeights, SelfTuner
from wellposed.weights import (
    EarlyStopping,
    HalfFineTuning,
    L2StartingPoint,
    LowRankAdaptation,
    WeightAveraging,
    WeightCompander,
    WeightDecay,
    WeightInterpolation,
)

N, CLASSES = 48, 3


def share(value=0.3, high=1.0, **options):
    return Hyperparameter(value, 0.0, high, **options)


def positive(value=0.5, **options):
    return Hyperparameter(value, chart="exp", **options)


# Class of each method: with every strength that can be learned, and whether its training loss is differentiable in all.
TUNABLE = {
    "BiasAlleviatingLoRA": (
        lambda: BiasAlleviatingLoRA(
            "classification",
            consistency=positive(0.1),
            diversity=positive(0.03),
            concentration=positive(0.03),
            k=2,
            teacher=StoredTeacher(torch.zeros(N, CLASSES)),
            schedules="constant",
        ),
        True,
    ),
    "CoTeaching": (lambda: CoTeaching(share(0.2), num_gradual=0, mode="full"), False),
    "Cutout": (lambda: Compose(Cutout(Hyperparameter(1.5, 0.0, 4.0, discrete=True), length=2)), False),
    "Dropout": (lambda: Dropout(share(0.2, 0.9, per_example=True)), False),
    "EarlyLearning": (lambda: EarlyLearning(N, CLASSES, positive(1.0)), True),
    "EarlyLearningPlus": (lambda: EarlyLearningPlus(N, CLASSES, positive(1.0)), True),
    "FeatureCompression": (lambda: FeatureCompression("nested", sigma=positive(4.0)), False),
    "GeneralizedCrossEntropy": (lambda: GeneralizedCrossEntropy(share(0.7)), True),
    "InputNoise": (lambda: InputNoise(share(0.1, per_example=True)), True),
    "L2StartingPoint": (lambda: L2StartingPoint(positive(0.1)), True),
    "LabelSmoothing": (lambda: LabelSmoothing(share(0.1, 0.5)), True),
    "LogitConsistency": (
        lambda: LogitConsistency(positive(0.1), teacher=StoredTeacher(torch.zeros(N, CLASSES))),
        True,
    ),
    "LogitDiversity": (lambda: LogitDiversity(positive(0.03)), True),
    "Mixup": (lambda: Mixup(positive(0.4), num_classes=CLASSES), False),
    "PastModelTeacher": (lambda: PastModelTeacher(CLASSES, share(0.5), schedule="constant"), True),
    "ProgressiveSelfDistillation": (
        lambda: ProgressiveSelfDistillation(N, CLASSES, share(0.5), schedule="constant"),
        True,
    ),
    "RegularizedGradient": (lambda: RegularizedGradient(positive(0.05), lam=share(0.5)), False),
    "SampleWeights": (lambda: SampleWeights(N, init=0.5), True),
    "SharpnessAwareMinimization": (lambda: SharpnessAwareMinimization(positive(0.05)), False),
    "SpectralConcentration": (lambda: SpectralConcentration(positive(0.03), k=2), True),
    "SurrogateSharpness": (
        lambda: SurrogateSharpness(0.05, lam=positive(0.5), mode="penalty", output_fn=lambda out: out.mean(1)),
        True,
    ),
    "SymmetricCrossEntropy": (lambda: SymmetricCrossEntropy(positive(0.2), positive(1.0)), True),
    "WeightCompander": (lambda: WeightCompander(positive(0.7), positive(0.7), weight_decay=positive(1e-3)), False),
    "WeightDecay": (lambda: WeightDecay(positive(1e-2, shape=(2,))), True),
}
REFUSED = {
    "ConservativeObjective": (
        lambda: ConservativeObjective(alpha=positive(0.1)),
        "(?s)ConservativeObjective.*alpha",
    ),
    "EarlyStopping": (lambda: EarlyStopping(patience=Hyperparameter(3.0)), "(?s)EarlyStopping.*patience"),
    "HalfFineTuning": (lambda: HalfFineTuning(ratio=share(0.5)), "(?s)HalfFineTuning.*ratio"),
    "LowRankAdaptation": (lambda: LowRankAdaptation(2, alpha=positive(2.0)), "(?s)LowRankAdaptation.*alpha"),
    "MiniBatchCoreset": (lambda: MiniBatchCoreset(ratio=share(0.5)), "(?s)MiniBatchCoreset.*ratio"),
    "WeightInterpolation": (lambda: WeightInterpolation(alpha=share(0.5)), "(?s)WeightInterpolation.*alpha"),
    "WeightAveraging": (lambda: WeightAveraging(decay=share(0.9)), "(?s)WeightAveraging.*decay"),
}
NOT_METHODS = {"Compose", "LogitTerm", "Regularizer", "ProgressiveShare", "ReplaySchedule"}
"""The contract itself, base classes, and the tuner's own replay."""


def public_methods():
    found = set()
    for room in ("weights", "losses", "features", "gradients", "tuning"):
        package = importlib.import_module(f"wellposed.{room}")
        for info in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"wellposed.{room}.{info.name}")
            for name, value in vars(module).items():
                if inspect.isclass(value) and issubclass(value, Regularizer) and value.__module__ == module.__name__:
                    found.add(name)
    return found


def test_no_method_is_left_out():
    assert public_methods() - NOT_METHODS == set(TUNABLE) | set(REFUSED)
    assert wellposed.Compose.__name__ in NOT_METHODS


def network(images):
    torch.manual_seed(0)
    flat = [nn.Flatten()] if images else []
    return nn.Sequential(*flat, nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, CLASSES))


def loaders(images):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * N, 16, generator=generator)
    y = (x[:, :3] + 0.5 * torch.randn(2 * N, 3, generator=generator)).argmax(1)
    x = x.reshape(-1, 1, 4, 4) if images else x
    return (
        TensorLoader(x[:N], y[:N], batch_size=12, shuffle=True, seed=1),
        TensorLoader(x[N:], y[N:], batch_size=24, shuffle=True, seed=2),
    )


def train(name, tuner, epochs=3):
    method = TUNABLE[name][0]()
    train, validation = loaders(name == "Cutout")
    result = fit(
        network(name == "Cutout"), train, validation=validation, epochs=epochs, regularizer=method, tuner=tuner
    )
    return method, result


@pytest.mark.parametrize("name", sorted(set(TUNABLE) - {"EarlyLearningPlus"}))
def test_a_self_tuning_network_learns_every_strength(name):
    start = {n: h.raw.clone() for n, h in wellposed.hyperparameter.named_hyperparameters(TUNABLE[name][0]()).items()}
    method, result = train(name, partial(SelfTuner, train_steps=2))
    for key, h in wellposed.hyperparameter.named_hyperparameters(method).items():
        assert bool((h.raw != start[key]).any()), key
        assert bool(torch.isfinite(h.raw).all()), key
    assert all(torch.isfinite(p).all() for p in result.model.parameters())
    # What comes back is plain: no response layer is left.
    assert not any("response" in n for n, _ in result.model.named_parameters())
    assert result.history[-1]["validation_loss"] < 5.0


@pytest.mark.parametrize("name", sorted(TUNABLE))
@pytest.mark.parametrize("tuner", ["BOREP", "OneStepUnrolled"])
def test_hypergradients_learn_what_the_loss_is_differentiable_in_and_refuse_the_rest_by_name(name, tuner):
    make = {
        "BOREP": partial(BOREP, outer_lr=0.05, inner_lr=0.1, z_lr=0.1, refine_steps=2),
        "OneStepUnrolled": partial(OneStepUnrolled, inner_lr=0.1, outer_lr=0.05),
    }[tuner]
    if not TUNABLE[name][1]:
        with pytest.raises(ValueError, match=rf"{name}|hyperparameter '"):
            train(name, make)
        return
    start = {n: h.raw.clone() for n, h in wellposed.hyperparameter.named_hyperparameters(TUNABLE[name][0]()).items()}
    method, _ = train(name, make)
    for key, h in wellposed.hyperparameter.named_hyperparameters(method).items():
        assert bool((h.raw != start[key]).any()), key


def test_a_method_that_copies_the_network_is_refused_by_a_self_tuning_one():
    with pytest.raises(ValueError, match=r"EarlyLearningPlus: .*learn the strength with wellposed\.tuning\.BOREP"):
        train("EarlyLearningPlus", SelfTuner)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_no_tuner_can_learn_is_refused_by_name(name):
    make, message = REFUSED[name]
    with pytest.raises(TypeError, match=message):
        make()
