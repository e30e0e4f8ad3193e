"""docs/extending.md quotes the tested examples word for word, and none is longer than 40 lines."""

from __future__ import annotations

from pathlib import Path

import pytest

EXAMPLES = [path for path in sorted(Path(__file__).parent.iterdir()) if "_example." in path.name]
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "extending.md"


def test_there_is_one_of_each_kind() -> None:
    kinds = {path.name.partition("_example")[0] for path in EXAMPLES}
    assert kinds == {"annotation", "dataset", "encoder", "head", "label_format", "metric", "tool_metric"}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_the_document_quotes_it(example: Path) -> None:
    text = example.read_text(encoding="utf-8").rstrip()
    assert len(text.splitlines()) <= 40
    assert f"\n{text}\n```" in DOCUMENT.read_text(encoding="utf-8")
