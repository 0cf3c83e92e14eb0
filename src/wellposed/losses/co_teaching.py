"""Co-teaching: two networks, each of which trains on the examples that the other finds easy."""

from __future__ import annotations

import warnings
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from ..batching import Paired, batch_size, call_model, map_tensors, unwrap
from ..hyperparameter import Hyperparameter, check_strength, number_of
from ..objective import Criterion, cross_entropy
from ..pair import Pair, reinitialized
from ..regularizer import Regularizer
from ..sample_table import SampleTable
from ..step import Step, mode
from .frozen_batch_norm import FrozenBatchNorm
from .sample_selection import forget_rate_at, small_loss

Mode = Literal["halves", "full"]
_MODES = ("halves", "full")
_WEIGHTS = "co-teaching weights"


class CoTeachingOutput(NamedTuple):
    """What a step of co-teaching did.

    Attributes:
        loss_a, loss_b: mean loss of each network over the examples that it trained on; detached.
        kept_a, kept_b: the examples whose loss each network found small, on which the OTHER one trained: positions in the
            batch, or in the data set if an index was given.
    """

    loss_a: Tensor
    loss_b: Tensor
    kept_a: Tensor
    kept_b: Tensor


def co_teaching_step(
    model_a: nn.Module,
    model_b: nn.Module,
    optimizer_a: Optimizer,
    optimizer_b: Optimizer,
    inputs: Any,
    targets: Tensor,
    forget_rate: float,
    *,
    mode: Mode = "halves",
    criterion: Criterion = cross_entropy,
    index: Tensor | None = None,
) -> CoTeachingOutput:
    """One step of co-teaching of any two networks, each with its own optimizer.

    - "halves" (arXiv 2206.13140): network a judges the first half of the batch and b the second, in evaluation mode;
      each then trains on the small-loss part of the half that it did NOT judge.
    - "full" (Han et al. 2018, arXiv 1804.06872): both judge the whole batch by their training losses, and exchange.

    Args:
        model_a, model_b: the networks.
        optimizer_a, optimizer_b: of each.
        inputs: a tensor (batch, ...), or a tuple or dict of such; `Paired` for inputs of each network's own.
        targets: (batch, ...).
        forget_rate: share of what is judged that is left out, in [0, 1); see `forget_rate_at`.
        mode: one of the two.
        criterion: unreduced loss of (outputs, targets), (batch,).
        index: (batch,) positions in the data set.

    Raises:
        ValueError: for a forget rate or a mode that is not allowed, or a criterion that does not return (batch,).

    Example:
        >>> a, b = nn.Linear(3, 2), nn.Linear(3, 2)
        >>> sgd = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (a, b)]
        >>> x, y = torch.randn(8, 3), torch.arange(8) % 2
        >>> step = co_teaching_step(a, b, *sgd, x, y, forget_rate=0.25, mode="full")
        >>> len(step.kept_a), len(step.kept_b)
        (6, 6)
    """
    _check("co_teaching_step", forget_rate, mode)
    networks, optimizers = (model_a, model_b), (optimizer_a, optimizer_b)
    own = inputs if isinstance(inputs, Paired) else Paired(inputs, inputs)
    size = len(targets)
    if mode == "halves":
        kept = _judged_halves(_score, networks, own, targets, forget_rate, criterion)
        rows = (kept[1], kept[0])
        losses = [
            _per_example(criterion(call_model(net, _rows(x, r, size)), targets[r]), len(r))
            for net, x, r in zip(networks, own, rows, strict=True)
        ]
    else:
        whole = [_per_example(criterion(call_model(n, x), targets), size) for n, x in zip(networks, own, strict=True)]
        kept = (small_loss(whole[0], forget_rate), small_loss(whole[1], forget_rate))
        losses = [whole[0][kept[1]], whole[1][kept[0]]]
    means = [loss.mean() for loss in losses]
    for optimizer, loss in zip(optimizers, means, strict=True):
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    found = [k if index is None else index[k.to(index.device)] for k in kept]
    return CoTeachingOutput(means[0].detach(), means[1].detach(), *found)


