"""`RegularizedGradient` in a training loop: plain training at rho = 0, SAM at lam = 1, adapters, accumulation, bad steps."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import config
from torch import nn

from wellposed import Compose, Hyperparameter, Regularizer, RequirementError, fit
from wellposed.gradients.factor_perturbation import (
    LowRankFactors,
    low_rank_factors,
    weight_space_direction,
    weight_space_moves,
)
from wellposed.gradients.gradient_rules import RULES
from wellposed.gradients.sharpness_steering import RegularizedGradient
from wellposed.indexed_dataset import TensorLoader
from wellposed.step import LoopServices, Step
from wellposed.weights.low_rank import LowRankAdaptation, add_low_rank


@pytest.fixture
def unchecked():
    """Wrong values on purpose: without the tests' own type checks."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)


def examples(rows=32, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 6, generator=generator, dtype=dtype), torch.randint(0, 3, (rows,), generator=generator)


def network(dtype=torch.float32, noisy=False):
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(10), nn.Dropout(0.5)] if noisy else []
    return nn.Sequential(nn.Linear(6, 10), *middle, nn.Tanh(), nn.Linear(10, 3)).to(dtype)


def trained(method=None, dtype=torch.float32, noisy=False, epochs=2, optimizer=None, batch=8, model=None, **options):
    loader = TensorLoader(*examples(dtype=dtype), batch_size=batch, shuffle=True)
    optimizer = optimizer or partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    model = network(dtype, noisy) if model is None else model
    return fit(model, loader, epochs=epochs, regularizer=method, optimizer=optimizer, **options)


def state(result):
    return torch.cat([v.detach().double().reshape(-1) for v in result.model.state_dict().values()])


class Keep(Regularizer):
    """The gradients that the optimizer will see."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_gradients(self, step):
        self.seen.append([None if p.grad is None else p.grad.clone() for p in step.model.parameters()])


# ── plain training ────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("rule", RULES)
def test_rho_zero_is_plain_training_bit_for_bit(rule):
    method = RegularizedGradient(rho=0.0, rule=rule, lam=0.7)
    assert torch.equal(state(trained(method, noisy=True)), state(trained(noisy=True)))
    assert int(method.passes) == 0 and int(method.skipped) == 8


@pytest.mark.parametrize("rule", ["project", "mix", "sam"])
def test_a_forced_second_pass_at_rho_zero_sees_the_same_masks_and_statistics(rule):
    for lam in (0.25, 1 / 3, 0.7, 1.0):
        method = RegularizedGradient(rho=0.0, rule=rule, lam=lam, force_second_pass=True)
        assert torch.equal(state(trained(method, noisy=True)), state(trained(noisy=True)))
        assert int(method.passes) == 8


def test_a_forced_steer_at_rho_zero_is_plain_up_to_rounding():
    method = RegularizedGradient(rho=0.0, rule="steer", lam=0.3, force_second_pass=True)
    found = state(trained(method, torch.float64, noisy=True))
    torch.testing.assert_close(found, state(trained(None, torch.float64, noisy=True)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", ["project", "mix", "steer"])
def test_lam_zero_is_plain_and_makes_no_second_pass(rule):
    method = RegularizedGradient(rho=0.3, rule=rule, lam=0.0)
    assert torch.equal(state(trained(method)), state(trained()))
    assert int(method.passes) == 0


def test_the_running_statistics_see_each_batch_once():
    method = RegularizedGradient(rho=0.1, rule="mix")
    model = trained(method, noisy=True).model
    assert int(model[1].num_batches_tracked) == 8


# ── SAM ───────────────────────────────────────────────────────────────────────────────────────────────────────────────
def independent_sam(make, rho, steps=20):
    """Sharpness-aware minimisation in a loop of its own, with one of torch's optimizers."""
    model = network(torch.float64)
    optimizer = make(model.parameters())
    x, y = examples(dtype=torch.float64)
    for epoch in range(steps // 4):
        loader = TensorLoader(x, y, batch_size=8, shuffle=True)
        loader.set_epoch(epoch)
        for batch in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(batch.inputs), batch.targets).backward()
            length = sum(p.grad.square().sum() for p in model.parameters()).sqrt()
            home = copy.deepcopy(model.state_dict())
            with torch.no_grad():
                for p in model.parameters():
                    p += rho * p.grad / length
            optimizer.zero_grad()
            F.cross_entropy(model(batch.inputs), batch.targets).backward()
            model.load_state_dict(home)
            optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize(
    "make", [partial(torch.optim.SGD, lr=0.1, momentum=0.9), partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)]
)
@pytest.mark.parametrize("rule", ["mix", "sam"])
def test_mix_with_lam_one_is_an_independent_sam_for_twenty_steps(make, rule):
    method = RegularizedGradient(rho=0.2, rule=rule, lam=1.0)
    found = state(trained(method, torch.float64, epochs=5, optimizer=make))
    torch.testing.assert_close(found, independent_sam(make, 0.2), rtol=0, atol=1e-10)
    assert not torch.allclose(found, state(trained(None, torch.float64, epochs=5, optimizer=make)), atol=1e-4)


