"""Recordings in several files: how their parts are found, and that they are one video in the index and after it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from commands.doctor.settings import check_data
from configs.dataset_spec import DataSetSpec
from configs.errors import UserError
from configs.load import load_dataset
from configs.schema import CacheConfig, Config, DataConfig, PreprocessConfig
from features.dataset.annotations import LabelTrack
from features.dataset.build import build_index
from features.dataset.catalogue import index_dataset, open_dataset
from features.dataset.check import check_index
from features.dataset.discover import find_videos
from features.dataset.index import Dataset, Index
from features.dataset.labels import load_labels, sample_labels, sampled_labels
from features.dataset.parts import joined_track
from features.dataset.sampling import frame_times_s, sampled_frames
from features.frames.source import (
    ChangedSource,
    cache_request,
    can_start_inside,
    frame_cache,
    open_frames,
    open_source,
    require_indexed_annotations,
    require_indexed_source,
    source_frames,
)
from features.video.base import ReaderError
from tests.videos import VideoSpec, cut_video, damage_packet, frame_number, truncate, variable_rate, write_video

PHASES = ("A", "B", "C", "D", "E")


def spec_of(files: str | None = None, **more: Any) -> DataSetSpec:
    """A data set whose videos may be in parts, with phases in files such as video01.txt (frame, phase)."""
    files = files or r"video(?P<id>\d+)(_part(?P<part>\w+))?\.txt"
    given: dict[str, Any] = {
        "name": "own",
        "annotation_fps": 25,
        "phases": PHASES,
        "patterns": {
            "video": r"video(?P<id>\d+)(_part(?P<part>\w+))?\.{video}",
            "frames": r"video(?P<id>\d+)",
            **more.pop("patterns", {}),
        },
        "labels": {"phases": {"files": files, "columns": {"start": "Frame", "label": "Phase"}, "unit": "source"}},
    }
    return DataSetSpec.model_validate(given | more)


SPEC = spec_of()
NAMES = [f"video02_part{number}.mp4" for number in (1, 2, 3)]


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of 60 frames, and the same in parts of 12, 24 and 24 frames."""
    root = tmp_path_factory.mktemp("cut")
    whole = write_video(root / "video01.mp4", VideoSpec(count=60))
    cut_video(whole, [root / name for name in NAMES], [1, 3])
    return root


def rows(frames: Sequence[int], first: int = 0) -> str:
    """A file of labels: these frames, with the phases that change every 10 frames of the whole."""
    return "Frame\tPhase\n" + "".join(f"{k}\t{PHASES[(first + k) // 10 % 5]}\n" for k in frames)


def indexed(root: Path, spec: DataSetSpec = SPEC, leave_out: bool = False, **data: Any) -> Dataset:
    index = build_index(root, spec, DataConfig(**data), leave_out=leave_out)
    assert Index.from_json(json.loads(json.dumps(index.to_json()))) == index
    return Dataset(index, root)


def described(root: Path, **data: Any) -> Config:
    """Settings that name this data set by a file, as a user's do."""
    file = root / ".own.yaml"
    file.write_text(yaml.safe_dump(SPEC.model_dump(mode="json")))
    return Config(data=DataConfig(**{"root": root, "index": root / ".index.json", "dataset": str(file)} | data))


def refusal(root: Path, spec: DataSetSpec = SPEC) -> str:
    """The one line by which an index of these files is refused; beside another video, only this one is left out."""
    with pytest.raises(UserError) as caught:
        build_index(root, spec, DataConfig())
    shutil.copyfile(root / ".spare", root / "video99.mp4")
    left = build_index(root, spec, DataConfig(), leave_out=True)
    assert [entry.id for entry in left.videos] == ["video99"]
    assert [one.id for one in left.left_out] == ["video02"]
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.fixture
def root(tmp_path: Path, cut: Path) -> Path:
    """The three parts, and outside any pattern a whole video."""
    for name in NAMES:
        shutil.copy2(cut / name, tmp_path / name)
    shutil.copyfile(cut / "video01.mp4", tmp_path / ".spare")
    return tmp_path


