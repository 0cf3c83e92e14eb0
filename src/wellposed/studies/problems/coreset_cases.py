"""Exact claims about mini-batch coresets: what one random direction leaves of the features, and what greedy reaches."""

from __future__ import annotations

import math
from itertools import combinations

import torch
from torch import Tensor

from ...gradients.adam_features import AdamMoments, adam_direction
from ...gradients.greedy_medoids import facility_location, facility_location_value, pairwise_similarity
from ...gradients.source_shares import source_budgets
from ...lab.study import Case

F64 = torch.float64


def replay_shortfall(similarity: Tensor, picks: Tensor) -> float:
    """How far the gain of any pick lies below the largest gain at its turn, relative to the largest similarity.

    0 for a greedy sequence, whatever it does at ties.
    """
    covered, worst = torch.full_like(similarity[:, 0], -math.inf), 0.0
    taken: list[int] = []
    for pick in picks.tolist():
        gain = similarity.sum(0) if not taken else (similarity - covered[:, None]).clamp(min=0.0).sum(0)
        gain[taken] = -math.inf
        worst = max(worst, float(gain.max() - gain[pick]))
        covered = torch.maximum(covered, similarity[:, pick])
        taken.append(pick)
    return worst / max(float(similarity.abs().max()), 1e-300)


def one_direction_cases() -> list[Case]:
    """With one fixed direction, 20 draws of 5 steps: features are numbers on a line, and picks greedy on these.

    Slopes are normal; the history goes on with the picks. `h(p)` is the normalised slope at a coordinate where z = 1 and
    the history is that of the whole vector divided by z: the same for all coordinates (without Adam's eps).
    """
    cases = []
    for draw in range(20):
        g = torch.Generator().manual_seed(draw)
        n, d, budget = 24, 40, 8
        z = torch.randn(d, generator=g, dtype=F64)
        moments = AdamMoments.start(z, (0.9, 0.999), 0.0)
        line = AdamMoments.start(z[:1], (0.9, 0.999), 0.0)
        rank, shortfall = 0.0, 0.0
        for _ in range(5):
            p = torch.randn(n, 1, generator=g, dtype=F64)
            features = moments.direction(p * z)
            numbers = adam_direction(p, line.first, line.second, line.updates, eps=0.0)
            singular = torch.linalg.svdvals(features - features.mean(0))
            # At the first step all features are +-sign(z), and may even be the same.
            rank = max(rank, float(singular[1] / singular[0].clamp(min=1e-12)))
            picks, _ = facility_location(pairwise_similarity(features), budget)
            shortfall = max(shortfall, replay_shortfall(pairwise_similarity(numbers), picks))
            chosen = p[picks]
            moments = moments.after(((chosen * z).sum(0), (chosen * z).square().sum(0)), budget)
            line = line.after((chosen.sum(0), chosen.square().sum(0)), budget)
        cases.append(Case(f"second singular value of the centred features, draw {draw}", rank, 1e-10))
        cases.append(Case(f"picks are greedy on the numbers h(p), draw {draw}", shortfall, 1e-9))
    return cases


def greedy_cases() -> list[Case]:
    """Greedy against the enumerated optimum, n = 12, 100 problems of 2 to 4 picks; budgets of 1,000 draws."""
    cases = []
    for draw in range(100):
        g = torch.Generator().manual_seed(draw)
        points = torch.randn(12, (1, 5, 40)[draw % 3], generator=g, dtype=F64)
        S, budget = pairwise_similarity(points), 2 + draw % 3
        picks, _ = facility_location(S, budget)
        sets = torch.tensor(list(combinations(range(12), budget)))
        best = float(S[:, sets].amax(2).sum(0).max())
        missing = max(0.0, (1 - 1 / math.e) * best - float(facility_location_value(S, picks)))
        cases.append(Case(f"greedy below (1 - 1/e) of the optimum, {budget} picks, draw {draw}", missing, 0.0))
    g = torch.Generator().manual_seed(0)
    wrong = 0
    for _ in range(1000):
        counts = torch.randint(0, 60, (int(torch.randint(1, 15, (), generator=g)),), generator=g)
        total = int(torch.randint(0, int(counts.sum()) + 1, (), generator=g))
        budgets = source_budgets(counts, total)
        wrong += int(budgets.sum()) != total or bool((budgets > counts).any()) or bool((budgets < 0).any())
    cases.append(Case("budgets that do not sum to the total, or exceed a source, of 1,000 draws", float(wrong), 0.0))
    return cases
