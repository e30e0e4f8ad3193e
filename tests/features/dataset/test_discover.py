"""Finding videos, frame folders and annotations below a root, and what image numbers mean."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError
from configs.file_pattern import VIDEO_ENDINGS, file_pattern
from configs.load import load_dataset
from configs.schema import DataConfig
from engine.files import LinkedRoot, inside
from features.dataset.discover import find_videos
from features.dataset.frame_folders import (
    LabelEnd,
    frame_folder,
    infer_layout,
    require_one_base,
    require_one_rate,
    scan_folder,
    source_frames,
)
from features.dataset.layouts import FolderLayout
from features.dataset.unmatched import suggested_pattern
from features.ids import natural_key

SPEC = load_dataset("cholec80")
M2CAI = load_dataset("m2cai16-workflow")


def make(root: Path, *paths: str) -> Path:
    for path in paths:
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(path.encode())
    return root


def found(
    root: Path, spec: DataSetSpec = SPEC, data: DataConfig | None = None
) -> dict[str, tuple[str, str | None, str | None]]:
    return {
        video.id: (video.source, video.labels.get("phase"), video.labels.get("tool"))
        for video in find_videos(root, spec, data).videos
    }


def refusal(root: Path, spec: DataSetSpec = SPEC, data: DataConfig | None = None) -> str:
    with pytest.raises(UserError) as caught:
        find_videos(root, spec, data)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# ---------------------------------------------------------------------------------------------- files


def test_files_are_found_by_name_whatever_the_folders(tmp_path: Path) -> None:
    make(
        tmp_path,
        "Videos (part 1)/video10.mp4",
        "deep/er/Video2.AVI",
        "video_03.mkv",
        "a/phases/video02-phase.txt",
        "a/VIDEO10-Phase.TXT",
        "b/video3-tool.txt",
        "videos/video02-timestamp.txt",
        "videos/readme.md",
    )
    assert found(tmp_path) == {
        "video02": ("deep/er/Video2.AVI", "a/phases/video02-phase.txt", None),
        "video03": ("video_03.mkv", None, "b/video3-tool.txt"),
        "video10": ("Videos (part 1)/video10.mp4", "a/VIDEO10-Phase.TXT", None),
    }


def test_files_that_the_description_ignores_are_neither_used_nor_reported(tmp_path: Path) -> None:
    patterns = SPEC.patterns.model_copy(update={"ignore": r"(tray/.*|masks/.*|.*_right\.{video})"})
    spec = SPEC.model_copy(update={"patterns": patterns})
    make(tmp_path, "micro/video01.mp4", "tray/video01.mp4", "micro/video01_right.mp4")
    make(tmp_path, "video02/0000.png", "video02/0001.png", "video02/masks/0000.png", "video02/masks/0001.png")
    everything = find_videos(tmp_path, spec)
    assert [video.source for video in everything.videos] == ["micro/video01.mp4", "video02"]
    assert not everything.passed_over
    with pytest.raises(ValidationError, match="ignore"):
        DataSetSpec.model_validate(spec.model_dump() | {"patterns": {**patterns.model_dump(), "ignore": "("}})


def test_videos_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    make(tmp_path, *(f"video{number}.mp4" for number in (100, 9, 10, 1)))
    assert list(found(tmp_path)) == ["video01", "video09", "video10", "video100"]


@given(st.lists(st.integers(0, 10**6), max_size=20))
def test_natural_order_is_the_order_of_numbers(numbers: list[int]) -> None:
    assert sorted((f"op{n}b" for n in numbers), key=natural_key) == [f"op{n}b" for n in sorted(numbers)]


def test_ids_that_are_names_stay_as_they_are(tmp_path: Path) -> None:
    make(
        tmp_path,
        "train_dataset/workflow_video_01.mp4",
        "train_dataset/workflow_video_01.txt",
        "train_dataset/workflow_video_01_timestamp.txt",
        "test_dataset/Test_Workflow_Video_01.mp4",
        "test_dataset/test_workflow_video_01.txt",
        "test_dataset/test_workflow_video_01-tool.txt",
    )
    assert found(tmp_path, M2CAI) == {
        "Test_Workflow_Video_01": (
            "test_dataset/Test_Workflow_Video_01.mp4",
            "test_dataset/test_workflow_video_01.txt",
            None,
        ),
        "workflow_video_01": ("train_dataset/workflow_video_01.mp4", "train_dataset/workflow_video_01.txt", None),
    }


def test_hidden_files_and_what_archives_leave_are_passed_over(tmp_path: Path) -> None:
    make(
        tmp_path,
        "video01.mp4",
        "._video01.mp4",
        ".video02.mp4.123.tmp",
        "__MACOSX/video01.mp4",
        "@eaDir/video01.mp4",
        ".cache/video03.mp4",
        "lost+found/video04.mp4",
    )
    assert found(tmp_path) == {"video01": ("video01.mp4", None, None)}


def test_a_folder_of_images_is_a_video_and_a_folder_without_is_not(tmp_path: Path) -> None:
    make(
        tmp_path,
        "frames/video01/video01_000000.jpg",
        "frames/video01/video01_000100.JPG",
        "frames/video01/Thumbs.db",
        "others/video02/video02.mp4",
        "empty/video03/notes.txt",
    )
    discovery = find_videos(tmp_path, SPEC)
    assert [(video.id, video.kind, video.source) for video in discovery.videos] == [
        ("video01", "frames", "frames/video01"),
        ("video02", "video", "others/video02/video02.mp4"),
    ]


def test_what_is_left_over_is_noted(tmp_path: Path) -> None:
    make(tmp_path, "video01.mp4", "video02.mp4", "video02-phase.txt", *(f"p/video{n}-phase.txt" for n in range(3, 8)))
    assert find_videos(tmp_path, SPEC).notes == (
        "5 phase annotation file(s) belong to no video here (p/video3-phase.txt, p/video4-phase.txt, "
        "p/video5-phase.txt, p/video6-phase.txt, p/video7-phase.txt)",
        "1 video(s) without phase annotations (video01)",
        "2 video(s) without tool annotations (video01, video02)",
    )
    make(tmp_path, "m/workflow_video_01.mp4", "m/workflow_video_01.txt")
    assert find_videos(tmp_path / "m", M2CAI).notes == ()


# ---------------------------------------------------------------------------------------------- names in use


@pytest.mark.parametrize("container", VIDEO_ENDINGS)
def test_every_container_that_the_readers_read_is_found(tmp_path: Path, container: str) -> None:
    make(tmp_path, f"Video 01.{container.upper()}", f"workflow_video_07.{container}")
    assert list(found(tmp_path)) == ["video01"]
    assert list(found(tmp_path, M2CAI)) == ["workflow_video_07"]


@pytest.mark.parametrize(
    "folder",
    [
        "VID01",
        "Video 1",
        "video-01",
        "video01.mp4",
        "video01_frames",
        "video01/frames",
        "video01/images",
        "1",
        "01",
        "1/frames",
    ],
)
def test_frame_folders_are_found_by_the_names_in_use(tmp_path: Path, folder: str) -> None:
    make(tmp_path, *(f"cutMargin/{folder}/{number:08d}.jpg" for number in range(3)))
    assert list(found(tmp_path).values()) == [(f"cutMargin/{folder}", None, None)]
    assert list(found(tmp_path)) == ["video01"]


@pytest.mark.parametrize(
    ("form", "taken"),
    [
        ("frame{}.jpg", True),
        ("img{:05d}.png", True),
        ("IMG_{}.JPG", True),
        ("frame_{:06d}.bmp", True),
        ("({}).webp", True),
        ("frame ({}).tif", True),
        ("frame {}.tiff", True),
        ("video01_{}.jpeg", True),
        ("图像_{:06d}.jpg", True),
        ("000001 ({}).jpg", False),  # copies of one image
        ("thumb{}.jpg", False),
        ("{}.gif", False),
    ],
)
def test_images_are_found_by_the_names_in_use(tmp_path: Path, form: str, taken: bool) -> None:
    make(tmp_path, "frames/video01/x_1.jpg", *(f"frames/video02/{form.format(number)}" for number in (1, 2)))
    assert list(found(tmp_path)) == ["video01", *(["video02"] * taken)]
    if taken:
        assert scan_folder(tmp_path, "frames/video02", SPEC).numbers.tolist() == [1, 2]


def test_folders_named_by_a_number_are_used_only_without_better_names(tmp_path: Path) -> None:
    make(tmp_path, "1/1.jpg", "1/2.jpg", "videos/video01.mp4", "videos/video02.mp4")
    assert list(found(tmp_path)) == ["video01", "video02"]
    discovery = find_videos(tmp_path, SPEC)
    assert discovery.passed_over == ()
    assert any("1 (with data.sources=frames:., folders named by a number are used)" in note for note in discovery.notes)
    assert found(tmp_path, data=DataConfig(sources="frames:1")) == {"video01": ("1", None, None)}
    make(tmp_path / "beside", *(f"frames/{name}/{n}.jpg" for name in ("video01", "2") for n in (1, 2)))
    assert "rename it like video01" in passed_over(tmp_path / "beside")["frames/2"]
    make(tmp_path / "m2cai", "1/1.jpg", "1/2.jpg")  # videos there have names and no numbers
    assert "1: a folder of images: its name does not match patterns.frames" in refusal(tmp_path / "m2cai", M2CAI)


# ---------------------------------------------------------------------------------------------- which sources


SURGFORMER = ("videos/video01.mp4", "frames/video01/1.jpg", "frames_cutmargin/video01/1.jpg")


@pytest.mark.parametrize(
    ("sources", "taken"),
    [
        ("video", SURGFORMER[0]),
        ("video:videos", SURGFORMER[0]),
        ("frames:frames", "frames/video01"),
        ("frames:frames_cutmargin", "frames_cutmargin/video01"),
        ("tfrecord", "video01.tfrecord"),
    ],
)
def test_the_setting_chooses_kind_and_folder(tmp_path: Path, sources: str, taken: str) -> None:
    make(tmp_path, *SURGFORMER, "video01.tfrecord", "video01-phase.txt")
    phase = None if sources == "tfrecord" else "video01-phase.txt"
    assert found(tmp_path, data=DataConfig(sources=sources)) == {"video01": (taken, phase, None)}


def test_ambiguous_sources_name_the_setting_that_decides(tmp_path: Path) -> None:
    make(tmp_path, *SURGFORMER)
    assert refusal(tmp_path).endswith(
        "two frame folders for one video; choose one with data.sources=frames:frames or "
        "data.sources=frames:frames_cutmargin"
    )
    (tmp_path / "frames_cutmargin/video01/1.jpg").unlink()
    assert refusal(tmp_path).endswith("so choose with data.sources=video or data.sources=frames")
    assert "no folder nowhere below" in refusal(tmp_path, data=DataConfig(sources="frames:nowhere"))
    with pytest.raises(ValueError, match="frames:FOLDER"):
        DataConfig(sources="frame")


def test_one_of_two_files_of_a_video_can_be_excluded_by_its_path(tmp_path: Path) -> None:
    make(tmp_path, "video01.mp4", "video01.mpg", "old/video01-phase.txt", "video01-phase.txt", "video02.mp4")
    assert """--set 'data.exclude={"video01.mpg": "second copy"}'""" in refusal(tmp_path)
    data = DataConfig(exclude={"video01.mpg": "second copy", "old/*": "first try"})
    assert found(tmp_path, data=data)["video01"] == ("video01.mp4", "video01-phase.txt", None)
    assert "is the only source of video02; give the video's id" in refusal(
        tmp_path, data=DataConfig(exclude=["*/video02.mp4", "*.mp4"])
    )


# ---------------------------------------------------------------------------------------------- passed over


def passed_over(root: Path, spec: DataSetSpec = SPEC) -> dict[str, str]:
    return dict(find_videos(root, spec).passed_over)


def test_every_video_file_that_is_passed_over_is_named_with_a_remedy(tmp_path: Path) -> None:
    make(tmp_path, "video01.mp4", "more/case_07.m2ts", "intro.h264")
    reasons = passed_over(tmp_path)
    assert list(reasons) == ["intro.h264", "more/case_07.m2ts"]
    assert (
        "rename it like video01.mp4, or set patterns.video to 'case_(?P<id>\\d+)\\.{video}'"
        in reasons["more/case_07.m2ts"]
    )
    assert "ffmpeg -framerate" in reasons["intro.h264"]


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (("video02_part1.mp4", "video02_part2.mp4"), True),
        (("video02-1.avi", "video02-2.avi"), True),
        (("02-1.avi", "02-2.avi"), True),
        (("Op3_A.mov", "Op3_B.mov"), True),
        (("case4 pt 2.mts",), True),
        (("video02_2.mp4",), True),
        (("video02_part001.mpg", "video02_part002.mpg"), True),
        (("case_07.mts", "case_08.mts"), False),
        (("site2_case_01.mts", "site2_case_02.mts"), False),
        (("2024-01-05.mp4", "2024-01-06.mp4"), False),
        (("Op7.final.mp4",), False),
        (("video03.mp4.crdownload", "video04.avi.gz"), False),
    ],
)
def test_parts_of_one_recording_are_called_so(tmp_path: Path, names: Sequence[str], parts: bool) -> None:
    make(tmp_path, "video01.mp4", *names)
    reasons = passed_over(tmp_path)
    assert list(reasons) == list(names)
    assert all(("one part of a recording" in reason) == parts for reason in reasons.values())


def test_what_is_no_video_of_its_own_is_not_missed(tmp_path: Path) -> None:
    make(
        tmp_path,
        *("video01.mp4", "video01 (1).mp4", "video01 - Copy.mp4", "README.md", "stats.csv", "video01-timestamp.txt"),
        *("video01-phase.txt", "video01-tool.txt", "thumbnails/a.jpg", "thumbnails/b.jpg", "ribbons.png"),
    )
    (tmp_path / "best.mp4").symlink_to("video01.mp4")
    (tmp_path / "later.mp4").symlink_to("later.mp4")  # its target does not exist
    discovery = find_videos(tmp_path, SPEC)
    assert discovery.passed_over == ()
    assert discovery.notes == ("1 other folder(s) of images, not named like a video: thumbnails",)


def test_a_folder_of_images_beside_frame_folders_is_passed_over(tmp_path: Path) -> None:
    make(tmp_path, *(f"frames/{name}/{n}.jpg" for name in ("video01", "case_2", "case_3") for n in (1, 2)))
    make(tmp_path, "frames/video04/000001_t0s.jpg", "frames/video04/000002_t0s.jpg")
    reasons = passed_over(tmp_path)
    assert list(reasons) == ["frames/case_2", "frames/case_3", "frames/video04"]
    assert "set patterns.frames to 'case_(?P<id>\\d+)'" in reasons["frames/case_2"]
    assert "set patterns.frame to '(?P<frame>\\d+)_t\\d+s\\.{image}'" in reasons["frames/video04"]


def test_label_files_that_match_no_pattern_are_noted_where_labels_are_missing(tmp_path: Path) -> None:
    make(tmp_path, "video01.mp4", "video01-tool.txt", "video01-phase.csv", "annotations/all.json", "stats.csv")
    note = next(note for note in find_videos(tmp_path, SPEC).notes if "look like annotations" in note)
    assert note.startswith("2 file(s) look like annotations, but their names do not match patterns.phase")
    assert "video01-phase.csv, annotations/all.json" in note
    make(tmp_path, "video01-phase.txt")
    assert find_videos(tmp_path, SPEC).notes == ()


NAMES = st.text(st.characters(categories=("L", "N", "Zs", "P")), min_size=1, max_size=12)


@settings(deadline=None, max_examples=200)
@given(st.lists(NAMES, min_size=1, max_size=4, unique=True), st.sampled_from(["video", "frames", "frame"]))
def test_the_proposed_pattern_matches_the_names(names: list[str], role: str) -> None:
    names = [name.replace("/", "_") + {"video": ".mov", "frames": "", "frame": ".png"}[role] for name in names]
    names = [name for name in names if role != "frame" or any(character.isdecimal() for character in name)]
    if names:
        pattern = file_pattern(suggested_pattern(role, names, SPEC.patterns))
        assert all(pattern.fullmatch(name) for name in names)


# ---------------------------------------------------------------------------------------------- refused


def test_a_missing_root_and_a_file_for_a_root_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "gone").startswith(f"{tmp_path / 'gone'}: no such folder; set data.root")
    make(tmp_path, "video01.mp4")
    assert refusal(tmp_path / "video01.mp4").startswith(f"{tmp_path / 'video01.mp4'}: is not a folder")


def test_no_videos_says_what_was_looked_for_and_what_is_there(tmp_path: Path) -> None:
    assert refusal(tmp_path) == (
        f"{tmp_path}: no videos of cholec80 found: looked for files named like video01.mp4 or video01.tfrecord "
        "and folders of images named like video01; files found: no files"
    )
    make(tmp_path, "case1.mp4", "case2.mp4", "x/video01-phase.txt")
    message = refusal(tmp_path)
    assert message.endswith("files found: 2 .mp4, 1 .txt")
    assert "case1.mp4 and 1 more (case2.mp4): its name does not match patterns.video" in message
    assert r"rename it like video01.mp4, or set patterns.video to 'case(?P<id>\d+)\.{video}'" in message


def test_a_video_without_a_video_extension_is_reported(tmp_path: Path) -> None:
    make(tmp_path, "video01.mp4", "video02", "video03.data", "video04.mpeg4", "notes", "picture.heif")
    for name in ("video02", "video04.mpeg4"):
        (tmp_path / name).write_bytes(b"\0\0\0\x18ftypisom")
    (tmp_path / "video03.data").write_bytes(b"RIFF\0\0\0\0AVI LIST")
    (tmp_path / "picture.heif").write_bytes(b"\0\0\0\x18ftypheic")
    passed = dict(find_videos(tmp_path, SPEC).passed_over)
    assert set(passed) == {"video02", "video03.data", "video04.mpeg4"}
    assert passed["video02"] == "contains a video: give it the extension of its container, such as .mp4"


def test_no_folder_is_proposed_that_would_lose_other_videos(tmp_path: Path) -> None:
    make(tmp_path, "videos/video01.mp4", "videos/video02.mp4", "videos/again/video02.mp4")
    message = refusal(tmp_path)
    assert "data.sources" not in message
    assert 'leave one out with --set \'data.exclude={"videos/video02.mp4": "second copy"}\'' in message


@pytest.mark.parametrize(
    ("paths", "what"),
    [
        (("a/video01.mp4", "b/video1.avi"), "two videos for one video"),
        (("a/video01-phase.txt", "b/video1-phase.txt"), "two phase annotation files for one video"),
        (("a/video01-tool.txt", "b/video01-tool.txt"), "two tool annotation files for one video"),
        (("a/video01/0.png", "b/video01/0.png"), "two frame folders for one video"),
        (("a/video01.mp4", "b/video01/0.png"), "a video and a folder of its frames"),
    ],
)
def test_two_files_for_one_video_are_refused_naming_both(tmp_path: Path, paths: Sequence[str], what: str) -> None:
    make(tmp_path, "video09.mp4", *paths)
    message = refusal(tmp_path)
    assert what in message
    for path in paths:
        named = Path(path).parent if path.endswith(".png") else Path(path)
        assert str(tmp_path / named) in message


def test_an_unreadable_folder_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """chmod does not stop root, so the system's refusal is simulated."""
    make(tmp_path, "video01.mp4", "private/video02.mp4")
    scandir = os.scandir

    def forbidding(folder: Path) -> object:
        if Path(folder).name == "private":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", forbidding)
    assert refusal(tmp_path) == f"{tmp_path / 'private'}: this folder cannot be read (Permission denied)"


