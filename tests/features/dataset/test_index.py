"""The index: its content for real and invented data sets, and that nothing false gets into or out of it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError
from configs.load import load_config, load_dataset
from configs.schema import DataConfig, SplitConfig
from features.dataset.annotations import LabelTrack, read_content
from features.dataset.build import build_index
from features.dataset.catalogue import open_dataset
from features.dataset.check import check_index
from features.dataset.formats.cholec80 import write_label_file
from features.dataset.frame_folders import frame_folder
from features.dataset.index import Dataset, Index, VideoEntry
from features.dataset.labels import load_labels
from features.dataset.sampling import most_fps, sampled_frames
from features.dataset.summary import count_frames, index_summary
from tests.cli import run

SPEC = load_dataset("cholec80")
M2CAI = load_dataset("m2cai16-workflow")
CHECKSUM = "0" * 64


def write_video(path: Path, frames: int, fps: float = 25) -> Path:
    """A video of small frames that are all different."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(fps).limit_denominator(1001))
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            pixels = np.full((32, 32, 3), number % 250, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def write_phases(path: Path, rows: int, stride: int = 1, spec: DataSetSpec = SPEC) -> LabelTrack:
    phase = np.arange(rows) * len(spec.phases) // rows
    track = LabelTrack(np.arange(rows) * stride, phase.astype(np.int8), stride)
    write_label_file(path, track, spec)
    return track


def write_tools(path: Path, rows: int, stride: int = 25) -> LabelTrack:
    track = LabelTrack(
        np.arange(rows) * stride, (np.arange(rows * 7).reshape(rows, 7) % 3 == 0).astype(np.int8), stride
    )
    write_label_file(path, track, SPEC)
    return track


def small_data_set(root: Path, videos: int = 2, frames: int = 100) -> Path:
    for number in range(1, videos + 1):
        write_video(root / f"videos/video{number:02d}.mp4", frames)
        write_phases(root / f"phase_annotations/video{number:02d}-phase.txt", frames)
        write_tools(root / f"tool_annotations/video{number:02d}-tool.txt", frames // 25)
    return root


def folder_data_set(root: Path, numbers: list[int], rows: int, name: str = "video01") -> Path:
    for number in numbers:
        image = root / f"frames/{name}/{name}_{number:06d}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(b"image %d" % number)
    write_phases(root / f"phase_annotations/{name}-phase.txt", rows)
    return root


def index_of(root: Path, spec: DataSetSpec = SPEC, **data: object) -> Index:
    return build_index(root, spec, DataConfig(**data))


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# ---------------------------------------------------------------------------------------------- real material


def test_the_real_clips_are_indexed_as_they_are(shared_data: Path, tmp_path: Path) -> None:
    root = shared_data / "clips"
    index = index_of(root)
    assert [entry.id for entry in index.videos] == ["video05", "video15", "video18", "video25", "video47"]
    for entry in index.videos:
        assert (entry.kind, entry.fps, entry.frame_count, entry.split) == ("video", 25.0, 800, "none")
        assert entry.source == f"videos/{entry.id}.mp4"
        assert entry.phase_file is not None
        assert entry.tool_file is not None
        assert (entry.phase_file.rows, entry.tool_file.rows) == (800, 32)
        frames = sampled_frames(entry, 1.0)
        assert frames.tolist() == list(range(0, 800, 25))
        phase, tools = load_labels(Dataset(index, root), entry, frames)
        lines = (root / entry.phase_file.path).read_text().splitlines()[1:]
        assert [SPEC.phases[label] for label in phase] == [line.split("\t")[1] for line in lines[::25]]
        rows = (root / entry.tool_file.path).read_text().splitlines()[1:]
        assert tools.tolist() == [[int(cell) for cell in row.split("\t")[1:]] for row in rows]
    assert check_index(Dataset(index, root)) == []
    assert len(index.notes) == 1
    assert "32/8/40 needs 80 videos, but there are 5" in index.notes[0]
    index.save(tmp_path / "index.json")
    assert Index.load(tmp_path / "index.json") == index
    assert str(shared_data) not in (tmp_path / "index.json").read_text()


def test_the_real_frame_folders_need_no_setting_and_no_image_is_opened(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = shared_data / "mini-cholec80"
    read: list[Path] = []
    with monkeypatch.context() as patch:
        patch.setattr("PIL.Image.open", lambda *_, **__: pytest.fail("an image was opened"))
        patch.setattr("features.dataset.labels.read_content", lambda path: (read.append(path), read_content(path))[1])
        index = index_of(root, split={"rule": "3/1/1"})
    assert len(read) == len(set(read)) == 10  # each annotation file once
    assert index.notes == ()
    assert [entry.split for entry in index.videos] == ["train", "train", "train", "val", "test"]
    published = np.load(shared_data / "labels" / "train40_1fps.npz")
    total = 0
    for entry in index.videos:
        assert entry.frames is not None
        assert (entry.frames.numbering, entry.frames.base, entry.frames.stride) == ("source", 0, 100)
        frames = sampled_frames(entry, 0.25)
        total += len(frames)
        assert list(frame_folder(root, entry.source, index.dataset, entry.frames)) == frames.tolist()
        phase, tools = load_labels(Dataset(index, root), entry, frames)
        assert np.array_equal(phase, published[f"{entry.id}_phase"][::4])
        assert np.array_equal(tools, published[f"{entry.id}_tools"][::4])
    assert total == 3568
    assert check_index(Dataset(index, root)) == []
    assert most_fps(index) == 0.25
    message = refusal(lambda: sampled_frames(index.videos[0], 1.0))
    assert message.startswith("video01: data.fps=1 is too high for ")


# ---------------------------------------------------------------------------------------------- what it says


def test_the_same_files_give_the_same_bytes_and_another_place_the_same_digest(tmp_path: Path) -> None:
    root = small_data_set(tmp_path / "here")
    shutil.copytree(root, tmp_path / "there")
    for name in ("a.json", "b.json"):
        index_of(root).save(tmp_path / name)
    index = Index.load(tmp_path / "a.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    for file in (tmp_path / "there").rglob("*.mp4"):
        os.utime(file, ns=(1, 1))
    (tmp_path / "there/videos").rename(tmp_path / "there/movies")
    moved = index_of(tmp_path / "there", full_hash=True)
    assert moved != index
    assert moved.digest() == index.digest()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json", "here", "there"]


def test_the_digest_follows_splits_and_labels(tmp_path: Path) -> None:
    root = small_data_set(tmp_path)
    index = index_of(root)
    assert index_of(root, split={"rule": "1/1"}).digest() != index.digest()
    text = (root / "phase_annotations/video01-phase.txt").read_text()
    (root / "phase_annotations/video01-phase.txt").write_text(text.replace("ClippingCutting", "Preparation"))
    assert index_of(root).digest() != index.digest()


def test_either_tasks_annotations_may_be_missing(tmp_path: Path) -> None:
    root = small_data_set(tmp_path, videos=3)
    (root / "phase_annotations/video01-phase.txt").unlink()
    (root / "tool_annotations/video02-tool.txt").unlink()
    index = index_of(root)
    frames = np.arange(0, 100, 25)
    phase, tools = load_labels(Dataset(index, root), index.entry("video01"), frames)
    assert (phase == -1).all()
    assert (tools >= 0).all()
    phase, tools = load_labels(Dataset(index, root), index.entry("video02"), frames)
    assert (phase >= 0).all()
    assert (tools == -1).all()
    assert tools.shape == (4, 7)
    assert index.notes[:2] == (
        "1 video(s) without phase annotations (video01)",
        "1 video(s) without tool annotations (video02)",
    )
    assert check_index(Dataset(index, root)) == []


def test_tools_between_rows_are_masked_or_held(tmp_path: Path) -> None:
    index = index_of(small_data_set(tmp_path, videos=1))
    entry = index.videos[0]
    frames = sampled_frames(entry, 5)
    _, masked = load_labels(Dataset(index, tmp_path), entry, frames, "mask")
    _, held = load_labels(Dataset(index, tmp_path), entry, frames, "hold")
    assert ((masked >= 0).all(axis=1) == (frames % 25 == 0)).all()
    assert held.tolist() == [row for row in masked[::5].tolist() for _ in range(5)]


def test_a_data_set_without_tools_is_indexed_by_its_own_description(tmp_path: Path) -> None:
    for name in ("workflow_video_01", "workflow_video_02", "test_workflow_video_01"):
        write_video(tmp_path / f"{name}.mp4", 50)
        write_phases(tmp_path / f"{name}.txt", 50, spec=M2CAI)
    index = index_of(tmp_path, M2CAI)
    assert {entry.id: entry.split for entry in index.videos} == {
        "test_workflow_video_01": "test",
        "workflow_video_01": "train",
        "workflow_video_02": "train",
    }
    assert index.notes == ()
    phase, tools = load_labels(Dataset(index, tmp_path), index.videos[0], np.arange(50))
    assert phase.max() == 7
    assert tools.shape == (50, 0)
    assert index_summary(index, count_frames(Dataset(index, tmp_path), 25))[0] == ["", "train", "test", "all"]
    assert Index.from_json(json.loads(json.dumps(index.to_json()))) == index


def test_a_folder_of_samples_from_one_is_read_with_its_labels(tmp_path: Path) -> None:
    root = folder_data_set(tmp_path, list(range(1, 41)), rows=1001)
    entry = index_of(root).videos[0]
    assert entry.frames is not None
    assert entry.frames.model_dump() == {"numbering": "sample", "base": 1, "stride": 25, "first": 0, "count": 40}
    assert (entry.fps, entry.frame_count, entry.most_fps) == (25.0, 1000, 1.0)
    assert index_of(root).notes[1:2] == ("video01-phase.txt: 1 trailing row cut, from frame 1000 on",)
    assert len(sampled_frames(entry, 1)) == 40
    assert sampled_frames(entry, 0.5).tolist() == list(range(0, 1000, 50))
    with pytest.raises(UserError, match="the most is 1"):
        sampled_frames(entry, 5)


def label_a_second(root: Path, rows: int = 20) -> Path:
    """Two videos of 20 s at 25 and 30 fps with one row per second from 1, one row missing, one without a phase."""
    for number, fps in ((1, 25), (2, 30)):
        write_video(root / f"videos/video{number:02d}.mp4", 20 * fps, fps)
        lines = [f"{row}\t{SPEC.phases[row % 7] if row != 9 else -1}\n" for row in range(1, rows + 1) if row != 5]
        path = root / f"phase_annotations/video{number:02d}-phase.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("Frame\tPhase\n" + "".join(lines))
    return root


def test_rows_in_seconds_are_stored_and_loaded_as_read(tmp_path: Path) -> None:
    index = index_of(label_a_second(tmp_path))
    again = Index.from_json(json.loads(json.dumps(index.to_json())))
    assert again == index
    assert again.digest() == index.digest()
    assert index.notes[1:5] == (
        "video01-phase.txt: rows are numbered at 1 fps",
        "video01-phase.txt: rows are numbered from 1",
        "video01-phase.txt: rows are missing, first from frame 100; 25 frames without a label",
        "video01-phase.txt: 1 row without a label (-1 or empty)",
    )
    wanted = [row % 7 if row not in (5, 9) else -1 for row in range(1, 21)]
    for entry, fps in zip(again.videos, (25, 30), strict=True):
        assert entry.phase_file is not None
        assert (entry.phase_file.row_fps, entry.phase_file.row_base) == (1.0, 1)
        phase, _ = load_labels(Dataset(again, tmp_path), entry, sampled_frames(entry, 1))
        assert phase.tolist() == wanted
        phase, _ = load_labels(Dataset(again, tmp_path), entry, np.arange(20 * fps))
        assert phase.tolist() == [label for label in wanted for _ in range(fps)]
    assert check_index(Dataset(again, tmp_path)) == []


def test_what_rows_count_is_left_out_where_they_count_the_videos_frames(tmp_path: Path) -> None:
    index = index_of(small_data_set(tmp_path, videos=1))
    assert index.to_json()["videos"][0]["phase_file"].keys() == {"path", "sha256", "rows"}
    assert index_of(tmp_path, row_fps=25).digest() == index.digest()
    assert index_of(tmp_path, row_fps="source", row_base=0).to_json() == index.to_json()


def test_a_folder_with_one_row_per_image_is_read_once_its_rate_is_given(tmp_path: Path) -> None:
    root = folder_data_set(tmp_path, list(range(1, 181)), rows=180)
    message = refusal(lambda: index_of(root))
    assert "source frames or samples? Set data.frame_numbering=source, or data.folder_fps" in message
    index = index_of(root, folder_fps=1)
    entry = index.videos[0]
    frames = sampled_frames(entry, 1)
    assert len(frames) == 180
    phase, _ = load_labels(Dataset(index, root), entry, frames)
    assert phase.tolist() == (np.arange(180) * 7 // 180).tolist()
    as_source = index_of(root, frame_numbering="source").videos[0]
    assert len(sampled_frames(as_source, 1)) == 8


@pytest.mark.parametrize(("stride", "seconds"), [(30, 100), (1, 60)])
def test_images_numbered_at_another_rate_than_the_rows_are_refused(tmp_path: Path, stride: int, seconds: int) -> None:
    """Frames of a video at 30 fps and rows at 25: matched by number, frames get the labels of later moments."""
    root = folder_data_set(tmp_path, list(range(0, seconds * 30, stride)), rows=seconds * 25)
    message = refusal(lambda: index_of(root, frame_numbering="source"))
    assert "last as long as the labels at 30 fps, not at 25 fps" in message
    index = index_of(root, SPEC.model_copy(update={"annotation_fps": 30.0}), frame_numbering="source", row_fps=25)
    frames = sampled_frames(index.videos[0], 1)
    phase, _ = load_labels(Dataset(index, root), index.videos[0], frames)
    assert frames.tolist() == list(range(0, seconds * 30, 30))
    assert phase.tolist() == (np.arange(seconds) * 7 // seconds).tolist()
    index_of(root, frame_numbering="source", row_fps=25)  # labels that do end early


def test_images_that_are_missing_are_frames_that_are_not_there(tmp_path: Path) -> None:
    root = folder_data_set(tmp_path, [number for number in range(1, 41) if number not in (6, 7, 20)], rows=1000)
    index = index_of(root)
    again = Index.from_json(json.loads(json.dumps(index.to_json())))
    entry = again.videos[0]
    assert again == index
    assert "frames/video01: 3 of 40 images are missing, the first of them number 6" in index.notes
    there = [k * 25 for k in range(40) if k not in (5, 6, 19)]
    assert sampled_frames(entry, 1).tolist() == there
    assert sampled_frames(entry, 0.5).tolist() == [frame for frame in there if frame % 50 == 0]
    assert list(frame_folder(root, entry.source, SPEC, entry.frames)) == there
    phase, _ = load_labels(Dataset(again, root), entry, there)
    assert phase.tolist() == [frame * 7 // 1000 for frame in there]
    assert index_summary(again, count_frames(Dataset(again, root), 1.0))[3] == ["frames", 37]
    assert check_index(Dataset(again, root)) == []
    (root / "frames/video01/video01_000030.png").unlink()
    assert "contains other images than were indexed" in check_index(Dataset(again, root))[0]


def test_videos_with_few_labels_are_left_out_unless_insisted_on(tmp_path: Path) -> None:
    root = small_data_set(tmp_path)
    write_phases(root / "phase_annotations/video02-phase.txt", 37)
    (root / "tool_annotations/video02-tool.txt").unlink()
    index = build_index(root, SPEC, DataConfig(), leave_out=True)
    assert [entry.id for entry in index.videos] == ["video01"]
    reason = index.left_out[0].reason
    assert reason.startswith(
        "phase_annotations/video02-phase.txt: has labels for 37.0% of videos/video02.mp4, less than"
    )
    assert "lower data.min_labelled" in reason
    for fraction in (0, 0.37):
        insisted = build_index(root, SPEC, DataConfig(min_labelled=fraction), leave_out=True)
        assert [entry.id for entry in insisted.videos] == ["video01", "video02"]
    write_tools(root / "tool_annotations/video01-tool.txt", 1)
    message = refusal(lambda: build_index(root, SPEC, DataConfig(), leave_out=True))
    assert message.endswith("(also at fault: video02)")
    (root / "phase_annotations/video02-phase.txt").unlink()  # none at all is as it was: indexed, and noted
    assert [e.id for e in build_index(root, SPEC, DataConfig(), leave_out=True).videos] == ["video02"]


def test_index_shows_what_is_labelled_and_leaves_out_what_is_hardly(tmp_path: Path) -> None:
    root = label_a_second(tmp_path / "data")
    write_video(root / "videos/video03.mp4", 100)
    write_phases(root / "phase_annotations/video03-phase.txt", 37)
    arguments = ["index", "--root", "data", "--set", "data.index=index.json"]
    done = run(arguments, tmp_path)
    assert done.returncode == 1, done.stderr
    assert "left out: video03: phase_annotations/video03-phase.txt: has labels for 37.0% of videos/video03.mp4" in (
        done.stdout + done.stderr
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["video", "images", "used", "with", "a", "phase", "with", "tools"] in lines
    assert ["video01", "500", "20", "90.0%", "0.0%"] in lines
    assert ["video02", "600", "20", "90.0%", "0.0%"] in lines
    for other in ("data.row_fps=source", "data.row_base=0"):
        config = load_config("cholec80", [f"data.root={root}", f"data.index={tmp_path / 'index.json'}", other])
        assert "index.json: the numbers of video01's rows or images were read in another way" in (
            refusal(partial(open_dataset, config))
        )
    config = load_config("cholec80", [f"data.root={root}", f"data.index={tmp_path / 'index.json'}", "data.row_fps=1"])
    assert [entry.id for entry in open_dataset(config).index.videos] == ["video01", "video02"]
    insisted = run([*arguments, "--set", "data.min_labelled=0.3", "--force"], tmp_path)
    assert insisted.returncode == 0, insisted.stderr
    assert ["video03", "100", "4", "50.0%", "0.0%"] in [line.split() for line in insisted.stdout.splitlines()]


def test_the_summary_counts_what_is_there(tmp_path: Path) -> None:
    root = small_data_set(tmp_path, videos=3)
    (root / "tool_annotations/video03-tool.txt").unlink()
    index = index_of(root, split={"rule": "1/1/1"})
    table = index_summary(index, count_frames(Dataset(index, root), 1.0))
    assert table[0] == ["", "train", "val", "test", "all"]
    counts = {str(row[0]): row[1:] for row in table[1:]}
    assert counts["videos"] == [1, 1, 1, 3]
    assert counts["frames"] == [4, 4, 4, 12]
    assert counts["no phase label"] == [0, 0, 0, 0]
    assert counts["no tool labels"] == [0, 0, 4, 4]
    assert counts["Preparation"] == [1, 1, 1, 3]
    assert counts["Grasper"] == [2, 2, 0, 4]
    per_phase = np.array([counts[name] for name in SPEC.phases])
    assert per_phase.sum(axis=0).tolist() == [4, 4, 4, 12]
    assert index_summary(index, count_frames(Dataset(index, root), 25.0))[3] == ["frames", 100, 100, 100, 300]
    assert index_summary(index, count_frames(Dataset(index, root), 25.0))[2] == ["hours", 0.0, 0.0, 0.0, 0.0]


def test_a_bar_counts_the_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[str, str, list[str]]] = []

    def bar(total: None, description: str, unit: str, iterable: Any, delay: float) -> Any:
        shown.append((description, unit, [video.id for video in iterable]))
        return contextlib.nullcontext(iterable)

    monkeypatch.setattr("features.dataset.build.progress_bar", bar)
    monkeypatch.setattr("features.dataset.check.progress_bar", bar)
    root = small_data_set(tmp_path)
    check_index(Dataset(build_index(root, SPEC, DataConfig()), root))
    assert shown == [(command, "video", ["video01", "video02"]) for command in ("index", "check")]


def test_videos_are_found_by_split_and_id(tmp_path: Path) -> None:
    index = index_of(small_data_set(tmp_path), split={"rule": "1/1"})
    assert [entry.id for entry in index.by_split("test")] == ["video02"]
    assert index.by_split("val") == ()
    assert refusal(lambda: index.entry("video09")) == "video09: no such video in the index (video01 to video02)"


# ---------------------------------------------------------------------------------------------- bad input


def damage_nothing(root: Path) -> None:
    """Damages no file: the root is removed."""
    shutil.rmtree(root)


def damage_zero_bytes(root: Path) -> None:
    (root / "videos/video02.mp4").write_bytes(b"")


def damage_text(root: Path) -> None:
    (root / "videos/video02.mp4").write_text("this is no video\n" * 50)


def damage_truncated(root: Path) -> None:
    path = root / "videos/video02.mp4"
    path.write_bytes(path.read_bytes()[:400])


def damage_video_shorter_than_labels(root: Path) -> None:
    write_phases(root / "phase_annotations/video02-phase.txt", 150)


def damage_other_rate(root: Path) -> None:
    write_video(root / "videos/video02.mp4", 3000, fps=30)
    write_phases(root / "phase_annotations/video02-phase.txt", 2400)
    (root / "tool_annotations/video02-tool.txt").unlink()


def damage_class_name(root: Path) -> None:
    path = root / "phase_annotations/video02-phase.txt"
    path.write_text(path.read_text().replace("99\tGallbladderRetraction", "99\tGallbladerRetraction"))


def damage_second_file(root: Path) -> None:
    shutil.copy(root / "videos/video02.mp4", root / "video2.mp4")


@pytest.mark.parametrize(
    ("damage", "named", "problem"),
    [
        (damage_nothing, "", "no such folder"),
        (damage_zero_bytes, "videos/video02.mp4", ""),
        (damage_text, "videos/video02.mp4", ""),
        (damage_truncated, "videos/video02.mp4", ""),
        (
            damage_video_shorter_than_labels,
            "phase_annotations/video02-phase.txt",
            "row 101 (line 102) is frame 100, beyond the 100 frames (4.0 s at 25 fps) of videos/video02.mp4",
        ),
        (
            damage_other_rate,
            "phase_annotations/video02-phase.txt",
            "row 2400 (line 2401) is frame 2399: rows are numbered as if at 24 fps, but videos/video02.mp4 runs at "
            "30 fps (3000 frames, 100.0 s); set data.row_fps=24, or data.row_fps=source if they",
        ),
        (
            damage_class_name,
            "phase_annotations/video02-phase.txt",
            "row 100 (line 101) unknown phase 'GallbladerRetraction'; did you mean GallbladderRetraction?",
        ),
        (damage_second_file, "videos/video02.mp4", "two videos for one video"),
    ],
)
def test_bad_input_is_refused_naming_the_file(
    tmp_path: Path, damage: Callable[[Path], None], named: str, problem: str
) -> None:
    root = small_data_set(tmp_path / "data")
    damage(root)
    before = sorted(tmp_path.rglob("*"))
    message = refusal(lambda: index_of(root))
    assert str(root / named) in message
    assert problem in message
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("step", [1, 25])
def test_rows_that_begin_with_the_number_of_a_folders_first_image_begin_with_it(tmp_path: Path, step: int) -> None:
    """Numbers of images and rows continue from folder to folder."""
    numbers = list(range(50, 50 + 40 * step, step))
    root = folder_data_set(tmp_path, numbers, rows=40)
    track = LabelTrack(np.array(numbers), (np.arange(40) * 7 // 40).astype(np.int8), step)
    write_label_file(root / "phase_annotations/video01-phase.txt", track, SPEC)
    index = index_of(root, frame_base="first", folder_fps=1 if step == 1 else None)
    assert index.to_json()["videos"][0]["phase_file"]["row_base"] == 50
    phase, _ = load_labels(Dataset(index, root), index.videos[0], sampled_frames(index.videos[0], 1))
    assert phase.tolist() == track.labels.tolist()


def test_every_video_at_fault_is_named(tmp_path: Path) -> None:
    root = small_data_set(tmp_path, videos=3)
    for name in ("video01", "video03"):
        (root / f"phase_annotations/{name}-phase.txt").write_text("nothing")
    message = refusal(lambda: index_of(root))
    assert message.startswith(str(root / "phase_annotations/video01-phase.txt"))
    assert message.endswith("(also at fault: video03)")


def test_a_folder_that_lost_its_first_image_is_refused(tmp_path: Path) -> None:
    folder_data_set(tmp_path, list(range(40)), rows=1000)
    folder_data_set(tmp_path, list(range(1, 40)), rows=1000, name="video02")
    message = refusal(lambda: index_of(tmp_path))
    assert message.startswith(f"{tmp_path / 'frames/video02'}: images are numbered from 1, but those of")
    index = index_of(tmp_path, frame_base=0, folder_fps=1)
    assert index.entry("video02").frames is not None
    assert sampled_frames(index.entry("video02"), 1)[0] == 25


def test_a_split_of_more_videos_names_a_file_that_was_passed_over(tmp_path: Path) -> None:
    root = small_data_set(tmp_path)
    (root / "video03_full.mp4").write_bytes(b"x")
    message = refusal(lambda: index_of(root, split={"rule": "1/1/1"}))
    assert "1/1/1 needs 3 videos, but there are 2" in message
    assert "passed over: video03_full.mp4: its name does not match" in message


def test_a_split_that_does_not_fit_is_refused_when_asked_for(tmp_path: Path) -> None:
    root = small_data_set(tmp_path)
    assert "32/8/40 needs 80 videos, but there are 2 (video01, video02)" in refusal(
        lambda: index_of(root, split={"rule": "32/8/40"})
    )
    with pytest.raises(UserError, match="there is no video 'video03'"):
        build_index(root, SPEC, DataConfig(split=SplitConfig(train=("video01",), test=("video03",))))


# ---------------------------------------------------------------------------------------------- checking


def test_an_untouched_data_set_passes_its_check(tmp_path: Path) -> None:
    root = small_data_set(tmp_path)
    assert check_index(Dataset(index_of(root), root)) == []
    assert check_index(Dataset(index_of(root, full_hash=True), root)) == []
    moved = Dataset(index_of(root), tmp_path / "gone")
    assert refusal(lambda: check_index(moved)).startswith(f"{tmp_path / 'gone'}: no such")


def tamper_remove(root: Path) -> None:
    (root / "videos/video02.mp4").unlink()


def tamper_replace(root: Path) -> None:
    write_video(root / "videos/video02.mp4", 101)


def tamper_flip(root: Path) -> None:
    path = root / "videos/video02.mp4"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def tamper_cut(root: Path) -> None:
    path = root / "videos/video02.mp4"
    path.write_bytes(path.read_bytes()[:-500])


def tamper_labels(root: Path) -> None:
    path = root / "tool_annotations/video02-tool.txt"
    path.write_text(path.read_text().replace("0\t1", "0\t0", 1))


def tamper_remove_labels(root: Path) -> None:
    (root / "phase_annotations/video02-phase.txt").unlink()


def tamper_touch(root: Path) -> None:
    os.utime(root / "videos/video02.mp4", ns=(1, 1))


@pytest.mark.parametrize(
    ("tamper", "named", "problem"),
    [
        (tamper_remove, "videos/video02.mp4", ""),
        (tamper_replace, "videos/video02.mp4", "size_bytes is"),
        (tamper_flip, "videos/video02.mp4", "sha256_ends is"),
        (tamper_cut, "videos/video02.mp4", ""),
        (
            tamper_labels,
            "tool_annotations/video02-tool.txt",
            "has changed since it was indexed; run `index --force`, then this again",
        ),
        (tamper_remove_labels, "phase_annotations/video02-phase.txt", "no such file"),
        (tamper_touch, "videos/video02.mp4", "was rewritten since it was indexed"),
    ],
)
def test_the_check_names_what_has_changed(
    tmp_path: Path, tamper: Callable[[Path], None], named: str, problem: str
) -> None:
    root = small_data_set(tmp_path)
    index = index_of(root)
    tamper(root)
    problems = check_index(Dataset(index, root))
    assert len(problems) == 1
    assert problems[0].startswith("video02: ")
    assert str(root / named) in problems[0]
    assert problem in problems[0]


def test_a_copy_is_no_change_where_whole_hashes_are_recorded(tmp_path: Path) -> None:
    root = small_data_set(tmp_path)
    index = index_of(root, full_hash=True)
    tamper_touch(root)
    assert check_index(Dataset(index, root)) == []


def test_a_header_that_packets_do_not_bear_out_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = small_data_set(tmp_path, videos=1)
    index = index_of(root)
    entry = index.videos[0].model_copy(update={"frame_count": 99, "tool_file": None})
    (problem,) = check_index(Dataset(index.model_copy(update={"videos": (entry,)}), root))
    assert (
        problem == f"video01: {root / 'videos/video01.mp4'}: frame_count is 100, but was indexed as 99; run index again"
    )
    monkeypatch.setattr("features.dataset.check.count_packets", lambda path: 99)
    (problem,) = check_index(Dataset(index, root))
    assert "contains 99 frames, but its header says 100" in problem


@pytest.mark.parametrize("change", ["remove", "grow", "first", "extra"])
def test_the_check_sees_changed_images(tmp_path: Path, change: str) -> None:
    root = folder_data_set(tmp_path, list(range(0, 1000, 100)), rows=1000)
    index = index_of(root)
    images = root / "frames/video01"
    if change == "remove":
        (images / "video01_000500.png").unlink()
    elif change == "grow":
        (images / "video01_000500.png").write_bytes(b"image 500 and more")
    elif change == "first":
        (images / "video01_000000.png").write_bytes(b"image O")
    else:
        (images / "video01_001000.png").write_bytes(b"image")
    (problem,) = check_index(Dataset(index, root))
    assert problem.startswith(f"video01: {images}: ")
    assert "run index again" in problem


def test_changed_labels_are_not_loaded(tmp_path: Path) -> None:
    root = small_data_set(tmp_path)
    index = index_of(root)
    tamper_labels(root)
    load_labels(Dataset(index, root), index.entry("video01"), np.arange(3))
    message = refusal(lambda: load_labels(Dataset(index, root), index.entry("video02"), np.arange(3)))
    assert message.startswith(str(root / "tool_annotations/video02-tool.txt"))


# ---------------------------------------------------------------------------------------------- foreign indices


def entry_json(**changes: object) -> dict[str, object]:
    entry = VideoEntry(
        id="video01",
        kind="video",
        source="videos/video01.mp4",
        size_bytes=1,
        modified_ns=1,
        sha256_ends=CHECKSUM,
        fps=25.0,
        frame_count=100,
        split="train",
    )
    return {**entry.model_dump(mode="json"), **changes}


def index_json(*entries: dict[str, object]) -> dict[str, object]:
    return {
        "format_version": 1,
        "dataset": SPEC.model_dump(mode="json"),
        "videos": list(entries or (entry_json(),)),
        "notes": [],
    }


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"source": "/etc/passwd"}, "videos.0.source"),
        ({"source": "../secret.mp4"}, "must be a path below the data root"),
        ({"source": "a/../../b.mp4"}, "must be a path below the data root"),
        ({"source": "a\ud800.mp4"}, "contains characters that no file name has"),
        ({"source": ""}, "videos.0.source"),
        ({"phase_file": {"path": "../x.txt", "sha256": CHECKSUM, "rows": 3}}, "videos.0.phase_file.path"),
        ({"phase_file": {"path": "x.txt", "sha256": "short", "rows": 3}}, "videos.0.phase_file.sha256"),
        ({"id": "../video01"}, "videos.0.id"),
        ({"id": ""}, "videos.0.id"),
        ({"fps": 0}, "videos.0.fps"),
        ({"fps": float("inf")}, "videos.0.fps"),
        ({"frame_count": 0}, "videos.0.frame_count"),
        ({"split": "holdout"}, "videos.0.split"),
        ({"kind": "frames"}, "frames must be given"),
        ({"colour": "red"}, "videos.0.colour"),
    ],
)
def test_damaged_indices_are_refused_naming_the_fault(changes: dict[str, object], problem: str) -> None:
    message = refusal(lambda: Index.from_json(index_json(entry_json(**changes)), "index.json"))
    assert message.startswith("index.json: damaged index: ")
    assert message.endswith("run index again")
    assert problem in message


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "not a JSON file"),
        (b"\xff\xfe", "not a JSON file"),
        (b"[1, 2]", "not an index; make one with the command index"),
        (b"null", "not an index"),
        (b'{"epochs": 5}', "not an index"),
        (b'{"format_version": 2, "videos": []}', "index format 2, but this program reads 1"),
        (b'{"format_version": 1, "videos": []}', "damaged index: dataset"),
        (b"[" * 100_000, "not a JSON file"),
    ],
)
def test_files_that_are_no_index_are_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "index.json"
    path.write_bytes(content)
    message = refusal(lambda: Index.load(path))
    assert message.startswith(f"{path}: ")
    assert problem in message
    assert refusal(lambda: Index.load(tmp_path / "gone.json")) == f"{tmp_path / 'gone.json'}: no such file"


def test_two_videos_of_one_id_are_refused() -> None:
    message = refusal(lambda: Index.from_json(index_json(entry_json(), entry_json(id="VIDEO01"))))
    assert "two videos have the same id" in message


def test_an_index_that_points_through_a_link_out_of_the_root_reads_nothing(tmp_path: Path) -> None:
    root = small_data_set(tmp_path / "data", videos=1)
    index = index_of(root)
    (root / "phase_annotations").rename(tmp_path / "outside")
    (root / "phase_annotations").symlink_to(tmp_path / "outside")
    dataset = Dataset(index, root)
    assert "leads out of the data root" in refusal(lambda: load_labels(dataset, index.videos[0], np.arange(3)))
    assert "leads out of the data root" in check_index(dataset)[0]


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=120)
@given(data=st.data(), junk=JUNK)
def test_no_damage_to_an_index_raises_anything_but_user_errors(data: st.DataObject, junk: object) -> None:
    value = index_json()
    place: dict = value
    for _ in range(data.draw(st.integers(0, 2))):
        branches = [key for key, below in place.items() if isinstance(below, dict)]
        if place is value:
            branches.append("videos")
        if not branches:
            break
        key = data.draw(st.sampled_from(branches))
        place = place[key][0] if key == "videos" else place[key]
    place[data.draw(st.sampled_from([*sorted(place), ""]) | st.text(max_size=5))] = junk
    try:
        index = Index.from_json(value)
    except UserError as error:
        refused = str(error)
    else:
        refused = ""
        assert Index.from_json(json.loads(json.dumps(index.to_json()))) == index
    assert len(refused.splitlines()) <= 1


def test_reading_an_index_imports_no_torch_and_no_decoder() -> None:
    heavy = ("torch", "torchvision", "decord", "av", "PIL", "h5py", "features.video.open", "features.dataset.build")
    program = (
        "import sys, features.dataset.index, features.dataset.labels\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
