"""A small self-tuning network learns the strength of ELR through `Hyperparameter`, the contract unchanged."""

from functools import partial

import torch
from torch import nn

from wellposed import Hyperparameter, TensorLoader, fit
from wellposed.evaluation import evaluate
from wellposed.losses import EarlyLearning
from wellposed.objective import cross_entropy
from wellposed.tuner import StepInfo, Tuner

CLASSES, WIDTH = 4, 32


class Response:
    """The response input of all layers: how far the hyperparameters are from their present values."""

    k: torch.Tensor = torch.zeros(1)


class ResponseLinear(nn.Module):
    """A linear layer whose rows respond to the hyperparameters: `W0 x + (V k) * (W1 x)`."""

    def __init__(self, inputs, outputs, response):
        super().__init__()
        self.general, self.varied = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs)
        self.scale = nn.Parameter(torch.zeros(outputs, 1))
        self.response = [response]

    def forward(self, x):
        return self.general(x) + (self.response[0].k @ self.scale.T) * self.varied(x)


class SelfTuner(Tuner):
    """Alternates: weights under perturbed hyperparameters, hyperparameters down the validation loss."""

    requires = frozenset({"response_layers"})

    def __init__(self, problem, scale=0.5, rate=0.05, lr=0.05):
        super().__init__(problem)
        self.response = next(m.response[0] for m in problem.model.modules() if hasattr(m, "response"))
        self.scale = scale
        self.generator = torch.Generator().manual_seed(0)
        self.weights = torch.optim.SGD(problem.params.values(), lr=lr, momentum=0.9)
        self.raws = [h.raw for h in problem.hypers.values()]
        self.hypers = torch.optim.Adam([{"params": self.raws}], lr=rate)

    def step(self, train, validation):
        train_batch, validation_batch = next(train), next(validation)
        raw = self.problem.raw()
        noise = {n: self.scale * torch.randn(u.shape, generator=self.generator) for n, u in raw.items()}
        self.response.k = torch.stack([e.reshape(()) for e in noise.values()])
        moved = {n: (u + noise[n]).detach() for n, u in raw.items()}
        inner = self.problem.evaluate(self.problem.inner_loss, self.problem.params, moved, train_batch)
        self.weights.zero_grad()
        inner.backward()
        self.problem.write_state()
        torch.nn.utils.clip_grad_norm_(self.problem.params.values(), 1.0)
        self.weights.step()
        self.response.k = torch.stack([(u - u.detach()).reshape(()) for u in raw.values()])
        outer = self.problem.evaluate(self.problem.outer_loss, self.problem.params, raw, validation_batch)
        gradients = torch.autograd.grad(outer, list(raw.values()))
        self.hypers.zero_grad()
        for h, g in zip(self.raws, gradients, strict=True):
            h.grad = g
        with torch.no_grad():
            self.hypers.step()
        self.response.k = torch.zeros(1)
        return StepInfo(float(inner.detach()), float(outer.detach()), {n: float(v) for n, v in self.values().items()})

    def extra_state(self):
        return {"weights": self.weights.state_dict(), "hypers": self.hypers.state_dict()}

    def load_extra_state(self, state):
        self.weights.load_state_dict(state["weights"])
        self.hypers.load_state_dict(state["hypers"])


def problem_data():
    generator = torch.Generator().manual_seed(5)
    centres = 1.2 * torch.randn(CLASSES, 10, generator=generator)
    labels = torch.randint(0, CLASSES, (400,), generator=generator)
    inputs = centres[labels] + torch.randn(400, 10, generator=generator)
    noisy = labels.clone()
    flipped = torch.rand(400, generator=generator) < 0.4
    noisy[flipped] = torch.randint(0, CLASSES, (int(flipped.sum()),), generator=generator)
    return (inputs[:250], noisy[:250]), (inputs[250:], labels[250:])


def network(layer):
    torch.manual_seed(1)
    return nn.Sequential(layer(10, WIDTH), nn.ReLU(), layer(WIDTH, CLASSES))


def test_a_tuner_learns_the_strength_of_elr_towards_what_a_grid_prefers():
    (x, y), (vx, vy) = problem_data()
    train = TensorLoader(x, y, batch_size=25, shuffle=True)
    validation = TensorLoader(vx, vy, batch_size=150)
    # The direction, by a plain grid.
    losses = {}
    for strength in (0.2, 3.0):
        model = fit(
            network(nn.Linear), train, epochs=40, regularizer=EarlyLearning(250, CLASSES, strength),
            optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        ).model  # fmt: skip
        losses[strength] = evaluate(model, validation, cross_entropy)["loss"]
    assert losses[3.0] < losses[0.2]

    strength = Hyperparameter(0.2)
    method = EarlyLearning(250, CLASSES, strength)
    model = network(partial(ResponseLinear, response=Response()))
    result = fit(model, train, validation=validation, epochs=40, regularizer=method, tuner=SelfTuner)
    assert float(strength.value) > 0.6
    assert result.history[-1]["strength"] == float(strength.value)
    assert evaluate(result.model, validation, cross_entropy)["loss"] < losses[0.2]


def test_plain_training_never_moves_a_hyperparameter():
    (x, y), _ = problem_data()
    strength = Hyperparameter(0.2)
    method = EarlyLearning(250, CLASSES, strength)
    before = strength.raw.clone()
    fit(network(nn.Linear), TensorLoader(x, y), epochs=2, regularizer=method)
    assert torch.equal(before, strength.raw)
