"""Search spaces of cards: what they mean, and what is refused by name."""

import pytest

from wellposed.lab.space import Choice, Range, parse_space


def test_the_middle_is_the_default_or_the_middle_of_the_scale():
    assert Range(1, 100, log=True).middle() == pytest.approx(10)
    assert Range(10, 61, integer=True).middle() == 36
    assert Range(0, 1, default=0.9).middle() == 0.9
    assert Choice((3, 1)).middle() == 3
    assert Choice((3, 1), default=1).middle() == 1


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (3, "elr: x: must be a table like"),
        ({"low": "1", "high": 2}, "elr: x: low must be a finite number, got '1'"),
        ({"low": 1, "high": float("inf")}, "elr: x: high must be a finite number, got inf"),
        ({"low": 1.5, "high": 3, "integer": True}, "elr: x: low must be an integer, got 1.5"),
        ({"low": 1, "high": 3, "integer": 1}, "elr: x: integer must be true or false, got 1"),
        ({"choices": "abc"}, "elr: x: choices must hold at least one value"),
        ({"choices": [[1], [2]]}, "elr: x: choices must be texts, numbers or truth values"),
        ({"choices": [1], "low": 1}, r"elr: x: unknown \['low'\]; allowed keys: \['choices', 'default'\]"),
    ],
)
def test_wrong_entries_are_refused_by_name(entry, message):
    with pytest.raises(ValueError, match=message):
        parse_space({"x": entry}, "elr")
