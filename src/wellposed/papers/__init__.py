"""The catalogue: one card a paper, the arms that everyone would try first, and their loader. Data, no torch."""

from typing import TYPE_CHECKING

import lazy_loader as lazy

if TYPE_CHECKING:
    from .arms import Arm as Arm
    from .arms import load_arms as load_arms
    from .catalogue import Card as Card
    from .catalogue import Claim as Claim
    from .catalogue import UnknownPaper as UnknownPaper
    from .catalogue import find_card as find_card
    from .catalogue import load_cards as load_cards
    from .search import search as search

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "arms": ["Arm", "load_arms"],
        "catalogue": ["Card", "Claim", "UnknownPaper", "find_card", "load_cards"],
        "search": ["search"],
    },
)
