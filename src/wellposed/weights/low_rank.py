"""Low-rank adaptation (LoRA): linear layers whose weights stay, with a trained product of two thin matrices beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..batching import unwrap
from ..hyperparameter import refuse_hyperparameter
from ..regularizer import Regularizer

Targets = Sequence[str] | Callable[[str, nn.Module], bool] | None


class LowRankLinear(nn.Module):
    """A frozen linear layer with a low-rank update: `W x + b + scaling * B A dropout(x)` (Hu et al. 2021, arXiv 2106.09685).

    Args:
        base: the layer; its parameters are frozen here.
        rank: rows of A, columns of B; at least 1.
        alpha: `scaling = alpha / rank`; None means rank, a scaling of 1.
        dropout: rate at which inputs of the update are dropped while training, in [0, 1).
        init: `"kaiming"`: A uniform as torch's linear layers, B zero. `"pissa"`: the principal singular directions (Meng et
            al. 2024, arXiv 2404.02948); what they leave of W becomes the frozen weight, so dropout must be 0.
        generator: of A's draw; None uses the global random state.

    Raises:
        TypeError: if base is not an `nn.Linear`.
        ValueError: for a rank, rate or initialisation out of range.

    Attributes:
        lora_A: (rank, in_features).
        lora_B: (out_features, rank).
        scaling: may be set, e.g. to interpolate between the base (0) and the adapted layer.

    Example:
        >>> base = nn.Linear(3, 2)
        >>> layer, x = LowRankLinear(base, rank=1), torch.randn(4, 3)
        >>> torch.equal(layer(x), base(x))
        True
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        init: str = "kaiming",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _check(base, rank, alpha, dropout, init)
        self.base = base.requires_grad_(False)
        self.rank, self.dropout = rank, dropout
        self.scaling = (rank if alpha is None else alpha) / rank
        weight = base.weight.detach()
        if init == "pissa":
            a, b = principal_factors(weight, rank, self.scaling)
            with torch.no_grad():
                base.weight -= self.scaling * (b @ a)
        else:
            bound = 1.0 / math.sqrt(base.in_features)  # Kaiming-uniform with a = sqrt(5)
            a = weight.new_empty(rank, base.in_features).uniform_(-bound, bound, generator=generator)
            b = weight.new_zeros(base.out_features, rank)
        self.lora_A, self.lora_B = nn.Parameter(a), nn.Parameter(b)

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        moved = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return self.base(x) + F.linear(F.linear(moved, self.lora_A), self.lora_B) * self.scaling

    def merged(self) -> nn.Linear:
        """A plain layer with the weight `W + scaling * B A`; this one stays as it is."""
        base = self.base
        layer = nn.utils.skip_init(
            nn.Linear, base.in_features, base.out_features, bias=base.bias is not None,
            device=base.weight.device, dtype=base.weight.dtype,
        )  # fmt: skip
        with torch.no_grad():
            layer.weight.copy_(base.weight + self.scaling * (self.lora_B @ self.lora_A))
            if base.bias is not None:
                layer.bias.copy_(base.bias)
        return layer

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout:g}"


def principal_factors(
    weight: Float[Tensor, "outputs inputs"], rank: int, scaling: float = 1.0
) -> tuple[Float[Tensor, "rank inputs"], Float[Tensor, "outputs rank"]]:
    """A and B with `scaling * B A` the best approximation of `weight` of this rank, its singular values shared evenly.

    Example:
        >>> a, b = principal_factors(torch.diag(torch.tensor([3.0, 1.0])), rank=1)
        >>> torch.allclose(b @ a, torch.diag(torch.tensor([3.0, 0.0])), atol=1e-6)
        True
    """
    low = weight.dtype in (torch.float16, torch.bfloat16)
    u, s, vh = torch.linalg.svd(weight.float() if low else weight, full_matrices=False)
    root = (s[:rank] / scaling).sqrt()
    return (root[:, None] * vh[:rank]).to(weight.dtype), (u[:, :rank] * root).to(weight.dtype)


