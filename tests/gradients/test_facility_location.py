"""Facility location: every pick is a greatest gain, greedy keeps its bound, budgets fit their sources."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import config

from wellposed.gradients import lazy_greedy
from wellposed.gradients.greedy_medoids import (
    cluster_sizes,
    facility_location,
    facility_location_value,
    pairwise_similarity,
)
from wellposed.gradients.source_shares import small_sources, source_budgets

F64 = torch.float64


@pytest.fixture
def unchecked():
    """Let bad arguments reach our own errors: jaxtyping would refuse them first."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)


def problem(seed, n=30, d=5):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=F64)


def replay(S, picks):
    """By NumPy: how far each pick's gain lies below the largest at its turn, and the gains."""
    S, best, short, gains, taken = np.asarray(S), None, [], [], []
    for pick in np.asarray(picks):
        gain = S.sum(0) if best is None else np.maximum(S - best[:, None], 0).sum(0)
        left = np.delete(gain, taken)
        short.append(left.max() - gain[pick])
        gains.append(gain[pick])
        best = S[:, pick] if best is None else np.maximum(best, S[:, pick])
        taken.append(pick)
    return np.array(short), np.array(gains)


# ── greedy ────────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("d", [1, 5, 40])
def test_every_pick_has_the_largest_gain_at_its_turn(d):
    for seed in range(34):
        S = pairwise_similarity(problem(seed, 12 + seed, d))
        picks, gains = facility_location(S, 2 + seed % 9)
        short, expected = replay(S, picks)
        assert short.max() <= 1e-9 * float(S.max()) and len(set(picks.tolist())) == len(picks)
        np.testing.assert_allclose(gains, expected, atol=1e-9 * float(S.max()))
        assert float(facility_location_value(S, picks)) == pytest.approx(float(gains.sum()), rel=1e-12)


@pytest.mark.parametrize("metric", ["l1", "l2", "cosine"])
def test_gains_do_not_grow_along_the_way(metric):
    for seed in range(30):
        S = pairwise_similarity(problem(seed), metric)
        assert float(S.min()) >= 0
        _, gains = facility_location(S, 30)
        assert float(gains.diff().max()) <= 1e-9 * float(S.max())


@pytest.mark.parametrize("budget", [2, 3, 4])
def test_greedy_reaches_its_share_of_the_enumerated_optimum(budget):
    worst, sets = 1.0, torch.tensor(list(combinations(range(12), budget)))
    for seed in range(30):
        S = pairwise_similarity(problem(seed, 12, 1 + seed % 6))
        picks, _ = facility_location(S, budget)
        best = float(S[:, sets].amax(2).sum(0).max())
        worst = min(worst, float(facility_location_value(S, picks)) / best)
    assert 1 - 1 / math.e <= worst <= 1 + 1e-12
    assert worst > 0.9


def test_a_shift_or_a_scale_of_similarity_keeps_picks_valid():
    for seed in range(20):
        S = pairwise_similarity(problem(seed))
        for other in (S + 7.3, S - 100.0, 0.37 * S):
            picks, _ = facility_location(other, 10)
            assert replay(S, picks)[0].max() <= 1e-9 * float(S.max())
        assert torch.equal(facility_location(2 * S, 10)[0], facility_location(S, 10)[0])


def test_equal_gains_go_to_the_lowest_position():
    S = pairwise_similarity(torch.tensor([[1.0], [0.0], [1.0], [0.0], [0.0]]))
    picks, gains = facility_location(S, 5)
    assert picks.tolist() == [1, 0, 2, 3, 4] and gains.tolist() == [3, 2, 0, 0, 0]