class CoTeaching(Regularizer):
    """Co-teaching (Han et al. 2018, arXiv 1804.06872; as the second stage of nested dropout, arXiv 2206.13140).

    Two networks train as one `Pair`, each on the examples whose loss the other finds small: wrong labels are left out,
    and no network confirms its own mistakes. Replaces the task loss. `attach` takes a `Pair` of networks that are
    trained already (the paper's second stage), or adds to any other model a second network with fresh parameters.
    Evaluation averages the two; `finish` returns the `Pair`. In your own loop: `co_teaching_step`.

    Args:
        forget_rate: R, share of the examples that are left out, in [0, 1); about the share of wrong labels. A float or a
            `Hyperparameter`.
        num_gradual: epochs until R is reached; 10 is usual from scratch, 0 for networks that are trained.
        mode: "halves" or "full"; see `co_teaching_step`. In "halves", `on_batch` replaces inputs, targets, index and
            weights by a `Paired` of each network's own, so that other methods which rewrite the batch (mixup) must come
            before, and methods that keep a memory of outputs per example do not apply.
        criterion: unreduced loss of (outputs, targets), to judge and to train by, (batch,).
        frozen_batch_norm: keep BatchNorm as it is (the paper's second stage); see `FrozenBatchNorm`.
        num_examples: size of the training set, to remember how often each example was kept; see `kept_share`.

    Attributes:
        kept: `Paired` positions in the data set (or in the batch) that each network kept in the last step
            (mode "full": in its last micro-batch).

    Raises:
        ValueError: for an argument out of range, or a `Pair` of a network with itself; in use, for a criterion that does
            not return one loss an example.

    Example:
        >>> from wellposed import fit
        >>> data = torch.utils.data.TensorDataset(torch.randn(32, 3), torch.arange(32) % 2)
        >>> method = CoTeaching(forget_rate=0.25, num_gradual=0, mode="full", num_examples=32)
        >>> model = fit(nn.Linear(3, 2), data, epochs=2, batch_size=8, regularizer=method).model
        >>> type(model).__name__, float(method.kept_share().mean())
        ('Pair', 0.75)
    """

    def __init__(
        self,
        forget_rate: float | Hyperparameter = 0.2,
        num_gradual: int = 10,
        mode: Mode = "halves",
        *,
        criterion: Criterion = cross_entropy,
        frozen_batch_norm: bool = False,
        num_examples: int | None = None,
    ) -> None:
        super().__init__()
        _check("CoTeaching", forget_rate, mode)
        if isinstance(num_gradual, bool) or not isinstance(num_gradual, int) or num_gradual < 0:
            raise ValueError(f"CoTeaching: num_gradual must be an integer >= 0, got {num_gradual!r}")
        if num_examples is not None and num_examples < 1:
            raise ValueError(f"CoTeaching: num_examples must be >= 1, got {num_examples}")
        self.forget_rate, self.num_gradual, self.mode = forget_rate, num_gradual, mode
        self.criterion, self.frozen_batch_norm = criterion, frozen_batch_norm
        self.coupled = mode == "full"  # halves are judged before the batch is cut
        self.pairs_batch = mode == "halves"
        self.table = None if num_examples is None else SampleTable(num_examples, (2,))
        if num_examples is not None:
            self.requires = frozenset({"index"})
        self.kept: Paired | None = None
        self._frozen: FrozenBatchNorm | None = None
        self._told = False

    def rate(self, step: Step) -> float:
        """The share that is left out in this step's epoch."""
        return forget_rate_at(step.epoch, number_of(self.forget_rate), self.num_gradual)

    def attach(self, model: nn.Module) -> nn.Module:
        pair = model if isinstance(model, Pair) else Pair(model, reinitialized(model))
        if pair.a is pair.b:
            raise ValueError("CoTeaching: the Pair must hold two networks, got one network twice")
        if self.frozen_batch_norm:
            self._frozen = FrozenBatchNorm(pair)
        return pair

    def on_batch(self, step: Step) -> None:
        if self.mode == "full":
            return
        size, pair = batch_size(step), _pair(step.model)
        own = step.inputs if isinstance(step.inputs, Paired) else Paired(step.inputs, step.inputs)
        if size % 2 and size > 1 and not self._told:
            self._told = True
            warnings.warn(
                f"CoTeaching: a batch of {size} cannot be halved; the last example of each such batch is left out "
                "(drop_last=True or mode='full' avoid it)"
            )

        def score(network: nn.Module, inputs: Any) -> Any:
            return step.forward(inputs=inputs, model=network, grad=False, training=False)

        rate = self.rate(step)
        kept_a, kept_b = _judged_halves(score, (pair.a, pair.b), own, step.targets, rate, self.criterion)
        self._remember(step, kept_a, kept_b, rate, torch.arange(max(1, size // 2 * 2)))
        rows = (kept_b, kept_a)  # each network trains on what the other kept

        def paired(value: Any) -> Paired:
            return Paired(*(_rows(value, r, size) for r in rows))

        step.inputs = Paired(*(_rows(x, r, size) for x, r in zip(own, rows, strict=True)))
        step.targets = paired(step.targets)
        step.extra = {
            name: paired(value) if isinstance(value, Tensor) and value.ndim and len(value) == size else value
            for name, value in step.extra.items()
        }
        if step.weights is not None:
            step.extra[_WEIGHTS] = paired(step.weights)
            step.weights = None
        if step.index is not None:
            step.index = paired(step.index)

    def loss(self, step: Step) -> Float[Tensor, " batch"]:
        """Sum of both networks' losses; the mean over the batch is that of each network over the examples it keeps."""
        first, second = self._losses(step)
        if self.mode == "halves":
            if _WEIGHTS in step.extra:
                weights = step.extra[_WEIGHTS]
                return first * weights.a.to(first) + second * weights.b.to(second)
            return first + second
        rate = self.rate(step)
        kept_a, kept_b = small_loss(first, rate), small_loss(second, rate)
        return _mean_weights(first, kept_b) * first + _mean_weights(second, kept_a) * second

    def on_backward(self, step: Step) -> None:
        if self.mode == "full":
            rate = self.rate(step)
            kept_a, kept_b = (small_loss(losses, rate) for losses in self._losses(step))
            self._remember(step, kept_a, kept_b, rate, torch.arange(batch_size(step)), judges=2)

    def finish(self, model: nn.Module) -> nn.Module:
        if self._frozen is not None:
            self._frozen.remove()
            self._frozen = None
        return model

    def kept_share(self) -> Float[Tensor, " examples"]:
        """How often each example was kept, of all times that it was judged while R > 0; not a number if never.

        Examples with a small share probably have a wrong label.

        Raises:
            RuntimeError: without `num_examples`.
        """
        if self.table is None:
            raise RuntimeError("CoTeaching.kept_share: pass num_examples= to remember what is kept")
        rows = self.table.rows.float()
        return rows[:, 1] / rows[:, 0]

    def _losses(self, step: Step) -> tuple[Tensor, Tensor]:
        if not isinstance(step.outputs, (tuple, list)) or len(step.outputs) != 2:
            raise ValueError(
                f"CoTeaching: the model must return the outputs of two networks, got {type(step.outputs).__name__}; "
                "train what attach returned, in training mode"
            )
        if self.mode == "halves" and not isinstance(step.targets, Paired):
            raise ValueError("CoTeaching: mode 'halves' needs on_batch before the loss; use mode='full' without it")
        targets = step.targets if isinstance(step.targets, Paired) else Paired(step.targets, step.targets)
        first, second = (
            _per_example(self.criterion(outputs, y), len(y)) for outputs, y in zip(step.outputs, targets, strict=True)
        )
        return first, second

    def _remember(
        self, step: Step, kept_a: Tensor, kept_b: Tensor, rate: float, judged: Tensor, judges: int = 1
    ) -> None:
        index = step.index
        self.kept = Paired(*(k if index is None else index[k.to(index.device)] for k in (kept_a, kept_b)))
        if self.table is None or rate == 0:
            return
        if index is None:
            raise ValueError("CoTeaching: step.index is missing; wrap the data set in IndexedDataset")
        counts = torch.zeros(batch_size(step), 2)
        counts[judged, 0] = float(judges)
        for kept in (kept_a, kept_b):
            counts[kept.cpu(), 1] += 1.0
        index, counts = index[judged.to(index.device)], counts[judged].to(index.device)
        self.table.write(index, self.table.read(index) + counts)


def _judged_halves(
    score: Any, networks: tuple[Any, Any], inputs: Paired, targets: Tensor, rate: float, criterion: Criterion
) -> tuple[Tensor, Tensor]:
    """Which rows of the first half network a keeps, and which of the second half network b does."""
    size = len(targets)
    half = max(1, size // 2)
    # A batch of one example cannot be halved: both networks see it.
    starts = (0, half if size > 1 else 0)
    kept = []
    for network, own, start in zip(networks, inputs, starts, strict=True):
        rows = torch.arange(start, start + half, device=targets.device)
        with torch.no_grad():
            losses = criterion(score(network, _rows(own, rows, size)), targets[rows])
        kept.append(rows[small_loss(_per_example(losses, half), rate)])
    return kept[0], kept[1]


@torch.no_grad()
def _score(network: nn.Module, inputs: Any) -> Any:
    with mode(network, False):
        return call_model(network, inputs)


def _rows(value: Any, rows: Tensor, size: int) -> Any:
    """These rows of every tensor of the batch's length, through nested containers."""
    return map_tensors(lambda t: t[rows.to(t.device)] if t.ndim and len(t) == size else t, value)


def _mean_weights(losses: Tensor, rows: Tensor) -> Tensor:
    """Weights whose mean with `losses` over the batch is the mean of `losses` over `rows`."""
    weights = torch.zeros_like(losses)
    weights[rows] = len(losses) / len(rows)
    return weights


def _per_example(losses: Tensor, size: int) -> Tensor:
    if losses.shape != (size,):
        raise ValueError(
            f"CoTeaching: criterion must return one loss for each of {size} examples, got shape {tuple(losses.shape)}"
        )
    return losses


def _pair(model: nn.Module) -> Pair:
    pair = unwrap(model)
    if not isinstance(pair, Pair):
        raise ValueError(f"CoTeaching: the model must be the Pair that attach returned, got {type(pair).__name__}")
    return pair


def _check(owner: str, forget_rate: Any, selection: str) -> None:
    check_strength(owner, "forget_rate", forget_rate, 0.0, 1.0)
    if not isinstance(forget_rate, Hyperparameter) and forget_rate == 1:
        raise ValueError(f"{owner}: forget_rate must lie in [0, 1), got 1")
    if selection not in _MODES:
        raise ValueError(f"{owner}: mode must be one of {list(_MODES)}, got {selection!r}")
