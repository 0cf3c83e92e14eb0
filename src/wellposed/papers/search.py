"""Searching the catalogue by words."""

from __future__ import annotations

import re

from .catalogue import Card, load_cards

_STOP = frozenset(
    [
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "by",
        "for",
        "from",
        "in",
        "is",
        "it",
        "my",
        "of",
        "on",
        "or",
        "the",
        "to",
        "with",
    ]
)

_WEIGHTS = (
    ("acronyms", 8.0),
    ("name", 6.0),
    ("keywords", 4.0),
    ("title", 3.0),
    ("use_when", 2.5),
    ("acts_on", 1.5),
    ("summary", 1.0),
)


def search(query: str) -> list[Card]:
    """Cards that hold the words of `query`, best first; all cards for an empty query.

    Words match by their stem ("labels" finds "label"). A card must hold every word somewhere; if none does, cards
    that hold some are returned. Where a word stands decides its weight: in an acronym most, in the summary least.

    Example:
        >>> [card.slug for card in search("label noise")][:2]
        ['elr', 'nested-dropout']
    """
    words = [_stem(word) for word in _words(query) if word not in _STOP]
    cards = list(load_cards().values())
    if not words:
        return cards
    scored = [(_score(card, words), card) for card in cards]
    whole = [(score, card) for (score, hits), card in scored if hits == len(words)]
    some = [(score, card) for (score, hits), card in scored if hits]
    found = whole or some
    return [card for _, card in sorted(found, key=lambda pair: (-pair[0], pair[1].slug))]


def _score(card: Card, words: list[str]) -> tuple[float, int]:
    total, hits = 0.0, 0
    texts = []
    for name, weight in _WEIGHTS:
        value = getattr(card, name)
        text = " ".join(value) if isinstance(value, tuple) else value
        texts.append(({_stem(word) for word in _words(f"{text} {card.slug if name == 'name' else ''}")}, weight))
    for word in words:
        best = max((weight for stems, weight in texts if word in stems), default=0.0)
        if not best and len(word) >= 4:
            best = max((w / 2 for stems, w in texts if any(s.startswith(word) for s in stems)), default=0.0)
        total += best + 0.1 * sum(weight for stems, weight in texts if word in stems)
        hits += best > 0
    return total, hits


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9+]+", text.lower())


def _stem(word: str) -> str:
    for ending in ("ization", "isation", "izing", "ising", "ing", "ies", "ed", "es", "s", "y"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word
