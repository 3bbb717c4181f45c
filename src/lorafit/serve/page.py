"""The page at `/`: one file with its style and its script inside, which asks this server and nobody else.

It has the fonts, the colours and the cards of the reports. Its policy names its own style and script by their hashes:
nothing else runs there, whatever a model writes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from string import Template

from lorafit.report.palette import DARK, LIGHT

REPORT = "lorafit.report"


@dataclass(frozen=True)
class Page:
    """The page, and the headers that it is sent with."""

    html: str
    headers: Mapping[str, str]


def page() -> Page:
    """The page, put together from its parts."""
    style = "\n".join(
        (
            f":root {{ {LIGHT.css()} }}",
            f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {DARK.css()} }} }}",
            _asset(REPORT, "page.css"),
            _asset(__package__, "page.css"),
        )
    )
    script = _asset(__package__, "page.js")
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    html = Template(_asset(__package__, "page.html")).substitute(style=style, script=script)
    return Page(html, {"content-security-policy": policy})


def _asset(package: str, name: str) -> str:
    return resources.files(package).joinpath(name).read_text(encoding="utf-8").replace("\r\n", "\n")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