def test_links_that_lead_out_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "elsewhere/video02.mp4", "elsewhere/folder/video03.mp4", "elsewhere/notes.txt")
    for name, target in (("video02.mp4", "elsewhere/video02.mp4"), ("more", "elsewhere/folder")):
        root = make(tmp_path / f"root-{name}", "video01.mp4")
        (root / name).symlink_to(tmp_path / target)
        assert refusal(root).startswith(f"{root / name}: is a link that leads out of the data root")
    root = make(tmp_path / "root", "video01.mp4")
    (root / "notes.txt").symlink_to(tmp_path / "elsewhere/notes.txt")
    assert list(found(root)) == ["video01"]


def test_links_that_lead_out_are_followed_where_that_is_allowed(tmp_path: Path) -> None:
    """A hub's cache: every file is a link to a blob without an extension; links back or to nowhere do not stop the
    walk.
    """
    make(tmp_path, "blobs/a1", "blobs/a2", "elsewhere/video03/000001.jpg", "elsewhere/video03/000002.jpg")
    root = make(tmp_path / "snapshots/r1", "video04.mp4")
    for name, target in (
        ("video01.mp4", "../../blobs/a1"),
        ("video02.mkv", "../../blobs/a2"),
        ("up", ".."),
        ("me", "."),
    ):
        (root / name).symlink_to(target)
    (root / "video03").symlink_to(tmp_path / "elsewhere/video03")
    (root / "again").symlink_to(tmp_path / "elsewhere")
    (root / "loop").symlink_to("loop")
    (tmp_path / "elsewhere/back").symlink_to(root)
    videos = find_videos(LinkedRoot(root), SPEC).videos
    assert [video.id for video in videos] == ["video01", "video02", "video03", "video04"]
    assert refusal(root).endswith("or data.follow_links=true to allow such links")


