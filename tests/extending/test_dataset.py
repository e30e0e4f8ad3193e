"""The data set of docs/extending.md: one YAML file, and its videos and labels are indexed."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.cli import succeed
from tests.videos import VideoSpec, write_video

EXAMPLE = Path(__file__).with_name("dataset_example.yaml")
SECONDS = 4


def test_a_data_set_is_one_file(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        folder = tmp_path / "data" / f"patient-{number}"
        folder.mkdir(parents=True)
        write_video(folder / f"op{number}.mp4", VideoSpec(count=25 * SECONDS))
        rows = "".join(f"{second}\t{second}\n" for second in range(SECONDS))
        (folder / f"op{number}-phases.txt").write_text(f"Frame\tPhase\n{rows}", encoding="utf-8")
    settings = ["--set", f"data.dataset={EXAMPLE}", "--set", "data.index=index.json"]
    out = succeed(["index", "--root", "data", *settings], tmp_path)
    index = json.loads((tmp_path / "index.json").read_text(encoding="utf-8"))
    assert {video["id"]: video["split"] for video in index["videos"]} == {
        "hernia001": "train", "hernia002": "train", "hernia003": "test"
    }  # fmt: skip
    for phase in ("Access", "Dissection", "MeshPlacement", "Closure"):
        assert re.search(rf"{phase}\W+2\W+1\W+3\W", out), out  # frames in train, test, all
