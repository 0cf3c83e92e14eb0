"""A self-tuning network learns the strength of ELR through `Hyperparameter`, the contract unchanged."""

from functools import partial

import torch
from torch import nn

from wellposed import Hyperparameter, TensorLoader, fit
from wellposed.evaluation import evaluate
from wellposed.losses import EarlyLearning
from wellposed.objective import cross_entropy
from wellposed.tuning import SelfTuner

CLASSES, WIDTH = 4, 32


def problem_data():
    generator = torch.Generator().manual_seed(5)
    centres = 1.2 * torch.randn(CLASSES, 10, generator=generator)
    labels = torch.randint(0, CLASSES, (400,), generator=generator)
    inputs = centres[labels] + torch.randn(400, 10, generator=generator)
    noisy = labels.clone()
    flipped = torch.rand(400, generator=generator) < 0.4
    noisy[flipped] = torch.randint(0, CLASSES, (int(flipped.sum()),), generator=generator)
    return (inputs[:250], noisy[:250]), (inputs[250:], labels[250:])


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(10, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES))


def test_a_tuner_learns_the_strength_of_elr_towards_what_a_grid_prefers():
    (x, y), (vx, vy) = problem_data()
    train = TensorLoader(x, y, batch_size=25, shuffle=True)
    validation = TensorLoader(vx, vy, batch_size=150)
    # The direction, by a plain grid.
    losses = {}
    for strength in (0.2, 3.0):
        model = fit(
            network(), train, epochs=40, regularizer=EarlyLearning(250, CLASSES, strength),
            optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        ).model  # fmt: skip
        losses[strength] = evaluate(model, validation, cross_entropy)["loss"]
    assert losses[3.0] < losses[0.2]

    strength = Hyperparameter(0.2, per_example=True)
    method = EarlyLearning(250, CLASSES, strength)
    tuner = partial(
        SelfTuner,
        weight_optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        hyper_optimizer=partial(torch.optim.Adam, lr=0.05),
        train_steps=2,
        clip_norm=1.0,
    )
    result = fit(network(), train, validation=validation, epochs=40, regularizer=method, tuner=tuner)
    assert float(strength.value) > 0.6
    assert result.history[-1]["strength"] == float(strength.value)
    assert evaluate(result.model, validation, cross_entropy)["loss"] < losses[0.2]
    # What comes back is a plain network.
    assert [name for name, _ in result.model.named_parameters()] == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_plain_training_never_moves_a_hyperparameter():
    (x, y), _ = problem_data()
    strength = Hyperparameter(0.2)
    method = EarlyLearning(250, CLASSES, strength)
    before = strength.raw.clone()
    fit(network(), TensorLoader(x, y), epochs=2, regularizer=method)
    assert torch.equal(before, strength.raw)
