"""Compression of the features before the classifier, as a method: insert the mask, choose the prefix, fold it away."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..batching import IGNORE_INDEX, as_batch, call_model, to_device, unwrap
from ..evaluation import predict
from ..hyperparameter import Hyperparameter, check_strength, number_of
from ..pair import Pair
from ..regularizer import Regularizer
from ..step import Step, mode
from .insertion import CONVOLUTION, can_fold, find_module, fold, insert, inserted, last_linear, remove
from .nested_dropout import NestedDropout
from .prefix_evaluation import prefix_accuracy, select_prefix
from .prefix_lengths import Distribution


class FeatureDropout(nn.Module):
    """Inverted dropout whose rate may be a `Hyperparameter`."""

    def __init__(self, p: float | Hyperparameter) -> None:
        super().__init__()
        self.p = p
        self.active = True

    def forward(self, features: Tensor) -> Tensor:
        return nn.functional.dropout(features, number_of(self.p), self.training and self.active)


class FeatureCompression(Regularizer):
    """Compress the features before the classifier, by nested dropout or dropout (arXiv 2206.13140), against label noise.

    `attach` inserts the layer before the model's last linear layer; parameters keep their names. With nested dropout,
    k* is chosen on the validation data after every epoch: the model then predicts from the first k* features. `finish`
    zeroes the classifier's columns behind k* and takes the layer out: a plain model that predicts what prefix k*
    predicted. In a `Pair`, each network gets its layer, both keep the same prefix in a step, and k* is chosen for their
    average.

    In a `Compose`, put it first: early stopping then judges (and restores) each epoch with its own k*.

    Args:
        kind: "nested", or "dropout": inverted dropout of rate `p` on the same features, and on these alone.
        sigma: width of nested dropout's distribution; a float, a `Hyperparameter`, or None for a fifth of the features.
        p: rate of kind="dropout", in [0, 1); a float or a `Hyperparameter`.
        dist, mu, rate, per, rescale, sync: of nested dropout; see `NestedDropout`.
        before: name of the module whose input is compressed, or several names in the order of the forward pass; the
            last `nn.Linear` if None. k* is chosen for the last of them.
        num_features, dim: size and dimension of the features before a module that is neither linear nor a convolution.
        alternate: in each step, mask the input of only one of several modules, drawn with equal chances (the paper's
            VGG training).
        select: how k* is chosen: "best" or "one_se" (see `select_prefix`; the paper's is "best"), or None: not at all.
        length_penalty: for each further feature, of "best".
        ks: prefix lengths to choose among; None takes all where the classifier is the model's last operation, and
            1, 2, 4, ..., K elsewhere, where each length costs a pass over the validation data.
        fold: whether `finish` makes a plain model; False leaves the layer (and k*) in it, for further training.

    Attributes:
        prefix: k* as last chosen, or None.
        accuracies: validation accuracy of each prefix in `lengths`, as last measured.

    Raises:
        ValueError: for an argument out of range, arguments of both kinds, or a model without such a module.

    Note:
        Folding needs a linear layer or an ungrouped convolution that shares its weight with nobody; elsewhere `finish`
        leaves the layer in the model, with its k*. The loop's own `validation_*` metrics of an epoch are measured before k*
        of that epoch is chosen; what methods ask for by `step.validate()` is measured after.

    Example:
        >>> from wellposed import fit
        >>> data = torch.utils.data.TensorDataset(torch.randn(32, 3), torch.arange(32) % 2)
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> method = FeatureCompression(sigma=4.0)
        >>> model = fit(model, data, validation=data, epochs=2, regularizer=method).model
        >>> 1 <= method.prefix <= 8, bool((model[2].weight[:, method.prefix :] == 0).all())
        (True, True)
    """

    def __init__(
        self,
        kind: Literal["nested", "dropout"] = "nested",
        *,
        sigma: float | Hyperparameter | None = None,
        p: float | Hyperparameter | None = None,
        dist: Distribution | Tensor = "gaussian",
        mu: float = 0.0,
        rate: float | None = None,
        per: Literal["batch", "sample"] = "batch",
        rescale: bool = False,
        sync: bool = False,
        before: str | Sequence[str] | None = None,
        num_features: int | None = None,
        dim: int = 1,
        alternate: bool = False,
        select: Literal["best", "one_se"] | None = "best",
        length_penalty: float = 1e-5,
        ks: Sequence[int] | None = None,
        fold: bool = True,
    ) -> None:
        super().__init__()
        owner = "FeatureCompression"
        if kind not in ("nested", "dropout"):
            raise ValueError(f"{owner}: kind must be 'nested' or 'dropout', got {kind!r}")
        if kind == "nested" and p is not None:
            raise ValueError(f"{owner}: p belongs to kind='dropout'; nested dropout and dropout exclude each other")
        gaussian = isinstance(dist, str) and dist == "gaussian"
        if kind == "dropout" and not (sigma is None and rate is None and mu == 0.0 and gaussian):
            raise ValueError(f"{owner}: sigma, dist, mu and rate belong to kind='nested', got kind='dropout'")
        if kind == "dropout":
            p = 0.5 if p is None else p
            check_strength(owner, "p", p, 0.0, 1.0)
            if p == 1:
                raise ValueError(f"{owner}: p must lie in [0, 1), got 1")
        if select not in ("best", "one_se", None):
            raise ValueError(f"{owner}: select must be 'best', 'one_se' or None, got {select!r}")
        names = [before] if isinstance(before, str) else None if before is None else list(before)
        if names == [] or (alternate and (names is None or len(names) < 2)):
            raise ValueError(f"{owner}: before must name a module (at least two with alternate), got {before!r}")
        self.kind, self.sigma, self.p = kind, sigma, p
        self.options: dict[str, Any] = {
            "dist": dist, "mu": mu, "rate": rate, "per": per, "rescale": rescale, "sync": sync,
        }  # fmt: skip
        self.before, self.num_features, self.dim, self.alternate = names, num_features, dim, alternate
        self.select, self.length_penalty, self.ks, self.fold = select, length_penalty, ks, fold
        if kind == "nested":
            NestedDropout(1 if not isinstance(dist, Tensor) else len(dist), sigma, **self.options)  # checks the rest
            if select is not None:
                self.requires = frozenset({"validation"})
        self.prefix: int | None = None
        self.lengths: list[int] = []
        self.accuracies: Tensor | None = None

    def attach(self, model: nn.Module) -> nn.Module:
        for network in _networks(model):
            for name in self.before or [last_linear(network)]:
                head = find_module(network, name)
                layer = self._layer(head)
                earlier = insert(head, layer)
                if isinstance(layer, NestedDropout) and isinstance(earlier, NestedDropout):
                    if earlier.num_features == layer.num_features:
                        layer.eval_k = earlier.eval_k  # a second stage starts from the first one's prefix
        return model

    def _layer(self, head: nn.Module) -> NestedDropout | FeatureDropout:
        if self.kind == "dropout":
            return FeatureDropout(0.0 if self.p is None else self.p)
        if isinstance(head, nn.Linear):
            size, dim = head.in_features, -1
        elif isinstance(head, CONVOLUTION):
            size, dim = head.in_channels, 1
        elif self.num_features is None:
            raise ValueError(
                f"FeatureCompression: before a {type(head).__name__}, num_features must be given, got None"
            )
        else:
            size, dim = self.num_features, self.dim
        return NestedDropout(size, self.sigma, dim=dim, **self.options)

    def on_batch(self, step: Step) -> None:
        if not self.alternate:
            return
        networks = [self._sites(network) for network in _networks(unwrap(step.model))]
        chosen = int(torch.randint(len(networks[0]), (), generator=step.generator))
        for sites in networks:
            for number, site in enumerate(sites):
                site.layer.active = number == chosen

    def on_epoch(self, step: Step) -> None:
        if self.kind == "dropout":
            return
        networks = _networks(unwrap(step.model))
        if len(networks) == 2 and self.options["per"] == "batch":
            for first, second in zip(*map(self._sites, networks), strict=True):
                if isinstance(first.layer, NestedDropout) and isinstance(second.layer, NestedDropout):
                    second.layer.follow(first.layer)
        if self.select is not None and step.number > 0:
            self._choose(step, networks)
            step.log("prefix", float(self.prefix or 0))
            step.invalidate()

    def _choose(self, step: Step, networks: list[nn.Module]) -> None:
        """Set k* by the accuracies of all prefixes on the validation data."""
        if step.validation is None:
            raise ValueError("FeatureCompression: select needs step.validation; pass select=None to do without")
        heads = [self._sites(network)[-1].head for network in networks]
        layers = [layer for head in heads if isinstance(layer := inserted(head), NestedDropout)]
        size = layers[0].num_features
        for layer in layers:
            layer.eval_k = None
        seen = [_classified(network, head, step.validation) for network, head in zip(networks, heads, strict=True)]
        direct = [s for s in seen if s is not None]
        if len(direct) == len(networks):
            self.lengths = list(range(1, size + 1)) if self.ks is None else [int(k) for k in self.ks]
            labels = direct[0].labels
            self.accuracies = prefix_accuracy([s.features for s in direct], labels, heads, self.lengths)
            count = len(labels)
        else:
            self.lengths = _grid(size) if self.ks is None else [int(k) for k in self.ks]
            self.accuracies, count = _accuracy_by_passes(step, layers, self.lengths)
        rule = "best" if self.select is None else self.select
        self.prefix = select_prefix(self.accuracies, self.length_penalty, rule, ks=self.lengths, num_examples=count)
        for layer in layers:
            layer.eval_k = self.prefix

    def finish(self, model: nn.Module) -> nn.Module:
        for network in _networks(model):
            for head, layer in self._sites(network):
                if isinstance(layer, FeatureDropout):
                    remove(head)
                    continue
                layer.follow(None)
                layer.active = True
                k = layer.eval_k
                self.prefix = k  # also of a state that another method restored
                if self.fold and (k is None or can_fold(head, network)):
                    if k is not None:
                        fold(head, k)
                    remove(head)
        return model

    def _sites(self, network: nn.Module) -> list[_Site]:
        """Looked up each time: a second network may be a copy of the first, made after `attach`."""
        found = {
            name: _Site(module, layer)
            for name, module in network.named_modules()
            if isinstance(layer := inserted(module), (NestedDropout, FeatureDropout))
        }
        return [found[name] for name in self.before] if self.before else list(found.values())


class _Site(NamedTuple):
    """A module whose input is compressed, and what compresses it."""

    head: nn.Module
    layer: NestedDropout | FeatureDropout


class _Classified(NamedTuple):
    features: Tensor
    labels: Tensor


@torch.no_grad()
def _classified(network: nn.Module, head: nn.Module, loader: Any) -> _Classified | None:
    """What a linear head sees of a loader's data, with the labels; None if its output is not the network's."""
    calls: list[tuple[Tensor, Any]] = []
    handle = head.register_forward_hook(lambda module, args, output: calls.append((args[0], output)))
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    features, labels = [], []
    try:
        with mode(network, False):
            for sample in loader:
                batch = as_batch(sample)
                calls.clear()
                outputs = call_model(network, to_device(batch.inputs, device))
                outputs = outputs if isinstance(outputs, Tensor) else outputs.logits
                if not calls:
                    raise ValueError(
                        f"FeatureCompression: the model's forward pass never calls the {type(head).__name__} whose "
                        "input is to be compressed; name another module with before="
                    )
                inputs, result = calls[-1]
                if not (isinstance(head, nn.Linear) and len(calls) == 1 and torch.equal(result, outputs)):
                    return None
                rows, classes = _valid(to_device(batch.targets, device))
                features.append(inputs.reshape(-1, head.in_features)[rows])
                labels.append(classes)
    finally:
        handle.remove()
    return _Classified(torch.cat(features), torch.cat(labels))


def _accuracy_by_passes(step: Step, layers: list[NestedDropout], lengths: list[int]) -> tuple[Tensor, int]:
    assert step.validation is not None
    found, count = [], 0
    for k in lengths:
        for layer in layers:
            layer.eval_k = k
        outputs, targets = predict(step.model, step.validation)
        rows, labels = _valid(targets)
        found.append((outputs.flatten(0, -2).argmax(-1)[rows] == labels).float().mean())
        count = len(labels)
    return torch.stack(found), count


def _valid(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Which positions have a label, and these labels."""
    if targets.is_floating_point():
        raise ValueError("FeatureCompression: choosing a prefix needs classes as targets; pass select=None")
    flat = targets.reshape(-1)
    rows = flat != IGNORE_INDEX
    return rows, flat[rows]


def _grid(size: int) -> list[int]:
    return [*(2**i for i in range(math.ceil(math.log2(size)))), size]


def _networks(model: nn.Module) -> list[nn.Module]:
    return [model.a, model.b] if isinstance(model, Pair) else [model]
