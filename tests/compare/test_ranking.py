"""The ranking: hand-computed intervals, what may be claimed, and the sentence that says it."""

import math

import pytest
from invented_comparison import invented
from scipy import stats

from wellposed.compare.ranking import ArmRuns, rank, signed


def arm(name, scores, seconds=1.0, memory=None, failures=()):
    n = len(scores)
    return ArmRuns(name, name, list(map(float, scores)), [seconds] * n, [memory] * n, list(failures))


BASE = arm("base", [10, 11, 12, 13, 14, 15])


def shifted(name, gaps, **kwargs):
    return arm(name, [b + g for b, g in zip(BASE.scores, gaps, strict=True)], **kwargs)


def row(ranking, name):
    return next(row for row in ranking.rows if row.name == name)


def test_difference_is_the_paired_student_interval_by_hand():
    found = row(rank([BASE, shifted("a", [1, 1, 1, 1, 1, 2])], "base"), "a")
    # mean 7/6, standard deviation sqrt(1/6), t(0.975, 5 degrees of freedom) = 2.5706
    half = 2.570582 * math.sqrt(1 / 6) / math.sqrt(6)
    assert found.difference.estimate == pytest.approx(7 / 6)
    assert found.difference.low == pytest.approx(7 / 6 - half, abs=1e-5)
    assert found.difference.high == pytest.approx(7 / 6 + half, abs=1e-5)
    assert found.p == 2 / 2**6 and found.group == "better"


def test_pairing_removes_what_seeds_share():
    found = row(rank([BASE, shifted("a", [1, 1, 1, 1, 1, 2])], "base"), "a")
    assert found.difference.half_width < 0.5 < 1.9 < found.mean.half_width


def test_level_is_divided_by_the_number_of_comparisons():
    arms = [BASE, *(shifted(f"a{i}", [i, 0, 1, 0, 1, 0]) for i in range(4))]
    ranking = rank(arms, "base")
    assert ranking.level == pytest.approx(1 - 0.05 / 4)
    gap = row(ranking, "a1").difference
    values = [1, 0, 1, 0, 1, 0]
    low, high = stats.ttest_1samp(values, 0).confidence_interval(1 - 0.05 / 4)
    assert (gap.low, gap.high) == (pytest.approx(low), pytest.approx(high))


def test_interval_alone_does_not_make_a_claim():
    """Five equal gaps: the interval is a point above zero, but 2 / 2^5 = 0.0625 is above 0.05."""
    base = arm("base", [1, 2, 3, 4, 5])
    found = row(rank([base, arm("a", [2, 3, 4, 5, 6])], "base"), "a")
    assert found.difference.low > 0 and found.p == 0.0625 and found.group == "within noise"


def test_sign_flips_alone_do_not_make_a_claim():
    """All six gaps are positive, p = 2 / 2^6, but one of them is so large that the interval holds zero."""
    found = row(rank([BASE, shifted("a", [0.1, 0.1, 0.1, 0.1, 0.1, 9])], "base"), "a")
    assert found.p < 0.05 and found.difference.low < 0 and found.group == "within noise"


def test_equal_scores_are_within_noise():
    found = row(rank([BASE, shifted("a", [0] * 6)], "base"), "a")
    assert found.group == "within noise" and found.p == 1.0 and found.difference.half_width == 0


def test_rows_stand_in_the_order_of_their_means():
    arms = [shifted("low", [-1] * 6), BASE, shifted("high", [2] * 6), shifted("middle", [1] * 6)]
    assert [(r.rank, r.name) for r in rank(arms, "base").rows] == [(1, "high"), (2, "middle"), (3, "base"), (4, "low")]


def test_worse_is_a_claim_too():
    assert row(rank([BASE, shifted("a", [-1, -1, -1, -1, -1, -2])], "base"), "a").group == "worse"


def test_a_noisy_arm_with_a_higher_mean_does_not_win():
    steady, noisy = shifted("steady", [1, 1, 1.1, 1, 1, 0.9]), shifted("noisy", [20, -9, 12, -8, 9, -7])
    base = rank([BASE, steady, noisy], "base")
    assert base.rows[0].name == "noisy" and base.winner.name == "base"  # 6 seeds are too few for two comparisons
    arms = [ArmRuns(a.name, a.label, a.scores * 2, a.seconds * 2, a.memory * 2) for a in (BASE, steady, noisy)]
    ranking = rank(arms, "base")
    assert ranking.winner.name == "steady" and ranking.tied == ["noisy"]


