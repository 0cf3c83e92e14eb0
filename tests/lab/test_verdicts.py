"""The verdict rule: each word in a constructed case, against SciPy, its symmetries, and against its own simulation."""

import math
import runpy
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from wellposed.lab.protocol import parse_protocol
from wellposed.lab.simulation import (
    DISTRIBUTIONS,
    draw,
    effect_shares,
    effect_words,
    equivalence_words,
    half_widths,
    sign_flip_ps,
)
from wellposed.lab.statistics import mean_interval, sign_flip_p, smallest_n
from wellposed.lab.study import claim_level
from wellposed.lab.verdicts import Case, Condition, judge_effect, judge_equivalence, judge_exact, secondary_level
from wellposed.papers.catalogue import load_cards

ROOT = Path(__file__).parents[2]
REACHED, NOT_REACHED = Condition("memorises", 0.3, True), Condition("memorises", 0.0, False)
QUARTERS = st.integers(-40, 40).map(lambda i: i / 4)
ONE = st.lists(QUARTERS, min_size=8, max_size=10)
MARGINS = st.integers(0, 20).map(lambda i: i / 4)
RANK = {"refuted": -1, "inconclusive": 0, "supported": 1}


@st.composite
def contrasts(draw):
    seeds = draw(st.integers(8, 10))
    columns = st.lists(st.lists(QUARTERS, min_size=seeds, max_size=seeds), min_size=1, max_size=3)
    return {str(i): column for i, column in enumerate(draw(columns))}


def around(center, width=0.5, seeds=12):
    """Values of one contrast, spread evenly around a mean."""
    return list(center + width * np.linspace(-1, 1, seeds))


def said(verdict):
    return verdict.word, verdict.qualifier


def mapped(values, change):
    return {name: [change(v) for v in column] for name, column in values.items()}


# Words of an effect


@pytest.mark.parametrize(
    ("center", "expected"),
    [
        (2.0, ("supported", "")),
        (1.0, ("inconclusive", "")),
        (0.5, ("refuted", "smaller than claimed")),
        (0.0, ("refuted", "absent")),
        (-0.1, ("refuted", "absent")),
        (-1.0, ("refuted", "reversed")),
    ],
)
def test_an_effect_is_judged_by_where_its_interval_lies(center, expected):
    assert said(judge_effect({"": around(center)}, margin=1.0, conditions=[REACHED])) == expected


def test_without_a_margin_only_a_reversed_effect_is_refuted():
    assert said(judge_effect({"": around(-0.5)}, margin=0.0)) == ("refuted", "reversed")
    assert said(judge_effect({"": around(0.0)}, margin=0.0)) == ("inconclusive", "")


def test_nothing_is_decided_where_the_phenomenon_does_not_exist():
    for conditions in ([NOT_REACHED], [REACHED, NOT_REACHED]):
        for center in (0.0, 1.0, 2.0):
            verdict = judge_effect({"": around(center)}, 1.0, conditions)
            assert said(verdict) == ("inconclusive", "regime not reached")
            assert verdict.conditions == tuple(conditions)


def test_a_list_is_supported_only_if_every_contrast_is():
    good, open_ = around(2.0), around(1.0)
    assert judge_effect({"a": good, "b": good, "c": good}, 1.0).word == "supported"
    verdict = judge_effect({"a": good, "b": open_, "c": good}, 1.0)
    assert (verdict.word, verdict.weakest.name) == ("inconclusive", "b")


def test_support_of_a_list_needs_no_stricter_level_but_refutation_does():
    # Upper ends at 95 %: just below the margin; at 1 - 0.05/4: above it.
    half = mean_interval(around(0.0), 0.95).half_width
    values, good = around(1 - 1.05 * half), around(2.0)
    assert mean_interval(values, 1 - 0.05 / 4).high > 1
    assert judge_effect({"a": values}, 1.0).word == "refuted"
    assert judge_effect({"a": values, "b": good, "c": good, "d": good}, 1.0).word == "inconclusive"
    barely = around(1 + 1.05 * half)
    assert judge_effect({"a": barely, "b": barely, "c": barely, "d": barely}, 1.0).word == "supported"


