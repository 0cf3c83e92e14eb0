"""`SteeredSAM`: the same numbers as the regularizer, one closure, any optimizer, schedules, scalers and checkpoints."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import config
from torch import nn

from wellposed import Hyperparameter, fit
from wellposed.gradients.gradient_rules import RULES
from wellposed.gradients.sharpness_steering import RegularizedGradient
from wellposed.gradients.steered_sam import SteeredSAM
from wellposed.indexed_dataset import TensorLoader
from wellposed.weights.low_rank import add_low_rank


@pytest.fixture
def unchecked():
    """Wrong values on purpose: without the tests' own type checks."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)


def examples():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(32, 6, generator=generator, dtype=torch.float64), torch.arange(32) % 3


def network(noisy=False):
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(8), nn.Dropout(0.5)] if noisy else []
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.Tanh(), nn.Linear(8, 3)).double()


def sgd(parameters, lr=0.1):
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def run(optimizer, model, steps=8, parts=1, start=0):
    x, y = examples()
    losses = []
    for number in range(start, steps):
        rows = (torch.arange(8) + 8 * number) % 32

        def closure(rows=rows):
            total = 0.0
            for part in rows.chunk(parts):
                loss = F.cross_entropy(model(x[part]), y[part]) / parts
                loss.backward()
                total += loss.item()
            return total

        losses.append(optimizer.step(closure))
    return losses


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_it_follows_the_regularizer(rule, scope):
    x, y = examples()
    model = network()
    run(SteeredSAM(sgd(model.parameters()), rho=0.3, rule=rule, lam=0.6, scope=scope), model)
    other = network()
    method = RegularizedGradient(rho=0.3, rule=rule, lam=0.6, scope=scope)
    fit(other, TensorLoader(x, y, batch_size=8), epochs=2, regularizer=method, optimizer=sgd)
    torch.testing.assert_close(flat(model), flat(other), rtol=0, atol=1e-10)


def test_rho_zero_is_the_wrapped_optimizer_bit_for_bit():
    model, plain = network(noisy=True), network(noisy=True)
    torch.manual_seed(1)
    optimizer = SteeredSAM(sgd(model.parameters()), rho=0.0, rule="mix", force_second_pass=True, model=model)
    run(optimizer, model)
    torch.manual_seed(1)
    base, (x, y) = sgd(plain.parameters()), examples()
    for number in range(8):
        rows = (torch.arange(8) + 8 * number) % 32
        base.zero_grad()
        F.cross_entropy(plain(x[rows]), y[rows]).backward()
        base.step()
    for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert float(optimizer.last_stats["cos"]) == pytest.approx(1)


def test_both_passes_have_the_same_masks_and_without_sharing_they_differ():
    for share, same in ((True, True), (False, False)):
        model = network(noisy=True)
        optimizer = SteeredSAM(
            sgd(model.parameters(), 0.0), rho=0.0, rule="sam", share_rng=share, force_second_pass=True
        )
        run(optimizer, model, steps=1)
        assert (abs(float(optimizer.last_stats["cos"]) - 1) < 1e-12) == same


def test_the_random_numbers_go_on_as_in_plain_training():
    model = network(noisy=True)
    torch.manual_seed(3)
    run(SteeredSAM(sgd(model.parameters()), rho=0.2), model, steps=1)
    after = torch.rand(1)
    torch.manual_seed(3)
    model(examples()[0][:8])
    assert torch.equal(torch.rand(1), after)


def test_micro_batches_in_the_closure_make_no_difference():
    whole, parts = network(), network()
    run(SteeredSAM(sgd(whole.parameters()), rho=0.3, rule="steer"), whole)
    run(SteeredSAM(sgd(parts.parameters()), rho=0.3, rule="steer"), parts, parts=4)
    torch.testing.assert_close(flat(parts), flat(whole), rtol=0, atol=1e-10)


def test_a_schedule_drives_the_wrapped_optimizer():
    model = network()
    base = sgd(model.parameters())
    optimizer = SteeredSAM(base, rho=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    run(optimizer, model, steps=1)
    scheduler.step()
    assert base.param_groups[0]["lr"] == 0.05
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 1.0})
    assert len(base.param_groups) == 2


