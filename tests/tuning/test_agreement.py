"""All tuners, on one problem whose answer is known: ridge regression with a logarithmic weight."""

import math
from functools import partial

import pytest
import torch
from jaxtyping import config
from scipy.optimize import minimize_scalar
from torch import nn

from wellposed import BilevelProblem, Hyperparameter
from wellposed.integrations import OptunaSearch
from wellposed.objective import squared_error
from wellposed.tuning import BOREP, HOAG, MAID, ImplicitDifferentiation, OneStepUnrolled, RandomSearch, SelfTuner
from wellposed.weights import WeightDecay

ROWS, COLUMNS = 24, 5


@pytest.fixture(scope="module", autouse=True)
def unchecked():
    """Without types and shapes, which each tuner's own tests check: thousands of small steps would double in time."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)


def data():
    generator = torch.Generator().manual_seed(5)
    x, vx = (torch.randn(n, COLUMNS, generator=generator, dtype=torch.float64) for n in (ROWS, 60))
    true = torch.randn(COLUMNS, generator=generator, dtype=torch.float64)
    noise = torch.randn(ROWS, generator=generator, dtype=torch.float64)
    return (x, x @ true + 3.0 * noise), (vx, vx @ true)


def exact_loss(u):
    """Validation loss of the exact ridge solution at the raw weight u."""
    (x, y), (vx, vy) = data()
    # squared error is a mean over rows, and decay is strength / 2 |w|^2.
    h = 2 * x.T @ x / ROWS + math.exp(u) * torch.eye(COLUMNS, dtype=torch.float64)
    return float((vx @ torch.linalg.solve(h, 2 * x.T @ y / ROWS) - vy).square().mean())


def best():
    """The raw weight at which the exact ridge solution has the lowest validation loss."""
    found = minimize_scalar(exact_loss, bounds=(-6, 6), method="bounded", options={"xatol": 1e-8})
    assert -4 < found.x < 4
    return found.x


CURVATURE = float(torch.linalg.eigvalsh(2 * data()[0][0].T @ data()[0][0] / ROWS)[-1])
MODULI = {"mu": lambda v: v["strength"], "L": lambda v: CURVATURE + v["strength"], "L_g": 10.0}
TUNERS = {
    "BO-REP": (partial(BOREP, outer_lr=0.03, inner_lr=0.1, z_lr=0.1, schedule="cosine"), 400),
    "implicit differentiation": (
        partial(ImplicitDifferentiation, inner_lr=0.2, outer_lr=0.05, inner_steps=20, cg_steps=10),
        80,
    ),
    "MAID": (partial(MAID, **MODULI, on_uncertified="ignore"), 16),
    # Not longer: its step size grows at the minimum until the point jumps between both sides of it.
    "HOAG": (partial(HOAG, step_scale=0.1, **MODULI, on_uncertified="ignore"), 80),
    "Delta-STN": (
        partial(
            SelfTuner,
            weight_optimizer=partial(torch.optim.SGD, lr=0.03, momentum=0.9),
            hyper_optimizer=partial(torch.optim.Adam, lr=0.03),
            scale=0.1,
            tune_scales=False,
            train_steps=10,
            warmup_steps=200,
        ),
        3000,
    ),
    "STN": (
        partial(
            SelfTuner,
            weight_optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
            hyper_optimizer=partial(torch.optim.SGD, lr=0.1),
            scale=0.1,
            tune_scales=False,
            delta=False,
            train_steps=5,
            warmup_steps=100,
        ),
        900,
    ),
    "TPE": (
        partial(
            OptunaSearch,
            steps_per_trial=50,
            boxes={"strength": (math.exp(-4), math.exp(4), True)},
            weight_optimizer=partial(torch.optim.SGD, lr=0.2),
            seed=0,
        ),
        50 * 15,
    ),
}


# A Delta-STN's slow response takes 3000 steps to settle; test_response_theory has a shorter run to a closed form.
SLOW = {"Delta-STN": pytest.mark.slow}


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, ())) for name in TUNERS])
def test_tuners_agree_with_the_closed_form(name):
    make, steps = TUNERS[name]
    per_example = name.endswith("STN")
    strength = Hyperparameter(1.0, chart="exp", per_example=per_example)
    strength.double()
    model = nn.Linear(COLUMNS, 1, bias=False).double()
    wrapped = nn.Sequential(model)
    problem = BilevelProblem.from_regularizer(wrapped, WeightDecay(strength), squared_error)
    train, validation = data()
    # Perturbations are drawn for each example: more rows with the same moments average them out.
    train = tuple(part.repeat(20, *[1] * (part.ndim - 1)) for part in train) if per_example else train
    tuner = make(problem)
    history = tuner.run([train], [validation], steps)
    tuner.export()  # a search goes back to its best trial
    found = float(strength.raw)
    if per_example:  # it keeps moving: what it moves around counts
        raws = [math.log(info.values["strength"]) for info in history if info.values]
        found = sum(raws[-60:]) / 60
    if name == "TPE":  # a search stops near the flat bottom, not at it
        assert exact_loss(found) < 1.03 * exact_loss(best())
    else:
        assert abs(found - best()) < 0.05


def test_one_unrolled_step_is_short_sighted():
    """Why it is a baseline and no method: it sees what decay does in one step, and not what it does in the end."""
    strength = Hyperparameter(1.0, chart="exp")
    strength.double()
    model = nn.Sequential(nn.Linear(COLUMNS, 1, bias=False).double())
    problem = BilevelProblem.from_regularizer(model, WeightDecay(strength), squared_error)
    train, validation = data()
    OneStepUnrolled(problem, inner_lr=0.1, outer_lr=0.3).run([train], [validation], 300)
    assert torch.isfinite(strength.raw)
    assert abs(float(strength.raw) - best()) > 0.5


def test_random_search_needs_a_box_where_the_range_has_no_end():
    problem = BilevelProblem.from_regularizer(
        nn.Sequential(nn.Linear(COLUMNS, 1)), WeightDecay(Hyperparameter(1.0, chart="exp")), squared_error
    )
    with pytest.raises(ValueError, match="strength"):
        RandomSearch(problem, steps_per_trial=10)
