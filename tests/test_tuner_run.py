"""`fit(tuner=)`: epochs, the best epoch, resume, and what is refused."""

from functools import partial

import pytest
import torch
from torch import nn

from wellposed import Compose, Hyperparameter, RequirementError, TensorLoader, fit
from wellposed.gradients import SharpnessAwareMinimization
from wellposed.losses import EarlyLearning
from wellposed.step import DivergenceError
from wellposed.tuner import StepInfo, Tuner
from wellposed.weights import WeightDecay


class Wanderer(Tuner):
    """Trains by gradient descent and lets the strength wander by seeded steps; takes two batches a step."""

    def __init__(self, problem, lr=0.1, seed=0):
        super().__init__(problem)
        self.lr = lr
        self.generator = torch.Generator().manual_seed(seed)

    def step(self, train, validation):
        next(train)
        value, gradients = self.problem.inner_value_and_grad(next(train))
        self.problem.write_state()
        with torch.no_grad():
            for name, p in self.problem.params.items():
                p.sub_(self.lr * gradients[name])
            for h in self.problem.hypers.values():
                h.raw.add_(0.3 * torch.randn(h.raw.shape, generator=self.generator))
        self.problem.on_step()
        outer = self.problem.outer_grads(next(validation))[0]
        return StepInfo(float(value), float(outer), self.recorded_values())

    def extra_state(self):
        return {"generator": self.generator.get_state()}

    def load_extra_state(self, state):
        self.generator.set_state(state["generator"])


def data(n=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator)
    return x, (x[:, 0] > 0).long()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 2))


def run(epochs=5, **options):
    train = TensorLoader(*data(), batch_size=8, shuffle=True, seed=1)
    validation = TensorLoader(*data(20, 1), batch_size=6, shuffle=True, seed=2)
    method = Compose(EarlyLearning(40, 2, Hyperparameter(1.0)), WeightDecay(Hyperparameter(1e-3, chart="exp")))
    options = {"tuner": Wanderer, "regularizer": method, "validation": validation, "epochs": epochs} | options
    return fit(network(), train, **options)


def weights(result):
    return torch.cat([p.detach().reshape(-1) for p in result.model.parameters()])


def test_a_tuner_sees_as_many_batches_as_plain_training():
    result = run()
    assert [entry["epoch"] for entry in result.history] == [1, 2, 3, 4, 5]
    # Five batches an epoch, two a step: 13 steps are the first to have taken 25 batches.
    assert len(result.tuner.history) == 13
    assert result.history[-1]["validation_accuracy"] > 0.5
    assert result.history[-1]["regularizers.0.strength"] == pytest.approx(
        result.tuner.history[-1].values["regularizers.0.strength"]
    )


def test_a_killed_run_continues_bit_for_bit(tmp_path):
    whole = run()

    class Killed(RuntimeError):
        pass

    def kill(step, entry):
        if entry["epoch"] == 4:
            raise Killed

    path = tmp_path / "run.pt"
    with pytest.raises(Killed):
        run(checkpoint=path, on_epoch_end=kill)
    resumed = run(checkpoint=path)
    assert torch.equal(weights(whole), weights(resumed))
    for a, b in zip(whole.tuner.history, resumed.tuner.history, strict=True):
        assert (a.inner_loss, a.outer_loss, a.values) == (b.inner_loss, b.outer_loss, b.values)
    strip = [{k: v for k, v in e.items() if k != "seconds"} for e in whole.history]
    assert strip == [{k: v for k, v in e.items() if k != "seconds"} for e in resumed.history]


def test_a_checkpoint_of_another_tuner_is_refused(tmp_path):
    class Other(Wanderer):
        pass

    path = tmp_path / "run.pt"
    run(epochs=2, checkpoint=path)
    with pytest.raises(RuntimeError, match="tuner='Wanderer', this one has tuner='Other'"):
        run(epochs=2, checkpoint=path, tuner=Other)


def test_early_stopping_keeps_the_best_epoch_with_its_hyperparameters():
    losses = iter([0.5, 0.3, 0.4, 0.6, 0.7, 0.8])
    seen = []

    def metric(outputs, targets):
        return 0.0

    class Scripted(Wanderer):
        def step(self, train, validation):
            info = super().step(train, validation)
            self.last = info
            return info

    def record(step, entry):
        seen.append({k: v for k, v in entry.items() if "strength" in k})

    import wellposed.tuner_run as module

    original = module.evaluate
    module.evaluate = lambda *a, **k: {"loss": next(losses)}
    try:
        result = run(epochs=6, early_stopping=3, tuner=Scripted, metrics={"m": metric}, on_epoch_end=record)
    finally:
        module.evaluate = original
    assert len(result.history) == 5
    assert "epoch 2 is kept" in result.stopped
    for name, value in result.tuner.values().items():
        assert float(value) == pytest.approx(seen[1][name])


def test_hooks_that_a_tuner_does_not_drive_are_refused_by_name():
    method = Compose(SharpnessAwareMinimization(), WeightDecay(Hyperparameter(0.1)))
    with pytest.raises(ValueError, match=r"Wanderer cannot train under SharpnessAwareMinimization.*'on_gradients'"):
        run(regularizer=method)


@pytest.mark.parametrize(
    "option, value",
    [("accumulation", 2), ("clip_norm", 1.0), ("amp", torch.bfloat16), ("optimizer", torch.optim.SGD)],
)
def test_arguments_of_plain_training_are_refused(option, value):
    with pytest.raises(ValueError, match=f"fit: {option} belongs to plain training"):
        run(**{option: value})


def test_validation_data_are_asked_for():
    with pytest.raises(ValueError, match="a tuner learns on validation data; pass validation="):
        run(validation=None)


def test_a_loss_that_is_not_finite_is_shown_with_the_values():
    with pytest.raises(DivergenceError, match=r"Wanderer: the (inner|outer) loss is (nan|inf) at \{'regularizers.0"):
        run(tuner=partial(Wanderer, lr=1e30), epochs=20)


def test_a_requirement_that_the_loop_lacks_is_named():
    class Double(WeightDecay):
        requires = frozenset({"gradients"})

    with pytest.raises(
        RequirementError, match=r"Double requires 'gradients', which fit with Wanderer does not provide"
    ):
        run(regularizer=Double(Hyperparameter(0.1)))
