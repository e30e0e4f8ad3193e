"""One bad video affects only itself in every command: what is left out, what is reported, and exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tests.cli import Ended, Forks
from tests.stage1_cnn.material import FRAMES, SPEC, paint, phase_at
from tests.videos import VideoSpec, write_video

NAMES = {"train": ("case 1", "case 2", "case 3"), "val": ("手术 4",), "test": ("case 5", "case 6")}
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "data": {
        "dataset": "clinic.yaml",
        "fps": 5,
        "root": "data",
        "index": "index.json",
        "split": {part: list(names) for part, names in NAMES.items()},
    },
    "cache": {"dir": "cache"},
    "preprocess": {"resize_px": 40, "crop_px": 32},
    "cnn": {
        "backbone": "shufflenet_v2_x0_5",
        "weights": "random",
        "precision": "fp32",
        "epochs": 1,
        "batch_frames": 8,
        "workers": 0,
        "phase_head": True,
    },
    "extract": {"store": "features", "precision": "fp32", "workers": 1},
    "temporal": {"head": {"name": "lstm", "hidden": 8}, "epochs": 1, "precision": "fp32"},
    "joint": {
        "net": {"tasks": "phase"},
        "sequence": {"frames": 8, "batch": 2},
        "multitask": {"epochs": 1, "precision": "fp32"},
        "workers": 0,
    },
}
CLINIC = {
    "name": "clinic",
    "annotation_fps": 25,
    "phases": list(SPEC.phases),
    "patterns": {
        "video": r"(?P<id>.+)\.mp4",
        "frames": r"NONE(?P<id>\d+)",
        "frame": r"(?P<frame>\d+)\.png",
        "phase": r"(?P<id>.+)\.txt",
        "tool": r"NONE(?P<id>\d+)",
    },
}


@pytest.fixture(scope="module")
def valid_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six valid videos with a phase for every frame."""
    folder = tmp_path_factory.mktemp("valid")
    write_video(folder / "one.mp4", VideoSpec(count=FRAMES, width_px=64, height_px=48, paint=paint))
    rows = "".join(f"{frame}\t{SPEC.phases[phase_at(frame)]}\n" for frame in range(FRAMES))
    for name in (name for names in NAMES.values() for name in names):
        shutil.copy(folder / "one.mp4", folder / f"{name}.mp4")
        (folder / f"{name}.txt").write_text("Frame\tPhase\n" + rows)
    (folder / "one.mp4").unlink()
    return folder


class Work:
    """A folder with settings and videos, and the commands that run there."""

    def __init__(self, folder: Path, valid_videos: Path, forks: Forks) -> None:
        self.folder, self._valid_videos, self._forks = folder, valid_videos, forks
        shutil.copytree(valid_videos, folder / "data")
        (folder / "clinic.yaml").write_text(yaml.safe_dump(CLINIC))
        (folder / "tiny.yaml").write_text(yaml.safe_dump(SETTINGS, allow_unicode=True))

    def damage(self, name: str) -> None:
        """Zero some bytes in the middle of the frames: the container is valid, but decoding fails."""
        path = self.folder / "data" / f"{name}.mp4"
        content = bytearray(path.read_bytes())
        start = content.index(b"mdat") + 8 + (len(content) - content.index(b"mdat")) // 3
        content[start : start + 400] = bytes(400)
        path.write_bytes(content)

    def repair(self, name: str) -> None:
        shutil.copy(self._valid_videos / f"{name}.mp4", self.folder / "data")

    def do(self, command: str, *arguments: str, code: int = 0) -> str:
        """Everything that a command prints, which ends with `code`."""
        name = ("--name", "r") if command != "index" else ()
        ended: Ended = self._forks.run([command, "--config", "tiny.yaml", *name, *arguments], self.folder)
        assert ended.code == code, ended.output
        assert "Traceback" not in ended.output
        return ended.output

    def json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())


@pytest.fixture
def work(tmp_path: Path, valid_videos: Path, forks: Forks) -> Work:
    return Work(tmp_path / "work", valid_videos, forks)