def test_against_the_sam_of_pytorch_optimizer():
    peer = pytest.importorskip("pytorch_optimizer")
    model = network(torch.float64)
    optimizer = peer.SAM(model.parameters(), torch.optim.SGD, rho=0.2, adaptive=False, lr=0.1, momentum=0.9)
    for epoch in range(2):
        loader = TensorLoader(*examples(dtype=torch.float64), batch_size=8, shuffle=True)
        loader.set_epoch(epoch)
        for batch in loader:

            def closure(batch=batch):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(batch.inputs), batch.targets)
                loss.backward()
                return loss

            closure()
            optimizer.step(closure)
    found = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    expected = state(trained(RegularizedGradient(rho=0.2, rule="sam"), torch.float64))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_sagm_takes_its_reference_at_a_nearer_point():
    near = state(trained(RegularizedGradient(rho=0.2, rule="sagm", sagm_alpha=0.1), torch.float64, epochs=1, batch=32))
    model = network(torch.float64)
    x, y = examples(dtype=torch.float64)
    order = next(iter(TensorLoader(x, y, batch_size=32, shuffle=True)))
    weights = list(model.parameters())
    g = torch.autograd.grad(F.cross_entropy(model(order.inputs), order.targets), weights)
    norm = torch.cat([part.reshape(-1) for part in g]).norm()
    home = [w.detach().clone() for w in weights]
    with torch.no_grad():
        for w, part in zip(weights, g, strict=True):
            w += (0.2 / norm - 0.1) * part
    s = torch.autograd.grad(F.cross_entropy(model(order.inputs), order.targets), weights)
    expected = torch.cat([(w - 0.1 * (a + b) / 2).reshape(-1) for w, a, b in zip(home, g, s, strict=True)])
    torch.testing.assert_close(near, expected, rtol=0, atol=1e-10)


# ── state ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_parameters_are_restored_bit_for_bit_and_the_frozen_left_alone():
    model = network()
    model[0].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    points = []

    class Look(nn.Module):
        def forward(self, x):
            points.append(model[2].weight.detach().clone())
            return x

    watched = nn.Sequential(Look(), *model)
    method = RegularizedGradient(rho=0.3, rule="mix")
    trained(method, epochs=1, batch=32, model=watched, optimizer=partial(torch.optim.SGD, lr=0.0))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert len(points) == 2 and not torch.equal(points[0], points[1])
    assert model[0].weight.grad is None and model[0].bias.grad is None


def test_every_second_step_is_plain():
    method, keep = RegularizedGradient(rho=0.3, rule="sam", every=2), Keep()
    trained(Compose(method, keep), torch.float64, epochs=1)
    assert (int(method.passes), int(method.skipped)) == (2, 2)
    plain = Keep()
    trained(plain, torch.float64, epochs=1)
    # The first step differs by the second pass; a plain second step from the plain first weights would not.
    assert not torch.equal(keep.seen[0][0], plain.seen[0][0])


def test_micro_batches_make_no_difference():
    whole = state(trained(RegularizedGradient(rho=0.3, rule="steer"), torch.float64, batch=16))
    parts = state(trained(RegularizedGradient(rho=0.3, rule="steer"), torch.float64, batch=16, accumulation=4))
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-10)


def test_cosine_and_conflict_are_logged():
    entry = trained(RegularizedGradient(rho=0.5, rule="project")).history[0]
    assert 0 < entry["gradient_cosine"] < 1 and entry["gradient_conflict"] == 0


class Hill(nn.Module):
    """loss = -w^2 / 2: the reference at a radius beyond |w| points the other way."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0]))

    def forward(self, x):
        return -0.5 * self.w.square().expand(len(x))


@pytest.mark.parametrize("rho, expected, conflict", [(1.5, 1.0, 1.0), (0.5, 1.1, 0.0)])
def test_a_conflict_on_a_hill_is_projected_away_and_counted(rho, expected, conflict):
    method = RegularizedGradient(rho=rho, rule="project", lam=1.0)
    result = fit(
        Hill(), [(torch.zeros(2), torch.zeros(2))], epochs=1, regularizer=method, criterion=lambda out, target: out,
        optimizer=partial(torch.optim.SGD, lr=0.1),
    )  # fmt: skip
    assert result.model.w.item() == pytest.approx(expected) and result.history[0]["gradient_conflict"] == conflict


def test_a_zero_gradient_makes_no_second_pass():
    method = RegularizedGradient(rho=0.1)
    model = Hill()
    nn.init.zeros_(model.w)
    fit(model, [(torch.zeros(2), torch.zeros(2))], epochs=1, regularizer=method, criterion=lambda o, t: o)
    assert (int(method.passes), int(method.skipped)) == (0, 1)


class Cliff(nn.Module):
    """Finite at 0, and not a number a little further."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.0]))

    def forward(self, x):
        return (0.05 - self.w).sqrt().expand(len(x))


