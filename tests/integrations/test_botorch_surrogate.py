"""The posterior mean of a BoTorch model as a surrogate: the formula of a Gaussian process, gradients, and both searches."""

import pytest
import torch

from wellposed.gradients import best_designs, evolution_search, offline_optimize

pytest.importorskip("botorch")

from wellposed.integrations import botorch_surrogate
from wellposed.integrations.botorch_surrogate import BotorchSurrogate


def bowl(n=60, d=2, seed=0):
    x = 2 * torch.rand(n, d, generator=torch.Generator().manual_seed(seed)) - 1
    return x, 3.0 - 2.0 * (x - 0.3).square().sum(1)


@pytest.fixture(scope="module")
def fitted():
    x, y = bowl()
    return x, y, BotorchSurrogate.fitted(x, y)


def test_the_mean_is_that_of_a_gaussian_process_on_all_designs():
    """Written out from kernel, noise and constant; the kernel was fitted on a part, the mean rests on all."""
    x, y = bowl()
    surrogate = BotorchSurrogate.fitted(x, y, fitted_on=30, seed=1)
    model = surrogate.model
    low, high = x.double().amin(0), x.double().amax(0)
    scaled = (x.double() - low) / (high - low)
    standard = (y.double() - y.double().mean()) / y.double().std()
    new = torch.rand(5, 2, dtype=torch.float64)
    kernel, noise, mean = model.covar_module, model.likelihood.noise, model.mean_module.constant
    gram = kernel(scaled).to_dense() + noise * torch.eye(len(x), dtype=torch.float64)
    weights = torch.linalg.solve(gram, standard - mean)
    expected = mean + kernel((new - low) / (high - low), scaled).to_dense() @ weights
    found = surrogate(new)
    assert found.dtype == torch.float64
    assert torch.allclose(found, expected * y.double().std() + y.double().mean(), atol=1e-6)


def test_it_fits_the_designs_and_has_their_dtype(fitted):
    x, y, surrogate = fitted
    found = surrogate(x)
    assert found.shape == y.shape
    assert found.dtype == x.dtype == torch.float32
    assert (found - y).abs().max() < 0.05


def test_the_gradient_in_the_designs_is_that_of_differences(fitted):
    surrogate = fitted[2]
    at = torch.tensor([[0.1, -0.2], [0.5, 0.4]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(surrogate, (at,), atol=1e-5)


def test_both_searches_find_the_top_of_the_bowl(fitted):
    x, y, surrogate = fitted
    found = offline_optimize(surrogate, best_designs(x, y, 4))
    assert (found - 0.3).abs().max() < 0.05
    assert not surrogate.training
    drawn = evolution_search(surrogate, x.mean(0), population=8, generations=30, keep=8)
    assert (drawn.mean(0) - 0.3).abs().max() < 0.05
    assert not any(p.requires_grad for p in surrogate.parameters())
    assert not surrogate.train().training


def test_more_designs_than_iterative_solvers_start_from_are_solved_exactly():
    x, y = bowl(n=900)
    assert (BotorchSurrogate.fitted(x, y, fitted_on=40)(x) - y).abs().max() < 0.05


def test_bad_input_names_the_argument(fitted):
    x, y, _ = fitted
    with pytest.raises(ValueError, match=r"BotorchSurrogate: x must be \(n, d\) and y \(n,\), got shapes"):
        BotorchSurrogate.fitted(x, y[:-1])
    with pytest.raises(ValueError, match="BotorchSurrogate: fitted_on must be >= 2, got 1 with 60 designs"):
        BotorchSurrogate.fitted(x, y, fitted_on=1)
    with pytest.raises(TypeError, match="BotorchSurrogate: model must be a BoTorch model, got Linear"):
        BotorchSurrogate(torch.nn.Linear(2, 1))
    from botorch.models import SingleTaskGP

    with pytest.raises(ValueError, match="BotorchSurrogate: model must have one outcome, got 2"):
        BotorchSurrogate(SingleTaskGP(x.double(), torch.stack([y, y], 1).double()))


def test_without_botorch_it_says_how_to_get_it(monkeypatch):
    def absent(name, *args):
        raise ImportError(name)

    monkeypatch.setattr(botorch_surrogate, "import_module", absent)
    with pytest.raises(ImportError, match="BoTorch is not installed: pip install botorch"):
        BotorchSurrogate.fitted(*bowl(4))