def test_one_contrast_far_enough_below_refutes_a_list_and_gives_it_its_word_of_scale():
    good = around(3.0)
    for center, size in ((0.6, "smaller than claimed"), (0.0, "absent"), (-1.0, "reversed")):
        assert said(judge_effect({"a": good, "b": around(center, 0.2), "c": good}, 1.0)) == ("refuted", size)
    verdict = judge_effect({"a": around(0.6, 0.2), "b": around(-1.0), "c": good}, 1.0)
    assert said(verdict) == ("refuted", "reversed")
    assert verdict.contrasts[1].refuting.level == pytest.approx(1 - 0.05 / 3)
    assert verdict.contrasts[1].interval.level == 0.95


def test_where_interval_and_sign_flips_disagree_nothing_is_claimed():
    values = [0.9, 1.0, 1.1, 1.0, 0.95]  # p = 2/32, whatever the interval says
    assert mean_interval(values).low > 0.5
    assert sign_flip_p(values) > 0.05
    assert said(judge_effect({"": values}, 0.5)) == ("inconclusive", "")
    assert said(judge_effect({"": values}, 2.0)) == ("inconclusive", "")
    assert said(judge_equivalence({"": values}, 2.0)) == ("inconclusive", "")
    assert judge_effect({"": [*values, 1.02]}, 0.5).word == "supported"


def test_the_word_of_scale_is_a_direction_too_and_needs_both_tests():
    for values in ([0.8, 1.3, 0.7, 0.2, -0.3, -0.4, 1.0, 1.3], [-1.1, -0.1, -1.0, 0.3, 0.1, -0.7, -1.0, -1.3]):
        interval = mean_interval(values)
        assert interval.low > 0 or interval.high < 0
        assert sign_flip_p(values) > 0.05
        assert said(judge_effect({"": values}, 5.0)) == ("refuted", "absent")


def test_equal_values_are_judged_without_rounding():
    third = 1 / 3
    assert judge_effect({"": [third] * 12}, third).word == "inconclusive"
    assert judge_effect({"": [third + 1e-9] * 12}, third).word == "supported"
    assert said(judge_effect({"": [third - 1e-9] * 12}, third)) == ("refuted", "smaller than claimed")


# Equivalence


@pytest.mark.parametrize(
    ("center", "two_sided", "one_sided"),
    [
        (0.0, ("supported", ""), ("supported", "")),
        (0.9, ("inconclusive", ""), ("supported", "")),
        (-0.9, ("inconclusive", ""), ("inconclusive", "")),
        (2.0, ("refuted", "above the margin"), ("supported", "")),
        (-2.0, ("refuted", "below the margin"), ("refuted", "below the margin")),
    ],
)
def test_an_equivalence_is_judged_at_both_margins_and_non_inferiority_at_one(center, two_sided, one_sided):
    values = {"": around(center)}
    assert said(judge_equivalence(values, 1.0, [REACHED])) == two_sided
    assert said(judge_equivalence(values, 1.0, [REACHED], non_inferiority=True)) == one_sided


@pytest.mark.parametrize("center", [-2.0, 0.0, 2.0])
def test_an_equivalence_says_nothing_where_the_phenomenon_does_not_exist(center):
    for one_sided in (False, True):
        verdict = judge_equivalence({"": around(center)}, 1.0, [NOT_REACHED], non_inferiority=one_sided)
        assert said(verdict) == ("inconclusive", "regime not reached")


def test_every_contrast_of_an_equivalence_must_lie_inside_and_one_outside_refutes():
    inside, open_, outside = around(0.0), around(0.9), around(-3.0)
    assert judge_equivalence({"a": inside, "b": inside}, 1.0).word == "supported"
    assert judge_equivalence({"a": inside, "b": open_}, 1.0).word == "inconclusive"
    assert said(judge_equivalence({"a": inside, "b": outside}, 1.0)) == ("refuted", "below the margin")