@pytest.mark.parametrize("path", ["/etc/passwd", "../outside.mp4", "a/../../outside.mp4", "a\0b"])
def test_no_path_of_an_index_leaves_a_root_whose_links_may(tmp_path: Path, path: str) -> None:
    make(tmp_path, "outside.mp4", "root/a/video01.mp4")
    with pytest.raises(UserError):
        inside(LinkedRoot(tmp_path / "root"), path)


def test_links_inside_the_root_are_no_second_copy(tmp_path: Path) -> None:
    make(tmp_path, "raw/video01.mp4", "raw/case7.mp4")
    (tmp_path / "all").symlink_to(tmp_path / "raw")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "video01.mp4").symlink_to("raw/video01.mp4")
    (tmp_path / "video07.mp4").symlink_to("raw/case7.mp4")
    assert found(tmp_path) == {"video01": ("raw/video01.mp4", None, None), "video07": ("video07.mp4", None, None)}


def test_a_root_that_is_itself_a_link_is_fine(tmp_path: Path) -> None:
    make(tmp_path / "real", "videos/video01.mp4")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert found(tmp_path / "link") == {"video01": ("videos/video01.mp4", None, None)}


def test_broken_links_pipes_and_unprintable_names_are_refused(tmp_path: Path) -> None:
    broken = make(tmp_path / "broken", "video01.mp4")
    (broken / "video02.mp4").symlink_to("nothing.mp4")
    assert refusal(broken).startswith(f"{broken / 'video02.mp4'}: cannot be read")
    circle = make(tmp_path / "circle", "video01.mp4")
    (circle / "video02.mp4").symlink_to("video02.mp4")
    assert str(circle / "video02.mp4") in refusal(circle)
    pipe = make(tmp_path / "pipe", "video01.mp4")
    os.mkfifo(pipe / "video02.mp4")
    assert refusal(pipe) == f"{pipe / 'video02.mp4'}: is not an ordinary file"
    odd = make(tmp_path / "odd", "one\ntwo/video01.mp4")
    assert refusal(odd) == r"'one\ntwo/video01.mp4': this name has characters that cannot be printed; rename it"


