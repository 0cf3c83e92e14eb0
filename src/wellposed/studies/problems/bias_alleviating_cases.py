"""Cases of BA-LoRA's exact claims: it starts at zero, its spectral term may be inert, its diversity term can be gauged away."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...lab.study import Case
from ...losses.adapter_layers import adapter_layers, disabled
from ...losses.adapter_teacher import AdapterTeacher, DisabledAdapterTeacher, FrozenCopyTeacher, InitialAdapterTeacher
from ...losses.logit_consistency import kl_consistency
from ...losses.logit_diversity import logit_covariance
from ...losses.logit_spectrum import spectral_concentration
from ...step import Step
from ...weights.low_rank import add_low_rank

EXACT, SINGLE = 1e-12, 1e-5
MATRICES = 20
DIFFERS = 1e-2
"""The least difference that counts as another model, in units of the logits' own size."""


def small_model(init: str, seed: int, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, Tensor]:
    """A pretrained perceptron, a copy of it with adapters, and inputs.

    Example:
        >>> pretrained, model, x = small_model("pissa", 0, torch.float64)
        >>> bool((pretrained(x) - model(x)).abs().max() < 1e-12)
        True
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        pretrained = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 7)).to(dtype)
        x = torch.randn(20, 12, dtype=dtype)
    model = copy.deepcopy(pretrained)
    add_low_rank(model, 3, init=init, generator=torch.Generator().manual_seed(seed))
    return pretrained, model, x


def zero_start_cases() -> Sequence[Case]:
    """Consistency and its gradient before the first step; teachers against a copy; the adapter switched off under PiSSA."""
    cases = []
    for init in ("kaiming", "pissa"):
        for seed in range(5):
            cases += _value_and_gradient(init, seed)
    for init in ("kaiming", "pissa"):
        cases.append(_teachers_agree(init, seed=0))
    pretrained, model, x = small_model("pissa", 0, torch.float32)
    with torch.no_grad(), disabled(adapter_layers(model)):
        apart = float((model(x) - pretrained(x)).norm() / pretrained(x).norm())
    name = f"PiSSA, adapter disabled: relative difference {apart:.2f} from the pretrained model; 0 if >= {DIFFERS}"
    cases.append(Case(name, 0.0 if apart >= DIFFERS else 1.0, 0.0))
    cases.append(Case("PiSSA: DisabledAdapterTeacher refuses", 0.0 if _refuses(model) else 1.0, 0.0))
    return cases


def _value_and_gradient(init: str, seed: int) -> list[Case]:
    pretrained, model, x = small_model(init, seed, torch.float64)
    logits = model(x)
    with torch.no_grad():
        teacher = pretrained(x)
    value = kl_consistency(logits, teacher).mean()
    value.backward()
    gradient = max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
    return [
        Case(f"{init}, seed {seed}: consistency", abs(float(value.detach())), EXACT),
        Case(f"{init}, seed {seed}: its largest gradient", gradient, EXACT),
    ]


def _teachers_agree(init: str, seed: int) -> Case:
    pretrained, model, x = small_model(init, seed, torch.float32)
    teachers: list[AdapterTeacher] = [InitialAdapterTeacher(), FrozenCopyTeacher(copy.deepcopy(pretrained))]
    for teacher in teachers:
        teacher.attach(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(1.5).add_(0.1)  # as if it had trained
    found = [teacher.logits(Step(model, inputs=x)) for teacher in teachers]
    return Case(
        f"{init}, float32: initial adapter against a frozen copy", float((found[0] - found[1]).abs().max()), SINGLE
    )


def _refuses(model: nn.Module) -> bool:
    try:
        DisabledAdapterTeacher().attach(model)
    except ValueError:
        return True
    return False


def inert_cases() -> Sequence[Case]:
    """Nuclear spectral term of logits with at most k classes: -1, and no gradient."""
    generator = torch.Generator().manual_seed(0)
    cases = []
    for number in range(MATRICES):
        classes, k = (2, 3)[number % 2], (3, 5)[number // 2 % 2]
        z = torch.randn(16, classes, generator=generator, dtype=torch.float64).requires_grad_()
        value = spectral_concentration(z, k)
        (gradient,) = torch.autograd.grad(value, z)
        name = f"matrix {number}, 16 x {classes}, k = {k}"
        cases.append(Case(f"{name}: value + 1", abs(float(value.detach()) + 1.0), EXACT))
        cases.append(Case(f"{name}: largest gradient", float(gradient.abs().max()), EXACT))
    return cases


def gauge_cases() -> Sequence[Case]:
    """Two classes: constants on the rows that take the covariance penalty to 0 and leave every probability as it was."""
    generator = torch.Generator().manual_seed(1)
    cases = []
    for number in range(MATRICES):
        z = torch.randn(16, 2, generator=generator, dtype=torch.float64) * (1 + number % 3)
        moved = z + decorrelating_offsets(z)[:, None]
        name = f"matrix {number} (penalty {float(logit_covariance(z)):.3g} before)"
        cases.append(Case(f"{name}: penalty", float(logit_covariance(moved)), EXACT))
        change = (moved.softmax(1) - z.softmax(1)).abs().max()
        cases.append(Case(f"{name}: largest change of a probability", float(change), EXACT))
    return cases


def decorrelating_offsets(z: Tensor) -> Tensor:
    """One constant a row of (rows, 2) logits, after which both columns are uncorrelated.

    With d = z_1 - z_2 and the mean of a row s the covariance is `Var(s) - Var(d) / 4`; so the rows' means are replaced by
    values uncorrelated with nothing but of that variance: any vector of variance `Var(d) / 4` serves, here d / 2 itself.

    Example:
        >>> z = torch.tensor([[1.0, 2.0], [0.0, 1.0], [3.0, 1.0]])
        >>> float(logit_covariance(z + decorrelating_offsets(z)[:, None]))
        0.0
    """
    return (z[:, 0] - z[:, 1]) / 2 - z.mean(1)