def test_a_checkpoint_continues_bit_for_bit():
    def make(model):
        return SteeredSAM(torch.optim.AdamW(model.parameters(), 0.01), rho=0.2, rule="mix", lam=0.3, every=2)

    whole = network()
    run(make(whole), whole)
    first = network()
    optimizer = make(first)
    run(optimizer, first, steps=3)
    optimizer.rho = 0.2
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict()))
    second = network()
    second.load_state_dict(saved[0])
    other = SteeredSAM(torch.optim.AdamW(second.parameters(), 0.01))
    other.load_state_dict(saved[1])
    assert (other.rho, other.steering.lam, other.steering.every, other.number) == (0.2, 0.3, 2, 3)
    run(other, second, start=3)
    assert torch.equal(flat(second), flat(whole))


@pytest.mark.parametrize("rule", ["mix", "steer", "sam"])
def test_a_gradient_scaler_changes_nothing_but_the_scale(rule):
    plain, scaled = network(), network()
    run(SteeredSAM(sgd(plain.parameters()), rho=0.3, rule=rule), plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer = SteeredSAM(sgd(scaled.parameters()), rho=0.3, rule=rule, scaler=scaler)
    x, y = examples()
    for number in range(8):
        rows = (torch.arange(8) + 8 * number) % 32

        def closure(rows=rows):
            loss = F.cross_entropy(scaled(x[rows]), y[rows])
            scaler.scale(loss).backward()
            return loss.item()

        optimizer.step(closure)
        scaler.update()
    torch.testing.assert_close(flat(scaled), flat(plain), rtol=0, atol=1e-12)


def test_an_overflow_under_a_scaler_skips_the_step_and_lowers_the_scale():
    model = nn.Linear(2, 1)
    before = flat(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = SteeredSAM(sgd(model.parameters()), scaler=scaler)

    def closure():
        loss = model(torch.full((1, 2), float("inf"))).sum()
        scaler.scale(loss).backward()
        return loss.item()

    optimizer.step(closure)
    scaler.update()
    assert torch.equal(flat(model), before) and scaler.get_scale() == 2.0**9


def test_a_step_that_is_not_finite_is_skipped_and_counted():
    model = nn.Linear(2, 1)
    before = flat(model)
    optimizer = SteeredSAM(sgd(model.parameters()))
    optimizer.step(lambda: model(torch.full((1, 2), float("nan"))).sum().backward())
    assert torch.equal(flat(model), before) and optimizer.skipped == 1


def test_weight_space_perturbation_equals_the_regularizers():
    x, y = examples()
    models = [network(), network()]
    for model in models:
        add_low_rank(model, 2, generator=torch.Generator().manual_seed(1))
    run(
        SteeredSAM(
            sgd([p for p in models[0].parameters() if p.requires_grad]), rho=0.3, perturb="weight", model=models[0]
        ),
        models[0],
    )
    method = RegularizedGradient(rho=0.3, perturb="weight")
    fit(models[1], TensorLoader(x, y, batch_size=8), epochs=2, regularizer=method, optimizer=sgd)
    torch.testing.assert_close(flat(models[0]), flat(models[1]), rtol=0, atol=1e-10)


@pytest.mark.usefixtures("unchecked")
def test_wrong_use_is_named():
    model = network()
    base = sgd(model.parameters())
    with pytest.raises(ValueError, match=r"SteeredSAM\.step: closure is missing"):
        SteeredSAM(base).step()
    with pytest.raises(ValueError, match="SteeredSAM: rho must be >= 0, got -1"):
        SteeredSAM(base, rho=-1)
    with pytest.raises(ValueError, match=r"SteeredSAM: lam must be in \[0, 1\]"):
        SteeredSAM(base, lam=2.0)
    with pytest.raises(ValueError, match="SteeredSAM: rule must be one of"):
        SteeredSAM(base, rule="glad")
    with pytest.raises(ValueError, match="base_optimizer LBFGS needs a closure itself"):
        SteeredSAM(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(TypeError, match="base_optimizer must be an optimizer, got type"):
        SteeredSAM(torch.optim.SGD)
    with pytest.raises(ValueError, match="perturb='weight' needs model="):
        SteeredSAM(base, perturb="weight")
    with pytest.raises(TypeError, match="rho cannot be a Hyperparameter"):
        SteeredSAM(base, rho=Hyperparameter(0.1))
    with pytest.raises(ValueError, match="SteeredSAM: rho must be >= 0, got -0.5"):
        SteeredSAM(base).rho = -0.5
    table = nn.Embedding(4, 2, sparse=True)
    with pytest.raises(ValueError, match="parameter 0' is sparse"):
        SteeredSAM(partial(torch.optim.SGD, lr=0.1)(table.parameters())).step(
            lambda: table(torch.tensor([1])).sum().backward()
        )