def test_time_is_the_median_of_paired_ratios():
    base, own = arm("base", [1, 2, 3]), arm("a", [1, 2, 3])
    base.seconds, own.seconds = [1.0, 2.0, 4.0], [3.0, 2.0, 8.0]
    base.memory, own.memory = [100, 100, None], [None, 150, 150]
    found = row(rank([base, own], "base"), "a")
    assert found.time == 2.0 and found.memory == 1.5


def test_costs_that_were_not_measured_are_none():
    base, own = arm("base", [1, 2, 3]), arm("a", [1, 2, 3])
    own.seconds = [None] * 3
    found = row(rank([base, own], "base"), "a")
    assert found.time is None and found.memory is None


def test_arms_that_failed_are_no_ties_of_the_winner():
    ranking = invented(failing="mixup").ranking()
    assert row(ranking, "mixup").failures == 3 and "mixup" not in ranking.tied
    assert row(ranking, "mixup").mean.estimate < 80, "a failed seed counts as the worst score"


def test_runner_ups_are_compared_with_the_winner():
    ranking = invented().ranking()
    assert ranking.winner.name == "elr"
    assert "elr-plus" in ranking.tied and "plain" not in ranking.tied and "early-stopping" not in ranking.tied


def test_sentence_when_a_method_helps():
    sentence = rank([BASE, shifted("elr", [1, 1, 1, 1, 1, 2])], "base").sentence
    assert sentence == "Elr helps: +1.2 points over base (95 % interval 0.7 to 1.6), at no visible cost."


def test_sentence_says_that_intervals_hold_together_and_who_is_tied():
    ranking = invented().ranking()
    gap = ranking.winner.difference
    assert ranking.sentence == (
        f"Early-learning (ELR) helps: +{gap.estimate:.1f} points over early stopping (95 % interval {gap.low:.1f} to "
        f"{gap.high:.1f}, all 11 comparisons together), at no visible cost. "
        "Early-learning plus (ELR+) and generalized cross-entropy are within noise of it."
    )


def test_sentence_names_the_price():
    gaps = [1, 1, 1, 1, 1, 2]
    base = arm("base", BASE.scores, memory=100)
    assert "at 2.0 times the training time." in rank([BASE, shifted("a", gaps, seconds=2.0)], "base").sentence
    both = rank([base, shifted("a", gaps, seconds=2.0, memory=150)], "base").sentence
    assert "at 2.0 times the training time and 1.5 times the memory." in both


def test_sentence_when_nothing_helps():
    sentence = invented(noise=0, effect=0.0).ranking().sentence
    assert sentence.startswith("Nothing here beats early stopping on this data beyond noise (best: ")
    assert sentence.endswith("Keep early stopping.")


def test_sentence_when_all_are_worse_tells_the_best_of_them():
    sentence = rank([BASE, shifted("a", [-1, -1, -1, -1, -1, -2])], "base").sentence
    assert "(best: a -1.2, interval -1.6 to -0.7)" in sentence


def test_sentence_when_seeds_are_too_few_for_any_claim():
    ranking = invented(n_seeds=5).ranking()
    assert ranking.winner.name == "early-stopping"
    assert ranking.sentence.startswith("5 seeds cannot show a difference between 12 arms; 9 or more can (best: ")
    assert ranking.shortage == "5 seeds cannot show a difference between 12 arms; 9 or more can."
    assert invented(n_seeds=9).ranking().shortage == ""


def test_long_lists_of_ties_are_cut():
    arms = [BASE, *(shifted(f"a{i}", [1, 1, 1, 1, 1, 2 - i / 10]) for i in range(6))]
    many = [ArmRuns(a.name, a.label, a.scores * 2, a.seconds * 2, a.memory * 2) for a in arms]
    assert rank(many, "base").sentence.endswith("A1, a2 and 3 others are within noise of it.")


def test_narrow_intervals_get_two_decimals():
    steady = arm("base", [90.00, 90.02, 90.01, 90.03, 90.02, 90.01])
    better = arm("a", [90.06, 90.09, 90.07, 90.10, 90.09, 90.08])
    ranking = rank([steady, better], "base")
    assert ranking.decimals == 2 and "+0.07 points" in ranking.sentence


def test_no_minus_before_a_zero():
    assert [signed(x) for x in (-0.04, 0.0, 0.04, -0.06)] == ["+0.0", "+0.0", "+0.0", "-0.1"]


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="no arm is called 'x', there are"):
        rank([BASE], "x")
    with pytest.raises(ValueError, match="at least two arms, got 1"):
        rank([BASE], "base")
    with pytest.raises(ValueError, match="same number of seeds"):
        rank([BASE, arm("a", [1.0])], "base")
