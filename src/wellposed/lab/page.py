"""Self-contained HTML pages from templates."""

from __future__ import annotations

from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def render(template: str, package: str = "wellposed.lab", **content: Any) -> str:
    """A page from a template of `package`, which may extend the laboratory's `base.html.j2`.

    Args:
        template: file name in the package's folder `templates`.
        package: that holds it.
        content: what the template shows; text is escaped, `Markup` (figures) is not.

    Raises:
        jinja2.UndefinedError: if the template shows what `content` lacks.
    """
    loader = ChoiceLoader([PackageLoader(package), PackageLoader("wellposed.lab")])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["duration"] = duration
    return environment.get_template(template).render(**content)


def figure(svg: str) -> Markup:
    """A figure of `wellposed.lab.figures` as safe markup."""
    return Markup(svg)


def duration(seconds: float) -> str:
    """A time as a person says it.

    Example:
        >>> duration(0.0421), duration(7.25), duration(95), duration(4000)
        ('0.042 s', '7.2 s', '1 min 35 s', '1 h 7 min')
    """
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"
