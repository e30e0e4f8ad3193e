"""Finding videos, frame folders and annotations below a root, and what image numbers mean."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from configs.load import load_dataset
from configs.schema import DataConfig, DataSetSpec
from features.discover import (
    FolderLayout,
    LabelEnd,
    find_videos,
    frame_folder,
    infer_layout,
    natural_key,
    require_one_base,
    scan_folder,
    source_frames,
)

SPEC = load_dataset("cholec80")
M2CAI = load_dataset("m2cai16-workflow")


def make(root: Path, *paths: str) -> Path:
    for path in paths:
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(path.encode())
    return root


def found(root: Path, spec: DataSetSpec = SPEC) -> dict[str, tuple[str, str | None, str | None]]:
    return {video.id: (video.source, video.phase, video.tool) for video in find_videos(root, spec).videos}


def refusal(root: Path, spec: DataSetSpec = SPEC) -> str:
    with pytest.raises(UserError) as caught:
        find_videos(root, spec)
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
        "5 phase annotation file(s) belong to no video here: p/video3-phase.txt, p/video4-phase.txt, "
        "p/video5-phase.txt, ...",
        "1 video(s) without phase annotations: video01",
        "2 video(s) without tool annotations: video01, video02",
    )
    make(tmp_path, "m/workflow_video_01.mp4", "m/workflow_video_01.txt")
    assert find_videos(tmp_path / "m", M2CAI).notes == ()


# ---------------------------------------------------------------------------------------------- refused


def test_a_missing_root_and_a_file_for_a_root_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "gone").startswith(f"{tmp_path / 'gone'}: no such folder; set data.root")
    make(tmp_path, "video01.mp4")
    assert refusal(tmp_path / "video01.mp4").startswith(f"{tmp_path / 'video01.mp4'}: is not a folder")


def test_no_videos_says_what_was_looked_for_and_what_is_there(tmp_path: Path) -> None:
    assert refusal(tmp_path) == (
        f"{tmp_path}: no videos of cholec80 found: looked for files named {SPEC.patterns.video} or "
        f"{SPEC.patterns.tfrecord} and folders of images "
        f"named {SPEC.patterns.frames}; what is there: no files"
    )
    make(tmp_path, "case1.mp4", "case2.mp4", "x/video01-phase.txt")
    assert refusal(tmp_path).endswith("what is there: 2 .mp4, 1 .txt")


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
    """chmod does not stop root, so the refusal of the system is played."""
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
    assert refusal(odd) == r"'one\ntwo/video01.mp4': this name holds characters that cannot be printed; rename it"


def test_an_id_that_could_leave_its_folder_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "video01.mp4")
    climbing = SPEC.model_copy(update={"id_format": "../{number}"})
    assert "the video id '../1' holds a slash; rename it" in refusal(tmp_path, climbing)
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
def test_consecutive_numbers_are_told_by_the_labels_length(
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
    assert message.startswith(f"{tmp_path / 'frames/video01'}: names are numbered 0 to 9; source frames or samples?")
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


def test_labels_of_another_length_are_asked_about(tmp_path: Path) -> None:
    folder(tmp_path, range(100))
    assert "(no usual rate fits labels of 1000 frames)" in ask(tmp_path, LabelEnd(1000, 1))
    assert layout(tmp_path, LabelEnd(1000, 1), folder_fps=2.5).stride == 10


def test_a_single_image_is_asked_about(tmp_path: Path) -> None:
    folder(tmp_path, [0])
    assert "several rates fit labels of 20 frames" in ask(tmp_path, LabelEnd(20, 1))


def test_numbers_that_do_not_last_as_long_as_the_labels_are_asked_about(tmp_path: Path) -> None:
    """Names in milliseconds look like source frames far apart."""
    folder(tmp_path, range(0, 40_000, 1000))
    assert "set data.frame_numbering=source if they do" in ask(tmp_path, LabelEnd(1000, 1))
    assert layout(tmp_path, LabelEnd(1000, 1), frame_numbering="source").stride == 1000


@pytest.mark.parametrize("numbers", [(25, 50, 75), (2, 3, 4), (101, 102)])
def test_another_first_number_is_asked_about(tmp_path: Path, numbers: Sequence[int]) -> None:
    folder(tmp_path, numbers)
    message = ask(tmp_path, LabelEnd(100, 1))
    assert f"numbers start at {numbers[0]}" in message
    assert "set data.frame_base" in message
    given_layout = layout(tmp_path, frame_base=1, frame_numbering="source")
    assert given_layout.first == numbers[0] - 1


def test_a_gap_names_the_first_missing_number(tmp_path: Path) -> None:
    folder(tmp_path, [0, 100, 200, 400, 500, 800])
    assert ask(tmp_path) == (
        f"{tmp_path / 'frames/video01'}: image number 300 is missing: video01_000400.jpg follows video01_000200.jpg, "
        "and numbers are 100 apart"
    )
    folder(tmp_path / "extra", [0, 100, 200, 250, 300, 400, 500])
    assert "video01_000250.jpg is out of step" in ask(tmp_path / "extra")


@pytest.mark.parametrize(
    ("numbers", "data", "problem"),
    [
        (range(0, 300, 100), {"frame_numbering": "sample", "folder_fps": 1}, "numbers are 100 apart"),
        (range(0, 300, 100), {"folder_fps": 1}, "set data.frame_numbering=source"),
        (range(3), {"frame_numbering": "source", "folder_fps": 1}, "data.folder_fps"),
        (range(3), {"folder_fps": 3}, "data.folder_fps=3 does not divide the source's 25 fps"),
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


def test_folders_that_start_at_different_numbers_are_refused() -> None:
    layouts = [
        (f"frames/video{i}", FolderLayout(numbering="sample", base=base, stride=25, first=0, count=9))
        for i, base in enumerate((0, 0, 1))
    ]
    require_one_base(layouts[:2], DataConfig())
    with pytest.raises(UserError, match=r"frames/video2: images are numbered from 1, those of frames/video0 from 0"):
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
    assert [frame for frame, _ in images.files] == wanted
    assert [name for _, name in images.files] == sorted(path.name for path in (root / "frames/video01").iterdir())
    assert images.fps == 25
    assert found_layout.frame_count == count * stride
    (root / "frames/video01" / images.files[-1][1]).unlink()
    with pytest.raises(UserError, match="its images are not those in the index"):
        frame_folder(root, "frames/video01", SPEC, found_layout)