def test_an_id_that_could_leave_its_folder_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "video01.mp4")
    climbing = SPEC.model_copy(update={"id_format": "../{number}"})
    assert "the video id '../1' contains a slash; rename it" in refusal(tmp_path, climbing)
    wrong = SPEC.model_copy(update={"id_format": "{nummer}"})
    assert refusal(tmp_path, wrong) == "data set cholec80: id_format '{nummer}' does not take a number"


# ---------------------------------------------------------------------------------------------- image numbers


def folder(root: Path, numbers: Sequence[int], form: str = "video01_{:06d}.jpg") -> Path:
    return make(root, *(f"frames/video01/{form.format(number)}" for number in numbers))


def layout(root: Path, labels: LabelEnd | None = None, **data: object) -> FolderLayout:
    return infer_layout(scan_folder(root, "frames/video01", SPEC), SPEC, DataConfig(**data), labels)


def ask(root: Path, labels: LabelEnd | None = None, **data: object) -> str:
    with pytest.raises(UserError) as caught:
        layout(root, labels, **data)
    return str(caught.value)


def test_numbers_far_apart_count_source_frames(tmp_path: Path) -> None:
    folder(tmp_path, range(0, 1000, 100))
    wanted = FolderLayout(numbering="source", base=0, stride=100, first=0, count=10)
    assert layout(tmp_path) == wanted
    assert layout(tmp_path, LabelEnd(925, 1)) == wanted
    assert layout(tmp_path, LabelEnd(1001, 25)) == wanted


