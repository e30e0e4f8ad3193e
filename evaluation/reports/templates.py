"""Jinja templates of this package, set up in one place: a missing value is an error, names in HTML are escaped."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import printable

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).resolve().parent / "templates"


def template_environment(*, html: bool) -> Environment:
    """For templates in `TEMPLATES`: HTML, or text such as Markdown, which is not escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=not html,
    )
    environment.filters["markdown"] = markdown
    environment.filters["markdown_code"] = markdown_code
    return environment


def markdown(name: object) -> str:
    """A name that Markdown shows literally, in tables too: as no HTML, link, image, emphasis or line break.

    Web and mail addresses do not become links by the rules of CommonMark and of GitHub's extensions, but stay legible.
    """
    text = " ".join(printable(str(name)).split())
    text = re.sub(r"([\\`*_~\[\]|])", r"\\\1", text)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"(?i)(www)\.", r"\1&#46;", text)
    return text.replace("://", "&#58;//").replace("@", "&#64;")


def markdown_code(name: object) -> str:
    """A name between backticks, where only a backtick has a meaning."""
    return " ".join(printable(str(name)).split()).replace("`", "'")
