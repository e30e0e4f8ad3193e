"""The examples of docs/datasets.md are those of the shipped descriptions, and read the lines above them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from configs.dataset_spec import DataSetSpec
from configs.label_source import LabelSource
from configs.load import load_dataset
from features.dataset.described.labels import parse_described, records_by_video

PROJECT = Path(__file__).resolve().parents[4]
TEXT = (PROJECT / "docs/datasets.md").read_text(encoding="utf-8").partition("## Recordings in several files")[0]
SHIPPED = [load_dataset(path.stem) for path in sorted((PROJECT / "configs/datasets").glob("*.yaml"))]
EXAMPLES = re.findall(r"(?:```(?:text|json)\n([^`]*)```\n\n)?```yaml\n(files:[^`]*)```", TEXT)


@pytest.mark.parametrize(("lines", "keys"), EXAMPLES, ids=lambda text: text.splitlines()[0][:30] if text else "none")
def test_an_example_is_a_shipped_description_that_reads_its_lines(lines: str, keys: str) -> None:
    source = LabelSource.model_validate(yaml.safe_load(keys))
    spec = next(spec for spec in SHIPPED if source in spec.labels.values())
    if lines:
        for records in records_by_video(lines.encode(), Path("lines"), source, spec).values():
            assert len(records) > 0
            parse_described(records, Path("lines"), source, "phase", spec)


def test_there_are_examples_of_all_forms_and_every_key_is_explained() -> None:
    assert len(EXAMPLES) >= 7
    assert all(f"`{key}`" in TEXT for key in LabelSource.model_fields)
    complete = next(text for text in re.findall(r"```yaml\n([^`]*)```", TEXT) if text.startswith("name:"))
    assert DataSetSpec.model_validate(yaml.safe_load(complete)).labels["phases"].form == "intervals"