def add_low_rank(
    model: nn.Module,
    rank: int,
    alpha: float | None = None,
    targets: Targets = None,
    dropout: float = 0.0,
    init: str = "kaiming",
    generator: torch.Generator | None = None,
) -> list[str]:
    """Replace linear layers of a model by `LowRankLinear`, in place, and freeze every other parameter.

    Args:
        model: the model; it must not be a linear layer itself.
        rank, alpha, dropout, init, generator: see `LowRankLinear`.
        targets: which layers: None for every `nn.Linear`; name endings such as `["q_proj", "v_proj"]`; or a predicate
            `(name, module) -> bool`.

    Returns:
        Names of the layers replaced, in the model's order.

    Raises:
        ValueError: if a name ending matches no linear layer, if nothing is left to adapt, if a layer belongs to an
            `nn.MultiheadAttention`, or if the model holds low-rank layers already.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> add_low_rank(model, rank=2)
        ['0', '2']
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['0.lora_A', '0.lora_B', '2.lora_A', '2.lora_B']
    """
    if any(isinstance(part, LowRankLinear) for part in model.modules()):
        raise ValueError("add_low_rank: model holds low-rank layers already; merge them first (merge_low_rank)")
    if isinstance(model, nn.Linear):
        raise ValueError("add_low_rank: model is a single nn.Linear, which cannot be replaced inside itself; wrap it")
    chosen = [(n, part) for n, part in model.named_modules(remove_duplicate=False) if isinstance(part, nn.Linear)]
    chosen = _matching(chosen, targets)
    _refuse_attention(model, chosen)
    model.requires_grad_(False)
    shared: dict[int, LowRankLinear] = {}
    for name, part in chosen:
        parent, _, leaf = name.rpartition(".")
        if id(part) not in shared:
            shared[id(part)] = LowRankLinear(part, rank, alpha, dropout, init, generator).train(part.training)
        setattr(model.get_submodule(parent), leaf, shared[id(part)])
    return [name for name, _ in chosen]


def merge_low_rank(model: nn.Module) -> nn.Module:
    """Fold every `LowRankLinear` of a model into a plain linear layer, in place; returns the model.

    Raises:
        ValueError: if the model holds none (it was merged before, or never adapted).

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        >>> _ = add_low_rank(model, rank=2)
        >>> type(merge_low_rank(model)[0]).__name__
        'Linear'
    """
    found = [
        (name, part) for name, part in model.named_modules(remove_duplicate=False) if isinstance(part, LowRankLinear)
    ]
    if not found:
        raise ValueError("merge_low_rank: model holds no low-rank layer; it was merged before, or never adapted")
    merged: dict[int, nn.Linear] = {}
    for name, part in found:
        if not name:
            return part.merged()
        parent, _, leaf = name.rpartition(".")
        if id(part) not in merged:
            merged[id(part)] = part.merged().train(part.training)
        setattr(model.get_submodule(parent), leaf, merged[id(part)])
    return model


