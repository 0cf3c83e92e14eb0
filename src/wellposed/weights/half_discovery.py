"""What half fine-tuning chooses among: the matrices and norms of every layer, found by their names and sorted by category."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

ATTENTION = frozenset(
    {
        "q_proj", "k_proj", "v_proj", "o_proj", "q", "k", "v", "o", "wq", "wk", "wv", "query", "key", "value",
        "q_lin", "k_lin", "v_lin", "to_q", "to_k", "to_v", "query_proj", "key_proj", "value_proj",
    }
)  # fmt: skip
FEEDFORWARD = frozenset(
    {
        "up_proj", "gate_proj", "down_proj", "up", "gate", "down", "fc1", "fc2", "fc_in", "fc_out", "c_fc", "w1", "w2", "w3",
        "wi", "wi_0", "wi_1", "lin1", "lin2", "linear1", "linear2", "dense_h_to_4h", "dense_4h_to_h",
    }
)  # fmt: skip
BY_PARENT = frozenset({"c_proj", "out_proj", "out_lin", "dense", "proj", "wo", "to_out"})
"""Names that attention and feed-forward layers share: the path decides."""
FUSED_THREE = frozenset({"qkv_proj", "c_attn", "Wqkv", "in_proj", "qkv"})
FUSED_TWO = frozenset(["gate_up_proj"])
FUSED_OTHERWISE = frozenset(["query_key_value"])
"""Fused per head: the three matrices are no contiguous blocks of rows."""
FUSED = FUSED_THREE | FUSED_TWO | FUSED_OTHERWISE
KNOWN = ATTENTION | FEEDFORWARD | BY_PARENT | FUSED
CATEGORIES = ("attention", "feed-forward", "norm")


@dataclass(frozen=True)
class Piece:
    """A parameter, or the rows (columns) `start:stop` of it along `dim`."""

    name: str
    size: int
    dim: int = 0
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Unit:
    """What is frozen or trained as one: a matrix with its bias, a norm, or one matrix of several fused ones.

    Attributes:
        name: path of the module or parameter.
        pieces: its parameters.
        category: "attention", "feed-forward", "norm", "other" inside a layer, "outside" of all layers.
        layer: number of its layer, or -1 outside.
        fused: how many matrices it holds, 1 for a plain one.
    """

    name: str
    pieces: tuple[Piece, ...]
    category: str
    layer: int
    fused: int = 1

    @property
    def size(self) -> int:
        """Number of scalars."""
        return sum(piece.size for piece in self.pieces)


def discover(model: nn.Module, groups: Sequence[Sequence[str]] | None, trainable_always: Collection[str]) -> list[Unit]:
    """Units of a model that may be frozen, in its order: those of the layers, then those outside that are not protected.

    Layers are the elements of every outermost `nn.ModuleList` (or `nn.Sequential`) whose elements all hold attention or
    feed-forward matrices. Parameters that need no gradient already are left out.

    Args:
        model: the model.
        groups: own groups of parameter or module names in place of the discovery: each is a layer's members of one category.
        trainable_always: "embed", "lm_head", "norm_f" for the parts outside of the layers, or parts of parameter names.

    Raises:
        ValueError: if nothing is found, or a name in `groups` is unknown or comes twice.

    Example:
        >>> block = lambda: nn.ModuleDict({"q_proj": nn.Linear(2, 2), "fc1": nn.Linear(2, 2), "ln_1": nn.LayerNorm(2)})
        >>> [(u.name, u.category) for u in discover(nn.ModuleDict({"h": nn.ModuleList([block()])}), None, ())]
        [('h.0.q_proj', 'attention'), ('h.0.fc1', 'feed-forward'), ('h.0.ln_1', 'norm')]
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if groups is not None:
        return _given(model, parameters, groups, trainable_always)
    paths = list(_layer_paths(model))
    if not paths:
        raise ValueError(
            "HalfFineTuning: no layers with matrices of a known name (q_proj, up_proj, fc1, c_attn, ...) were found in "
            f"{type(model).__name__}; name them with groups=[[...], ...]"
        )
    units = _gather(model, parameters, {path: number for number, path in enumerate(paths)})
    return _unprotected(model, units, trainable_always)


def _layer_paths(model: nn.Module) -> Iterator[str]:
    taken: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or any(path.startswith(f"{t}.") for t in taken):
            continue
        if len(module) and all(_has_matrices(element) for element in module):
            taken.append(path)
            yield from (f"{path}.{i}" if path else str(i) for i in range(len(module)))