# ---------------------------------------------------------------------------------------------- finding


def make(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(path.encode())
    return root


def parts_found(root: Path, spec: DataSetSpec = SPEC) -> dict[str, list[tuple[str, str | None]]]:
    """The source and the file of phases of each part of each video."""
    return {
        video.id: [(one.source, one.labels.get("phase")) for one in video.parts or (video,)]
        for video in find_videos(root, spec).videos
    }


def test_parts_are_ordered_by_number_or_letter_and_one_part_alone_is_a_video(tmp_path: Path) -> None:
    make(tmp_path, *(f"a/video01_part{number:02d}.mp4" for number in range(11)), "video02_partB.avi")
    make(tmp_path, "b/video02_partA.avi", "b/video02_partb.txt", "video03_part1.mp4", "video03_part1.txt", "video4.mp4")
    found = parts_found(tmp_path)
    assert [source for source, _ in found["video01"]] == [f"a/video01_part{number:02d}.mp4" for number in range(11)]
    assert found["video02"] == [("b/video02_partA.avi", None), ("video02_partB.avi", "b/video02_partb.txt")]
    assert found["video03"] == [("video03_part1.mp4", "video03_part1.txt")]
    assert found["video04"] == [("video4.mp4", None)]


def test_patterns_with_slashes_match_the_end_of_the_path(tmp_path: Path) -> None:
    spec = spec_of(
        r"video_(?P<id>\d+)(_(?P<part>\d+))?/action_discrete\.txt",
        patterns={
            "video": r"video_(?P<id>\d+)(_(?P<part>\d+))?/video_left\.{video}",
            "frames": r"video_(?P<id>\d+)/left",
        },
    )
    for folder in ("train1/video_11_2", "train1/video_11_1", "train1/video_2"):
        make(tmp_path, f"{folder}/video_left.avi", f"{folder}/action_discrete.txt", f"{folder}/video_right.avi")
    make(tmp_path, "test/video_41/left/000000.png", "test/video_41/right/000000.png")
    found = find_videos(tmp_path, spec)
    assert parts_found(tmp_path, spec) == {
        "video02": [("train1/video_2/video_left.avi", "train1/video_2/action_discrete.txt")],
        "video11": [
            (f"train1/video_11_{n}/video_left.avi", f"train1/video_11_{n}/action_discrete.txt") for n in (1, 2)
        ],
        "video41": [("test/video_41/left", None)],
    }
    assert [path for path, _ in found.passed_over] == [
        f"train1/video_{folder}/video_right.avi" for folder in ("2", "11_1", "11_2")
    ]


@pytest.mark.parametrize("names", [("video02_part1.mp4", "video02_part2.mp4"), ("a/video02-A.avi", "b/video02-B.avi")])
def test_without_the_group_parts_are_passed_over_with_both_ways_to_use_them(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    make(tmp_path, "video01.mp4", *names)
    spec = load_dataset("cholec80")
    passed = dict(find_videos(tmp_path, spec).passed_over)
    assert set(passed) == set(names)
    [reason] = set(passed.values())
    assert f"join its parts into video02{Path(names[0]).suffix}" in reason
    pattern = reason.partition("set patterns.video to '")[2].partition("' in a copy")[0]
    described = spec.model_copy(update={"patterns": spec.patterns.model_copy(update={"video": pattern})})
    assert parts_found(tmp_path, described) == {
        "video01": [("video01.mp4", None)],
        "video02": [(name, None) for name in names],
    }


def test_the_way_to_use_parts_is_general_where_no_pattern_can_be_made(tmp_path: Path) -> None:
    make(tmp_path, "op1/left.mp4", "op2_part1.mp4")
    spec = spec_of(r"x(?P<id>\d+)", patterns={"video": r"op(?P<id>\d+)/left\.mp4"})
    [(_, reason)] = find_videos(tmp_path, spec).passed_over
    assert "add a group (?P<part>...) to patterns.video" in reason
    make(tmp_path, "video05_partA.mp4", "video06-teil1.mp4")
    [(_, reason)] = [one for one in find_videos(tmp_path, SPEC).passed_over if "06" in one[0]]
    assert "let patterns.video, which has a group (?P<part>...), match it" in reason


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (
            ["video02_part1.mp4", "b/video02_part01.mp4"],
            "for part 1 of one video; choose one with data.sources=video:b",
        ),
        (
            ["video02_part1.mp4", "b/video02_part1.mp4", "video02_part2.mp4"],
            "for part 1 of one video; remove one of them, or leave one out with --set 'data.exclude=",
        ),
        (["video02_part1.mp4", "video02_partA.mp4"], "two videos for part 1 of one video"),
        (["video02_part1.mp4", "video02.mp4"], "two videos for one video, the whole and a part of it"),
        (["video02_part1.mp4", "video02_part3.mp4"], "is part 3 of a recording, but there is no part 2; complete it"),
        (["video02_part2.mp4"], "is part 2 of a recording, but there is no part 1"),
        (["video02_part0.mp4", "video02_part2.mp4"], "but there is no part 1"),
        (["video02_partxy.mp4"], "'xy' is not the number or letter of a part"),
        (["video02_part99999.mp4"], "'99999' is not the number"),
        (["video02.mp4", "video02_part1.txt"], "has phase labels of part 1, but the video is one file, video02.mp4"),
        (["video02_part1.mp4", "video02_part2.mp4", "video02_part3.txt"], "of part 3, but the video has 2 part(s)"),
        (["video02_part1.mp4", "video02_part1.txt", "video02.txt"], "the whole and a part of it"),
    ],
)
def test_parts_that_do_not_make_a_recording_are_refused_in_one_line(
    tmp_path: Path, paths: list[str], message: str
) -> None:
    make(tmp_path, *paths)
    with pytest.raises(UserError) as caught:
        find_videos(tmp_path, SPEC)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("patterns", "labels", "message"),
    [
        ({"frames": r"video(?P<id>\d+)(?P<part>\d)"}, None, "is for video files and their labels only"),
        ({"video": r"video(?P<id>\d+)\.mp4"}, None, "labels.phases.files has a group part, but patterns.video has"),
        ({}, r"all_(?P<part>\d)\.txt", "needs a group (?P<id>...) beside it"),
    ],
)
def test_a_group_part_where_it_means_nothing_is_refused(patterns: Any, labels: str | None, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        spec_of(labels, patterns=patterns)
    assert message in str(caught.value)


# ---------------------------------------------------------------------------------------------- one video


def test_the_frames_of_the_parts_are_those_of_the_uncut_video(root: Path, cut: Path) -> None:
    dataset, whole = indexed(root), indexed(cut, spec_of(patterns={"video": r"video(?P<id>01)(?P<part>x)?\.mp4"}))
    [entry], [uncut] = dataset.index.videos, whole.index.videos
    assert entry.source == NAMES[0]
    assert [(part.source, part.frame_count) for part in entry.parts] == list(zip(NAMES, (12, 24, 24), strict=True))
    assert entry.size_bytes == sum((root / name).stat().st_size for name in NAMES)
    assert (entry.fps, entry.frame_count, entry.times_s) == (25, 60, None)
    assert "parts" not in uncut.model_dump()
    for fps in (25, 5, 3.7, 1):
        assert sampled_frames(entry, fps).tolist() == sampled_frames(uncut, fps).tolist()
        assert np.array_equal(frame_times_s(entry, sampled_frames(entry, fps)), sampled_frames(uncut, fps) / 25)
    for reader in ("pyav", "decord"):
        config = Config(data=DataConfig(reader=reader))
        with open_source(config, dataset, entry) as parts, open_source(config, whole, uncut) as one:
            assert (parts.name, parts.version, parts.frame_count) == (one.name, one.version, 60)
            for wanted in ([0, 11, 12, 35, 36, 59], [20, 21], [12], [59], list(range(60))):
                frames = list(parts.read(wanted))
                assert [frame_number(frame) for frame in frames] == wanted
                assert all(map(np.array_equal, frames, one.read(wanted)))
            with pytest.raises(ReaderError, match="has 60 frames"):
                parts.read([60])
    assert can_start_inside(entry, root) == can_start_inside(uncut, cut) == True  # noqa: E712


def test_resized_frames_are_the_same_from_another_process_and_from_the_cache(root: Path) -> None:
    dataset, frame_index = indexed(root), np.arange(0, 60, 4)
    [entry] = dataset.index.videos
    small = PreprocessConfig(resize_px=32, crop_px=32, cut_margin=True)
    config = Config(preprocess=small, cache=CacheConfig(dir=root / "cache", codec="png"), data=DataConfig(fps=6.25))
    sent = pickle.loads(pickle.dumps(partial(source_frames, config, dataset, entry, frame_index)))  # noqa: S301
    with sent() as sampled:
        frames = list(sampled.frames)
    assert sampled.provenance["reader"] == "pyav"
    frame_cache(config).ensure(cache_request(config, dataset, entry, frame_index)).close()
    with open_frames(config, dataset, entry, frame_index, slice(3, 9)) as sampled:
        assert sampled.provenance["frames_from"] == "cache"
        assert np.array_equal(list(sampled.frames), frames[3:9])


def test_parts_of_different_rates_are_sampled_by_time(tmp_path: Path) -> None:
    for name, fps, count in zip(NAMES, (25, 50, Fraction(30000, 1001)), (10, 30, 9), strict=True):
        write_video(tmp_path / name, VideoSpec(count=count, fps=Fraction(fps)))
    dataset = indexed(tmp_path)
    [entry] = dataset.index.videos
    expected = np.concatenate([np.arange(10) / 25, 0.4 + np.arange(30) / 50, 1 + np.arange(9) * 1001 / 30000])
    assert np.allclose(frame_times_s(entry, np.arange(49)), expected, atol=1e-12)
    assert entry.fps == pytest.approx(49 / (1 + 9 * 1001 / 30000))
    assert sampled_frames(entry, 10).tolist() == [0, 2, 5, 7, 10, 15, 20, 25, 30, 35, 40, 42, 45, 48]
    assert check_index(dataset) == []


def test_a_part_with_times_of_its_own_continues_where_the_one_before_ends(tmp_path: Path) -> None:
    spec = variable_rate(20)
    write_video(tmp_path / NAMES[0], VideoSpec(count=10))
    write_video(tmp_path / NAMES[1], spec)
    write_video(tmp_path / NAMES[2], VideoSpec(count=5))
    [entry] = indexed(tmp_path).index.videos
    times_s = frame_times_s(entry, np.arange(35))
    assert np.allclose(times_s[10:30], 0.4 + np.array(spec.times_s), atol=1e-4)
    assert (np.diff(times_s) > 0).all()
    assert times_s[30] == pytest.approx(times_s[29] + 1 / entry.parts[1].fps)


def test_pictures_of_other_sizes_are_refused_only_where_a_margin_is_cut(tmp_path: Path) -> None:
    for name, width_px in zip(NAMES[:2], (96, 128), strict=True):
        write_video(tmp_path / name, VideoSpec(count=5, width_px=width_px))
    dataset = indexed(tmp_path)
    [entry] = dataset.index.videos
    with open_source(Config(), dataset, entry) as reader:
        assert [frame.shape for frame in reader.read([4, 5])] == [(64, 96, 3), (64, 128, 3)]
    with pytest.raises(ReaderError, match=r"video02_part2\.mp4: has pictures of 128x64, but .* of 96x64"):
        open_source(Config(preprocess=PreprocessConfig(cut_margin=True)), dataset, entry)


# ---------------------------------------------------------------------------------------------- labels


def test_labels_of_the_whole_and_labels_of_parts_give_the_same(root: Path) -> None:
    (root / "video02.txt").write_text(rows(range(60)))
    dataset = indexed(root)
    [entry] = dataset.index.videos
    expected = [frame // 10 % 5 for frame in range(60)]
    assert load_labels(dataset, entry, range(60))[0].tolist() == expected
    assert entry.annotation_files[0].path == "video02.txt"
    (root / "video02.txt").unlink()
    for name, first, count in zip(NAMES, (0, 12, 36), (12, 24, 24), strict=True):
        (root / name).with_suffix(".txt").write_text(rows(range(count), first))
    dataset = indexed(root)
    [entry] = dataset.index.videos
    assert load_labels(dataset, entry, range(60))[0].tolist() == expected
    assert sampled_labels(dataset, entry, DataConfig(fps=5)).phase.tolist() == expected[::5]
    assert [part.phase_file and part.phase_file.rows for part in entry.parts] == [12, 24, 24]
    before = entry.phase_file
    (root / "video02_part2.txt").write_text(rows(range(23), 12))
    assert any("video02_part2.txt: has changed" in problem for problem in check_index(dataset))
    [changed] = indexed(root).index.videos
    assert changed.phase_file != before  # so that features know that their labels are out of date


def test_tracks_may_differ_in_whether_parts_have_files_of_their_own(root: Path) -> None:
    (root / "video02.txt").write_text(rows(range(60)))
    for part, first in ((1, 0), (3, 36)):
        (root / f"steps02_{part}.csv").write_text(f"start,end,label\n0,2,{'xy'[first > 0]}\n5,9,z\n")
    steps = {"files": r"steps(?P<id>\d+)_(?P<part>\d)\.csv", "delimiter": "comma", "form": "intervals"}
    steps |= {"unit": "source", "columns": {"end": "end", "label": "label"}, "gaps": "x"}
    phases = SPEC.model_dump(mode="json")["labels"]["phases"]
    spec = spec_of(tracks={"steps": {"classes": ["x", "y", "z"]}}, labels={"phases": phases, "steps": steps})
    dataset = indexed(root, spec)
    [entry] = dataset.index.videos
    labels = sampled_labels(dataset, entry, DataConfig(fps=25))
    assert labels.phase.tolist() == [frame // 10 % 5 for frame in range(60)]
    first, third = [0, 0, 0, 0, 0, 2, 2, 2, 2, 0, 0, 0], [1, 1, 0, 0, 0, 2, 2, 2, 2] + [0] * 15
    assert labels.tracks["steps"].tolist() == [*first, *[-1] * 24, *third]
    assert [file.path for file in entry.annotation_files] == ["video02.txt", "steps02_1.csv"]
    assert entry.paths == {*NAMES, "video02.txt", "steps02_1.csv", "steps02_3.csv"}
    assert check_index(dataset) == check_index(indexed(root, spec))


def test_a_part_without_labels_or_with_too_few_has_none_there(root: Path) -> None:
    (root / "video02_part1.txt").write_text(rows(range(0, 8, 2)))
    (root / "video02_part3.txt").write_text(rows(range(5, 24, 5), 36))
    dataset = indexed(root)
    [entry] = dataset.index.videos
    phase = load_labels(dataset, entry, range(60))[0]
    labelled = [*range(8), *range(41, 60)]
    assert np.flatnonzero(phase >= 0).tolist() == labelled
    assert phase[labelled].tolist() == [0] * 8 + [(36 + k // 5 * 5) // 10 % 5 for k in range(5, 24)]
    assert any("video02_part3.txt: starts late" in note for note in dataset.index.notes)


def test_rows_beyond_a_part_are_refused_naming_its_file(root: Path) -> None:
    for name in NAMES:
        (root / name).with_suffix(".txt").write_text(rows(range(30)))
    assert "video02_part1.txt: line 14 is frame 12, beyond the 12 frames" in refusal(root)


def test_one_file_for_all_videos_numbers_the_whole_recording(root: Path) -> None:
    def shared(*cells: str) -> DataSetSpec:
        lines = [f"{cell};{frame};{PHASES[frame // 12]}" for cell in cells for frame in (0, 12, 36)]
        (root / "all.csv").write_text("\n".join(["video;Frame;Phase", *lines]) + "\n")
        columns = {"video": "video", "start": "Frame", "label": "Phase"}
        source = {"files": r"all\.csv", "delimiter": "semicolon", "form": "starts", "unit": "source"}
        return spec_of(labels={"phases": {**source, "columns": columns}})

    dataset = indexed(root, shared("2"))
    [entry] = dataset.index.videos
    assert load_labels(dataset, entry, range(60))[0].tolist() == [0] * 12 + [1] * 24 + [3] * 24
    require_indexed_annotations(dataset, entry)
    shared("2", "3")
    require_indexed_annotations(dataset, entry)  # the labels of another video are new
    (root / "all.csv").write_text((root / "all.csv").read_text().replace("2;12;B", "2;13;B"))
    with pytest.raises(UserError, match=r"all\.csv: has changed since it was indexed"):
        require_indexed_annotations(dataset, entry)
    with pytest.raises(UserError, match="'video02_part1' is one part of a recording"):
        indexed(root, shared("video02_part1"))


@settings(max_examples=60)
@given(st.data())
def test_joined_rows_label_each_frame_as_its_part_does(data: st.DataObject) -> None:
    tracks: list[LabelTrack | None] = []
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    for length in lengths:
        stride = data.draw(st.integers(1, 4))
        numbers = data.draw(st.lists(st.integers(0, (length - 1) // stride), unique=True, max_size=6).map(sorted))
        labels = data.draw(st.lists(st.integers(0, 3), min_size=len(numbers), max_size=len(numbers)))
        track = LabelTrack(np.array(numbers) * stride, np.array(labels, dtype=np.int8), stride)
        tracks.append(track if numbers else None)
    joined = joined_track(tracks, lengths)

    def phases(track: LabelTrack | None, length: int) -> list[int]:
        return sample_labels(range(length), track, None, "mask", 0)[0].tolist()

    parts = [phases(track, length) for track, length in zip(tracks, lengths, strict=True)]
    assert phases(joined, sum(lengths)) == [label for part in parts for label in part]


# ---------------------------------------------------------------------------------------------- damage


def test_a_missing_part_leaves_the_video_out_and_a_lost_or_changed_one_is_named(root: Path, cut: Path) -> None:
    dataset = indexed(root)
    [entry] = dataset.index.videos
    os.utime(root / NAMES[1], (1, 1))
    assert "was rewritten since it was indexed" in check_index(dataset)[0]
    require_indexed_source(dataset, entry)
    write_video(root / NAMES[1], VideoSpec(count=24, width_px=128))
    with pytest.raises(ChangedSource, match=r"video02_part2\.mp4: has changed"):
        open_source(Config(), dataset, entry)
    config = described(root)
    dataset.index.save(config.data.index)
    assert "1 of 1 sources have changed (video02)" in list(check_data(config))[-1].found
    (root / NAMES[1]).unlink()
    assert NAMES[1] in check_index(dataset)[0]
    assert "1 of 1 sources are missing (video02)" in list(check_data(config))[-1].found
    with pytest.raises(UserError, match=r"video02_part2\.mp4"):
        open_source(Config(), dataset, entry)
    assert "part 3 of a recording, but there is no part 2" in refusal(root)


def test_a_damaged_part_is_named_and_its_neighbours_can_be_read(root: Path) -> None:
    damage_packet(root / NAMES[1], 12)
    dataset = indexed(root)
    [entry] = dataset.index.videos
    with open_source(Config(), dataset, entry) as reader:
        assert [frame_number(frame) for frame in reader.read([0, 11, 40])] == [0, 11, 40]
        with pytest.raises(ReaderError, match=r"video02_part2\.mp4: damaged, frame \d+ cannot be read"):
            list(reader.read(range(60)))


@pytest.mark.parametrize("damage", ["empty", "cut", "link", "text", "no frames"])
def test_a_part_that_is_no_video_leaves_the_whole_recording_out(root: Path, damage: str) -> None:
    import av

    part = root / NAMES[2]
    if damage == "cut":
        truncate(part, 0.6)
    elif damage == "no frames":
        with av.open(str(part), "w") as output:
            stream = output.add_stream("mpeg4", rate=25)
            stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
            output.start_encoding()
    elif damage == "link":
        outside = root.parent / f"{root.name}-outside.mp4"
        shutil.move(part, outside)
        part.symlink_to(outside)
    else:
        part.write_bytes(b"" if damage == "empty" else b"not a video")
    assert NAMES[2] in refusal(root)


def test_excluding_a_part_by_its_path_or_the_recording_by_its_id(root: Path) -> None:
    shutil.copyfile(root / ".spare", root / "video01.mp4")
    index = indexed(root, exclude={NAMES[2]: "sound only"}).index
    assert [len(entry.parts) for entry in index.videos] == [0, 2]
    assert [entry.id for entry in indexed(root, exclude=["video02"]).index.videos] == ["video01"]
    left = indexed(root, exclude=[NAMES[1]], leave_out=True).index.left_out
    assert [one.id for one in left] == ["video02"]


@pytest.mark.parametrize(
    "change",
    [
        {"frame_count": 61},
        {"source": NAMES[1]},
        {"kind": "frames"},
        {"part": {"source": "../x.mp4"}},
        {"part": {"times": {"tick_s": [1, 1000], "steps": "aaaa"}}},
        {"part": {"fps": 0}},
    ],
)
def test_an_entry_that_contradicts_its_parts_is_refused(root: Path, change: dict[str, Any]) -> None:
    index = indexed(root).index.to_json()
    of_part = change.pop("part", {})
    index["videos"][0].update(change)
    index["videos"][0]["parts"][1].update(of_part)
    with pytest.raises(UserError, match="damaged index: videos"):
        Index.from_json(index)


def test_an_index_fits_the_settings_only_if_all_parts_do(root: Path) -> None:
    (root / "later").mkdir()
    (root / NAMES[2]).rename(root / "later" / NAMES[2])
    index = index_dataset(described(root))
    assert [entry.source for entry in index.videos[0].sources] == [*NAMES[:2], f"later/{NAMES[2]}"]
    assert open_dataset(described(root)).index == index
    with pytest.raises(UserError, match=r"contains video02_part1\.mp4, which data\.sources=video:later"):
        open_dataset(described(root, sources="video:later"))
    cut_video(root / ".spare", [root / f"video03_part{number}.mp4" for number in (1, 2)], [2])
    with pytest.raises(UserError, match="replace it with --force"):
        index_dataset(described(root))


def test_parts_in_the_folders_of_two_splits_are_refused(root: Path) -> None:
    split = {"train": ["/first/*"], "test": ["/second/*"]}
    spec = spec_of(splits={"official": split}, default_split="official")
    for name, folder in zip(NAMES, ("first", "first", "second"), strict=True):
        (root / folder).mkdir(exist_ok=True)
        (root / name).rename(root / folder / name)
    with pytest.raises(UserError, match="video02"):
        build_index(root, spec, DataConfig(split={"rule": "official"}))
    (root / "second" / NAMES[2]).rename(root / "first" / NAMES[2])
    (root / ".spare").rename(root / "second/video01.mp4")
    splits = {entry.id: entry.split for entry in indexed(root, spec).index.videos}
    assert splits == {"video01": "test", "video02": "train"}


def test_a_copy_with_new_times_is_the_same_by_its_whole_hash(root: Path) -> None:
    dataset = indexed(root, full_hash=True)
    os.utime(root / NAMES[2], (1, 1))
    assert not [problem for problem in check_index(dataset) if "passed over" not in problem]


def test_a_moved_data_set_keeps_the_digest_of_its_index(root: Path) -> None:
    index = indexed(root).index
    (root / "elsewhere").mkdir()
    for name in NAMES:
        shutil.copyfile(root / name, root / "elsewhere" / name.upper())
        (root / name).unlink()
    moved = indexed(root).index
    assert moved.videos[0].parts[1].source == f"elsewhere/{NAMES[1].upper()}"
    assert moved.digest() == index.digest()
