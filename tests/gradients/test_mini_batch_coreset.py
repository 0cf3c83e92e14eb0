"""MiniBatchCoreset: what is kept and picked, weights, history, purity, resuming, and bad input."""

import math
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from wellposed import Compose, Pair, Step, fit
from wellposed.accumulation import Accumulation
from wellposed.batching import Batch
from wellposed.gradients.coreset_loader import CoresetBatchSampler, CoresetDataLoader
from wellposed.gradients.greedy_medoids import pairwise_similarity
from wellposed.gradients.mini_batch_coreset import MiniBatchCoreset
from wellposed.gradients.source_shares import source_budgets
from wellposed.objective import cross_entropy
from wellposed.regularizer import Regularizer, RequirementError, check_requirements
from wellposed.studies.problems.coreset_cases import replay_shortfall

SMALL = [3, 4]


def network(dropout=0.3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 4))


def mixture(n=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    source = torch.multinomial(torch.tensor([8.0, 7.0, 6.0, 1.0, 1.0]), n, replacement=True, generator=g)
    return torch.randn(n, 6, generator=g), torch.randint(0, 4, (n,), generator=g), source


def pool(model, n=64, seed=0, optimizer=True, **fields):
    x, y, source = mixture(n, seed)
    built = torch.optim.AdamW(model.parameters()) if optimizer else None
    return Step(model, built, x, y, torch.arange(n), extra={"source": source}, **fields)


def coreset(**options):
    return MiniBatchCoreset(**{"small_sources": SMALL, **options})


class Pools:
    """Pools of 32 out of 192 examples with sources."""

    def __init__(self, n=192, size=32):
        self.x, self.y, self.source = mixture(n)
        self.size = size

    def __len__(self):
        return len(self.y) // self.size

    def __iter__(self):
        for rows in torch.arange(len(self.y)).split(self.size):
            yield Batch(self.x[rows], self.y[rows], rows, None, {"source": self.source[rows]})


class Record(Regularizer):
    """Keeps which examples every step trained on."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_batch(self, step):
        self.seen.append(step.index)


KINDS = {
    "exact": {},
    "zo": {"feature": "zo", "n_directions": 3},
    "paper": {"feature": "zo", "fixed_z": True},
    "random": {"ranking": "random"},
    "selected": {"history": "selected"},
    "plain": {"adam": False, "metric": "cosine"},
}


# ── what is kept and picked ───────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("kind", KINDS)
def test_small_sources_are_kept_and_the_rest_has_its_budgets(kind):
    step = pool(network())
    source = step.extra["source"]
    method = coreset(**KINDS[kind])
    method.on_batch(step)
    assert len(step.index) == 32 and step.weights is None
    assert step.index.tolist() == sorted(set(step.index.tolist()))
    kept = torch.isin(source, torch.tensor(SMALL))
    assert 0 < int(kept.sum()) < 32 and set(kept.nonzero()[:, 0].tolist()) <= set(step.index.tolist())
    counts = torch.bincount(source[~kept], minlength=3)
    chosen = torch.bincount(source[step.index], minlength=5)[:3]
    assert chosen.tolist() == source_budgets(counts, 32 - int(kept.sum())).tolist()
    x, y, _ = mixture()
    assert torch.equal(step.inputs, x[step.index]) and torch.equal(step.targets, y[step.index])
    assert torch.equal(step.extra["source"], source[step.index])


def test_picks_are_a_valid_greedy_sequence_of_the_exact_gradients():
    model = network().double()
    x, y, source = mixture()
    step = Step(model, None, x.double(), y, torch.arange(64), extra={"source": source})
    coreset(adam=False, topk=10_000).on_batch(step)
    model.eval()
    rows = []
    for i in range(64):
        loss = F.cross_entropy(model(x[i : i + 1].double()), y[i : i + 1])
        rows.append(torch.autograd.grad(loss, model[4].weight)[0].flatten())
    rows = torch.stack(rows)
    for q in range(3):
        own = (source == q).nonzero()[:, 0]
        S = pairwise_similarity(rows[own])
        picked = torch.isin(own, step.index)
        # The set, put in a greedy order: there is one whose every pick is a largest gain.
        left, order = picked.nonzero()[:, 0].tolist(), []
        while left:
            order.append(min(left, key=lambda j: replay_shortfall(S, torch.tensor([*order, j]))))
            left.remove(order[-1])
        assert replay_shortfall(S, torch.tensor(order)) <= 1e-9


def test_all_of_the_pool_at_ratio_one_and_only_small_ones_if_all_are():
    step = pool(network())
    coreset(ratio=1.0).on_batch(step)
    assert step.index.tolist() == list(range(64))
    step = pool(network())
    MiniBatchCoreset(1.0, sources=None, small_sources=()).on_batch(step)
    assert step.index.tolist() == list(range(64))
    step = pool(network())
    MiniBatchCoreset(0.25, small_sources=range(5)).on_batch(step)
    assert len(step.index) == 16
    draws = set()
    for seed in range(5):
        step = pool(network())
        MiniBatchCoreset(0.25, small_sources=range(5), seed=seed).on_batch(step)
        draws.add(tuple(step.index.tolist()))
    assert len(draws) == 5  # a random part, not the first


@settings(max_examples=15)
@given(
    st.integers(1, 40),
    st.sampled_from([0.1, 0.3, 0.5, 0.9, 1.0]),
    st.integers(0, 99),
    st.sampled_from(["facility", "random"]),
)
def test_any_pool_gives_a_batch_of_the_asked_size(n, ratio, seed, ranking):
    g = torch.Generator().manual_seed(seed)
    features, sources = torch.randn(n, 3, generator=g), torch.randint(0, 6, (n,), generator=g)
    method = MiniBatchCoreset(ratio, small_sources=[0, 5], ranking=ranking, weights="unbiased", seed=seed)
    indices, weights = method.select(features, sources)
    assert len(indices) == max(1, math.floor(ratio * n + 1e-9)) == len(set(indices.tolist()))
    assert weights is None or (len(weights) == len(indices) and bool((weights > 0).all()))


def test_sources_below_the_mean_are_counted_along_the_way_or_from_all_labels():
    data = Pools()
    method = MiniBatchCoreset(history="selected")
    fit(network(), data, epochs=1, regularizer=method)
    counts = torch.bincount(data.source).tolist()
    assert method.small == {q for q in range(5) if counts[q] * 5 < 192} == {3, 4}
    assert method._counts == dict(enumerate(counts))
    known = MiniBatchCoreset()
    known.fit_sources(data.source)
    assert known.small == {3, 4}
    with pytest.raises(ValueError, match="fit_sources: counts labels for"):
        known.fit_sources(data.source)


# ── weights ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_unbiased_weights_give_the_pools_gradient_on_average():
    torch.manual_seed(0)
    values = torch.randn(64)
    _, _, source = mixture()
    means = []
    for seed in range(250):
        indices, weights = coreset(ranking="random", weights="unbiased", seed=seed).select(torch.zeros(64, 1), source)
        assert float(weights.sum()) == pytest.approx(32, abs=1e-4)
        means.append(float((values[indices] * weights).mean()))
    means = torch.tensor(means)
    error = float(means.std()) / 250**0.5
    assert abs(float(means.mean() - values.mean())) < 4 * error
    plain = torch.tensor(
        [
            float(values[coreset(ranking="random", seed=s).select(torch.zeros(64, 1), source).indices].mean())
            for s in range(250)
        ]
    )
    assert abs(float(plain.mean() - values.mean())) > 4 * error  # re-weighting is a bias


def test_cluster_weights_count_whom_a_medoid_stands_for():
    features = torch.tensor([[0.0], [0.15], [0.2], [9.0], [0.1], [50.0], [50.1], [7.0], [8.0]])
    sources = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 2])
    method = MiniBatchCoreset(5 / 9, small_sources=[2], adam=False, weights="cluster")
    indices, weights = method.select(features, sources)
    assert indices.tolist() == [1, 3, 5, 7, 8]
    assert weights.tolist() == pytest.approx([w * 5 / 9 for w in (4, 1, 2, 1, 1)])


def test_weights_multiply_what_is_there_and_the_loss_of_the_batch_is_unbiased():
    step = pool(network())
    step.weights = torch.arange(64.0)
    method = coreset(ranking="random", weights="unbiased")
    method.on_batch(step)
    again = pool(network())
    method.on_batch(again)
    assert torch.equal(step.weights, again.index.float() * again.weights)
    assert float(again.weights.mean()) == pytest.approx(1)
    tokenwise = pool(network())
    tokenwise.weights = torch.ones(64, 3)
    method.on_batch(tokenwise)
    assert torch.equal(tokenwise.weights, again.weights[:, None].expand(32, 3))


# ── history ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_exact_gradients_take_the_optimizers_moments():
    model = network(dropout=0.0)
    step = pool(model)
    method = coreset()
    assert method.history == "optimizer" and method.requires == {"optimizer"}
    like = torch.zeros(64)
    start = method.gradients.optimizer_moments(step, like, (0.9, 0.999), 1e-8)
    assert start.updates == 0 and not start.first.any()
    for _ in range(3):
        step.optimizer.zero_grad()
        F.cross_entropy(model(step.inputs), step.targets).backward()
        step.optimizer.step()
    held = method.gradients.optimizer_moments(step, like, (0.9, 0.999), 1e-8)
    state = step.optimizer.state[model[4].weight]
    assert held.updates == 3 and torch.equal(held.first, state["exp_avg"].flatten())
    assert torch.equal(held.second, state["exp_avg_sq"].flatten())


def test_the_history_of_the_picks_is_that_of_the_picks_alone():
    g = torch.Generator().manual_seed(0)
    sources = torch.zeros(10, dtype=torch.int64)
    method = MiniBatchCoreset(0.3, small_sources=(), betas=(0.5, 0.8))
    first, second = torch.zeros(4), torch.zeros(4)
    for number in range(3):
        features = torch.randn(10, 4, generator=g)
        picked = features[method.select(features, sources).indices]
        first = 0.5 * first + 0.5 * picked.mean(0)
        second = 0.8 * second + 0.2 * picked.square().mean(0)
        torch.testing.assert_close(method._moments.first, first)
        torch.testing.assert_close(method._moments.second, second)
        assert method.updates == method._moments.updates == number + 1


def test_directions_are_fixed_or_drawn_anew():
    for fixed in (True, False):
        step = pool(network())
        method = coreset(feature="zo", fixed_z=fixed, n_directions=2)
        rows = [method.gradients.rows(step, torch.arange(4), t).right for t in (0, 1, 1)]
        assert torch.equal(rows[1], rows[2]) and torch.equal(rows[0], rows[1]) == fixed


# ── purity and resuming ───────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("kind", KINDS)
def test_the_selection_leaves_no_trace_and_may_be_repeated(kind):
    model = network()
    model[1].eval()
    model[4].weight.grad = torch.ones_like(model[4].weight)
    method = coreset(**KINDS[kind])
    before = [t.clone() for t in (*model.parameters(), *model.buffers())]
    random, flags = torch.get_rng_state(), [m.training for m in model.modules()]
    ids = [id(p) for p in model.parameters()]
    found = []
    for _ in range(2):
        step = pool(model)
        method.on_batch(step)
        found.append(step.index)
    assert torch.equal(*found) and method.updates == 0 and method._moments is None
    assert all(torch.equal(a, b) for a, b in zip(before, (*model.parameters(), *model.buffers()), strict=True))
    assert ids == [id(p) for p in model.parameters()] and all(p.requires_grad for p in model.parameters())
    assert torch.equal(random, torch.get_rng_state()) and flags == [m.training for m in model.modules()]
    assert torch.equal(model[4].weight.grad, torch.ones_like(model[4].weight)) and torch.is_grad_enabled()
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    method.on_step(step)
    method.on_step(step)  # a second time without a batch in between writes nothing
    assert method.updates == 1


class Killed(Exception):
    pass


class Kill(Regularizer):
    """Ends the first of two runs before its second epoch."""

    def __init__(self, armed):
        super().__init__()
        self.armed = armed

    def on_epoch(self, step):
        if self.armed and step.epoch == 1:
            raise Killed


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_picks_what_the_uninterrupted_one_picks(tmp_path, kind):
    def train(path, armed):
        record = Record()
        regularizer = Compose(MiniBatchCoreset(**KINDS[kind]), record, Kill(armed))
        try:
            optimizer = partial(torch.optim.AdamW, lr=1e-2)
            model = fit(
                network(), Pools(), epochs=3, regularizer=regularizer, optimizer=optimizer, seed=0, checkpoint=path
            ).model
        except Killed:
            model = None
        return record.seen, model

    whole, model = train(None, armed=False)
    first, nothing = train(tmp_path / "run.pt", armed=True)
    rest, resumed = train(tmp_path / "run.pt", armed=False)
    assert nothing is None and len(first) == 6 and len(rest) == 12
    assert all(torch.equal(a, b) for a, b in zip(first + rest, whole, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), model.parameters(), strict=True))


# ── in a loop ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_gradients_do_not_depend_on_how_the_batch_is_cut():
    found = []
    for parts in (1, 4):
        model = network(dropout=0.0).eval()
        step = pool(model)
        coreset(weights="unbiased").on_batch(step)
        Accumulation(step, Regularizer(), cross_entropy, parts).run()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)


@pytest.mark.parametrize("chunk", [None, 5])
def test_language_model_inputs_are_dicts_and_targets_sequences(chunk):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.v_proj, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9)

        def forward(self, input_ids, attention_mask, use_cache=False):
            x = self.embed(input_ids) * attention_mask[..., None]
            return {"logits": self.head(self.v_proj(x.cumsum(1)).tanh())}

    torch.manual_seed(0)
    ids, targets = torch.randint(0, 9, (2, 24, 6))
    mask = (torch.arange(6) < torch.randint(2, 7, (24, 1))).long()
    targets = targets.masked_fill(mask == 0, -100)
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    step = Step(Model(), None, inputs, targets, torch.arange(24), extra={"source": torch.arange(24) % 3})
    method = MiniBatchCoreset(
        small_sources=[2],
        history="selected",
        parameter="v_proj.weight",
        chunk_size=chunk,
        criterion=lambda outputs, y: cross_entropy(outputs["logits"], y),
    )
    method.on_batch(step)
    assert len(step.targets) == 12 and step.inputs["input_ids"].shape == (12, 6) and step.inputs["use_cache"] is False
    assert torch.equal(step.inputs["input_ids"], ids[step.index])
    assert set(range(2, 24, 3)) <= set(step.index.tolist())


def test_the_loader_yields_what_the_hook_chooses_and_the_state_moves_on():
    data = Pools()
    record, method = Record(), coreset()
    fit(
        network(),
        data,
        epochs=1,
        regularizer=Compose(method, record),
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
        seed=0,
    )
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    other, found = coreset(), []
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        for batch in CoresetDataLoader(data, other, model.train(), optimizer):
            found.append(batch.index)
            optimizer.zero_grad()
            F.cross_entropy(model(batch.inputs), batch.targets).backward()
            optimizer.step()
    assert len(CoresetDataLoader(data, other, model, optimizer)) == len(found) == 6
    assert all(torch.equal(a, b) for a, b in zip(found, record.seen, strict=True)) and other.updates == 6


def test_the_batch_sampler_yields_positions():
    x, y, source = mixture(100)
    rows = [{"inputs": a, "targets": b, "source": c} for a, b, c in zip(x, y, source, strict=True)]
    model = network()
    sampler = CoresetBatchSampler(rows, 32, coreset(history="selected"), model, seed=1)
    assert len(sampler) == 3
    batches = list(sampler)
    flat = [i for batch in batches for i in batch]
    assert [len(b) for b in batches] == [16] * 3 and len(set(flat)) == 48
    loader = torch.utils.data.DataLoader(rows, batch_sampler=sampler)
    assert [len(b["targets"]) for b in loader] == [16] * 3
    with pytest.raises(ValueError, match=r"pool_size must lie in \[1, 100\]"):
        CoresetBatchSampler(rows, 101, coreset(history="selected"), model)
    with pytest.raises(ValueError, match="yields positions without weights"):
        CoresetBatchSampler(rows, 32, coreset(history="selected", weights="unbiased"), model)
    for make in (CoresetDataLoader, lambda data, c, m: CoresetBatchSampler(data, 32, c, m)):
        with pytest.raises(ValueError, match="optimizer is missing"):
            make(rows, coreset(), model)


# ── bad input ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_missing_sources_are_refused_with_the_ways_out():
    step = pool(network())
    del step.extra["source"]
    with pytest.raises(
        ValueError,
        match=r"extra\['source'\] is missing, and source discovery is off.*'source'.*'discover'.*sources=None",
    ):
        coreset().on_batch(step)
    with pytest.raises(ValueError, match="sources is None, so that there are neither labels nor clusters"):
        MiniBatchCoreset(sources=None)
    for bad in (torch.zeros(64), torch.zeros(63, dtype=torch.int64), torch.zeros(64, 1, dtype=torch.int64)):
        step.extra["source"] = bad
        with pytest.raises(ValueError, match=r"must hold one integer an example, \(64,\)"):
            coreset().on_batch(step)


def test_examples_with_features_that_are_not_finite_are_dropped_with_a_count():
    logged = {}
    step = pool(network())
    source = step.extra["source"]
    bad = (source == 0).nonzero()[:5, 0]
    step.inputs[bad] = math.nan
    step.services.log = lambda name, value: logged.__setitem__(name, value)
    method = coreset()
    with pytest.warns(UserWarning, match=r"features of 5 of \d+ candidates are not finite"):
        method.on_batch(step)
    assert not set(bad.tolist()) & set(step.index.tolist()) and len(step.index) == 32
    assert logged["coreset_dropped"] == 5 and 0 < logged["coreset_small_share"] < 1
    step = pool(network())
    step.inputs[:] = math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method.on_batch(step)
    assert torch.equal(step.index, torch.isin(source, torch.tensor(SMALL)).nonzero()[:, 0])


@pytest.mark.parametrize(
    "options, words",
    [
        ({"ratio": 0.0}, r"ratio must lie in \(0, 1\], got 0.0"),
        ({"ratio": 1.1}, "ratio must lie in"),
        ({"n_directions": 0}, "n_directions must be an integer >= 1"),
        ({"topk": 0}, "topk must be an integer >= 1"),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers"),
        ({"zo_eps": 0.0}, "zo_eps must be > 0"),
        ({"chunk_size": 0}, "chunk_size must be"),
        ({"eps": -1.0}, "eps must be >= 0"),
        ({"feature": "first_layer"}, "feature must be one of"),
        ({"metric": "l3"}, "metric must be one of"),
        ({"ranking": "best"}, "ranking must be one of"),
        ({"weights": "even"}, "weights must be one of"),
        ({"history": "none"}, "history must be one of"),
        ({"sources": "labels"}, "sources must be one of"),
        ({"small_sources": "rare"}, "small_sources must be one of"),
        ({"ranking": "random", "weights": "cluster"}, "weights='cluster' counts whom a medoid stands for"),
    ],
)
def test_bad_arguments_are_named(options, words, unchecked):
    with pytest.raises(ValueError, match=f"MiniBatchCoreset: {words}"):
        MiniBatchCoreset(**options)


@pytest.fixture
def unchecked():
    """Let bad arguments reach our own errors: jaxtyping would refuse them first."""
    from jaxtyping import config

    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)


def test_what_the_loop_lacks_is_named(unchecked):
    step = pool(network())
    step.optimizer = torch.optim.SGD(step.model.parameters())
    with pytest.raises(
        ValueError, match="history='optimizer' reads the moments of Adam or AdamW, and the optimizer is SGD"
    ):
        coreset().on_batch(step)
    with pytest.raises(RequirementError, match="MiniBatchCoreset requires 'optimizer'"):
        check_requirements(coreset(), [], "a loop")
    check_requirements(coreset(history="selected"), [], "a loop")
    step.model = Pair(network(), network())
    with pytest.raises(ValueError, match="the model is a Pair"):
        coreset().on_batch(step)
    with pytest.raises(ValueError, match="features and sources must hold one row an example, got 3 and 2"):
        coreset().select(torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64))
