"""The catalogue: complete, valid, searchable, and free of torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from wellposed.papers.arms import load_arms
from wellposed.papers.catalogue import Card, UnknownPaper, find_card, load_cards
from wellposed.papers.pages import BEGIN, END, stale, with_table
from wellposed.papers.reading import build
from wellposed.papers.search import search

ROOT = Path(__file__).parents[2]
SLUGS = [
    "active-mtrl",
    "ba-lora",
    "beyond-l1",
    "bo-rep",
    "colm",
    "dcdm",
    "dpp-least-squares",
    "dynamical-stability",
    "elr",
    "gg-prior",
    "glad",
    "hft",
    "ignite",
    "infinite-compute",
    "linear-mdp",
    "lp-reg",
    "lpn",
    "maid",
    "nde-solver-reg",
    "nested-dropout",
    "orthogonal-conv",
    "ps-kd",
    "quantnas",
    "scaling-crossover",
    "sltrain",
    "sparse-ot",
    "stn",
    "subgm",
    "token-crisis",
    "unfolded",
    "weight-compander",
]


def test_all_papers_have_a_valid_card():
    cards = load_cards()
    assert sorted(cards) == sorted(SLUGS)
    assert len({card.arxiv for card in cards.values()}) == 31
    for card in cards.values():
        assert len(card.summary) > 80
        assert card.use_when and card.not_when and card.try_first
        assert card.date.startswith(f"20{card.arxiv[:2]}-{card.arxiv[2:4]}")


def test_only_what_is_built_says_so():
    assert [slug for slug, card in load_cards().items() if card.status == "built"] == [
        "ba-lora",
        "bo-rep",
        "colm",
        "elr",
        "glad",
        "hft",
        "ignite",
        "maid",
        "nested-dropout",
        "ps-kd",
        "stn",
        "weight-compander",
    ]


def test_the_claims_of_a_built_paper_are_registered_with_one_primary():
    claims = load_cards()["elr"].claims
    assert [claim.id for claim in claims if claim.primary] == ["beats-loss-only"]
    assert {claim.id: claim.margin for claim in claims}["elr-plus"] == 0.29


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("label noise", ["elr", "nested-dropout"]),
        ("noisy labels", ["elr", "nested-dropout"]),
        ("optimal transport", ["sparse-ot"]),
        ("hyperparameter", ["bo-rep", "maid", "stn"]),
        ("ELR", ["elr"]),
        ("neural ODE", ["nde-solver-reg"]),
    ],
)
def test_search_finds_what_people_look_for(query, first):
    assert sorted(card.slug for card in search(query)[: len(first)]) == sorted(first)


def test_forgetting_in_fine_tuning_finds_half_fine_tuning():
    assert search("fine-tuning forgets")[0].slug == "hft"
    assert len(search("")) == 31
    assert search("xyzzy") == []


def test_an_unknown_paper_suggests_the_nearest():
    with pytest.raises(UnknownPaper, match=r"no paper 'er'. Did you mean 'elr'\?"):
        find_card("er")
    assert find_card("BackSlash").slug == "gg-prior"


def test_unknown_and_missing_keys_name_the_file():
    with pytest.raises(ValueError, match="x.toml: unknown key 'colour'"):
        build(Card, {"colour": "red"}, "x.toml")
    with pytest.raises(ValueError, match="x.toml: the key 'slug' is missing"):
        build(Card, {}, "x.toml")


def test_arms_are_unique_and_begin_with_the_controls():
    names = [arm.name for arm in load_arms()]
    assert names[:2] == ["plain", "early-stopping"]
    assert len(names) == len(set(names)) >= 12


def test_generated_pages_are_up_to_date():
    assert [str(path) for path in stale(ROOT)] == []
    with pytest.raises(ValueError, match="must hold the markers"):
        with_table("no markers", "")
    assert with_table(f"a{BEGIN}old{END}b", "new") == f"a{BEGIN}\nnew\n{END}b"


def test_the_catalogue_does_not_import_torch():
    code = "import sys, wellposed.papers as p; p.load_cards(); p.load_arms(); p.search('x'); import wellposed.papers.pages; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
