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
    """
    loader = ChoiceLoader([PackageLoader(package), PackageLoader("wellposed.lab")])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(**content)


def figure(svg: str) -> Markup:
    """A figure of `wellposed.lab.figures` as safe markup."""
    return Markup(svg)