@settings(max_examples=12)
@given(st.integers(0, 500), st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_groups_in_one_loop_pick_what_each_picks_alone(seed, sizes):
    g = torch.Generator().manual_seed(seed)
    longest = max(sizes)
    features = torch.randn(len(sizes), longest, 3, generator=g, dtype=F64)
    valid = torch.arange(longest) < torch.tensor(sizes)[:, None]
    budgets = torch.tensor([int(torch.randint(0, size + 1, (), generator=g)) for size in sizes])
    S = pairwise_similarity(features, "l1", valid)
    picks, gains = facility_location(S, budgets, valid)
    assert picks.shape == gains.shape == (len(sizes), int(budgets.max()))
    for group, (size, budget) in enumerate(zip(sizes, budgets.tolist(), strict=True)):
        own = pairwise_similarity(features[group, :size])
        torch.testing.assert_close(S[group, :size, :size], own)
        assert (picks[group, budget:] == -1).all() and (gains[group, budget:] == 0).all()
        short, expected = replay(own, picks[group, :budget]) if budget else (np.zeros(1), np.zeros(0))
        assert short.max() <= 1e-9 * max(1.0, float(own.max()))
        np.testing.assert_allclose(gains[group, :budget], expected, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("d", [1, 2, 30])
def test_many_candidates_give_the_picks_of_the_plain_loop_bit_for_bit(d, dtype):
    for seed, n in enumerate((50, 80, 129, 200)):
        # Few whole numbers: sums are exact in any order, equal rows and equal gains abound.
        points = torch.randint(0, 4 if d < 30 else 9, (n, d), generator=torch.Generator().manual_seed(seed)).to(dtype)
        S = pairwise_similarity(points)
        picks, gains = facility_location(S, n)
        expected, added, covered, open_ = [], [], None, np.ones(n, bool)
        for _ in range(n):
            rows = S.numpy() if covered is None else np.maximum(S.numpy() - covered[:, None], 0)
            gain = np.where(open_, rows.sum(0), -np.inf)
            best = int(gain.argmax())
            expected.append(best)
            added.append(gain[best])
            open_[best] = False
            covered = S.numpy()[:, best] if covered is None else np.maximum(covered, S.numpy()[:, best])
        assert picks.tolist() == expected and gains.tolist() == added


@pytest.mark.parametrize("vecdot", [True, False])
def test_equal_rows_have_equal_sums_wherever_they_stand(vecdot, monkeypatch):
    if not vecdot:
        monkeypatch.delattr(np, "vecdot", raising=False)
    for n in (1, 7, 31, 64, 129):  # odd lengths: rows start at every alignment
        rows = np.repeat(problem(n, 1, n).float().numpy(), 37, 0)
        found = lazy_greedy._row_sums(rows, np.ones(n, np.float32))
        assert len(set(found.tolist())) == 1
        np.testing.assert_allclose(found, rows.astype(np.float64).sum(1), rtol=1e-4, atol=1e-4)


def test_far_fewer_candidates_are_computed_than_by_the_plain_loop(monkeypatch):
    rows, added = [], lazy_greedy._added
    monkeypatch.setattr(lazy_greedy, "_added", lambda own, *rest: (rows.append(len(own)), added(own, *rest))[1])
    facility_location(pairwise_similarity(problem(0, 256, 40)), 128)
    assert sum(rows) < 256 * 128 / 4


def test_groups_may_have_holes_and_half_precision():
    S = pairwise_similarity(problem(3, 9, 2))
    valid = torch.tensor([[True, False, True, True, False, True, True, False, True]])
    there = valid[0].nonzero()[:, 0]
    alone, gains = facility_location(S[there][:, there], 4)
    picks, added = facility_location(S[None], 4, valid)
    assert picks[0].tolist() == there[alone].tolist() and added[0].tolist() == gains.tolist()
    half, gains = facility_location(S.to(torch.bfloat16).requires_grad_(), 4)
    assert (
        gains.dtype == torch.bfloat16
        and half.tolist() == facility_location(S.to(torch.bfloat16).float(), 4)[0].tolist()
    )


def test_cluster_sizes_count_the_nearest_pick():
    for seed in range(10):
        points = problem(seed, 20, 3)
        S = pairwise_similarity(points)
        picks, _ = facility_location(S, 5)
        nearest = torch.cdist(points, points[picks], p=1).argmin(1)
        found = cluster_sizes(S[None], picks[None], torch.ones(1, 20, dtype=torch.bool))[0]
        assert found.tolist() == torch.bincount(nearest, minlength=5).tolist() and int(found.sum()) == 20


def test_submodlib_picks_are_valid_by_the_same_criterion_and_reach_the_same_value():
    submodlib = pytest.importorskip("submodlib")
    for seed in range(10):
        S = pairwise_similarity(problem(seed, 40, 5))
        function = submodlib.FacilityLocationFunction(
            n=40, mode="dense", sijs=S.numpy().astype(np.float32), separate_rep=False
        )
        theirs = torch.tensor(
            [pick for pick, _ in function.maximize(budget=8, optimizer="LazyGreedy", show_progress=False)]
        )
        assert replay(S, theirs)[0].max() <= 1e-4 * float(S.max())
        ours, _ = facility_location(S, 8)
        assert float(facility_location_value(S, ours)) == pytest.approx(
            float(facility_location_value(S, theirs)), rel=1e-3
        )


def test_bad_matrices_and_budgets_are_named(unchecked):
    with pytest.raises(ValueError, match=r"similarity must be \(n, n\)"):
        facility_location(torch.zeros(2, 3), 1)
    with pytest.raises(ValueError, match="similarity must be finite"):
        facility_location(torch.full((2, 2), float("nan")), 1)
    for budget in (-1, 4):
        with pytest.raises(ValueError, match=r"budget must lie in \[0, n\]"):
            facility_location(torch.eye(3), budget)
    with pytest.raises(ValueError, match="budget must lie"):
        facility_location(torch.eye(3)[None], torch.tensor([3]), torch.tensor([[True, True, False]]))
    with pytest.raises(ValueError, match="metric must be one of"):
        pairwise_similarity(torch.eye(3), "manhattan")


# ── budgets ───────────────────────────────────────────────────────────────────────────────────────────────────────────
FROZEN = [
    ([40, 30, 20, 3], 29, [12, 9, 7, 1]), ([5, 5, 5], 7, [3, 2, 2]), ([5, 5, 5], 8, [3, 3, 2]), ([1, 1, 1, 1], 2, [1, 1, 0, 0]),
    ([10, 0, 10], 5, [3, 0, 2]), ([0, 0, 7], 3, [0, 0, 3]), ([100, 1], 50, [49, 1]), ([100, 1], 1, [1, 0]),
    ([9, 8, 7, 6, 5], 0, [0, 0, 0, 0, 0]), ([9, 8, 7, 6, 5], 35, [9, 8, 7, 6, 5]), ([9, 8, 7, 6, 5], 17, [4, 4, 3, 3, 3]),
    ([3, 3, 3, 3], 11, [3, 3, 3, 2]), ([50, 30, 20], 10, [5, 3, 2]), ([50, 30, 21], 10, [4, 3, 3]),
    ([1, 2, 3, 4, 5, 6], 10, [1, 1, 2, 2, 2, 2]), ([23, 41, 17, 12], 29, [7, 12, 6, 4]), ([64], 32, [32]),
    ([2, 2], 3, [2, 1]), ([7, 7, 1], 14, [7, 6, 1]), ([33, 33, 33], 50, [17, 17, 16]),
]  # fmt: skip


@pytest.mark.parametrize("counts, total, expected", FROZEN)
def test_budgets_of_the_frozen_table(counts, total, expected):
    assert source_budgets(torch.tensor(counts), total).tolist() == expected


@given(st.lists(st.integers(0, 400), min_size=1, max_size=16), st.floats(0, 1))
def test_budgets_sum_to_the_total_and_exceed_no_source(counts, share):
    total = round(share * sum(counts))
    budgets = source_budgets(torch.tensor(counts), total).tolist()
    assert sum(budgets) == total and all(0 <= b <= c for b, c in zip(budgets, counts, strict=True))
    if total < sum(counts):
        floors = [total * c // sum(counts) for c in counts]
        extra = [b - f for b, f in zip(budgets, floors, strict=True)]
        assert set(extra) <= {0, 1}
        # Those that got one more are the smallest floors, the first among equals.
        order = sorted((f, i) for i, (f, c) in enumerate(zip(floors, counts, strict=True)) if c)
        assert {i for i, e in enumerate(extra) if e} == {i for _, i in order[: sum(extra)]}


def test_bad_budgets_are_named():
    with pytest.raises(ValueError, match=r"total must lie in \[0, 5\]"):
        source_budgets(torch.tensor([2, 3]), 6)
    with pytest.raises(ValueError, match="counts must be >= 0"):
        source_budgets(torch.tensor([-1, 3]), 1)


def test_small_sources_of_math_instruct_sizes_lie_below_the_mean():
    ids = torch.repeat_interleave(torch.tensor([3, 8, 11, 5]), torch.tensor([10, 50, 20, 40]))
    assert small_sources(ids) == {3, 11}
    assert small_sources(torch.tensor([4, 4, 9, 9])) == frozenset()  # none is below the mean
    with pytest.raises(ValueError, match="source_ids is empty"):
        small_sources(torch.tensor([], dtype=torch.int64))