def test_the_p_value_of_an_equivalence_is_that_of_the_nearer_margin():
    values = around(0.5, 1.5)
    (both,) = judge_equivalence({"": values}, 1.0).contrasts
    (one,) = judge_equivalence({"": values}, 1.0, non_inferiority=True).contrasts
    assert both.p == sign_flip_p([v - 1.0 for v in values])
    assert one.p == sign_flip_p([v + 1.0 for v in values])
    assert one.p < both.p


# Exact claims


def test_an_exact_claim_fails_with_its_first_case_and_not_a_number_counts_as_off():
    good, off, worse = Case("n = 1", 0.0, 1e-12), Case("n = 2", 1e-3, 1e-12), Case("n = 3", 1.0, 1e-12)
    verdict = judge_exact([good, off, worse])
    assert (verdict.word, verdict.counterexample, verdict.cases, verdict.worst) == ("fails", off, 3, 1.0)
    verdict = judge_exact([good, Case("n = 2", 1e-12, 1e-12)])
    assert (verdict.word, verdict.counterexample, verdict.worst) == ("holds", None, 1e-12)
    nothing = Case("n = 0", math.nan, 1e-12)
    verdict = judge_exact([good, nothing])
    assert (verdict.word, verdict.counterexample) == ("fails", nothing)
    assert math.isnan(verdict.worst)
    assert judge_exact([Case("infinite", math.inf, 1.0)]).word == "fails"
    with pytest.raises(ValueError, match="at least one case"):
        judge_exact([])


# Levels and bad input


def test_a_secondary_claim_is_judged_at_its_own_level():
    level = secondary_level(5)
    assert level == pytest.approx(0.99)
    values = around(mean_interval(around(0.0), 0.97).half_width)
    assert judge_effect({"": values}, 0.0).word == "supported"
    verdict = judge_effect({"": values}, 0.0, level=level)
    assert (verdict.word, verdict.level, verdict.contrasts[0].interval.level) == ("inconclusive", level, level)
    assert secondary_level(1) == 0.95
    assert secondary_level(0) == 0.95


def test_eight_seeds_can_never_decide_at_a_level_that_needs_more():
    certain = around(5.0, 0.01, seeds=8)
    assert smallest_n(secondary_level(6)) == 8
    assert judge_effect({"": certain}, 0.0, level=secondary_level(6)).word == "supported"
    assert judge_effect({"": certain}, 0.0, level=secondary_level(7)).word == "inconclusive"
    assert judge_effect({"": certain}, 0.0, level=1 - 2 / 2**8).word == "supported"  # p is just what it may be


def test_every_registered_study_has_seeds_enough_for_the_level_of_each_claim():
    found = 0
    for card in load_cards().values():
        if card.protocol:
            seeds = parse_protocol(card.protocol, card.slug).seeds
            for claim in card.claims:
                if claim.kind in ("effect", "equivalence"):
                    assert smallest_n(claim_level(card, claim)) <= seeds, f"{card.slug}: {claim.id}"
                    found += 1
    assert found


def test_wrong_arguments_are_refused_by_name():
    good = around(0.0)
    for margin in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="margin must be >= 0 and finite, got"):
            judge_effect({"": good}, margin)
    for margin in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="margin must be > 0 and finite, got"):
            judge_equivalence({"": good}, margin)
    for judge in (judge_effect, judge_equivalence):
        with pytest.raises(ValueError, match="at least one contrast"):
            judge({}, 1.0)
        with pytest.raises(ValueError, match="at least two seeds"):
            judge({"": [1.0]}, 1.0)
        with pytest.raises(ValueError, match=r"same seeds, got so many values: \{'a': 12, 'b': 11\}"):
            judge({"a": good, "b": good[:-1]}, 1.0)
        for bad in (math.nan, math.inf):
            with pytest.raises(ValueError, match="finite numbers"):
                judge({"": [*good, bad]}, 1.0)
        with pytest.raises(ValueError, match=r"level must lie in \(0, 1\), got 95"):
            judge({"": good}, 1.0, level=95)


# Symmetries


@given(contrasts(), MARGINS, st.integers(0, 10))
def test_a_constant_added_to_values_and_margin_changes_no_word(values, margin, constant):
    moved = judge_effect(mapped(values, lambda v: v + constant), margin + constant)
    assert moved.word == judge_effect(values, margin).word


