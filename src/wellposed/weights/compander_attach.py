"""Put a weight compander on the convolutional and linear layers of a model."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ..batching import unwrap
from ..hyperparameter import Hyperparameter
from .compander_functions import CompanderFunction
from .compander_module import Compander, check_choice, check_scales

Learnable = Literal["no", "layer", "global"]
Units = Literal["absolute", "deviation"]

WEIGHTED_LAYERS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
"""The layers whose `weight` is companded unless told otherwise: convolutions and linear layers."""

CLIPPED_SHARE = 0.95
"""To this share of the bound `out_of_range="clip"` clips."""

# They hand their weights to fused kernels, flattened or by name, past the parametrization.
_FUSED = (nn.RNNBase, nn.MultiheadAttention)


@dataclass(frozen=True)
class _Site:
    """One tensor to compand, and every layer that uses it: (name, module, tensor)."""

    weight: Tensor
    users: tuple[tuple[str, nn.Module, str], ...]
    unit: float

    @property
    def name(self) -> str:
        return self.users[0][0]


def apply_compander(
    model: nn.Module,
    a: float | Hyperparameter = 0.7,
    b: float | Hyperparameter = 0.7,
    *,
    fn: CompanderFunction = "arctan",
    learnable: Learnable = "no",
    log_space: bool = False,
    units: Units = "absolute",
    out_of_range: Literal["raise", "clip"] = "raise",
    types: tuple[type[nn.Module], ...] = WEIGHTED_LAYERS,
    skip: Collection[str] = (),
    stack: bool = False,
) -> list[str]:
    """Weight compander, WC (arXiv 2306.16993): let `w = a f(v / b)` and train v, in place, before the optimizer is built.

    The weights, and so the network, stay what they are (eq. 4). Biases, norms and embeddings are left alone, so are
    tensors that do not train. A tensor that layers share is companded once for all of them. The parameters keep their
    identity.

    Args:
        model: any module.
        a: height, > 0; arctan bounds |w| by `a pi / 2`. A number, or a `Hyperparameter` that a tuner learns.
        b: width, > 0; near zero dw/dv is `a / b`, which acts as a learning rate larger by `(a / b)^2`.
        fn: see `compand`.
        learnable: "layer" lets the training optimizer learn one pair (a, b) a layer ("fine", which the paper
            recommends, from a = 0.5, b = 1.0), "global" one for the network ("coarse").
        log_space: learn the logarithms, so that a and b stay positive; the paper learns them as they are.
        units: "deviation" takes a and b in standard deviations of each layer's present weights: a of 2 to 4 is where
            the bound is felt, while the paper's a >= 0.5 mostly rescales the learning rate.
        out_of_range: what to do with weights that no v reaches: "raise", or "clip" them to 0.95 of the bound with a
            warning, which changes the network.
        types: layers whose `weight` is companded.
        skip: names of modules (with all inside them) or of weights to leave alone.
        stack: put the compander on top of parametrizations that a weight already has.

    Returns:
        Names of the companded weights.

    Raises:
        ValueError: for an argument out of range; for a weight out of range, naming layer, max |w| and bound; for a
            weight that is already parametrized; if there is nothing to compand. The model is left as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> apply_compander(model, a=0.7, b=0.7)
        ['0.weight', '2.weight']
        >>> [name for name, _ in model.named_parameters()][:2]
        ['0.bias', '0.parametrizations.weight.original']
    """
    check_scales("apply_compander", a, b, fn, learnable != "no")
    check_options("apply_compander", learnable, units, out_of_range)
    network = unwrap(model)
    sites = _sites(network, types, skip, stack, units)

    def make(site: _Site) -> Compander:
        made = Compander(a, b, fn, learnable=learnable != "no", log_space=log_space, unit=site.unit)
        # Scales never in half precision, whatever the weights are in.
        return made.to(site.weight.device, torch.promote_types(site.weight.dtype, torch.float32))

    shared = make(sites[0]) if learnable == "global" else None
    companders = [shared or make(site) for site in sites]
    _fit_into_range(sites, companders, out_of_range)
    for site, compander in zip(sites, companders, strict=True):
        _register(site, compander)
    return [site.name for site in sites]


def check_options(owner: str, learnable: Any, units: Any, out_of_range: Any) -> None:
    """Check the words that `apply_compander` takes.

    Raises:
        ValueError: naming owner, argument, value and what is allowed.
    """
    check_choice(owner, "learnable", learnable, ("no", "layer", "global"))
    check_choice(owner, "units", units, ("absolute", "deviation"))
    check_choice(owner, "out_of_range", out_of_range, ("raise", "clip"))
    if learnable == "global" and units == "deviation":
        raise ValueError(f"{owner}: units='deviation' differ by layer, which learnable='global' cannot share")


def _sites(
    network: nn.Module, types: tuple[type[nn.Module], ...], skip: Collection[str], stack: bool, units: Units
) -> list[_Site]:
    modules = dict(network.named_modules())
    _check_skip(skip, modules)
    fused: dict[str, nn.Module] = {
        n: module for n, module in modules.items() if isinstance(module, _FUSED) and not _inside(n, skip)
    }
    sites: list[_Site] = []
    seen: set[int] = set()
    for path, module in modules.items():
        name = f"{path}.weight" if path else "weight"
        if not isinstance(module, types) or _inside(name, skip) or any(_inside(path, [f]) for f in fused):
            continue
        weight = _trainable_weight(module, name, stack)
        if weight is None or id(weight) in seen:
            continue
        seen.add(id(weight))
        first = (name, module, "weight")
        users = (first, *(user for user in _users(network, weight) if user != first))
        if any(isinstance(user, _FUSED) for _, user, _ in users):
            fused[name] = module
            continue
        if any(getattr(user, "sparse", False) for _, user, _ in users):
            raise ValueError(
                f"apply_compander: {name!r} has sparse gradients; pass sparse=False to the layer, or skip it"
            )
        unit = float(weight.detach().float().std(correction=0)) if units == "deviation" else 1.0
        if not unit > 0:
            raise ValueError(f"apply_compander: {name!r} has equal weights, so that units='deviation' are 0; skip it")
        sites.append(_Site(weight, users, unit))
    if fused:
        names = ", ".join(f"{name!r} ({type(module).__name__})" for name, module in fused.items())
        warnings.warn(
            f"apply_compander: left plain, as their weights go to fused kernels: {names}; list them in skip",
            stacklevel=3,
        )
    if not sites:
        kinds = [kind.__name__ for kind in types]
        raise ValueError(f"apply_compander: the model has no layer to compand that trains; types = {kinds}")
    return sites


def _trainable_weight(module: nn.Module, name: str, stack: bool) -> Tensor | None:
    if parametrize.is_parametrized(module, "weight"):
        if not stack:
            raise ValueError(
                f"apply_compander: {name!r} is already parametrized; skip it, or pass stack=True to compand the result"
            )
        return getattr(module, "weight").detach()  # noqa: B009
    weight = module._parameters.get("weight")
    if weight is None:
        raise ValueError(
            f"apply_compander: {name!r} is no parameter (an old-style weight_norm?); use its parametrization, or skip it"
        )
    if is_lazy(weight):
        raise ValueError(f"apply_compander: {name!r} has no shape yet; call the lazy module once first")
    return weight if weight.requires_grad and weight.is_floating_point() else None


def _users(network: nn.Module, weight: Tensor) -> tuple[tuple[str, nn.Module, str], ...]:
    """Every (name, module, tensor) that holds this very parameter."""
    return tuple(
        (f"{path}.{tensor}" if path else tensor, module, tensor)
        for path, module in network.named_modules()
        for tensor, parameter in module._parameters.items()
        if parameter is weight
    )


def _fit_into_range(sites: list[_Site], companders: list[Compander], out_of_range: str) -> None:
    """Check all layers before any is touched; clip where that is wanted and possible."""
    refusals = [compander.refusal(site.weight) for site, compander in zip(sites, companders, strict=True)]
    refused = [entry for entry in zip(sites, companders, refusals, strict=True) if entry[2]]
    for site, compander, problem in refused:
        clippable = math.isfinite(compander.bound) and isinstance(site.weight, nn.Parameter)
        if out_of_range == "raise" and clippable:
            problem += "; raise a, skip the layer, or pass out_of_range='clip', which changes the network"
        if out_of_range == "raise" or not clippable or not bool(torch.isfinite(site.weight).all()):
            raise ValueError(f"apply_compander: {site.name!r}: {problem}")
    for site, compander, problem in refused:
        limit = CLIPPED_SHARE * compander.bound
        count = int((site.weight.abs() > limit).sum())
        warnings.warn(
            f"apply_compander: {site.name!r}: {problem}; clipped {count} of {site.weight.numel()} weights to {limit:g}, "
            "which changes the network",
            stacklevel=3,
        )
        with torch.no_grad():
            site.weight.clamp_(-limit, limit)


def _register(site: _Site, compander: Compander) -> None:
    first = site.users[0]
    stacked = parametrize.is_parametrized(first[1], first[2])
    plain = site.weight.detach().clone()
    parametrize.register_parametrization(first[1], first[2], compander)
    if stacked:
        # Assigning runs all inverses, so that the network stays what it is, where the others have one.
        with torch.no_grad():
            setattr(first[1], first[2], plain)
            moved = float((getattr(first[1], first[2]) - plain).abs().max())
        if moved > 1e-3 * float(plain.abs().max()):
            warnings.warn(
                f"apply_compander: {site.name!r}: the parametrizations below the compander have no exact inverse; its "
                f"weights moved by up to {moved:g}",
                stacklevel=3,
            )
        return
    original = first[1].parametrizations[first[2]].original  # type: ignore[union-attr, index]
    for _, module, tensor in site.users[1:]:
        # A plain copy first: the shared parameter holds v by now, and its inverse must not be taken again.
        module._parameters[tensor] = nn.Parameter(plain.clone())
        parametrize.register_parametrization(module, tensor, compander)
        module.parametrizations[tensor].original = original  # type: ignore[union-attr, index]


def _inside(name: str, groups: Iterable[str]) -> bool:
    return any(name == group or name.startswith(f"{group}.") for group in groups)


def _check_skip(skip: Collection[str], modules: Mapping[str, nn.Module]) -> None:
    known = {name for name in modules if name}
    known |= {f"{path}.{n}" if path else n for path, m in modules.items() for n in m._parameters}
    for name in skip:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"apply_compander: skip names {name!r}, which the model does not have{hint}")