@pytest.mark.parametrize("rule", RULES)
def test_a_reference_that_is_not_finite_is_dropped_and_counted(rule):
    method, keep = RegularizedGradient(rho=-0.0 + 0.2, rule=rule), Keep()

    class Uphill(Cliff):
        def forward(self, x):
            return -super().forward(x)

    fit(
        Uphill(), [(torch.zeros(2), torch.zeros(2))], epochs=1, regularizer=Compose(method, keep),
        criterion=lambda o, t: o, optimizer=partial(torch.optim.SGD, lr=0.0),
    )  # fmt: skip
    assert int(method.kept) == 1
    assert keep.seen[0][0].item() == pytest.approx(0.5 / 0.05**0.5, rel=1e-5)


def test_a_gradient_that_is_not_finite_is_left_to_the_loop():
    model = nn.Linear(2, 1)
    step = Step(model)
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    step.services = LoopServices(closure=lambda: pytest.fail("no second pass"))
    method = RegularizedGradient()
    method.on_gradients(step)
    assert int(method.skipped) == 1 and bool(model.weight.grad.isnan().all())


def test_counters_continue_from_the_state_dict():
    method = RegularizedGradient(rho=0.2)
    trained(method)
    other = RegularizedGradient(rho=0.2)
    other.load_state_dict(method.state_dict())
    assert int(other.passes) == 8


def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    def make():
        return RegularizedGradient(rho=0.2, rule="mix", every=3)

    whole = state(trained(make(), noisy=True, epochs=4))

    class Killed(Exception):
        pass

    def kill(step, entry):
        if entry["epoch"] == 3:
            raise Killed

    with pytest.raises(Killed):
        trained(make(), noisy=True, epochs=4, checkpoint=tmp_path / "run.pt", on_epoch_end=kill)
    method = make()
    assert torch.equal(state(trained(method, noisy=True, epochs=4, checkpoint=tmp_path / "run.pt")), whole)
    assert int(method.passes) + int(method.skipped) == 16


def test_strengths_may_be_hyperparameters():
    method = RegularizedGradient(rho=Hyperparameter(0.2), lam=Hyperparameter(0.5, 0.0, 1.0))
    assert len(list(method.parameters())) == 0
    torch.testing.assert_close(
        state(trained(method)), state(trained(RegularizedGradient(rho=0.2, lam=0.5))), rtol=0, atol=1e-5
    )


def test_under_bfloat16_and_with_a_scaler():
    method = RegularizedGradient(rho=0.1, rule="steer")
    assert torch.isfinite(state(trained(method, amp=torch.bfloat16))).all()
    scaled = state(trained(method, torch.float64, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10)))
    torch.testing.assert_close(scaled, state(trained(method, torch.float64)), rtol=0, atol=1e-12)


# ── low-rank adapters ─────────────────────────────────────────────────────────────────────────────────────────────────
def adapted(dtype=torch.float64, rank=2):
    model = network(dtype)
    add_low_rank(model, rank, alpha=4, generator=torch.Generator().manual_seed(1))
    return model


def test_at_the_start_of_lora_the_perturbation_lives_in_b_alone():
    model, seen = adapted(), []
    home = {name: p.detach().clone() for name, p in model.named_parameters()}

    class Look(Regularizer):
        def penalty(self, step):
            seen.append({name: p.detach() - home[name] for name, p in model.named_parameters()})

    method = RegularizedGradient(rho=0.3, rule="sam")
    trained(Compose(method, Look()), torch.float64, epochs=1, batch=32, model=model)
    moved = seen[1]
    assert all(bool((move == 0).all()) for name, move in moved.items() if not name.endswith("lora_B"))
    length = torch.cat([move.reshape(-1) for name, move in moved.items()]).norm()
    assert float(length) == pytest.approx(0.3, rel=1e-9)