@given(contrasts(), MARGINS, st.randoms())
def test_the_order_of_seeds_and_of_contrasts_does_not_matter(values, margin, random):
    order = list(range(len(values["0"])))
    random.shuffle(order)
    names = list(values)
    random.shuffle(names)
    turned = {name: [values[name][i] for i in order] for name in names}
    assert said(judge_effect(turned, margin)) == said(judge_effect(values, margin))
    assert said(judge_equivalence(turned, margin + 1)) == said(judge_equivalence(values, margin + 1))


@given(contrasts(), MARGINS, st.integers(-6, 6))
def test_the_unit_does_not_matter(values, margin, power):
    scaled = mapped(values, lambda v: v * 2.0**power)
    assert said(judge_effect(scaled, margin * 2.0**power)) == said(judge_effect(values, margin))


@given(contrasts(), MARGINS, st.integers(0, 40).map(lambda i: i / 8))
def test_larger_values_are_never_judged_worse(values, margin, more):
    before, after = judge_effect(values, margin), judge_effect(mapped(values, lambda v: v + more), margin)
    assert RANK[after.word] >= RANK[before.word]


@given(contrasts(), MARGINS)
def test_a_further_contrast_never_makes_a_list_supported(values, margin):
    first = {"0": values["0"]}
    assert judge_effect(first, margin).word == "supported" or judge_effect(values, margin).word != "supported"


@given(ONE, MARGINS)
def test_an_equivalence_turned_around_has_the_same_word(values, margin):
    there, back = judge_equivalence({"": values}, margin + 1), judge_equivalence({"": [-v for v in values]}, margin + 1)
    swapped = {"below the margin": "above the margin", "above the margin": "below the margin", "": ""}
    assert (there.word, swapped[there.qualifier]) == said(back)


@given(contrasts(), MARGINS)
def test_non_inferiority_is_an_effect_above_the_negative_margin(values, margin):
    found = judge_equivalence(values, margin + 1, non_inferiority=True)
    assert found.word == judge_effect(mapped(values, lambda v: v + margin + 1), 0.0).word


# Independent reference


def reference(values, margin, level=0.95):
    """The rule in SciPy's words."""

    def side(column, at):
        test = stats.ttest_1samp(column, margin)
        interval = test.confidence_interval(at)
        moved = (np.asarray(column) - margin,)
        p = stats.permutation_test(moved, np.sum, permutation_type="samples", n_resamples=np.inf).pvalue
        return 0 if p > 1 - at + 1e-12 else int(interval.low > margin) - int(interval.high < margin)

    if all(side(column, level) == 1 for column in values.values()):
        return "supported"
    strict = 1 - (1 - level) / len(values)
    return "refuted" if any(side(column, strict) == -1 for column in values.values()) else "inconclusive"


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_rule_is_scipys_t_test_and_permutation_test_joined(name):
    generator = np.random.default_rng(4)
    seen = set()
    for truth in (-1.2, -0.6, 0.0, 0.9, 1.6):
        for k in (1, 3):
            sample = draw(DISTRIBUTIONS[name], generator, 1, 9, k)[0] + truth + 0.5
            values = {str(i): row.tolist() for i, row in enumerate(sample)}
            found = judge_effect(values, 0.5)
            assert found.word == reference(values, 0.5)
            seen.add(found.word)
            p = stats.permutation_test(
                (sample[0] - 0.5,), np.mean, permutation_type="samples", n_resamples=np.inf
            ).pvalue
            assert found.contrasts[0].p == pytest.approx(p, abs=1e-12)
    assert len(seen) >= 2


# The simulation


@pytest.mark.parametrize("seeds", [2, 8, 12, 20, 24])
@pytest.mark.parametrize("name", ["discrete", "diverging"])
def test_the_vectorised_sign_flip_test_is_the_one_in_use(seeds, name):
    values = draw(DISTRIBUTIONS[name], np.random.default_rng(seeds), 6, seeds)[:, 0] + 0.3
    expected = [sign_flip_p(row, draws=2_000) for row in values]
    assert sign_flip_ps(values).tolist() == pytest.approx(expected, abs=1e-12)