def _has_matrices(module: nn.Module) -> bool:
    return any(_leaf(name) in KNOWN for name, p in module.named_parameters() if p.ndim >= 2)


def _leaf(name: str) -> str:
    """The name that tells what a parameter is: its own, or that of its module."""
    *path, own = name.split(".")
    stripped = re.sub(r"_?(weight|bias)$", "", own)
    return stripped if stripped in KNOWN or not path else path[-1]


def _unit_path(name: str) -> str:
    """Path under which a matrix and its bias meet."""
    path, _, own = name.rpartition(".")
    stripped = re.sub(r"_?(weight|bias)$", "", own)
    return f"{path}.{stripped}" if stripped in KNOWN and path else path or name


def _gather(model: nn.Module, parameters: dict[str, nn.Parameter], layers: dict[str, int]) -> list[Unit]:
    found: dict[str, list[str]] = {}
    for name in parameters:
        found.setdefault(_unit_path(name), []).append(name)
    inside: list[Unit] = []
    outside: list[Unit] = []
    for path, names in found.items():
        number = next((n for layer, n in layers.items() if path.startswith(f"{layer}.") or path == layer), -1)
        layer = next((layer for layer, n in layers.items() if n == number), "")
        pieces = tuple(Piece(name, parameters[name].numel()) for name in names)
        leaf = _leaf(names[0])
        category = _category(model, path, leaf, path[len(layer) :]) if number >= 0 else "outside"
        fused = 3 if leaf in FUSED_THREE | FUSED_OTHERWISE else 2 if leaf in FUSED_TWO else 1
        (inside if number >= 0 else outside).append(Unit(path, pieces, category, number, fused))
    return inside + outside


def _category(model: nn.Module, path: str, leaf: str, inner: str) -> str:
    attention = re.search(r"attn|attention", inner.rpartition(".")[0].lower()) is not None
    if leaf == "wo" or leaf in BY_PARENT:
        return "attention" if attention else "feed-forward"
    if leaf in ATTENTION or leaf in FUSED_THREE | FUSED_OTHERWISE:
        return "attention"
    if leaf in FEEDFORWARD | FUSED_TWO:
        return "feed-forward"
    return "norm" if _is_norm(model, path, leaf) else "other"


def _is_norm(model: nn.Module, path: str, leaf: str) -> bool:
    try:
        kind = type(model.get_submodule(path)).__name__
    except AttributeError:  # a parameter of its own
        kind = ""
    return "norm" in f"{kind} {leaf}".lower() or leaf.startswith("ln_")


def _unprotected(model: nn.Module, units: Sequence[Unit], always: Collection[str]) -> list[Unit]:
    """Without the units that train always: by a part of their name (of any name that a tied tensor has), or by their role."""
    aliases: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(p), []).append(name)
    named = dict(model.named_parameters())

    def protected(unit: Unit) -> bool:
        names = [name for piece in unit.pieces for name in aliases[id(named[piece.name])]]
        if any(part in name for part in always for name in names):
            return True
        return unit.category == "outside" and any(_role(model, name) in always for name in names)

    return [unit for unit in units if not protected(unit)]


def _role(model: nn.Module, name: str) -> str:
    path = _unit_path(name)
    lowered = path.lower()
    try:
        module: nn.Module | None = model.get_submodule(path)
    except AttributeError:
        module = None
    if isinstance(module, nn.Embedding) or re.search(r"embed|(^|\.)(wte|wpe)$|position", lowered):
        return "embed"
    return "norm_f" if _is_norm(model, path, path.rpartition(".")[2]) else "lm_head"


def _given(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    groups: Sequence[Sequence[str]],
    always: Collection[str],
) -> list[Unit]:
    units: list[Unit] = []
    seen: dict[str, str] = {}
    for number, group in enumerate(groups):
        for member in group:
            names = [name for name in parameters if name == member or name.startswith(f"{member}.")]
            if not names:
                near = difflib.get_close_matches(member, parameters, n=1)
                raise ValueError(
                    f"HalfFineTuning: groups names {member!r}, which is no parameter or module that trains"
                    + (f"; did you mean {near[0]!r}?" if near else "")
                )
            for name in names:
                if name in seen:
                    raise ValueError(f"HalfFineTuning: groups holds {name!r} twice, in {seen[name]!r} and {member!r}")
                seen[name] = member
            pieces = tuple(Piece(name, parameters[name].numel()) for name in names)
            units.append(Unit(member, pieces, f"group of {len(group)}", number))
    if not units:
        raise ValueError("HalfFineTuning: groups is empty; name at least one parameter, or leave it None")
    return _unprotected(model, units, always)
