"""Turning a network into one that responds to hyperparameters, and back into a plain one."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..batching import unwrap
from ..hyperparameter import Hyperparameter
from . import response_norms as norms
from .linearization import Linearization
from .response_input import ResponseState
from .response_layers import (
    Response,
    ResponseConv1d,
    ResponseConv2d,
    ResponseConv3d,
    ResponseEmbedding,
    ResponseLayer,
    ResponseLinear,
)
from .response_lstm import LSTMResponse, ResponseLSTM

RESPONSE_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: ResponseLinear,
    nn.Conv1d: ResponseConv1d,
    nn.Conv2d: ResponseConv2d,
    nn.Conv3d: ResponseConv3d,
    nn.Embedding: ResponseEmbedding,
    nn.LSTM: ResponseLSTM,
    nn.BatchNorm1d: norms.ResponseBatchNorm1d,
    nn.BatchNorm2d: norms.ResponseBatchNorm2d,
    nn.BatchNorm3d: norms.ResponseBatchNorm3d,
    nn.InstanceNorm1d: norms.ResponseInstanceNorm1d,
    nn.InstanceNorm2d: norms.ResponseInstanceNorm2d,
    nn.InstanceNorm3d: norms.ResponseInstanceNorm3d,
    nn.GroupNorm: norms.ResponseGroupNorm,
    nn.LayerNorm: norms.ResponseLayerNorm,
    nn.RMSNorm: norms.ResponseRMSNorm,
}
"""What `convert` knows, and what it makes of it."""

_READS_ITS_CHILDREN = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Modules that use the weights of their children without calling them: a converted child would be passed over."""