class LowRankAdaptation(Regularizer):
    """LoRA as a method: `attach` adds low-rank layers and freezes the rest, `finish` merges them.

    For transformers models PEFT offers more (`wellposed` methods run under its adapters, see docs/integrations.md); this
    one works on any module, and merges when training ends.

    Args:
        rank, alpha, targets, dropout, init: see `add_low_rank`.
        trainable: name endings of parameters that train as well, such as `["head.weight", "head.bias"]`.
        seed: of the initialisation.

    Raises:
        ValueError: as `add_low_rank`, or if an ending in `trainable` matches nothing.
        TypeError: if rank, alpha or dropout is a `Hyperparameter`.

    Example:
        >>> from wellposed import fit
        >>> data = torch.utils.data.TensorDataset(torch.randn(32, 3), torch.arange(32) % 2)
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> fit(model, data, epochs=1, regularizer=LowRankAdaptation(rank=2)).model[0]
        Linear(in_features=3, out_features=8, bias=True)
    """

    def __init__(
        self,
        rank: int = 8,
        alpha: float | None = None,
        targets: Targets = None,
        dropout: float = 0.0,
        init: str = "kaiming",
        trainable: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        super().__init__()
        reason = "it is set when the adapter is built, so that no tuner can learn it; search it"
        for name, value in {"rank": rank, "alpha": alpha, "dropout": dropout}.items():
            refuse_hyperparameter("LowRankAdaptation", name, value, reason)
        if not (isinstance(rank, int) and rank >= 1):
            raise ValueError(f"LowRankAdaptation: rank must be an integer of at least 1, got {rank!r}")
        self.rank, self.alpha, self.targets, self.dropout = rank, alpha, targets, dropout
        self.init, self.trainable, self.seed = init, tuple(trainable), seed

    def attach(self, model: nn.Module) -> nn.Module:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        generator = torch.Generator(device).manual_seed(self.seed)
        names = [name for name, _ in model.named_parameters()]
        for ending in self.trainable:
            if not any(_ends(name, ending) for name in names):
                raise ValueError(f"LowRankAdaptation: trainable names {ending!r}, which no parameter's name ends with")
        add_low_rank(model, self.rank, self.alpha, self.targets, self.dropout, self.init, generator)
        for name, parameter in model.named_parameters():
            if any(_ends(name, ending) for ending in self.trainable):
                parameter.requires_grad_(True)
        return model

    def finish(self, model: nn.Module) -> nn.Module:
        return merge_low_rank(unwrap(model))


def _matching(layers: list[tuple[str, nn.Linear]], targets: Targets) -> list[tuple[str, nn.Linear]]:
    if callable(targets):
        chosen = [(name, part) for name, part in layers if targets(name, part)]
    elif targets is None:
        chosen = layers
    else:
        for ending in targets:
            if not any(_ends(name, ending) for name, _ in layers):
                known = sorted({name.rpartition(".")[2] for name, _ in layers})
                raise ValueError(f"add_low_rank: targets names {ending!r}, but the linear layers end in {known}")
        chosen = [(name, part) for name, part in layers if any(_ends(name, ending) for ending in targets)]
    if not chosen:
        raise ValueError("add_low_rank: targets leaves no linear layer to adapt")
    return chosen


def _refuse_attention(model: nn.Module, chosen: list[tuple[str, nn.Linear]]) -> None:
    """Torch's attention reads the weight of its output projection itself: a layer in its place would not be called."""
    owners = {name for name, part in model.named_modules() if isinstance(part, nn.MultiheadAttention)}
    for name, _ in chosen:
        if name.rpartition(".")[0] in owners:
            raise ValueError(
                f"add_low_rank: targets takes {name!r}, whose weight nn.MultiheadAttention reads itself; call "
                "wellposed.weights.split_attention(model) first, or leave it out of targets"
            )


def _ends(name: str, ending: str) -> bool:
    """Whether a dotted name ends in `ending`, at a dot."""
    return name == ending or name.endswith("." + ending)


def _check(base: nn.Module, rank: int, alpha: float | None, dropout: float, init: str) -> None:
    if not isinstance(base, nn.Linear):
        raise TypeError(f"LowRankLinear: base must be an nn.Linear, got {type(base).__name__}")
    largest = min(base.in_features, base.out_features)
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"LowRankLinear: rank must be an integer of at least 1, got {rank!r}")
    if alpha is not None and not alpha > 0:
        raise ValueError(f"LowRankLinear: alpha must be positive, got {alpha}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"LowRankLinear: dropout must lie in [0, 1), got {dropout}")
    if init not in ("kaiming", "pissa"):
        raise ValueError(f"LowRankLinear: init must be 'kaiming' or 'pissa', got {init!r}")
    if init == "pissa" and dropout:
        raise ValueError(
            f"LowRankLinear: dropout must be 0 with init='pissa', got {dropout}: the weight was split, and a dropped "
            "update would not give it back"
        )
    if init == "pissa" and rank > largest:
        raise ValueError(f"LowRankLinear: rank must be at most {largest} with init='pissa', got {rank}")