def test_numbers_from_one_count_from_one(tmp_path: Path) -> None:
    folder(tmp_path, range(1, 252, 25), "video1-{}.png")
    assert layout(tmp_path) == FolderLayout(numbering="source", base=1, stride=25, first=0, count=11)


@pytest.mark.parametrize("base", [0, 1])
@pytest.mark.parametrize(
    ("count", "end", "numbering", "stride"),
    [
        (200, 200, "source", 1),
        (200, 201, "source", 1),
        (33, 801, "sample", 25),
        (32, 800, "sample", 25),
        (33, 800, "sample", 25),
        (40, 200, "sample", 5),
        (20, 1000, "sample", 50),
        (12, 1190, "sample", 100),
    ],
)
def test_consecutive_numbers_are_inferred_from_the_length_of_the_labels(
    tmp_path: Path, base: int, count: int, end: int, numbering: str, stride: int
) -> None:
    folder(tmp_path, range(base, base + count))
    found_layout = layout(tmp_path, LabelEnd(end, 25))
    assert found_layout.model_dump() == {
        "numbering": numbering,
        "base": base,
        "stride": stride,
        "first": 0,
        "count": count,
    }


def test_consecutive_numbers_without_labels_are_asked_about(tmp_path: Path) -> None:
    folder(tmp_path, range(10))
    message = ask(tmp_path)
    assert message.startswith(f"{tmp_path / 'frames/video01'}: do numbers 0 to 9 count source frames or samples?")
    assert "data.frame_numbering=source" in message
    assert "data.folder_fps" in message
    assert layout(tmp_path, frame_numbering="source").stride == 1
    assert layout(tmp_path, folder_fps=1).model_dump() == {
        "numbering": "sample",
        "base": 0,
        "stride": 25,
        "first": 0,
        "count": 10,
    }
    assert layout(tmp_path, folder_fps=0.25, frame_numbering="sample").stride == 100