@pytest.mark.slow
def test_run_trains_and_evaluates_on_what_is_usable(work: Work) -> None:
    """One of the videos is broken in the middle, one has no labels, one has a name in Chinese."""
    work.damage("case 2")
    for name in ("case 6.txt", "case 3.mp4", "case 3.txt"):
        (work.folder / "data" / name).unlink()
    five = ("--set", "data.split.train=[case 1, case 2]")
    said = work.do("run", *five, code=1)
    assert "left out: case 2: " in said
    summary = work.json("runs/r/summary.json")
    left_out = {video["id"]: video["reason"] for video in summary["left_out"]}
    assert set(left_out) == {"case 2", "case 6"}
    assert "case 2.mp4" in left_out["case 2"]
    assert "no phase or tool labels" in left_out["case 6"]
    assert (summary["split"], summary["test_videos"]) == ("1/1/1", 1)
    assert summary["scored_videos"] == {"phases": 1, "tools": 0}
    assert summary["videos_without_labels"]["phases"] == ["case 6"]
    assert summary["phase_accuracy_temporal"] is not None
    about = work.json("runs/r/evaluate/test/metrics.json")["phases"]["temporal"]["phase_mean"]["about"]
    assert (about["videos"], about["videos_without_labels"]) == (1, ["case 6"])
    trained = work.json("runs/r/temporal/identity.json")["split"]
    assert trained == {"train": ["case 1"], "val": ["手术 4"]}
    card = (work.folder / "runs/r/MODEL_CARD.md").read_text()
    assert "| train | 1 videos: case 1 |" in card
    assert "- case 2 (train): " in card
    assert "Without phase labels, so neither trained on nor scored for phases: case 6." in card
    assert "Evaluated on the split **test** (1 video)." in card
    assert work._forks.run(["report", "runs/r", "--no-thumbnails"], work.folder).code == 0
    page = (work.folder / "runs/r/report.html").read_text()
    assert "case 2: case 2.mp4" in page
    assert "on 1 video of clinic" in page
    assert "case 6: no labels of phases" in page
    before = (work.folder / "runs/r/cnn/best.pt").read_bytes()
    again = work.do("run", *five, code=1)
    assert again.count("finished before with these settings") == 1
    assert (work.folder / "runs/r/cnn/best.pt").read_bytes() == before


@pytest.mark.slow
def test_stages_agree_on_a_video_that_extract_cannot_read(work: Work) -> None:
    """A test video, which stage one never reads; once repaired, it is extracted and scored."""
    work.damage("case 5")
    work.do("index")
    work.do("train-cnn")
    assert "failed: case 5: " in work.do("extract", code=1)
    for command in ("train-temporal", "evaluate"):
        assert "left out: case 5: case 5.mp4" in work.do(command, code=1)
    assert work.json("runs/r/summary.json")["test_videos"] == 1
    work.repair("case 5")
    assert "run `index --force`" in work.do("extract", code=1)
    work.do("index", "--force")
    assert "1 video(s) extracted" in work.do("extract")
    work.do("train-temporal")
    work.do("evaluate")
    assert work.json("runs/r/summary.json")["test_videos"] == 2
    assert work.json("runs/r/summary.json")["left_out"] == []


@pytest.mark.slow
def test_training_again_with_a_repaired_video_is_another_run(work: Work) -> None:
    work.damage("case 1")
    work.do("index")
    assert "left out: case 1: case 1.mp4" in work.do("train-cnn", code=1)
    assert "finished before" in work.do("train-cnn", code=1)
    assert work.json("runs/r/cnn/result.json")["train_videos"] == 2
    work.repair("case 1")
    work.do("index", "--force")
    refused = work.do("train-cnn", code=2)
    assert "this run exists with other settings (left_out.case 1" in refused
    assert "choose another --name" in refused
    work.do("train-cnn", "--name", "other")


def test_an_excluded_video_is_listed_and_is_no_failure(work: Work) -> None:
    work.damage("case 2")
    options = ("--set", "data.exclude={case 2: no consent}", "--set", "extract.encoder=initial")
    assert "left out: case 2: excluded: no consent" in work.do("run", *options)
    summary = work.json("runs/r/summary.json")
    assert summary["left_out"] == [
        {"id": "case 2", "reason": "excluded: no consent", "split": "train", "excluded": True}
    ]
    assert summary["split"] == "2/1/2"
    assert "- case 2 (train): excluded: no consent" in (work.folder / "runs/r/MODEL_CARD.md").read_text()