def convert(
    model: nn.Module,
    hypers: Mapping[str, Hyperparameter] | int,
    exclude: Collection[str] = (),
    strict: bool = True,
    *,
    delta: bool = True,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Let a network respond to hyperparameters: W(k) = W0 + diag(V k) W1 in every layer (arXiv 1903.03088, section 3.2).

    In place: layers change their class, keep their names, weights (W0, b0), hooks and parametrizations, and get a child
    `response`. About twice the parameters. Converted are linear, convolutional and embedding layers, LSTMs, and the
    gain and bias of normalisations. Left plain: frozen layers, `exclude`, and a linear layer whose weight is that of an
    embedding.

    Args:
        model: the network, after all methods are attached.
        hypers: the hyperparameters by name, or the number of their values.
        exclude: names of modules that stay plain, with all below them.
        strict: refuse a module with parameters of its own that `convert` does not know; else it stays plain.
        delta: for a Delta-STN (V and C start at 0, the response is zero at the present hyperparameters); else an STN.
        generator: of the initial numbers; seed 0 by default.

    Returns:
        The same model.

    Raises:
        ValueError: naming the module that is unknown, excluded but absent, or converted already; or if none is left to
            convert.

    Example:
        >>> model = convert(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), 1)
        >>> before = model(torch.ones(1, 3))
        >>> with response_state(model).at(torch.ones(1, 1)):
        ...     bool((model(torch.ones(1, 3)) == before).all())  # V and C are still 0
        True
    """
    root = unwrap(model)
    size = hypers if isinstance(hypers, int) else sum(h.raw.numel() for h in hypers.values())
    found = _to_convert(root, exclude, strict)
    state = ResponseState(size, centred=delta)
    reference = next(root.parameters())
    state.to(reference.device, reference.dtype)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    for name, layer in found:
        _convert_layer(layer, state, name, generator)
    hooks = Linearization(state)
    root.register_forward_pre_hook(hooks.begin)
    root.register_forward_hook(hooks.end, always_call=True)
    return model


def response_state(model: nn.Module) -> ResponseState:
    """The state that the response layers of a network share.

    Raises:
        ValueError: if the network has none.
    """
    for module in unwrap(model).modules():
        if isinstance(module, ResponseState):
            return module
    raise ValueError("response_state: the model has no response layer; convert it first (wellposed.tuning.convert)")


def is_converted(model: nn.Module) -> bool:
    """Whether a network has response layers."""
    return any(isinstance(module, ResponseLayer) for module in unwrap(model).modules())


def response_parameters(model: nn.Module) -> list[str]:
    """Names of the response parameters of a network: W1, b1, V, C; all others are its weights.

    Example:
        >>> response_parameters(convert(nn.Linear(3, 4), 1))
        ['response.weight', 'response.scale', 'response.bias', 'response.bias_scale']
    """
    found: list[str] = []
    for name, module in unwrap(model).named_modules():
        if isinstance(module, ResponseLayer):
            prefix = f"{name}.response." if name else "response."
            found += [f"{prefix}{inner}" for inner, _ in module.response.named_parameters()]
    return found


@torch.no_grad()
def collapse(model: nn.Module, k: Tensor | None = None) -> nn.Module:
    """Undo `convert`, in place: the plain network with the weights W0 + diag(V k) W1 at one response input.

    Args:
        model: a converted network; a plain one is returned as it is.
        k: (n,); the one at rest by default: of a Delta-STN zero, which leaves its weights bit for bit.

    Returns:
        The same model.

    Example:
        >>> model = collapse(convert(nn.Linear(3, 4), 1))
        >>> type(model), [name for name, _ in model.named_parameters()]
        (<class 'torch.nn.modules.linear.Linear'>, ['weight', 'bias'])
    """
    root = unwrap(model)
    if not is_converted(root):
        return model
    state = response_state(root)
    if k is None:
        k = None if state.centred else state.rest
    shared = _shared_tensors(root)
    for module in list(root.modules()):
        if isinstance(module, ResponseLayer):
            _collapse_layer(module, k, shared)
    for hooks in (root._forward_pre_hooks, root._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Linearization)]:
            del hooks[key]
            root._forward_hooks_always_called.pop(key, None)
    return model


def _to_convert(root: nn.Module, exclude: Collection[str], strict: bool) -> list[tuple[str, nn.Module]]:
    names = dict(root.named_modules())
    for name in exclude:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
            raise ValueError(
                f"convert: exclude names {name!r}, which the model does not have; did you mean {near[0]!r}?"
            )
    tied = {id(m.weight) for m in names.values() if isinstance(m, nn.Embedding)}
    seen: set[int] = set()
    skipped = [f"{name}." if name else "" for name in exclude]
    found: list[tuple[str, nn.Module]] = []
    for name, module in names.items():
        if name in exclude or any(name.startswith(prefix) for prefix in skipped):
            continue
        if isinstance(module, ResponseLayer):
            raise ValueError(f"convert: the module {name!r} is a response layer already; collapse the model first")
        kind = plain_class(module)
        opaque = isinstance(module, _READS_ITS_CHILDREN)
        own = [p for p in _own_tensors(module) if p.requires_grad]
        if opaque or (own and kind is None):
            if not any(p.requires_grad for p in module.parameters()):
                continue
            if strict and not _is_container_of_parametrizations(module):
                raise ValueError(
                    f"convert: the module {name or 'model'!r} ({type(module).__name__}) has parameters, but no known "
                    f"response; exclude={{{name!r}}} leaves it plain, strict=False all that are unknown. Known: "
                    f"{', '.join(sorted(c.__name__ for c in RESPONSE_CLASSES))}"
                )
            skipped.append(f"{name}." if name else "")
            continue
        if kind is None or not own:
            continue
        if kind is nn.Linear and id(module.weight) in tied:
            continue
        if any(id(p) in seen for p in own):
            continue  # a tensor that two layers share responds in the first
        _check_layer(name, module)
        seen |= {id(p) for p in own}
        found.append((name, module))
    if not found:
        raise ValueError("convert: the model has no layer to convert")
    return found


def plain_class(module: nn.Module) -> type[nn.Module] | None:
    """The class of `RESPONSE_CLASSES` whose forward a module runs, parametrised or not; None for any other."""
    for kind in RESPONSE_CLASSES:
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return kind
    return None


def _own_tensors(module: nn.Module) -> Iterable[Tensor]:
    """Parameters of a module itself, those behind its parametrizations included."""
    yield from (p for p in module._parameters.values() if p is not None)
    if parametrize.is_parametrized(module):
        yield from module.parametrizations.parameters()  # type: ignore[union-attr, operator]


def _is_container_of_parametrizations(module: nn.Module) -> bool:
    return isinstance(module, parametrize.ParametrizationList)


def _check_layer(name: str, module: nn.Module) -> None:
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module.parameters()):
        raise ValueError(f"convert: the module {name!r} has no shape yet; run one batch through the model first")
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        raise ValueError(
            f"convert: the embedding {name!r} rescales its table in place (max_norm), which cannot respond"
        )
    if isinstance(module, nn.LSTM) and module.proj_size:
        raise ValueError(f"convert: the LSTM {name!r} has a projection (proj_size), which has no response; exclude it")


def _convert_layer(layer: Any, state: ResponseState, name: str, generator: torch.Generator) -> None:
    kind = plain_class(layer)
    assert kind is not None
    label = name or type(layer).__name__
    response: nn.Module
    if isinstance(layer, nn.LSTM):
        response = LSTMResponse(state, layer, label, generator)
    elif issubclass(RESPONSE_CLASSES[kind], norms._ResponseNorm):
        response = norms.NormResponse(state, layer.weight, getattr(layer, "bias", None), label, generator)
    elif isinstance(layer, nn.Embedding):
        response = Response(state, layer.weight, None, label, generator, 100.0, columns=True)  # U(-0.1, 0.1)
        if layer.padding_idx is not None:
            with torch.no_grad():
                response.weight[layer.padding_idx] = 0
    else:
        weight: Tensor = layer.weight
        fan_in = weight[0].numel()
        response = Response(state, weight, layer.bias, label, generator, fan_in)
    layer.response = response
    # A parametrised layer has a class of its own, with a property for its weight: the response goes before it.
    plain = type(layer)
    target = RESPONSE_CLASSES[kind]
    if plain is not kind:
        target = type(f"Response{plain.__name__}", (target, plain), {})
    response.plain_class = plain  # type: ignore[assignment]
    layer.__class__ = target


def _shared_tensors(root: nn.Module) -> set[int]:
    """Parameters that more than one module holds."""
    counts: dict[int, int] = {}
    for module in root.modules():
        for p in module._parameters.values():
            if p is not None:
                counts[id(p)] = counts.get(id(p), 0) + 1
    return {key for key, count in counts.items() if count > 1}


def _collapse_layer(layer: Any, k: Tensor | None, shared: set[int]) -> None:
    plain = layer.response.plain_class
    if parametrize.is_parametrized(layer) == (plain in RESPONSE_CLASSES):
        if parametrize.is_parametrized(layer):
            raise ValueError(
                f"collapse: the layer {layer.response.name!r} was parametrised after its conversion; remove that first"
            )
        plain = plain.__bases__[0]  # its parametrizations were removed meanwhile
    values = {} if k is None else layer.collapsed(k)
    layer.__class__ = plain
    del layer.response
    for name, value in values.items():
        parameter = layer._parameters.get(name)
        if parameter is None:
            setattr(layer, name, value)  # a parametrization finds the numbers that make this tensor
        elif id(parameter) in shared:
            # The other owner (a tied decoder) has no response: its weights stay as they are.
            setattr(layer, name, nn.Parameter(value))
        else:
            parameter.copy_(value)
    if isinstance(layer, nn.LSTM):
        layer.flatten_parameters()
