"""The catalogue in a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .arms import load_arms
from .catalogue import Card
from .verdicts import load_verdicts


def print_papers(cards: list[Card], console: Console) -> None:
    """One line a paper: slug, name, where it acts, when to use it, status."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("paper", "acts on", "use it when", "year", "status"):
        table.add_column(title, no_wrap=title in ("paper", "year", "status"), header_style="bold")
    for card in cards:
        table.add_row(card.slug, card.acts_on, card.use_when, card.year, card.status)
    console.print(table)
    console.print(f"\n{len(cards)} papers · one in full: wellposed show {cards[0].slug}", highlight=False)


def print_card(card: Card, console: Console) -> None:
    """One paper: what a reader needs to decide, and to begin."""

    def say(text: str) -> None:
        console.print(text, highlight=False)

    say(f"[bold]{escape(card.name)}[/bold]")
    say(f"{escape(card.title)}")
    venue = f" · {card.venue}" if card.venue else ""
    say(f"{_authors(card)} · {card.year} · arXiv {card.arxiv}{venue}\n")
    say(escape(card.summary) + "\n")
    for title, text in (
        ("acts on", card.acts_on),
        ("use it when", card.use_when),
        ("not when", card.not_when),
        ("try first", card.try_first),
    ):
        say(f"[bold]{title:<12}[/bold] {escape(text)}")
    primary = next((claim for claim in card.claims if claim.primary), None)
    if primary is not None:
        say(f"[bold]{'claim':<12}[/bold] {escape(primary.statement)}")
    say(f"[bold]{'verdict':<12}[/bold] {escape(verdict_line(card))}")
    if card.status == "planned":
        say(f"[bold]{'status':<12}[/bold] planned: not built yet")
        return
    for symbol in card.symbols:
        say(f"[bold]{'API':<12}[/bold] {escape(symbol)}")
    names = [arm.name for arm in load_arms() if arm.paper == card.slug]
    if names:
        say(f"[bold]{'try it':<12}[/bold] wellposed compare DATA --methods {','.join(names)}")
    if card.protocol:
        cost = f"        cost: {card.cost}" if card.cost else ""
        say(f"[bold]{'run it':<12}[/bold] wellposed run {card.slug}{escape(cost)}")
    say(f"[bold]{'read it':<12}[/bold] docs/methods/{card.slug}.md")


def verdict_line(card: Card) -> str:
    """The verdict on the primary claim, or that there is none yet."""
    line = load_verdicts().get(card.slug)
    if line is None:
        return "none yet: its study has not been run"
    return f"{line['sentence']} ({line['date']})"


def _authors(card: Card) -> str:
    names = [name.rpartition(" ")[2] for name in card.authors]
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"
