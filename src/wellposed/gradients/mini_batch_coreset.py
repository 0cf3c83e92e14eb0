"""`MiniBatchCoreset` (CoLM): from a large pool keep the small sources, choose medoids of the others, train on these."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..batching import batch_size, unwrap
from ..hyperparameter import refuse_hyperparameter
from ..indexed_dataset import epoch_seed
from ..objective import Criterion, cross_entropy
from ..pair import Pair
from ..regularizer import Regularizer
from ..step import Step
from .adam_features import AdamMoments, GradientRows, sparse_features
from .coreset_gradients import CoresetGradients, Feature
from .coreset_selection import Picks, Selection, any_of, grouped, medoids, random_picks
from .greedy_medoids import METRICS, Metric
from .pool_exchange import PoolExchange
from .source_discovery import SourceDiscovery
from .source_shares import small_by_size
from .source_shares import small_sources as below_mean

Rows = Callable[[Tensor], GradientRows]

_WAYS = (
    "Let the data set yield a dict with 'inputs', 'targets' and 'source' (an integer id), let "
    "sources='discover' cluster hidden states, or choose medoids without sources: sources=None, small_sources=()"
)


class MiniBatchCoreset(Regularizer):
    r"""Mini-batch coresets for language models, CoLM (Nguyen et al., ICLR 2025, arXiv 2407.19580).

    Of a pool of n examples `b = ratio n` are trained on: every example of the small sources, and for the rest medoids
    of each large source, by facility location on per-example gradients of one tensor near the output, normalised as
    Adam would and cut to the `topk` coordinates that matter to the source. The batch's loss is a plain mean.

    Put it into `fit` or an adapter with the POOL as the batch; in a loop of your own use `CoresetDataLoader`, or
    `select` with features of your own. **Always run the control, `ranking="random"`**: the same number of examples of
    each source, picked at random. It tells choosing examples from re-weighting sources: keeping small sources gives
    them a larger share of the loss than they have in the data, and that alone moves accuracy. `weights="unbiased"`
    takes the shift away.

    Published settings: `feature="zo", fixed_z=True`. With one direction, all features are `sign(z) h(slope)`: numbers
    on a line, so that topk and metric change nothing. Exact gradients are the default.

    State is written in `on_step`; `on_batch` reads it, so that it may be repeated. The selection leaves parameters,
    buffers, training flags and random states as they are.

    Args:
        ratio: b / n, in (0, 1].
        small_sources: sources that are always kept: "below_mean" (fewer examples than the average source; sizes by
            `fit_sources`, or counted along training), or their ids; () keeps none.
        feature: "last_layer_grad" (exact), "zo" (zeroth-order differences), or a function of a step with the candidates
            that returns (candidates, d).
        n_directions: random directions of "zo", >= 1.
        fixed_z: draw them once for the whole run (as the authors' code does), not anew at every step.
        adam: normalise; False compares plain gradients.
        betas: of the normalisation, each in [0, 1).
        topk: coordinates kept for each source, >= 1.
        metric: "l1", "l2" or "cosine" distance.
        ranking: "facility", or "random" (the control; needs no forward pass).
        weights: "uniform"; "cluster", by how many candidates a pick stands for; or "unbiased", the inverse of how
            likely an example of its source is picked at random.
        history: of the normalisation: "optimizer", Adam's own state of the tensor, or "selected", the picks' moments.
            None: "optimizer" for exact gradients, "selected" for others, as the authors' code has it.
        sources: "extra", labels in `step.extra["source"]`; "discover", clusters of hidden states
            (`SourceDiscovery()`), or a `SourceDiscovery`; None, the pool is one source: then small_sources must be ().
        seed: of directions and random picks.
        parameter: name of the tensor; by default the last linear weight that trains.
        zo_eps: length of a difference, > 0.
        criterion: unreduced task loss whose gradients are compared.
        chunk_size: examples in one forward pass of the selection; None for the whole pool.
        eps: of the normalisation, >= 0.

    Attributes:
        small: ids of the small sources, as far as known.
        updates: optimizer steps so far.

    Raises:
        ValueError: for an argument out of its range; in use, if sources are missing, the parameter is not found, zo meets
            half precision, or the optimizer has no moments.

    Example:
        >>> coreset = MiniBatchCoreset(ratio=0.5, small_sources=[1], adam=False)
        >>> features = torch.tensor([[0.0], [0.1], [5.0], [5.1], [9.0], [9.1]])
        >>> coreset.select(features, torch.tensor([0, 0, 0, 0, 0, 1])).indices.tolist()
        [0, 2, 5]
    """

    def __init__(
        self,
        ratio: float = 0.5,
        small_sources: Literal["below_mean"] | Collection[int] = "below_mean",
        feature: Feature = "last_layer_grad",
        n_directions: int = 1,
        fixed_z: bool = False,
        adam: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        topk: int = 2560,
        metric: Metric = "l1",
        ranking: Literal["facility", "random"] = "facility",
        weights: Literal["uniform", "cluster", "unbiased"] = "uniform",
        history: Literal["optimizer", "selected"] | None = None,
        sources: Literal["extra", "discover"] | SourceDiscovery | None = "extra",
        seed: int = 0,
        *,
        parameter: str | None = None,
        zo_eps: float = 1e-3,
        criterion: Criterion = cross_entropy,
        chunk_size: int | None = None,
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        _check_numbers(ratio, n_directions, topk, betas, zo_eps, chunk_size, eps)
        _check_choices(
            feature=(feature, ("last_layer_grad", "zo"), callable(feature)),
            metric=(metric, METRICS, False),
            ranking=(ranking, ("facility", "random"), False),
            weights=(weights, ("uniform", "cluster", "unbiased"), False),
            history=(history, ("optimizer", "selected"), history is None),
            sources=(sources, ("extra", "discover"), sources is None or isinstance(sources, SourceDiscovery)),
            small_sources=(small_sources, ("below_mean",), isinstance(small_sources, Collection)),
        )
        if ranking == "random" and weights == "cluster":
            raise ValueError(
                "MiniBatchCoreset: weights='cluster' counts whom a medoid stands for, and ranking='random' picks no "
                "medoids; use weights='unbiased'"
            )
        if sources is None and small_sources != () and len(small_sources):
            raise ValueError(
                "MiniBatchCoreset: sources is None, so that there are neither labels nor clusters by which sources could "
                f"be small, but small_sources is {small_sources!r}. {_WAYS}"
            )
        if (sources == "discover" or isinstance(sources, SourceDiscovery)) and not isinstance(small_sources, str):
            if len(small_sources):
                raise ValueError(
                    "MiniBatchCoreset: small_sources names sources, but clusters have no names that are known before: use "
                    f"'below_mean' or (), got {small_sources!r}"
                )
        self.ratio, self.adam, self.betas, self.eps = ratio, adam, betas, eps
        self.topk, self.metric, self.ranking, self.weights, self.seed = topk, metric, ranking, weights, seed
        self.history = history or ("optimizer" if feature == "last_layer_grad" else "selected")
        if ranking == "facility" and adam and self.history == "optimizer":
            self.requires = frozenset({"optimizer"})
        self.gradients = CoresetGradients(
            feature, parameter, criterion, n_directions, fixed_z, zo_eps, chunk_size, seed + 1
        )
        self.labelled = sources == "extra"
        self.discovery = SourceDiscovery(seed=seed) if sources == "discover" else None
        if isinstance(sources, SourceDiscovery):
            self.discovery = sources
        self.small = frozenset[int]() if isinstance(small_sources, str) else frozenset(map(int, small_sources))
        self.updates = 0
        self._counts: dict[int, int] | None = {} if isinstance(small_sources, str) else None
        self._moments: AdamMoments | None = None
        self._pending: list[Callable[[], None]] = []
        self._warned = False

    # ── in a loop of your own ─────────────────────────────────────────────────────────────────────────────────────
    def fit_sources(self, source_ids: Int[Tensor, " examples"]) -> None:
        """Learn from the whole data set which sources are small; without it sizes are counted along training.

        Args:
            source_ids: the source of every example.

        Raises:
            ValueError: if small_sources were named, sources are discovered, or there are no ids.
        """
        if self._counts is None or self.discovery is not None:
            raise ValueError(
                "MiniBatchCoreset.fit_sources: counts labels for small_sources='below_mean' and sources='extra'; here "
                "small sources were named or counted before, or sources are discovered"
            )
        self.small, self._counts = below_mean(source_ids), None

    def select(self, features: Float[Tensor, "n d"], sources: Int[Tensor, " n"]) -> Selection:
        """Choose from a pool by gradients of your own; the normalisation's history goes on with each call.

        Args:
            features: gradients of all examples of the pool.
            sources: source of each.

        Raises:
            ValueError: if the two differ in length.
        """
        if len(features) != len(sources):
            raise ValueError(
                f"MiniBatchCoreset.select: features and sources must hold one row an example, got {len(features)} and "
                f"{len(sources)}"
            )
        pool = PoolExchange(len(sources), features.device)
        self._pending = []
        rows: Rows = lambda which: GradientRows(features[which.to(features.device)])  # noqa: E731
        selection = self._select(pool, sources.cpu().to(torch.int64), rows, None)
        self._commit()
        return selection

    # ── in the contract ───────────────────────────────────────────────────────────────────────────────────────────
    def on_batch(self, step: Step) -> None:
        model = unwrap(step.model)
        if isinstance(model, Pair):
            raise ValueError("MiniBatchCoreset: works on one network, and the model is a Pair; select before pairing")
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        pool = PoolExchange(batch_size(step), device)
        self._pending = []
        sources = self._labels(step, pool) if self.discovery is None else self._discovered(step, pool)
        rows: Rows = lambda which: self.gradients.rows(step, which, self.updates)  # noqa: E731
        selection = self._select(pool, sources, rows, step)
        small = torch.tensor(sorted(self._small(sources)), dtype=torch.int64)
        step.log("coreset_small_share", float(torch.isin(sources[selection.indices], small).double().mean()))
        pool.deal(step, selection.indices, selection.weights, sources)

    def on_step(self, step: Step) -> None:
        self._commit()

    def _commit(self) -> None:
        if self._pending:
            for write in self._pending:
                write()
            self._pending = []
            self.updates += 1

    # ── sources ───────────────────────────────────────────────────────────────────────────────────────────────────
    def _labels(self, step: Step, pool: PoolExchange) -> Int[Tensor, " pool"]:
        if not self.labelled:
            return torch.zeros(pool.total, dtype=torch.int64)
        labels = step.extra.get("source")
        if labels is None:
            raise ValueError(
                "MiniBatchCoreset: the batch has no sources: extra['source'] is missing, and source discovery is off "
                f"(sources='extra'). {_WAYS}"
            )
        labels = torch.as_tensor(labels)
        if labels.shape != (pool.size,) or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(
                f"MiniBatchCoreset: extra['source'] must hold one integer an example, ({pool.size},), got "
                f"{labels.dtype} of shape {tuple(labels.shape)}"
            )
        return pool.rows(labels.to(torch.int64)).cpu()

    def _discovered(self, step: Step, pool: PoolExchange) -> Int[Tensor, " pool"]:
        """Numbers of clusters; -1 while warming up."""
        discovery, total = self.discovery, step.total
        assert discovery is not None
        hidden = pool.rows(discovery.hidden_states(step, self.gradients.chunk_size))
        self._pending.append(lambda: discovery.observe(hidden, total))
        found = discovery.assign(hidden)
        return torch.full((pool.total,), -1) if found is None else found.cpu()

    def _small(self, sources: Tensor) -> frozenset[int]:
        if self._counts is None:
            return self.small
        return small_by_size(self.discovery.sizes if self.discovery is not None else self._counted(sources))

    def _counted(self, sources: Tensor) -> dict[int, int]:
        """Examples of each source seen so far, with this pool's."""
        counts = dict(self._counts or {})
        for name, count in zip(*(t.tolist() for t in sources.unique(return_counts=True)), strict=True):
            counts[name] = counts.get(name, 0) + count
        return counts

    # ── the selection ─────────────────────────────────────────────────────────────────────────────────────────────
    def _select(self, pool: PoolExchange, sources: Tensor, rows: Rows, step: Step | None) -> Selection:
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.updates))
        n, small = len(sources), self._small(sources)
        batch = max(1, math.floor(self.ratio * n + 1e-9))
        counts = None if self._counts is None else self._counted(sources)
        self._pending.append(lambda: self._write(small, counts))
        if bool((sources < 0).all()):
            return Selection(any_of(torch.arange(n), batch, generator), None)
        is_small = torch.isin(sources, torch.tensor(sorted(small), dtype=torch.int64))
        kept, candidates = is_small.nonzero()[:, 0], (~is_small).nonzero()[:, 0]
        if len(kept) >= batch:
            weights = None if self.weights == "uniform" else torch.full((batch,), len(kept) / n)
            return Selection(any_of(kept, batch, generator), weights)
        budget = min(batch - len(kept), len(candidates))
        if budget == len(candidates):
            return Selection(torch.arange(n), None)
        if self.ranking == "random":
            picks = random_picks(*grouped(sources[candidates], budget), generator)
        else:
            candidates, picks = self._medoids(pool, sources, candidates, budget, rows, step)
        chosen = torch.cat([kept, candidates[picks.places]])
        order = chosen.argsort()
        if self.weights == "uniform":
            return Selection(chosen[order], None)
        weights = torch.cat([torch.ones(len(kept)), picks.stands_for]) * (len(chosen) / n)
        return Selection(chosen[order], weights[order])

    def _medoids(
        self, pool: PoolExchange, sources: Tensor, candidates: Tensor, budget: int, rows: Rows, step: Step | None
    ) -> tuple[Tensor, Picks]:
        """The candidates that have a finite gradient, and the picks among them."""
        found = rows(pool.own(candidates))
        finite = found.finite()
        usable = pool.rows(finite).cpu()
        if not bool(usable.all()):
            self._report_dropped(int((~usable).sum()), len(usable), step)
            found, candidates = found.rows(finite), candidates[usable]
            if not len(candidates):
                return candidates, Picks(candidates, torch.ones(0))
        group, sizes, shares = grouped(sources[candidates], min(budget, len(candidates)))
        here = (candidates >= pool.start) & (candidates < pool.start + pool.size)
        moments = self._history(found, step) if self.adam else None
        mine = group[here].to(found.left.device)
        features = pool.rows(sparse_features(found, mine, len(sizes), self.topk, moments, pool.sum))
        picks = medoids(features, group, sizes, shares, self.metric, self.weights == "cluster")
        picks = Picks(pool.agreed(picks.places).cpu(), pool.agreed(picks.stands_for).cpu())
        if moments is not None and (self.history == "selected" or step is None):
            chosen = torch.isin(here.nonzero()[:, 0], picks.places).to(found.left.device)
            first, second = found.rows(chosen).moment_sums()
            after = moments.after((pool.sum(first), pool.sum(second)), len(picks.places))
            self._pending.append(lambda: setattr(self, "_moments", after))
        return candidates, picks

    def _history(self, rows: GradientRows, step: Step | None) -> AdamMoments:
        like, held = rows.left.new_zeros(rows.width), self._moments
        if self.history == "optimizer" and step is not None:
            return self.gradients.optimizer_moments(step, like, self.betas, self.eps)
        if held is None or len(held.first) != rows.width:
            return AdamMoments.start(like, self.betas, self.eps)
        return AdamMoments(held.first.to(like), held.second.to(like), held.updates, self.betas, self.eps)

    def _report_dropped(self, dropped: int, of: int, step: Step | None) -> None:
        if step is not None:
            step.log("coreset_dropped", float(dropped))
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"MiniBatchCoreset: features of {dropped} of {of} candidates are not finite; such examples are not "
                "picked. Later ones are counted as 'coreset_dropped', without a warning",
                stacklevel=2,
            )

    def _write(self, small: frozenset[int], counts: dict[int, int] | None) -> None:
        self.small, self._counts = small, counts

    # ── state ─────────────────────────────────────────────────────────────────────────────────────────────────────
    def get_extra_state(self) -> dict[str, Any]:
        """What an exact resume needs; directions and random picks follow from seed and step."""
        held = self._moments
        return {
            "updates": self.updates,
            "counts": None if self._counts is None else dict(self._counts),
            "small": sorted(self.small),
            "moments": None if held is None else {"m": held.first, "v": held.second, "updates": held.updates},
        }

    def set_extra_state(self, state: Any) -> None:
        """Continue from `get_extra_state`."""
        self.updates, self.small, held = state["updates"], frozenset(state["small"]), state["moments"]
        self._counts = None if state["counts"] is None else dict(state["counts"])
        self._moments = (
            None if held is None else AdamMoments(held["m"], held["v"], held["updates"], self.betas, self.eps)
        )
        self._pending = []