def test_the_vectorised_interval_is_the_one_in_use():
    values = draw(DISTRIBUTIONS["skewed"], np.random.default_rng(0), 20, 8)[:, 0]
    assert half_widths(values, 0.99) == pytest.approx([mean_interval(row, 0.99).half_width for row in values])


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize(("k", "level"), [(1, 0.95), (3, 0.95), (4, 0.98)])
def test_the_simulated_rule_is_the_rule_in_use(name, k, level):
    generator = np.random.default_rng([k, len(name)])
    truths = generator.uniform(-1.5, 2.5, (40, 1, 1))
    values = draw(DISTRIBUTIONS[name], generator, 40, 10, k) + truths
    for words, judge in ((effect_words, judge_effect), (equivalence_words, judge_equivalence)):
        expected = []
        for sample in values:
            verdict = judge({str(i): row.tolist() for i, row in enumerate(sample)}, 1.0, level=level)
            expected.append(f"{verdict.word}: {verdict.qualifier}" if verdict.qualifier else verdict.word)
        assert words(values, 1.0, level).tolist() == expected
        assert len(set(expected)) >= 2


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_every_distribution_has_mean_zero_and_standard_deviation_one(name):
    # All its quantiles in turn, instead of draws.
    u = (np.arange(2_000_000) + 0.5) / 2_000_000
    values = DISTRIBUTIONS[name].quantiles(special.ndtri(u))
    assert values.mean() == pytest.approx(0, abs=1e-3)
    assert values.std() == pytest.approx(1, abs=0.005)


def test_contrasts_share_about_half_of_their_variance():
    for name, least in (("normal", 0.49), ("discrete", 0.48), ("skewed", 0.42), ("heavy", 0.35), ("diverging", 0.3)):
        values = draw(DISTRIBUTIONS[name], np.random.default_rng(1), 4000, 12, 2)
        assert least < np.corrcoef(values[:, 0].ravel(), values[:, 1].ravel())[0, 1] < 0.51


def test_one_diverged_seed_in_ten_is_what_the_name_says():
    values = draw(DISTRIBUTIONS["diverging"], np.random.default_rng(2), 4000, 12)
    lowest = values.min()
    assert (values == lowest).mean() == pytest.approx(0.1, abs=0.006)
    rest = values[values > lowest]
    assert (rest.mean() - lowest) / rest.std() == pytest.approx(10, abs=0.1)


def test_a_normal_claim_at_its_margin_is_decided_wrongly_no_more_often_than_the_level_says():
    found = effect_shares(DISTRIBUTIONS["normal"], np.random.default_rng(3), 8_000, 12, [1.0], 1.0)
    error = math.sqrt(0.025 * 0.975 / 8_000)
    assert found["supported"] < 0.025 + 3 * error
    assert found["refuted"] < 0.025 + 3 * error
    assert found["inconclusive"] < 0.97


SCRIPT = runpy.run_path(str(ROOT / "scripts" / "simulate_verdicts.py"))
TABLES = {table.name: table for table in SCRIPT["tables"]()}
PAGE = (ROOT / "docs" / "verdicts.md").read_text("utf-8")


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_of_the_page_are_those_of_the_simulation(name):
    shown = SCRIPT["section"](PAGE, name)[0]
    assert TABLES[name].differences(shown, 1_500, slice(None, None, 2)) == []


def test_a_number_of_the_page_that_is_wrong_is_found():
    table = TABLES["coverage"]
    shown = SCRIPT["section"](PAGE, "coverage")[0]
    assert table.differences(shown, 10_000) == []
    lines = shown.splitlines()
    for old, new in ((lines[2].split("|")[2], " 90.0 "), (lines[5].split("|")[4], " 95.0 ")):
        assert len(table.differences(shown.replace(old, new, 1), 10_000)) == 1
    assert table.differences(shown.replace("skewed", "lopsided"), 10) == [
        "coverage: header or labels differ from the script"
    ]