def test_the_only_video_of_a_split_ends_the_work(work: Work) -> None:
    work.damage("手术 4")
    work.do("index")
    for command in ("train-cnn", "run", "train-joint"):
        line = work.do(command, code=2).strip().splitlines()[-1]
        assert line.startswith("error: val split has no videos left: 手术 4 was left out (手术 4.mp4"), line
    assert not (work.folder / "runs/r/cnn/identity.json").exists()
    work.do("extract", "--set", "extract.encoder=initial", code=1)
    assert "error: val split has no videos left" in work.do("train-temporal", code=2)


def test_an_interrupted_extract_is_not_mistaken_for_bad_videos(work: Work) -> None:
    work.do("extract", "--set", "extract.encoder=initial", "--shard", "0/2")
    said = work.do("train-temporal", code=2)
    assert "no features of" in said
    assert "run extract to make them" in said
    work.do("extract", "--set", "extract.encoder=initial", "--shard", "1/2")
    work.do("train-temporal")


def test_features_are_required_only_for_videos_in_a_split(work: Work) -> None:
    """A video that lists leave out of every split may be broken."""
    work.damage("case 3")
    part = ("--set", "data.split.train=[case 1, case 2]", "--set", "extract.encoder=initial")
    work.do("index", *part)
    work.do("extract", *part, code=1)
    work.do("train-temporal", *part)
    work.do("evaluate", *part)
    work.do("evaluate", *part, "--split", "all")


def test_folders_of_images_some_of_them_cut_short(work: Work) -> None:
    """One image per label row, as in demonstration data; a truncated image affects only its own folder."""
    shutil.rmtree(work.folder / "data")
    for number in range(1, 6):
        folder = work.folder / f"data/case {number}"
        folder.mkdir(parents=True)
        for frame in range(24):
            Image.fromarray(paint(frame, 64, 48)).save(folder / f"{frame:04d}.png")
        rows = "".join(f"{frame}\t{SPEC.phases[frame // 8]}\n" for frame in range(24))
        (folder.parent / f"case {number}.txt").write_text("Frame\tPhase\n" + rows)
    for name in ("case 2/0010.png", "case 5/0020.png"):
        cut = work.folder / "data" / name
        cut.write_bytes(cut.read_bytes()[:300])
    patterns = {**CLINIC["patterns"], "frames": r"(?P<id>case \d)"}
    (work.folder / "clinic.yaml").write_text(yaml.safe_dump({**CLINIC, "annotation_fps": 5, "patterns": patterns}))
    split = "data.split={train: [case 1, case 2], val: [case 3], test: [case 4, case 5]}"
    said = work.do("run", "--set", split, code=1)
    assert "left out: case 2: case 2: " in said or "left out: case 2: case 2/0010.png" in said
    summary = work.json("runs/r/summary.json")
    assert {video["id"] for video in summary["left_out"]} == {"case 2", "case 5"}
    assert "0010.png" in summary["left_out"][0]["reason"]
    assert (summary["split"], summary["test_videos"]) == ("1/1/1", 1)


@pytest.mark.slow
def test_the_joint_net_leaves_out_what_it_cannot_read(work: Work) -> None:
    for name in ("case 1", "case 5"):
        work.damage(name)
    work.do("index")
    assert "left out: case 1: case 1.mp4" in work.do("train-joint", code=1)
    said = work.do("evaluate", code=1)
    assert "left out: case 1: " in said
    assert "left out: case 5: " in said
    summary = work.json("runs/r/summary.json")
    assert {video["id"] for video in summary["left_out"]} == {"case 1", "case 5"}
    assert summary["test_videos"] == 1
    card = (work.folder / "runs/r/MODEL_CARD.md").read_text()
    work.do("index", "--set", "data.index=other.json", "--set", "data.split={train: [case 1], test: [case 2]}")
    other = ("--index", "other.json", "--set", "data.split={train: [case 1], test: [case 2]}")
    assert "trained on case 2 of clinic; test on other videos" in work.do("evaluate", *other, code=2)
    work.do("evaluate", *other, "--set", "data.allow_overlap=true", code=1)
    assert work.json("runs/r/summary.json") == summary
    assert (work.folder / "runs/r/MODEL_CARD.md").read_text() == card
    assert work.json("runs/r/evaluate/other-test/metrics.json")["videos"] == ["case 2"]
