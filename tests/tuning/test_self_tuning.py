"""Self-tuning: who moves when, what a gradient reaches, hooks, exact resume, refusals."""

import copy
import math
from functools import partial

import pytest
import torch
from jaxtyping import config
from torch import nn

from wellposed import Compose, Hyperparameter, Regularizer, TensorLoader, fit
from wellposed.bilevel import BilevelProblem
from wellposed.features import Cutout, InputNoise
from wellposed.gradients import perturbed
from wellposed.loading import EndlessBatches
from wellposed.losses import LabelSmoothing
from wellposed.objective import cross_entropy
from wellposed.step import DivergenceError
from wellposed.tuning import HyperDropout, SelfTuner, response_parameters
from wellposed.weights import WeightDecay


@pytest.fixture
def unchecked():
    """For runs of many small steps: types and shapes are checked by the other tests of this file."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)


def example(h, **options):
    return Hyperparameter(h, per_example=True, **options)


def method():
    return Compose(
        InputNoise(example(0.1, high=0.6)),
        LabelSmoothing(example(0.02, high=0.3)),
        WeightDecay(example(torch.tensor([1e-4, 1e-3]), chart="exp", shape=(2,))),
    )


def network(norm=True):
    torch.manual_seed(0)
    rate = example(0.2, low=0.0, high=0.8)
    middle = [nn.BatchNorm1d(12)] if norm else []
    return nn.Sequential(nn.Linear(6, 12), *middle, nn.ReLU(), HyperDropout(rate), nn.Linear(12, 3))


def data(seed=0, rows=40):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, generator=generator)
    return x, (x[:, :3] + 0.5 * torch.randn(rows, 3, generator=generator)).argmax(1)


def problem(regularizer=None, model=None):
    return BilevelProblem.from_regularizer(model or network(), regularizer or method(), cross_entropy, seed=0)


def tuner_of(regularizer=None, model=None, **options):
    return SelfTuner(problem(regularizer, model), **{"train_steps": 2, **options})


def loaders(batch_size=10):
    return (
        EndlessBatches(TensorLoader(*data(0), batch_size=batch_size, shuffle=True), "train"),
        EndlessBatches(TensorLoader(*data(1), batch_size=batch_size, shuffle=True), "validation"),
    )


def trainable(tuner):
    return {n: p.detach().clone() for n, p in tuner.problem.params.items()}


MODES = [{"delta": False}, {"delta": True}, {"delta": True, "linearize": False}]


# Who moves when


@pytest.mark.parametrize("mode", MODES)
def test_training_moves_parameters_alone_and_validation_hyperparameters_alone(mode):
    tuner = tuner_of(**mode)
    leaves = tuner.u.detach().clone(), tuner.log_scale.detach().clone()
    raws = {n: h.raw.clone() for n, h in tuner.problem.hypers.items()}
    for _ in range(3):
        before = trainable(tuner)
        tuner.training_step(data(0))
        assert all(not torch.equal(p, before[n]) for n, p in tuner.problem.params.items() if p.grad.abs().max() > 1e-6)
        assert torch.equal(tuner.u, leaves[0]) and torch.equal(tuner.log_scale, leaves[1])
        assert tuner.u.grad is None and tuner.log_scale.grad is None
        assert all(torch.equal(h.raw, raws[n]) for n, h in tuner.problem.hypers.items())
    before, buffers = trainable(tuner), {n: b.clone() for n, b in tuner.problem.model.named_buffers() if "1." in n}
    tuner.validation_step(data(1))
    assert all(torch.equal(p, before[n]) for n, p in tuner.problem.params.items())
    assert all(torch.equal(dict(tuner.problem.model.named_buffers())[n], b) for n, b in buffers.items())
    assert bool((tuner.u != leaves[0]).all()) and bool((tuner.log_scale != leaves[1]).all())
    assert all(bool((h.raw != raws[n]).all()) for n, h in tuner.problem.hypers.items())
    assert all(p.requires_grad for p in tuner.problem.params.values())


@pytest.mark.parametrize("mode", MODES)
def test_no_training_gradient_reaches_a_hyperparameter_through_masks_or_counts(mode):
    holes = example(2.5, high=6.0, discrete=True)
    rate = example(0.3, high=0.9)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), HyperDropout(rate), nn.Linear(8, 3))
    tuner = tuner_of(Cutout(holes, 3), model, **mode)
    images, labels = torch.randn(20, 1, 8, 8), torch.randint(0, 3, (20,))
    for _ in range(3):
        tuner.training_step((images, labels))
    raw = tuner.perturbations.split(tuner.u.detach() + torch.randn(20, 2))
    raw = {n: v.requires_grad_() for n, v in raw.items()}
    loss = tuner.problem.evaluate(tuner.problem.inner_loss, tuner.problem.params, raw, (images, labels))
    found = torch.autograd.grad(loss, list(raw.values()), allow_unused=True)
    assert all(g is None or not g.any() for g in found)
    tuner.validation_step((images, labels))
    assert bool(torch.isfinite(tuner.u.grad).all()) and bool((tuner.u.grad != 0).all())
    with torch.no_grad():
        assert float(holes()) == math.floor(float(holes.from_raw(holes.raw)))


def test_the_gradients_of_a_delta_stn_are_those_of_two_losses_on_two_groups():
    tuner = tuner_of(scale=0.5)
    problem, batch = tuner.problem, data(0)
    for _ in range(2):
        tuner.training_step(batch)
    state = torch.get_rng_state(), tuner.generator.get_state(), problem.objective.generator.get_state()
    tuner.weight_optimizer.step = lambda: None
    tuner.training_step(batch)
    found = {n: p.grad.clone() for n, p in problem.params.items()}
    # The two losses by hand, with the same random numbers.
    for restore, saved in zip(
        (torch.set_rng_state, tuner.generator.set_state, problem.objective.generator.set_state), state, strict=True
    ):
        restore(saved)
    problem.begin()
    noise = tuner._draw(batch) * tuner.scale
    with tuner.response.at(noise, linearized=True):
        raw = tuner.perturbations.split(tuner.u.detach() + noise)
        perturbed_loss = problem.evaluate(problem.inner_loss, problem.params, raw, batch)
    held = {n: h.raw for n, h in problem.hypers.items()}
    plain_loss = problem.evaluate(problem.inner_loss, problem.params, held, batch)
    responding = response_parameters(problem.model)
    general = [n for n in found if n not in responding]
    for names, loss in ((general, plain_loss), (responding, perturbed_loss)):
        expected = torch.autograd.grad(loss, [problem.params[n] for n in names])
        for name, gradient in zip(names, expected, strict=True):
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)
    assert all(found[n].any() for n in found)


def test_at_any_time_the_weights_of_a_delta_stn_are_those_of_plain_training():
    """With nothing to draw but the response, W0 and b0 follow plain SGD at the present hyperparameters."""
    strength = Hyperparameter(0.05, chart="exp")
    (x, y), start = data(0), network(norm=False)
    start[2] = nn.Identity()
    tuner = tuner_of(WeightDecay(strength), copy.deepcopy(start), weight_optimizer=partial(torch.optim.SGD, lr=0.1))
    plain = copy.deepcopy(start)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(5):
        tuner.training_step((x, y))
        optimizer.zero_grad()
        decay = sum(p.square().sum() for p in plain.parameters() if p.ndim == 2)
        (cross_entropy(plain(x), y).mean() + 0.5 * strength.value * decay).backward()
        optimizer.step()
    for name, p in plain.named_parameters():
        torch.testing.assert_close(dict(tuner.problem.params)[name], p, rtol=1e-4, atol=1e-6)


def test_steps_alternate_after_the_warm_up():
    tuner = tuner_of(train_steps=3, valid_steps=2, warmup_steps=4)
    train, validation = loaders()
    tuned = []
    for _ in range(12):
        info = tuner.step(train, validation)
        tuned.append(info.outer_loss is not None)
        assert bool(info.values) == tuned[-1]
    assert [i + 1 for i, due in enumerate(tuned) if due] == [7, 10]
    assert (train.taken, validation.taken) == (12, 4)
    assert tuner.schedule.steps == [0, 7, 10] and tuner.schedule.total == 12
    assert set(tuner.schedule.values[-1]) == set(tuner.problem.hypers)


def test_running_statistics_come_from_training_at_the_present_values():
    plain, tuner = network(), tuner_of(Regularizer(), network(), scale=2.0)
    for _ in range(3):
        tuner.training_step(data(0))
    assert int(tuner.problem.model[1].num_batches_tracked) == 3
    with torch.no_grad():
        for name, p in plain.named_parameters():
            p.copy_(tuner.problem.params[name])
        tuner.problem.model.eval()
        plain.load_state_dict({n: v for n, v in tuner.problem.model.state_dict().items() if "response" not in n})
    torch.testing.assert_close(tuner.problem.model(data(1)[0]), plain.eval()(data(1)[0]), rtol=0, atol=0)


# Scales


def test_scales_rise_under_entropy_alone_and_rest_without_it():
    class Deaf(nn.Module):
        """A network whose validation loss is constant in the response."""

        def __init__(self):
            super().__init__()
            self.layer, self.rate = nn.Linear(6, 3), example(0.2, high=0.8)

        def forward(self, x):
            y = self.layer(x)
            return y if self.training else 0 * y

    for tau in (1e-3, 0.0):
        tuner = tuner_of(Regularizer(), Deaf(), tau=tau, delta=False)
        before = tuner.scale
        for _ in range(4):
            tuner.validation_step(data(1))
            after = tuner.scale
            assert bool((after > before).all()) if tau else torch.equal(after, before)
            before = after
        assert tau or not tuner.log_scale.grad.any()


def test_fixed_scales_leave_the_validation_step_unperturbed():
    tuner = tuner_of(tune_scales=False, scale=0.7, delta=False)
    for _ in range(3):
        tuner.training_step(data(0))
    state = tuner.generator.get_state()
    first = tuner.validation_step(data(1))
    assert torch.equal(state, tuner.generator.get_state())
    torch.testing.assert_close(tuner.scale, torch.full((5,), 0.7))
    assert math.isfinite(first)


def test_scales_may_be_given_by_name():
    tuner = tuner_of(
        LabelSmoothing(Hyperparameter(0.1, 0.0, 0.5)), scale={"2.rate": 0.5, "smoothing": 2.0}, model=network(False)
    )
    found = {n: float(tuner.scale[s]) for n, s in tuner.perturbations.slices.items()}
    assert found == pytest.approx({"2.rate": 0.5, "smoothing": 2.0})
    with pytest.raises(ValueError, match="scale must name all of"):
        tuner_of(scale={"rate": 1.0})
    with pytest.raises(ValueError, match="scale must be > 0 and finite, got 0"):
        tuner_of(scale=0)


# Batches


def test_a_last_batch_of_one_example_and_mixed_draws_work():
    regularizer = Compose(LabelSmoothing(example(0.1, high=0.5)), WeightDecay(Hyperparameter(1e-3, chart="exp")))
    for delta in (True, False):
        tuner = tuner_of(regularizer, network(norm=False), delta=delta)
        train, validation = (iter([(x[:1], y[:1])] * 4) for x, y in (data(0), data(1)))
        for _ in range(2):
            assert math.isfinite(tuner.step(train, validation).inner_loss)


def test_batches_that_do_not_tell_their_size_need_hyperparameters_drawn_once():
    model, h = nn.Linear(2, 1), example(1.0)

    def loss(w, v, b):
        return torch.func.functional_call(model, w, torch.ones(1, 2)).square().sum() * v["h"].mean()

    tuner = SelfTuner(BilevelProblem(model, loss, loss, hypers={"h": h}))
    with pytest.raises(ValueError, match=r"need batches of \(inputs, targets\), a dict or a Batch, got NoneType"):
        tuner.training_step(None)
    once = nn.Linear(2, 1)

    def plain(w, v, b):
        return torch.func.functional_call(once, w, torch.ones(1, 2)).square().sum() * v["h"]

    assert math.isfinite(
        SelfTuner(BilevelProblem(once, plain, plain, hypers={"h": Hyperparameter(1.0)})).training_step(None)
    )


# Methods


class Sharpness(Regularizer):
    """SAM with a radius that may be tuned."""

    requires = frozenset({"closure", "gradients"})

    def __init__(self, rho):
        super().__init__()
        self.rho, self.radii, self.closures = rho, [], []

    def on_gradients(self, step):
        parameters = [p for p in step.model.parameters() if p.grad is not None]
        rho = float(self.rho())
        self.radii.append(rho)
        with perturbed(parameters, [p.grad.clone() for p in parameters], rho):
            self.closures.append(float(step.closure()))


@pytest.mark.parametrize("mode", MODES)
def test_a_method_on_gradients_runs_with_its_perturbed_radius_and_the_radius_is_learned(mode):
    rho = Hyperparameter(0.05, 0.0, 1.0)
    sam = Sharpness(rho)
    tuner = tuner_of(sam, network(norm=False)[:2] + nn.Sequential(nn.Linear(12, 3)), **mode)
    before = rho.raw.clone()
    for _ in range(3):
        tuner.step(*loaders(20))
    assert not torch.equal(rho.raw, before)
    assert len(sam.radii) == (6 if mode["delta"] else 3) and len(set(sam.radii)) > 2
    if mode["delta"]:  # the response trains under a perturbed radius, the weights at the present one
        assert sam.radii[1] == pytest.approx(0.05) and sam.radii[0] != pytest.approx(0.05)


@pytest.mark.parametrize("mode", MODES)
def test_a_closure_repeats_the_loss_with_the_same_random_numbers(mode):
    sam = Sharpness(Hyperparameter(1e-12, 0.0, 1.0, tune=False))
    losses = []

    class Watch(Regularizer):
        def on_backward(self, step):
            losses.append(float(step.log and 0.0))

    tuner = tuner_of(Compose(method(), sam, Watch()), network(norm=False), **mode)
    for _ in range(2):
        loss = tuner.training_step(data(0))
        assert sam.closures[-1] == pytest.approx(loss, rel=1e-5)
    assert len(losses) == 2


def test_the_last_dropout_masks_of_a_hooked_step_do_not_shift_the_random_numbers():
    runs = []
    for regularizer in (method(), Compose(method(), Sharpness(Hyperparameter(1e-12, 0.0, 1.0, tune=False)))):
        torch.manual_seed(3)
        tuner = tuner_of(regularizer, network(norm=False), delta=False)
        for _ in range(3):
            tuner.training_step(data(0))
        runs.append(trainable(tuner))
    for name, value in runs[0].items():
        torch.testing.assert_close(value, runs[1][name], rtol=1e-4, atol=1e-6)


def test_every_hook_is_driven_as_often_as_the_contract_says():
    class Counts(Regularizer):
        requires = frozenset({"index"})

        def __init__(self):
            super().__init__()
            self.calls = []
            self.h = example(0.1, high=0.5)

        def loss(self, step):
            return cross_entropy(step.outputs, step.targets) * (1 + self.h())

        def on_batch(self, step):
            self.calls.append("on_batch")

        def on_backward(self, step):
            assert step.index is not None and step.outputs is not None
            self.calls.append("on_backward")

        def on_gradients(self, step):
            self.calls.append("on_gradients")

        def on_step(self, step):
            self.calls.append("on_step")

        def on_epoch(self, step):
            self.calls.append("on_epoch")

    counts = Counts()
    fit(
        network(False),
        TensorLoader(*data(0), batch_size=20),
        validation=TensorLoader(*data(1)),
        epochs=2,
        regularizer=counts,
        tuner=SelfTuner,
    )
    found = {name: counts.calls.count(name) for name in set(counts.calls)}
    assert found == {"on_batch": 8, "on_backward": 4, "on_gradients": 8, "on_step": 4, "on_epoch": 3}


class MeanPenalty(Regularizer):
    """A penalty of the whole batch, times a strength."""

    coupled = True

    def __init__(self, strength):
        super().__init__()
        self.strength = strength

    def penalty(self, step):
        return self.strength() * step.logits.mean().square()


def test_a_batch_level_reader_of_a_value_of_each_example_is_refused_by_name():
    for delta in (True, False):
        with pytest.raises(
            ValueError, match="'strength' has per_example=True, but it multiplies a penalty of the whole batch"
        ):
            tuner_of(MeanPenalty(example(1.0)), network(False), delta=delta).training_step(data(0))
        with pytest.raises(ValueError, match="'rho' has per_example=True, but on_gradients reads it"):
            tuner_of(Sharpness(example(0.1, high=1.0)), network(False), delta=delta).training_step(data(0))
        assert math.isfinite(
            tuner_of(MeanPenalty(Hyperparameter(1.0)), network(False), delta=delta).training_step(data(0))
        )


# Runs


@pytest.mark.parametrize("mode", MODES)
def test_a_run_continues_bit_for_bit_from_its_state(mode):
    def run(steps, state=None, taken=(0, 0)):
        torch.manual_seed(11)
        tuner = tuner_of(train_steps=3, warmup_steps=2, hyper_optimizer=torch.optim.Adam, **mode)
        if state is not None:
            tuner.load_state_dict(copy.deepcopy(state[0]))
            torch.set_rng_state(state[1])
        train, validation = loaders()
        train.restore(taken[0])
        validation.restore(taken[1])
        for _ in range(steps):
            tuner.step(train, validation)
        return tuner, (train.taken, validation.taken)

    whole, _ = run(12)
    first, taken = run(7)  # in the middle of a cycle
    second, _ = run(5, (first.state_dict(), torch.get_rng_state()), taken)
    for name, value in trainable(whole).items():
        assert torch.equal(value, second.problem.params[name])
    assert torch.equal(whole.u, second.u) and torch.equal(whole.log_scale, second.log_scale)
    assert whole.schedule == second.schedule
    x = data(1)[0]
    whole.problem.model.eval(), second.problem.model.eval()
    assert torch.equal(whole.problem.model(x), second.problem.model(x))


@pytest.mark.parametrize("delta", [True, False])
def test_a_killed_fit_continues_bit_for_bit_and_ends_in_a_plain_network(tmp_path, delta):
    def run(epochs, path, stop=None):
        def interrupt(step, entry):
            if entry["epoch"] == stop:
                raise KeyboardInterrupt

        tuner = partial(SelfTuner, train_steps=2, delta=delta)
        return fit(
            network(), TensorLoader(*data(0), batch_size=10, shuffle=True), regularizer=method(), epochs=epochs,
            validation=TensorLoader(*data(1), batch_size=10), tuner=tuner, checkpoint=path, on_epoch_end=interrupt,
        )  # fmt: skip

    whole = run(4, tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run(4, tmp_path / "b", stop=3)
    again = run(4, tmp_path / "b")
    assert [type(m) for m in whole.model.modules()] == [type(m) for m in network().modules()]
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert whole.tuner.schedule == again.tuner.schedule and len(whole.tuner.schedule.steps) == 9
    whole.model.eval()
    x = data(1)[0]
    entry = whole.history[-1]["validation_loss"]
    assert float(cross_entropy(whole.model(x), data(1)[1]).mean()) == pytest.approx(entry, abs=1e-5)


def test_seeds_alone_decide():
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        tuner = tuner_of(seed=seed)
        train, validation = loaders()
        for _ in range(4):
            tuner.step(train, validation)
        found.append(tuner.u.detach())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize("delta", [True, False])
def test_mixed_precision_keeps_charts_entropy_and_losses_in_float32(delta):
    seen = {}

    class Types(Regularizer):
        def __init__(self):
            super().__init__()
            self.h = example(0.1, high=0.5)

        def loss(self, step):
            seen["logits"], seen["value"] = step.logits.dtype, self.h().dtype
            found = cross_entropy(step.outputs, step.targets) * (1 + self.h())
            seen["loss"] = found.dtype
            return found

    tuner = tuner_of(Types(), network(False), amp=torch.bfloat16, delta=delta)
    train, validation = loaders()
    for _ in range(4):
        info = tuner.step(train, validation)
    assert seen == {"logits": torch.bfloat16, "value": torch.float32, "loss": torch.float32}
    assert math.isfinite(info.outer_loss) and tuner.u.dtype == torch.float32


def test_double_precision_stays_double():
    model = network().double()
    tuner = tuner_of(method().double(), model)
    x, y = data(0)
    tuner.training_step((x.double(), y))
    tuner.validation_step((x.double(), y))
    assert tuner.u.dtype == torch.float64 and all(p.dtype == torch.float64 for p in tuner.problem.params.values())


def test_gradients_are_clipped_over_all_parameters():
    tuner = tuner_of(clip_norm=1e-3)
    tuner.training_step(data(0))
    norm = torch.stack([p.grad.norm() for p in tuner.problem.params.values()]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.usefixtures("unchecked")
def test_a_strength_moves_to_where_plain_training_validates_better():
    """60 noisy examples of 36 features, of which 6 matter: more decay than at first helps much, as a grid says."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 36, generator=generator)
    y = (x[:, :6].sum(1) + 1.5 * torch.randn(400, generator=generator) > 0).long()
    train, validation = TensorLoader(x[:60], y[:60], batch_size=60), TensorLoader(x[60:], y[60:], batch_size=340)

    def run(decay, **options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(36, 32), nn.ReLU(), nn.Linear(32, 2))
        regularizer = WeightDecay(decay)
        found = fit(model, train, validation=validation, epochs=120, regularizer=regularizer, **options)
        return found.history[-1]["validation_loss"]

    optimizer = partial(torch.optim.SGD, lr=0.03, momentum=0.9)
    start = run(1e-3, optimizer=optimizer)
    assert run(1e-1, optimizer=optimizer) < start - 0.1
    hyper = partial(torch.optim.RMSprop, lr=0.05)
    tuner = partial(SelfTuner, weight_optimizer=optimizer, hyper_optimizer=hyper, train_steps=2, warmup_steps=20)
    for delta in (True, False):
        decay = example(1e-3, chart="exp")
        assert run(decay, tuner=partial(tuner, delta=delta)) < start - 0.1
        assert float(decay.value) > 2e-2


# Refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train_steps": 0}, "train_steps must be an integer >= 1, got 0"),
        ({"valid_steps": 0}, "valid_steps must be an integer >= 1, got 0"),
        ({"warmup_steps": -1}, "warmup_steps must be an integer >= 0, got -1"),
        ({"tau": -1e-3}, "tau must be >= 0 and finite, got -0.001"),
        ({"clip_norm": 0.0}, "clip_norm must be > 0, got 0.0"),
        ({"amp": torch.float16}, "amp must be None or torch.bfloat16"),
        ({"scale": math.inf}, "scale must be > 0 and finite"),
        ({"exclude": ["nothing"]}, "exclude names 'nothing'"),
    ],
)
def test_arguments_out_of_range_are_refused_at_construction(options, words):
    with pytest.raises(ValueError, match=words):
        tuner_of(**options)


def test_a_model_converted_for_something_else_is_refused():
    tuner = tuner_of()
    with pytest.raises(
        ValueError, match="converted for 5 values and delta=True, but the problem has 5 and delta=False"
    ):
        SelfTuner(tuner.problem, delta=False)
    assert SelfTuner(tuner.problem).response is tuner.response


def test_a_loss_that_is_not_finite_names_the_present_values():
    tuner = tuner_of(weight_optimizer=partial(torch.optim.SGD, lr=1e30))
    with pytest.raises(DivergenceError, match=r"SelfTuner: the (inner|outer) loss is nan at .*smoothing"):
        tuner.run(TensorLoader(*data(0), batch_size=10), TensorLoader(*data(1), batch_size=10), 30)


def test_validation_data_are_needed():
    with pytest.raises(ValueError, match="pass validation="):
        fit(network(), TensorLoader(*data(0)), epochs=1, regularizer=method(), tuner=SelfTuner)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("delta", [True, False])
def test_it_tunes_on_an_accelerator(delta):
    result = fit(
        network(), TensorLoader(*data(0), batch_size=10), validation=TensorLoader(*data(1), batch_size=10), epochs=2,
        regularizer=method(), tuner=partial(SelfTuner, delta=delta), device="cuda",
    )  # fmt: skip
    assert all(math.isfinite(entry["validation_loss"]) for entry in result.history)