def test_starts_and_intervals_do_not_tell_the_rate_of_images(tmp_path: Path) -> None:
    """Of 100 s at 1 image per second, the last label may start at 20 s, as if there were 5 per second."""
    folder(tmp_path, range(100))
    started = LabelEnd(500, 25, is_least=True)
    assert "(starts and intervals of labels do not tell how long the video is)" in ask(tmp_path, started)
    assert layout(tmp_path, started, folder_fps=1).stride == 25
    rows = LabelEnd(2500, 25)
    assert layout(tmp_path, LabelEnd.longest([started, rows])).stride == 25
    folder(tmp_path / "far", range(0, 2500, 25))
    assert layout(tmp_path / "far", started).stride == 25
    assert "do not last as long" in ask(tmp_path / "far", LabelEnd(5000, 25, is_least=True))


def test_labels_of_another_length_are_asked_about(tmp_path: Path) -> None:
    folder(tmp_path, range(100))
    assert "(no usual rate fits the labels' length of 1000 frames)" in ask(tmp_path, LabelEnd(1000, 1))
    assert layout(tmp_path, LabelEnd(1000, 1), folder_fps=2.5).stride == 10


def test_a_single_image_is_asked_about(tmp_path: Path) -> None:
    folder(tmp_path, [0])
    assert "several rates fit the labels' length of 20 frames" in ask(tmp_path, LabelEnd(20, 1))