def test_weight_space_radius_is_the_distance_of_the_weights():
    model, seen = adapted(), []
    layers = [model[0], model[2]]

    def weights():
        return [layer.base.weight + layer.scaling * layer.lora_B @ layer.lora_A for layer in layers]

    class Look(Regularizer):
        def penalty(self, step):
            seen.append([w.detach().clone() for w in weights()])

    method = RegularizedGradient(rho=0.3, rule="sam", perturb="weight")
    trained(Compose(method, Look()), torch.float64, epochs=1, batch=32, model=model)
    # At the start B = 0, so that the change of the weights is linear in the move: the distance is exact.
    distance = torch.cat([(b - a).reshape(-1) for a, b in zip(*seen, strict=True)]).norm()
    assert float(distance) == pytest.approx(0.3, rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_weight_space_moves_make_the_projection_of_the_weights_gradient(seed):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    a, b, gradient, s = normal(2, 7), normal(5, 2), normal(5, 7), 1.7
    eps_a, eps_b, norm = weight_space_direction(
        s * b.T @ gradient, s * gradient @ a.T, LowRankFactors(a, b, s), damping=0.0
    )
    change = s * (eps_b @ a + b @ eps_a)
    across = torch.eye(7, dtype=torch.float64) - torch.linalg.pinv(a) @ a
    upon = b @ torch.linalg.pinv(b)
    expected = gradient - (torch.eye(5, dtype=torch.float64) - upon) @ gradient @ across
    torch.testing.assert_close(change, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(norm, expected.norm(), rtol=1e-9, atol=1e-9)
    # Another way to write the same B A, the same change of the weight.
    mix = normal(2, 2) + 2 * torch.eye(2, dtype=torch.float64)
    c, d = torch.linalg.inv(mix) @ a, b @ mix
    eps_c, eps_d, _ = weight_space_direction(
        s * d.T @ gradient, s * gradient @ c.T, LowRankFactors(c, d, s), damping=0.0
    )
    torch.testing.assert_close(s * (eps_d @ c + d @ eps_c), expected, rtol=1e-8, atol=1e-8)


def test_damping_keeps_a_still_while_b_is_tiny():
    torch.manual_seed(0)
    a, b, gradient = torch.randn(2, 6), 1e-6 * torch.randn(4, 2), torch.randn(4, 6)
    loose = weight_space_direction(b.T @ gradient, gradient @ a.T, LowRankFactors(a, b, 1.0), damping=0.0)
    firm = weight_space_direction(b.T @ gradient, gradient @ a.T, LowRankFactors(a, b, 1.0), damping=0.01)
    assert float(loose[0].norm()) > 1e4 and float(firm[0].norm()) < 1e-2


def test_factors_are_found_in_pefts_layers_and_half_an_adapter_is_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(network(), peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0", "2"]))
    found = low_rank_factors(model)
    assert [(tuple(f.a.shape), tuple(f.b.shape), f.scaling) for f in found] == [
        ((2, 6), (10, 2), 3.0), ((2, 10), (3, 2), 3.0),
    ]  # fmt: skip
    result = trained(RegularizedGradient(rho=0.1, perturb="weight"), model=model)
    assert torch.isfinite(state(result)).all() and result.history[0]["gradient_cosine"] > 0
    a, b = torch.ones(1, 2), torch.ones(2, 1)
    with pytest.raises(ValueError, match="only one factor of an adapter has a gradient"):
        weight_space_moves([a], [a], [LowRankFactors(a, b, 1.0)])


def test_adapters_train_and_merge_under_every_rule():
    x, _ = examples()
    for rule in RULES:
        model = trained(Compose(LowRankAdaptation(rank=2), RegularizedGradient(rho=0.2, rule=rule))).model
        assert not any("lora" in name for name, _ in model.named_parameters())
        assert model(x).shape == (32, 3)


# ── errors ────────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"rho": -0.1}, "RegularizedGradient: rho must be >= 0, got -0.1"),
        ({"lam": 1.2}, r"RegularizedGradient: lam must be in \[0, 1\], got 1.2"),
        ({"rule": "glad"}, "rule must be one of .* got 'glad'"),
        ({"scope": "layer"}, "scope must be one of"),
        ({"perturb": "bias"}, "perturb must be one of"),
        ({"every": 0}, "every must be an integer >= 1, got 0"),
        ({"damping": -1.0}, "damping must be >= 0"),
        ({"sagm_alpha": float("nan")}, "sagm_alpha must be >= 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        RegularizedGradient(**arguments)


def test_sparse_gradients_are_named():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Flatten(1))
    with pytest.raises(ValueError, match=r"the gradient of '0\.weight' is sparse"):
        fit(model, [(torch.tensor([[1], [2]]), torch.tensor([0, 1]))], epochs=1, regularizer=RegularizedGradient(),
            optimizer=partial(torch.optim.SGD, lr=0.1))  # fmt: skip


def test_a_loop_without_a_closure_is_refused():
    from wellposed.regularizer import check_requirements

    with pytest.raises(RequirementError, match="RegularizedGradient requires 'closure'"):
        check_requirements(RegularizedGradient(), {"gradients"}, "my loop")
