"""Set up the Jinja templates of this package: a missing value is an error, and names in HTML are escaped."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import printable

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).resolve().parent / "templates"


def template_environment(*, html: bool) -> Environment:
    """Return an environment for the templates in `TEMPLATES`: for HTML, or for text such as Markdown (not escaped)."""
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
    """Escape a name so that Markdown shows it literally, also in tables: without HTML, link, image, emphasis or break.

    Web and mail addresses stay legible, but do not become links under the rules of CommonMark and GitHub's extensions.
    """
    text = " ".join(printable(str(name)).split())
    text = re.sub(r"([\\`*_~\[\]|])", r"\\\1", text)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"(?i)(www)\.", r"\1&#46;", text)
    return text.replace("://", "&#58;//").replace("@", "&#64;")


def markdown_code(name: object) -> str:
    """Escape a name to be shown between backticks, where only a backtick has a meaning."""
    return " ".join(printable(str(name)).split()).replace("`", "'")
