"""The documents: links have targets, and the tests and files that they name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
DOCUMENTS = [*PROJECT.glob("*.md"), *PROJECT.glob("docs/*.md")]
TEST = re.compile(r"`(?:tests/)?((?:\w+/)*test_\w+\.py)(?:::(\w+))?`(?:, `::(\w+)`)*")
MORE = re.compile(r"`::(\w+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
SOURCE = re.compile(
    r"`((?:benchmarks|commands|configs|engine|evaluation|features|interop|live|stage\d_\w+)/[\w/]+\.\w+)`"
)


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub makes of a document's headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_have_targets(document: Path) -> None:
    for link in LINK.findall(document.read_text(encoding="utf-8")):
        if link.startswith(("http:", "https:")):
            continue
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_tests_and_files_that_are_named_exist(document: Path) -> None:
    if document.name == "method.md":  # it names programs of another project
        return
    for line in document.read_text(encoding="utf-8").splitlines():
        file = None
        for found in re.finditer(rf"{TEST.pattern}|{MORE.pattern}", line):
            if found.group(1):
                file = PROJECT / "tests" / found.group(1)
                assert file.is_file(), found.group()
            for name in re.findall(r"::(\w+)", found.group()):
                assert file, found.group()
                assert f"def {name}(" in file.read_text(encoding="utf-8"), f"{file.name}::{name}"
        for source in SOURCE.findall(line):
            assert "/test_" in source or (PROJECT / source).exists(), source