def test_numbers_that_do_not_last_as_long_as_the_labels_are_asked_about(tmp_path: Path) -> None:
    """Names in milliseconds look like distant source frames."""
    folder(tmp_path, range(0, 40_000, 1000))
    assert "set data.frame_numbering=source if the numbers do" in ask(tmp_path, LabelEnd(1000, 1))
    assert layout(tmp_path, LabelEnd(1000, 1), frame_numbering="source").stride == 1000


@pytest.mark.parametrize("numbers", [(25, 50, 75), (2, 3, 4), (101, 102)])
def test_another_first_number_is_asked_about(tmp_path: Path, numbers: Sequence[int]) -> None:
    folder(tmp_path, numbers)
    message = ask(tmp_path, LabelEnd(100, 1))
    assert f"numbers start at {numbers[0]}" in message
    assert "data.frame_base=first" in message
    assert "data.frame_base=0 or 1" in message
    first = layout(tmp_path, frame_base="first", frame_numbering="source")
    assert (first.base, first.first) == (numbers[0], 0)
    given_layout = layout(tmp_path, frame_base=1, frame_numbering="source")
    assert given_layout.first == numbers[0] - 1


@pytest.mark.parametrize(
    ("numbers", "data", "missing"),
    [
        ([0, 100, 200, 400, 500, 800], {}, ((3, 4), (6, 8))),
        ([1, 101, 201, 401, 501], {}, ((3, 4),)),
        ([1, 2, 3, 5, 6, 7], {"folder_fps": 1}, ((3, 4),)),
        ([5, 6, 7, 10], {"frame_numbering": "source", "frame_base": "first"}, ((3, 5),)),
    ],
)
def test_missing_images_are_frames_that_are_not_there(
    tmp_path: Path, numbers: list[int], data: dict, missing: tuple[tuple[int, int], ...]
) -> None:
    folder(tmp_path, numbers)
    found_layout = layout(tmp_path, **data)
    assert found_layout.missing == missing
    scan = scan_folder(tmp_path, "frames/video01", SPEC)
    unit = found_layout.stride if found_layout.numbering == "sample" else 1
    assert found_layout.frames().tolist() == [(number - found_layout.base) * unit for number in numbers]
    assert source_frames(scan, found_layout).tolist() == found_layout.frames().tolist()
    assert found_layout.frame_count == found_layout.frames()[-1] + found_layout.stride
    assert FolderLayout.model_validate(found_layout.model_dump(mode="json")) == found_layout


@pytest.mark.parametrize("missing", [((0, 1),), ((3, 3),), ((2, 4), (4, 5)), ((5, 10),), ((4, 3),)])
def test_missing_images_that_cannot_be_are_refused(missing: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValidationError, match="missing images"):
        FolderLayout(numbering="source", base=0, stride=1, first=0, count=10, missing=missing)


def test_an_image_out_of_step_is_refused(tmp_path: Path) -> None:
    folder(tmp_path, [0, 100, 200, 250, 300, 400, 500])
    assert "video01_000250.jpg follows video01_000200.jpg" in ask(tmp_path)


def test_one_row_per_image_is_asked_about_if_sampling_would_drop_most(tmp_path: Path) -> None:
    folder(tmp_path, range(180))
    rows = LabelEnd(180, 1)
    message = ask(tmp_path, rows)
    assert "do numbers 0 to 179 count source frames or samples? Set data.frame_numbering=source, or data" in message
    assert "if they are source frames at 25 fps, data.fps=1 uses only 8 of 180" in message
    assert layout(tmp_path, rows, frame_numbering="source").stride == 1
    assert layout(tmp_path, rows, folder_fps=1).stride == 25
    assert layout(tmp_path, rows, fps=25).stride == 1
    assert layout(tmp_path, LabelEnd(180, 25)).stride == 1  # one row of tools per second: they count source frames


