"""Searches on a surrogate, the conservative objective, and ensembles."""

import builtins

import numpy as np
import pytest
import torch
from jaxtyping import config
from torch import nn

from wellposed import TensorLoader, fit, squared_error
from wellposed.gradients import (
    ConservativeObjective,
    SurrogateEnsemble,
    best_designs,
    ensemble_squared_error,
    evolution_search,
    input_gradient,
    mean_output,
    offline_optimize,
    percentile_report,
)


@pytest.fixture
def unchecked():
    """Let bad arguments reach our own errors: jaxtyping would refuse them first."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)


def data(n=64, d=3):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    return x, x.sin().sum(1)


def network(seed=0, d=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(d, 16), nn.LeakyReLU(0.3), nn.Linear(16, 1))


class Bowl(nn.Module):
    """Highest at 1 in every coordinate."""

    def forward(self, x):
        return -(x - 1).square().sum(1)


def test_fit_and_ascent_reproduce_a_plain_script():
    x, y = data()
    loader = TensorLoader(x, y, batch_size=16, shuffle=True, seed=4)
    model = fit(
        network(), loader, epochs=3, criterion=squared_error, optimizer=lambda g: torch.optim.Adam(g, 1e-2)
    ).model
    found = offline_optimize(model, best_designs(x, y, 8), steps=20)

    plain = network()
    optimizer = torch.optim.Adam(plain.parameters(), 1e-2)
    order = TensorLoader(x, y, batch_size=16, shuffle=True, seed=4)
    for epoch in range(3):
        order.set_epoch(epoch)
        for batch in order:
            optimizer.zero_grad()
            (plain(batch.inputs)[:, 0] - batch.targets).square().mean().backward()
            optimizer.step()
    design = x[torch.argsort(y, descending=True)[:8]].clone()
    for _ in range(20):
        design.requires_grad_()
        (slope,) = torch.autograd.grad(plain(design).sum(), design)
        design = (design + 0.01 * 3**0.5 * slope).detach()
    torch.testing.assert_close(found, design, rtol=0, atol=1e-6)


def test_percentiles_are_numpys():
    scores = torch.randn(128, generator=torch.Generator().manual_seed(0))
    report = percentile_report(scores, (50, 80, 100))
    np.testing.assert_allclose(list(report.values()), np.percentile(scores.double().numpy(), [50, 80, 100]), rtol=1e-12)


def test_every_design_moves_by_its_own_gradient_and_the_surrogate_is_left_alone():
    model = nn.Sequential(network(), nn.Dropout(0.5))
    x, _ = data(5)
    together = offline_optimize(model, x, steps=7, lr=0.1)
    alone = torch.cat([offline_optimize(model, one[None], steps=7, lr=0.1) for one in x])
    torch.testing.assert_close(together, alone)
    assert model.training and all(p.grad is None for p in model.parameters()) and not together.requires_grad
    assert torch.equal(offline_optimize(model, x, steps=0), x)


def test_bounds_are_kept_at_every_step():
    x = torch.zeros(4, 3)
    found = offline_optimize(Bowl(), x, steps=50, lr=0.1, bounds=(-0.5, torch.tensor([0.2, 0.5, 2.0])))
    torch.testing.assert_close(found, torch.tensor([[0.2, 0.5, 1.0]]).expand(4, 3), rtol=0, atol=1e-4)


def test_the_gradient_in_the_inputs_can_be_differentiated_in_the_weights():
    model, (x, _) = network(), data(4)
    input_gradient(model, x, create_graph=True).square().sum().backward()
    assert float(model[0].weight.grad.abs().max()) > 0


def test_best_designs_are_the_best_in_order():
    x, y = data()
    order = torch.argsort(y, descending=True)
    assert torch.equal(best_designs(x, y, 10), x[order[:10]])
    with pytest.raises(ValueError, match=r"count must lie in \[1, 64\]"):
        best_designs(x, y, 65)


def test_evolution_finds_the_top_keeps_its_last_designs_and_leaves_numpys_state_alone():
    np.random.seed(3)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    found = evolution_search(Bowl(), torch.zeros(5), population=16, generations=60, keep=20, seed=1)
    assert found.shape == (20, 5) and found.dtype == torch.float32
    assert float((found - 1).abs().max()) < 0.05
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002
    np.random.seed(9)  # noqa: NPY002
    again = evolution_search(Bowl(), torch.zeros(5), population=16, generations=60, keep=20, seed=1)
    other = evolution_search(Bowl(), torch.zeros(5), population=16, generations=60, keep=20, seed=2)
    assert torch.equal(found, again) and not torch.equal(found, other)
    boxed = evolution_search(Bowl(), torch.zeros(2), population=8, generations=30, keep=8, bounds=(-0.5, 0.5))
    assert float(boxed.abs().max()) <= 0.5


def test_wrong_arguments_are_named(unchecked, monkeypatch):
    x = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="steps >= 0, got shape"):
        offline_optimize(Bowl(), x, steps=-1)
    with pytest.raises(ValueError, match=r"x0 must be \(n, d\)"):
        offline_optimize(Bowl(), x[0])
    with pytest.raises(ValueError, match="lr must be > 0 or 'auto', got 0"):
        offline_optimize(Bowl(), x, lr=0)
    with pytest.raises(ValueError, match="sigma > 0"):
        evolution_search(Bowl(), x[0], sigma=0.0)
    with pytest.raises(ValueError, match=r"keep must lie in \[1, population \* generations = 6\], got 7"):
        evolution_search(Bowl(), x[0], population=2, generations=3, keep=7)
    with pytest.raises(ValueError, match="members is empty"):
        SurrogateEnsemble([])
    with pytest.raises(ValueError, match="reduce must be 'mean' or 'min', got 'max'"):
        SurrogateEnsemble([network()], reduce="max")
    for name, value in {"alpha": 0.0, "alpha_lr": -1.0, "steps": 0, "lr": 0.0}.items():
        with pytest.raises(ValueError, match=f"ConservativeObjective: {name} must be"):
            ConservativeObjective(**{name: value})
    importing = builtins.__import__

    def without(name, *rest, **more):
        if name == "cma":
            raise ImportError(name)
        return importing(name, *rest, **more)

    monkeypatch.setitem(__import__("sys").modules, "cma", None)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install cma"):
        evolution_search(Bowl(), x[0])


def test_an_ensemble_predicts_by_its_mean_or_minimum():
    members, (x, y) = [network(i) for i in range(3)], data()
    singles = torch.stack([mean_output(m(x)) for m in members], 1)
    torch.testing.assert_close(SurrogateEnsemble(members).train()(x), singles)
    torch.testing.assert_close(SurrogateEnsemble(members).eval()(x), singles.mean(1))
    torch.testing.assert_close(SurrogateEnsemble(members, "min").eval()(x), singles.amin(1))
    torch.testing.assert_close(ensemble_squared_error(singles, y[:, None]), (singles - y[:, None]).square().sum(1))


# ── conservative objective models ─────────────────────────────────────────────────────────────────────────────────────
def conservative(epochs=1, accumulation=1, **options):
    x, y = data()
    method = ConservativeObjective(**{"steps": 4, **options})
    loader = TensorLoader(x, y, batch_size=32, shuffle=True, seed=4)
    made = fit(network(), loader, epochs=epochs, criterion=squared_error, regularizer=method, accumulation=accumulation,
               optimizer=lambda g: torch.optim.SGD(g, 0.05))  # fmt: skip
    return made.model, method


def test_one_conservative_step_is_that_of_the_formula():
    x, y = data(32)
    method = ConservativeObjective(limit=0.5, alpha=0.3, alpha_lr=0.01, steps=4, lr=0.05)
    found = fit(network(), TensorLoader(x, y, batch_size=32), epochs=1, criterion=squared_error, regularizer=method,
                optimizer=lambda g: torch.optim.SGD(g, 0.05)).model  # fmt: skip
    plain, particles = network(), x.clone()
    for _ in range(4):
        particles.requires_grad_()
        (slope,) = torch.autograd.grad(plain(particles).sum(), particles)
        particles = (particles + 0.05 * 3**0.5 * slope).detach()
    gap = (plain(particles) - plain(x)).mean()
    loss = (plain(x)[:, 0] - y).square().mean() + 0.3 * gap
    for p, g in zip(plain.parameters(), torch.autograd.grad(loss, list(plain.parameters())), strict=True):
        p.data -= 0.05 * g
    for a, b in zip(found.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    torch.testing.assert_close(method.gap, gap.detach(), rtol=1e-5, atol=1e-7)


def test_alpha_moves_as_torchs_adam_moves_it():
    _, method = conservative(epochs=1, limit=0.0, alpha=0.2, alpha_lr=0.03)
    log_alpha = torch.tensor(0.2).log().requires_grad_()
    optimizer = torch.optim.Adam([log_alpha], 0.03)
    gaps = []

    class Watched(ConservativeObjective):
        def on_step(self, step):
            gaps.append(float(self.gap))
            super().on_step(step)

    x, y = data()
    watched = Watched(limit=0.0, alpha=0.2, alpha_lr=0.03, steps=4)
    fit(
        network(),
        TensorLoader(x, y, batch_size=8, shuffle=True, seed=4),
        epochs=2,
        criterion=squared_error,
        regularizer=watched,
    )
    for gap in gaps:
        optimizer.zero_grad()
        (log_alpha.exp() * (0.0 - gap)).backward()
        optimizer.step()
    torch.testing.assert_close(watched.log_alpha, log_alpha.detach(), rtol=1e-5, atol=1e-6)
    assert float(method.log_alpha) > np.log(0.2)  # the gap exceeds the limit: alpha grows


def test_conservative_models_promise_less_and_do_not_depend_on_the_cut():
    x, _ = data()
    gaps = {}
    for alpha in (1e-6, 2.0):
        model, _ = conservative(epochs=20, alpha=alpha, alpha_lr=0.0)
        gaps[alpha] = float(
            (mean_output(model(offline_optimize(model, x, 20))) - mean_output(model(x))).mean().detach()
        )
    assert gaps[2.0] < 0.7 * gaps[1e-6]
    (one, a), (four, b) = conservative(3), conservative(3, accumulation=4)
    for p, q in zip(one.parameters(), four.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    torch.testing.assert_close(a.log_alpha, b.log_alpha)
