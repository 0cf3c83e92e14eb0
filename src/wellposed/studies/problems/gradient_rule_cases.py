"""Exact cases of the rules that steer by sharpness: what holds for every network, or for every quadratic."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...fit import fit
from ...gradients.gradient_rules import RULES, Rule, agreement, regularized_gradient
from ...gradients.sharpness_steering import RegularizedGradient
from ...indexed_dataset import TensorLoader
from ...lab.study import Case

DRAWS = 20
NEAR = 1e-4


def identity_cases() -> list[Case]:
    """All cases: (a) convex quadratics, (b) an independent SAM, (c) the gradient-norm penalty, (d) rho = 0."""
    return [*convex_cases(), *sam_cases(), *penalty_cases(), *plain_cases()]


def convex_cases() -> list[Case]:
    """On `0.5 w' H w` with H >= 0 the two gradients never conflict, and `project` returns g bit for bit."""
    cases = []
    for draw in range(DRAWS):
        generator = torch.Generator().manual_seed(draw)
        root = torch.randn(6, 4 + draw % 3, generator=generator, dtype=torch.float64)
        hessian, w = root @ root.T, torch.randn(6, generator=generator, dtype=torch.float64)
        g = hessian @ w
        sharp = hessian @ (w + 0.5 * g / g.norm())
        made = regularized_gradient([g], [sharp], "project", 1.0)[0]
        dot = float(agreement([g], [sharp]).dot)
        changed = 0.0 if torch.equal(made, g) else float((made - g).abs().max()) or 1.0
        cases.append(Case(f"convex quadratic, draw {draw}: project minus g", changed, 0.0))
        cases.append(Case(f"convex quadratic, draw {draw}: <g, s> at most 0", max(0.0, -dot) + (dot == 0), 0.0))
    return cases


def _data(draw: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(draw)
    x = torch.randn(24, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (24,), generator=generator)


def _network(draw: int, *, noisy: bool = False) -> nn.Sequential:
    with torch.random.fork_rng([]):
        torch.manual_seed(draw)
        middle = [nn.BatchNorm1d(8), nn.Dropout(0.5)] if noisy else []
        return nn.Sequential(nn.Linear(5, 8), *middle, nn.Tanh(), nn.Linear(8, 3)).double()


def _trained(draw: int, method: RegularizedGradient | None, *, noisy: bool = False) -> list[Tensor]:
    x, y = _data(draw)
    loader = TensorLoader(x, y, batch_size=6, shuffle=True, seed=draw)
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    model = fit(_network(draw, noisy=noisy), loader, epochs=5, regularizer=method, optimizer=optimizer, seed=draw).model
    return [value.detach() for value in model.state_dict().values()]


def sharpness_aware(draw: int, rho: float) -> list[Tensor]:
    """Twenty steps of SAM in plain torch, written apart from the library's."""
    x, y = _data(draw)
    model = _network(draw)
    weights = list(model.parameters())
    momentum = [torch.zeros_like(w) for w in weights]
    for batch in (b for epoch in range(5) for b in _batches(x, y, draw, epoch)):
        first = torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), weights)
        length = torch.cat([g.reshape(-1) for g in first]).norm()
        home = [w.detach().clone() for w in weights]
        with torch.no_grad():
            for w, g in zip(weights, first, strict=True):
                w.add_(g, alpha=float(rho / (length + 1e-12)))
        second = torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), weights)
        with torch.no_grad():
            for w, old, m, g in zip(weights, home, momentum, second, strict=True):
                m.mul_(0.9).add_(g)
                w.copy_(old - 0.1 * m)
    return [w.detach() for w in weights]


def _batches(x: Tensor, y: Tensor, draw: int, epoch: int) -> list[tuple[Tensor, Tensor]]:
    loader = TensorLoader(x, y, batch_size=6, shuffle=True, seed=draw)
    loader.set_epoch(epoch)
    return [(batch.inputs, batch.targets) for batch in loader]


def sam_cases() -> list[Case]:
    """`mix` with lam = 1, and `sam`, follow an independent SAM for twenty steps."""
    rules: tuple[Rule, ...] = ("mix", "sam")
    return [
        Case(f"20 steps, draw {draw}: {rule} against SAM", _distance(found, sharpness_aware(draw, 0.2)), 1e-10)
        for draw in range(3)
        for rule in rules
        for found in [_trained(draw, RegularizedGradient(rho=0.2, rule=rule, lam=1.0))]
    ]


def penalty_cases() -> list[Case]:
    """`(mix - g) / (lam rho)` tends to `H g / |g|`, the gradient of |g|: relative error, and its slope in rho."""
    cases = []
    for draw in range(3):
        x, y = _data(draw)
        model = _network(draw)
        weights = list(model.parameters())
        g = torch.autograd.grad(F.cross_entropy(model(x), y), weights, create_graph=True)
        norm = torch.cat([part.reshape(-1) for part in g]).norm()
        truth = torch.autograd.grad(norm, weights)
        g = tuple(part.detach() for part in g)

        def error(rho: float, model=model, x=x, y=y, weights=weights, g=g, truth=truth, norm=norm) -> float:  # type: ignore[no-untyped-def]
            moved = {
                name: w.detach() + rho * part / norm.detach()
                for (name, w), part in zip(model.named_parameters(), g, strict=True)
            }
            leaves = [value.requires_grad_() for value in moved.values()]
            loss = F.cross_entropy(torch.func.functional_call(model, moved, (x,)), y)
            sharp = torch.autograd.grad(loss, leaves)
            mixed = regularized_gradient(list(g), list(sharp), "mix", 0.5)
            slopes = [(m - part) / (0.5 * rho) for m, part in zip(mixed, g, strict=True)]
            return _distance(slopes, list(truth), relative=True)

        cases.append(Case(f"gradient-norm penalty, draw {draw}, rho = 1e-6", error(1e-6), NEAR))
        ratio = error(2e-3) / error(1e-3)
        cases.append(Case(f"gradient-norm penalty, draw {draw}: halving rho halves the error", abs(ratio - 2), 0.2))
    return cases


def plain_cases() -> list[Case]:
    """With rho = 0 every rule is plain training, bit for bit, with batch norm and dropout; the first three also forced."""
    plain = _trained(0, None, noisy=True)
    forced = {"project": True, "mix": True, "sam": True}
    cases = []
    for rule in RULES:
        for force in (False, True) if rule in forced else (False,):
            method = RegularizedGradient(rho=0.0, rule=rule, lam=0.7, force_second_pass=force)  # type: ignore[arg-type]
            found = _trained(0, method, noisy=True)
            same = all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
            name = f"rho = 0{', second pass forced' if force else ''}: {rule} against plain training"
            cases.append(Case(name, 0.0 if same else max(_distance(found, plain), 1e-300), 0.0))
    return cases


def _distance(found: list[Tensor], expected: list[Tensor], *, relative: bool = False) -> float:
    a, b = (torch.cat([part.reshape(-1).double() for part in parts]) for parts in (found, expected))
    return float((a - b).norm() / b.norm()) if relative else float((a - b).abs().max())