def _check_choices(**given: tuple[Any, tuple[str, ...], bool]) -> None:
    """Each a word among the allowed ones, or, where the third entry says so, something that is no word."""
    for name, (value, allowed, also_others) in given.items():
        if value not in allowed and not (also_others and not isinstance(value, str)):
            raise ValueError(f"MiniBatchCoreset: {name} must be one of {list(allowed)}, got {value!r}")


def _check_numbers(
    ratio: float,
    n_directions: int,
    topk: int,
    betas: tuple[float, float],
    zo_eps: float,
    chunk_size: int | None,
    eps: float,
) -> None:
    reason = "what is picked is drawn or ranked, so that no tuner can learn it"
    refuse_hyperparameter("MiniBatchCoreset", "ratio", ratio, reason)
    for text, value, holds in (
        ("ratio must lie in (0, 1]", ratio, 0 < ratio <= 1),
        ("n_directions must be an integer >= 1", n_directions, isinstance(n_directions, int) and n_directions >= 1),
        ("topk must be an integer >= 1", topk, isinstance(topk, int) and topk >= 1),
        ("betas must be two numbers in [0, 1)", betas, len(betas) == 2 and all(0 <= b < 1 for b in betas)),
        ("zo_eps must be > 0", zo_eps, zo_eps > 0),
        ("chunk_size must be an integer >= 1, or None", chunk_size, chunk_size is None or chunk_size >= 1),
        ("eps must be >= 0", eps, eps >= 0),
    ):
        if not holds:
            raise ValueError(f"MiniBatchCoreset: {text}, got {value!r}")