@pytest.mark.parametrize("rows", [40, 41])
def test_source_numbers_may_go_with_rows_by_image_or_second(tmp_path: Path, rows: int) -> None:
    folder(tmp_path, range(0, 1000, 25))
    assert layout(tmp_path, LabelEnd(rows, 1)).stride == 25
    folder(tmp_path / "fast", range(0, 1000, 5))
    assert layout(tmp_path / "fast", LabelEnd(rows, 1)).stride == 5


@pytest.mark.parametrize(
    ("numbers", "data", "problem"),
    [
        (range(0, 300, 100), {"frame_numbering": "sample", "folder_fps": 1}, "numbers are 100 apart"),
        (range(0, 300, 100), {"folder_fps": 1}, "set data.frame_numbering=source"),
        (range(3), {"frame_numbering": "source", "folder_fps": 1}, "data.folder_fps"),
        (
            range(3),
            {"folder_fps": 3},
            "does not divide the source's 25 fps; the nearest that do are 3.125 (one image per 8 frames), 2.77778 (",
        ),
        (range(3), {"folder_fps": 50}, "data.folder_fps=50 does not divide"),
        (range(3), {"frame_base": 1}, "is numbered below data.frame_base=1"),
    ],
)
def test_settings_that_contradict_the_names_are_refused(
    tmp_path: Path, numbers: Sequence[int], data: dict, problem: str
) -> None:
    folder(tmp_path, numbers)
    assert problem in ask(tmp_path, **data)


def test_two_images_of_one_number_and_empty_images_are_refused(tmp_path: Path) -> None:
    folder(tmp_path, range(3))
    make(tmp_path, "frames/video01/1.png")
    assert "two images with number 1" in ask(tmp_path)
    (tmp_path / "frames/video01/1.png").unlink()
    (tmp_path / "frames/video01/video01_000002.jpg").write_bytes(b"")
    assert ask(tmp_path).endswith("video01_000002.jpg: this image is empty (0 bytes)")


def test_labels_that_count_own_frames_tell_no_rate_if_folders_differ() -> None:
    """Seven of HeiChole's videos have 50 frames per second: by frames, their labels last twice as long."""
    layouts = [
        (f"frames/hei{i}", FolderLayout(numbering="sample", base=0, stride=stride, first=0, count=9))
        for i, stride in enumerate((25, 25, 50))
    ]
    hei, cholec = load_dataset("heichole"), load_dataset("cholec80")
    require_one_rate(layouts[:2], hei, DataConfig())
    require_one_rate(layouts, cholec, DataConfig())
    with pytest.raises(
        UserError, match=r"frames/hei2: by its labels, .* one image per 50 .* in frames/hei0 one per 25"
    ):
        require_one_rate(layouts, hei, DataConfig())


def test_folders_that_start_at_different_numbers_are_refused() -> None:
    layouts = [
        (f"frames/video{i}", FolderLayout(numbering="sample", base=base, stride=25, first=0, count=9))
        for i, base in enumerate((0, 0, 1))
    ]
    require_one_base(layouts[:2], DataConfig())
    with pytest.raises(UserError, match=r"frames/video2: images are numbered from 1, but those of frames/video0"):
        require_one_base(layouts, DataConfig())


@settings(deadline=None, max_examples=40)
@given(base=st.integers(0, 1), stride=st.integers(2, 300), count=st.integers(2, 12), sample=st.booleans())
def test_images_lie_where_their_layout_says(
    tmp_path_factory: pytest.TempPathFactory, base: int, stride: int, count: int, sample: bool
) -> None:
    root = tmp_path_factory.mktemp("folder")
    folder(root, [base + i * (1 if sample else stride) for i in range(count)])
    data = {"folder_fps": 25 / stride} if sample else {}
    found_layout = layout(root, **data)
    scan = scan_folder(root, "frames/video01", SPEC)
    wanted = [i * stride for i in range(count)]
    assert source_frames(scan, found_layout).tolist() == wanted
    images = frame_folder(root, "frames/video01", SPEC, found_layout)
    assert list(images) == wanted
    assert list(images.values()) == sorted(path.name for path in (root / "frames/video01").iterdir())
    assert found_layout.frame_count == count * stride
    (root / "frames/video01" / images[wanted[-1]]).unlink()
    with pytest.raises(UserError, match="contains other images than were indexed"):
        frame_folder(root, "frames/video01", SPEC, found_layout)
