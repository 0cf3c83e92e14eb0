"""Pages generated from the cards: one a method, their index, and README's table."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .arms import load_arms
from .catalogue import Card, load_cards
from .terminal import verdict_line
from .verdicts import expected_wrong, load_verdicts

BEGIN, END = "<!-- papers:begin -->", "<!-- papers:end -->"
_GENERATED = "<!-- generated from src/wellposed/papers by `make docs`; change it there -->\n"


def pages(root: Path) -> dict[Path, str]:
    """Every generated file, by its path, with the content it should have.

    Args:
        root: of the project; README.md is read from it.
    """
    cards = load_cards()
    found = {root / "docs" / "methods" / f"{slug}.md": method_page(card) for slug, card in cards.items()}
    found[root / "docs" / "methods" / "index.md"] = index_page(cards)
    readme = root / "README.md"
    found[readme] = with_table(readme.read_text("utf-8"), table(cards, "docs/methods/", "docs/verdicts.md"))
    return found


def stale(root: Path) -> list[Path]:
    """Generated files that differ from what they should be, or are missing."""
    return [path for path, text in pages(root).items() if not path.is_file() or path.read_text("utf-8") != text]


def write(root: Path) -> list[Path]:
    """Bring all generated files up to date; returns those that changed."""
    wanted = pages(root)
    changed = stale(root)
    for path in changed:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(wanted[path], "utf-8")
    return changed


def method_page(card: Card) -> str:
    """Markdown of one paper."""
    lines = [_GENERATED, f"# {card.name}\n"]
    venue = f", {card.venue}" if card.venue else ""
    where = f" ({card.organisation})" if card.organisation else ""
    lines.append(f"*{card.title}*  \n{', '.join(card.authors)}{where}  \n{_arxiv(card)}{venue}, {card.year}\n")
    lines.append(card.summary + "\n")
    lines.append(f"- **Acts on** {card.acts_on}\n- **Use it when** {card.use_when}\n- **Not when** {card.not_when}")
    lines.append(f"- **Try first** {card.try_first}\n- **Verdict** {verdict_line(card)}")
    lines.append(f"- **Status** {'built' if card.status == 'built' else 'planned: not built yet'}\n")
    if card.status == "built":
        lines.append("## API\n\n```python\n" + "\n".join(card.symbols) + "\n```\n")
        lines += [_documented(symbol) for symbol in card.symbols]
        names = [arm.name for arm in load_arms() if arm.paper == card.slug]
        lines.append(f"Try it on your data: `wellposed compare DATA --methods {','.join(names)}`\n")
    elif card.symbols:
        lines.append("## Planned API\n\n" + "\n".join(f"- `{symbol}`" for symbol in card.symbols) + "\n")
    if card.deviations:
        lines.append(
            "## Where this differs from the paper or its code\n\n" + "\n".join(f"- {d}" for d in card.deviations) + "\n"
        )
    if card.claims:
        lines.append("## Claims, registered before the study runs\n")
        for claim in card.claims:
            mark = " (primary)" if claim.primary else ""
            margin = "" if claim.margin is None else f" Margin {claim.margin:g}: {claim.reason}."
            regime = f" Regime: {claim.regime}." if claim.regime else ""
            estimand = f" Estimand: {claim.estimand}." if claim.estimand else ""
            lines.append(f"- **{claim.id}**{mark}, {claim.kind}. {claim.statement}{estimand}{margin}{regime}")
        lines.append("")
    if card.protocol:
        lines += _protocol(card)
    extra = [
        ("Peers", ", ".join(card.peers)),
        ("Reference code", card.reference_code),
        ("Cost of the study", card.cost),
    ]
    lines += [f"{title}: {text}  " for title, text in extra if text]
    return "\n".join(lines).rstrip() + "\n"


def index_page(cards: dict[str, Card]) -> str:
    """Markdown of the index, with the acronyms people search for."""
    known = sorted((acronym, card.slug) for card in cards.values() for acronym in card.acronyms)
    acronyms = " · ".join(f"[{acronym}]({slug}.md)" for acronym, slug in known)
    return f"{_GENERATED}\n# The methods\n\n{table(cards, '', '../verdicts.md')}\n\n## By acronym\n\n{acronyms}\n"


def table(cards: dict[str, Card], folder: str, verdicts: str) -> str:
    """Markdown table of all papers, the built ones first."""
    ordered = sorted(cards.values(), key=lambda card: (card.status != "built", card.acts_on, card.slug))
    rows = ["| paper | acts on | use it when | primary claim, and what we found |", "|---|---|---|---|"]
    for card in ordered:
        found = _finding(card) if card.status == "built" else "planned"
        rows.append(
            f"| [{card.name}]({folder}{card.slug}.md), {_arxiv(card)} | {card.acts_on} | {card.use_when} | {found} |"
        )
    if load_verdicts():
        rows += ["", f"{expected_wrong(load_verdicts())} [How verdicts are drawn]({verdicts})."]
    return "\n".join(rows)


def _finding(card: Card) -> str:
    """The primary claim with its verdict, for a cell of the table."""
    line = load_verdicts().get(card.slug)
    if line is None:
        return verdict_line(card)
    return " ".join(_statement_and_verdict(part) for part in (line, line.get("beside")) if part)


def _statement_and_verdict(part: dict[str, Any]) -> str:
    sentence = part["sentence"]
    return f"{part['statement']} **{sentence[0].upper()}{sentence[1:]}**"


def _protocol(card: Card) -> list[str]:
    """What the study registers: problem, budgets and arms."""
    table = card.protocol
    lines = ["## Protocol of the study\n"]
    lines.append(f"{table['problem']}. A seed re-draws {table['redraws']}.\n")
    lines.append(
        f"{table['seeds']} evaluation seeds; {table['tuning_rounds']} tuning trials an arm, each on {table['tuning_seeds']} seeds "
        f"of their own; tuning maximises {table['score']}. Run it: `wellposed run {card.slug}`.\n"
    )
    shared = ", ".join(f"`{name}` {_range(part)}" for name, part in table.get("shared", {}).items())
    lines.append(f"Knobs of every tuned arm: {shared or 'none'}.\n")
    lines += ["| arm | role | own knobs |", "|---|---|---|"]
    for arm in table["arms"]:
        own = ", ".join(f"`{name}` {_range(part)}" for name, part in arm.get("search", {}).items())
        if not own:
            base = arm.get("trials_of") or arm.get("settings_of")
            own = f"as tuned for `{base}`" if base else "fixed" if arm.get("shared") is False else "none"
        lines.append(f"| {arm.get('label', arm['name'])} | {arm.get('role', 'baseline')} | {own} |")
    return [*lines, ""]


def _range(part: dict[str, Any]) -> str:
    if "choices" in part:
        return "in {" + ", ".join(str(choice) for choice in part["choices"]) + "}"
    return f"[{part['low']:g}, {part['high']:g}]" + (" log" if part.get("log") else "")


def with_table(text: str, new: str) -> str:
    """`text` with what stands between the two markers replaced.

    Raises:
        ValueError: if the markers are missing.
    """
    if BEGIN not in text or END not in text:
        raise ValueError(f"README.md must hold the markers {BEGIN} and {END}")
    return f"{text[: text.index(BEGIN)]}{BEGIN}\n{new}\n{text[text.index(END) :]}"


def _arxiv(card: Card) -> str:
    return f"[arXiv {card.arxiv}](https://arxiv.org/abs/{card.arxiv})"


def _documented(symbol: str) -> str:
    """The docstring of a symbol, read from its source: the documentation is made without importing torch."""
    room, _, name = symbol.partition("(")[0].rpartition(".")
    spec = find_spec(room)
    folder = Path(spec.origin).parent if spec is not None and spec.origin else Path()
    for path in sorted(folder.glob("*.py")):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
                text = ast.get_docstring(node) or ""
                return f"### `{name}`\n\n```text\n{text}\n```\n"
    raise ValueError(f"{symbol}: not found in {room}")
