"""Filling the page templates: one look, everything escaped, nothing loaded from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from secura_ds.report.drawing import DARK, LIGHT


def fill(template: str, content: Mapping[str, Any]) -> str:
    """The HTML of a template of `templates/` with `content`; both looks' colours are there too."""
    environment = Environment(
        loader=PackageLoader("secura_ds.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["unbroken"] = unbroken
    html = environment.get_template(template).render(light=LIGHT, dark=DARK, **content)
    # Model output may hold lone surrogates, which no file can store.
    return html.encode("utf-8", "replace").decode("utf-8")


def unbroken(text: str) -> str:
    """Keep a number, its unit and its error on one line."""
    return re.sub(r" (?=[%±]|points|nats)|(?<=±) ", "\u00a0", text)
