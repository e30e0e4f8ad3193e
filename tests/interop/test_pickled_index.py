"""Index pickles: read by structure, compared with the files below the root, and written as they were read."""

from __future__ import annotations

import json
import pickle
import pickletools
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from configs.errors import UserError
from configs.load import load_dataset
from configs.schema import Config, DataConfig, SplitConfig
from engine.safe_pickle import load_plain
from features.dataset.annotations import LabelTrack
from features.dataset.catalogue import index_dataset, open_dataset
from features.dataset.check import check_index
from features.dataset.formats.cholec80 import write_label_file
from features.dataset.index import Dataset, Index
from features.dataset.labels import load_labels
from features.dataset.sampling import sampled_frames
from interop.pickled_index import index_from_pickles, pickle_from_index
from interop.pickled_videos import read_pickled_index
from tests.videos import VideoSpec, write_video

SPEC = load_dataset("cholec80")
ORDERS = ("mtrcnet", "tf-cholec80")


def labels_of(number: int, rows: int) -> tuple[list[int], list[list[int]]]:
    """Phases and tools of a video."""
    draw = np.random.default_rng(number)
    return (np.arange(rows) * 7 // rows).tolist(), draw.integers(0, 2, (rows, 7)).tolist()


def make_images(root: Path, number: int, rows: int, first: int = 1, step: int = 1) -> Path:
    folder = root / f"frames/video{number:02d}"
    folder.mkdir(parents=True)
    for row in range(rows):
        (folder / f"video{number:02d}-{first + row * step}.jpg").write_bytes(b"image")
    return folder


def rows_of(folder: str, number: int, rows: int, phases_only: bool = False) -> list[list[Any]]:
    """A video of cholec80.pkl."""
    phase, tools = labels_of(number, rows)
    return [
        [f"{folder}/{folder.rsplit('/', 1)[-1]}-{row + 1}.jpg", *([] if phases_only else tools[row]), phase[row]]
        for row in range(rows)
    ]


def in_parts(parts: Sequence[Sequence[list[list[Any]]]]) -> list[Any]:
    return [
        *([row[0] for video in part for row in video] for part in parts),
        *([row[1:] for video in part for row in video] for part in parts),
        *([len(video) for video in part] for part in parts),
    ]


def config_of(root: Path, **data: Any) -> Config:
    return Config(data=DataConfig(**({"root": root, "index": root.parent / "index.json"} | data)))


def write(path: Path, value: Any, protocol: int = 3) -> Path:
    path.write_bytes(pickle.dumps(value, protocol))
    return path


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four folders of frames at one frame per second, no annotations."""
    for number, rows in ((1, 40), (2, 31), (3, 36), (4, 44)):
        make_images(tmp_path / "data", number, rows)
    return tmp_path / "data"


VIDEOS = ((1, 40), (2, 31), (3, 36), (4, 44))


def videos_of(root: Path, phases_only: bool = False) -> list[list[list[Any]]]:
    """All four, as in the pickle that the index writes."""
    return [rows_of((root / f"frames/video{n:02d}").as_posix(), n, rows, phases_only) for n, rows in VIDEOS]


# ---------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("order", ORDERS)
def test_labels_come_from_the_pickle_and_phases_by_name(root: Path, tmp_path: Path, order: str) -> None:
    rows = [rows_of(f"/research/cholec80/data_resize/{n}", n, count) for n, count in VIDEOS]
    file = write(tmp_path / "x.pkl", rows)
    index = index_from_pickles(config_of(root), [file], phase_order=order)
    names = SPEC.phase_orders[order]
    for entry, (number, count) in zip(index.videos, VIDEOS, strict=True):
        assert (entry.id, entry.kind) == (f"video{number:02d}", "frames")
        phase, tools = load_labels(Dataset(index, root), entry, sampled_frames(entry, 1.0))
        assert [SPEC.phases[one] for one in phase] == [names[one] for one in labels_of(number, count)[0]]
        assert tools.tolist() == labels_of(number, count)[1]
        assert entry.phase_file is not None
        assert entry.phase_file.path == f"labels-from-pickle/{entry.id}-phase.txt"
    text = (root / "labels-from-pickle/video01-phase.txt").read_text().splitlines()
    assert text[:2] == ["Frame\tPhase", "0\tPreparation"]
    assert index.made_from == "x.pkl"
    assert check_index(Dataset(index, root)) == []
    assert "research" not in json.dumps(index.to_json())
    assert Index.load(tmp_path / "index.json") == index


def test_parts_determine_the_split_unless_settings_do(root: Path, tmp_path: Path) -> None:
    videos = [rows_of(f"./data/video{n}", n, count) for n, count in VIDEOS]
    file = write(tmp_path / "x.pkl", in_parts([videos[:2], videos[2:3], videos[3:]]))
    config = config_of(root)
    index = index_from_pickles(config, [file], phase_order="mtrcnet")
    assert [entry.split for entry in index.videos] == ["train", "train", "val", "test"]
    assert open_dataset(config).index == index
    assert index_dataset(config) == index  # like the command `run`
    assert index_from_pickles(config, [file], phase_order="mtrcnet") == index  # labels are there now, and the same
    other = config_of(root, split={"rule": "1/1/2"})
    assert "another split" in refusal(lambda: open_dataset(other))
    index_from_pickles(other, [file], phase_order="mtrcnet", replace=True)
    assert [entry.split for entry in open_dataset(other).index.videos] == ["train", "val", "test", "test"]
    assert index_dataset(config_of(root, split={"rule": "4/0/0"}), replace=True).made_from is None


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_files_with_phases_only_and_in_two_pickles(root: Path, tmp_path: Path, protocol: int) -> None:
    videos = [rows_of(f"C:\\data\\{n}".replace("\\", "/"), n, count, True) for n, count in VIDEOS]
    for video in videos:
        for row in video:
            row[0] = row[0].replace("/", "\\")
    files = [
        write(tmp_path / "b.pkl", in_parts([videos[:1], videos[1:2]]), protocol),
        write(tmp_path / "a.pkl", in_parts([videos[2:3]]), protocol),
    ]
    index = index_from_pickles(config_of(root), files, phase_order="mtrcnet")
    assert [(entry.id, entry.split) for entry in index.videos] == [
        ("video01", "train"),
        ("video02", "val"),
        ("video03", "test"),
    ]
    assert all(entry.tool_file is None and entry.phase_file for entry in index.videos)
    assert index.made_from == "b.pkl, a.pkl"


def test_layouts_are_recognised_by_structure(tmp_path: Path) -> None:
    video = rows_of("a/1", 1, 5)
    for content, splits in (
        ([video, video, video], ["none"] * 3),
        (in_parts([[video], [], [video]]), ["train", "test"]),
        (in_parts([[video], [video]]), ["train", "val"]),
        (in_parts([[video]]), ["test"]),
        ([video] * 9, ["none"] * 9),
        ((tuple(map(tuple, video)),), ["none"]),
    ):
        read = read_pickled_index(write(tmp_path / "cholec80.pkl", content), SPEC)
        assert [one.split for one in read] == splits
        assert all(one.tools is not None and one.tools.shape == (5, 7) for one in read)


@pytest.mark.parametrize("empty", [(), (0,), (1,), (2,), (0, 1), (1, 2)])
@pytest.mark.parametrize("data_order", [(0, 1, 3, 4, 6, 7, 2, 5, 8), (0, 3, 6, 1, 4, 7, 2, 5, 8)])
def test_nine_lists_in_any_order_are_the_same_index(
    tmp_path: Path, empty: tuple[int, ...], data_order: tuple[int, ...]
) -> None:
    """MTRCNet: paths, labels, lengths of all parts. Trans-SVNet: those of train and val, then the three of test."""
    parts = [[] if part in empty else [rows_of(f"a/{part + 1}", part + 1, 5 + part)] for part in range(3)]
    nine = in_parts(parts)
    order = (0, 1, 3, 4, 6, 7, 2, 5, 8) if empty else data_order
    other = [nine[k] for k in order]
    first, second = (read_pickled_index(write(tmp_path / "x.pkl", value), SPEC) for value in (nine, other))
    assert [video.split for video in first] == [s for k, s in enumerate(("train", "val", "test")) if k not in empty]
    for one, same in zip(first, second, strict=True):
        assert (one.where, one.paths, one.split) == (same.where, same.paths, same.split)
        assert np.array_equal(one.phase, same.phase)


def test_a_validation_part_within_the_test_part_is_test(root: Path, tmp_path: Path, capsys) -> None:
    """As in the 40/40 splits of TMRNet and Trans-SVNet; any other video that occurs twice is still an error."""
    videos = [rows_of(f"x/{n}", n, count) for n, count in VIDEOS]
    file = write(tmp_path / "x.pkl", in_parts([videos[:2], videos[2:3], videos[2:]]))
    index = index_from_pickles(config_of(root), [file], phase_order="mtrcnet")
    assert [entry.split for entry in index.videos] == ["train"] * 2 + ["test"] * (len(videos) - 2)
    assert f"videos in both val and test are used for test: {index.videos[2].id}" in capsys.readouterr().err
    changed = [*videos[2][:-1], [*videos[2][-1][:-1], (videos[2][-1][-1] + 1) % 7]]
    for parts in ([videos[:2], [changed], videos[2:]], [videos[:2], videos[1:2], videos[2:]]):
        write(file, in_parts(parts))
        assert "occurs twice" in refusal(
            lambda: index_from_pickles(config_of(root), [file], phase_order="mtrcnet", replace=True)
        )


def test_rows_numbered_by_source_frame_and_starting_late(tmp_path: Path) -> None:
    root = tmp_path / "data"
    make_images(root, 1, 37, first=0, step=25)
    phase, tools = labels_of(1, 30)
    rows = [[f"x/1/video01_{(row + 5) * 25:06d}.jpg", *tools[row], phase[row]] for row in range(30)]
    file = write(tmp_path / "x.pkl", [rows])
    assert "data.frame_base" in refusal(lambda: index_from_pickles(config_of(root), [file], phase_order="mtrcnet"))
    index = index_from_pickles(config_of(root, frame_base=0), [file], phase_order="mtrcnet")
    frames = sampled_frames(index.videos[0], 1.0)
    read, _ = load_labels(Dataset(index, root), index.videos[0], frames)
    assert read.tolist() == [-1] * 5 + phase + [-1] * 2


@pytest.mark.parametrize("rate", [Fraction(25), Fraction(30000, 1001)])
def test_pickles_beside_videos(tmp_path: Path, rate: Fraction) -> None:
    import av

    root = tmp_path / "data"
    root.mkdir()
    with av.open(str(root / "video07.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for _ in range(count := int(10 * rate)):
            black = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(black))
        container.mux(stream.encode(None))
    file = write(tmp_path / "x.pkl", [rows_of("frames/video07", 7, 10)])
    config = config_of(root)
    index = index_from_pickles(config, [file], phase_order="mtrcnet")
    phase, tools = load_labels(Dataset(index, root), index.videos[0], sampled_frames(index.videos[0], 1.0))
    assert (phase.tolist(), tools.tolist()) == labels_of(7, 10)
    back = tmp_path / "back.pkl"
    pickle_from_index(config, back, layout="cholec80", phase_order="mtrcnet")
    again = index_from_pickles(config, [back], phase_order="mtrcnet", replace=True)
    assert again.videos == index.videos
    long = write(tmp_path / "long.pkl", [rows_of("frames/video07", 7, 11)])
    message = refusal(lambda: index_from_pickles(config, [long], phase_order="mtrcnet"))
    assert f"11 rows end at frame {count}" in message
    assert f"has {count} frames" in message


def test_a_recording_in_several_files_is_refused(tmp_path: Path) -> None:
    described = SPEC.model_dump(mode="json")
    described["patterns"]["video"] = r"video(?P<id>\d+)_part(?P<part>\d)\.mp4"
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(described))
    (tmp_path / "data").mkdir()
    for part in (1, 2):
        write_video(tmp_path / f"data/video07_part{part}.mp4", VideoSpec(count=50))
    file = write(tmp_path / "x.pkl", [rows_of("frames/video07", 7, 4)])
    config = config_of(tmp_path / "data", dataset=str(tmp_path / "own.yaml"))
    message = refusal(lambda: index_from_pickles(config, [file], phase_order="mtrcnet"))
    assert "video07_part1.mp4: video07 has 2 files; join them for a pickle" in message


# ---------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("phases_only", [False, True])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("layout", ["cholec80", "train_val_test", "train_val", "test"])
def test_pickle_to_index_to_pickle_is_the_same(
    root: Path, tmp_path: Path, layout: str, order: str, phases_only: bool
) -> None:
    videos = videos_of(root, phases_only)
    value: Any = {
        "cholec80": videos,
        "train_val_test": in_parts([videos[:2], videos[2:3], videos[3:]]),
        "train_val": in_parts([videos[:3], videos[3:]]),
        "test": in_parts([videos]),
    }[layout]
    config = config_of(root)
    index_from_pickles(config, [write(tmp_path / "x.pkl", value)], phase_order=order)
    out = tmp_path / "out.pkl"
    pickle_from_index(config, out, layout=layout, phase_order=order, phases_only=phases_only)
    content = out.read_bytes()
    assert pickle.loads(content) == value  # noqa: S301 - written a line above
    assert max(code.proto for code, _, _ in pickletools.genops(content)) <= 2
    pickle_from_index(config, out, layout=layout, phase_order=order, phases_only=phases_only)
    assert out.read_bytes() == content


@pytest.mark.parametrize("layout", ["cholec80", "train_val_test"])
def test_index_to_pickle_to_index_is_the_same(tmp_path: Path, layout: str) -> None:
    root = tmp_path / "data"
    for number, rows in VIDEOS:
        make_images(root, number, rows)
        phase, tools = labels_of(number, rows)
        dense = np.repeat(np.array(phase, np.int8), 25)
        write_label_file(root / f"p/video{number:02d}-phase.txt", LabelTrack(np.arange(len(dense)), dense, 1), SPEC)
        track = LabelTrack(np.arange(rows) * 25, np.array(tools, np.int8), 25)
        write_label_file(root / f"t/video{number:02d}-tool.txt", track, SPEC)
    config = config_of(root, split={"rule": "2/1/1"})
    index = index_dataset(config)
    out = tmp_path / "out.pkl"
    pickle_from_index(config, out, layout=layout, phase_order="tf-cholec80")
    asked = config_of(root) if layout == "train_val_test" else config
    again = index_from_pickles(asked, [out], phase_order="tf-cholec80", replace=True)
    assert again.model_copy(update={"made_from": None}) == index
    assert not (root / "labels-from-pickle").exists()
    message = refusal(lambda: index_from_pickles(asked, [out], phase_order="mtrcnet", replace=True))
    assert "differs from" in message
    assert "--phase-order" in message


def test_frames_without_a_label_are_left_out_and_reported(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = videos_of(root)
    config = config_of(root)
    index_from_pickles(config, [write(tmp_path / "x.pkl", videos)], phase_order="mtrcnet")
    tool_file = root / "labels-from-pickle/video01-tool.txt"
    tool_file.write_text("".join(tool_file.read_text().splitlines(True)[:-1]))
    (root / "labels-from-pickle/video03-tool.txt").unlink()
    index_dataset(config, replace=True)
    capsys.readouterr()
    out = tmp_path / "out.pkl"
    pickle_from_index(config, out, layout="cholec80", phase_order="mtrcnet")
    written = load_plain(out)
    assert written == [videos[0][:-1], videos[1], videos[3]]
    said = capsys.readouterr().err
    assert "left out: 37 sampled frames that lack a label" in said
    assert "1 videos that are not in this layout's splits, or without labels: video03" in said
    message = refusal(lambda: pickle_from_index(config, out, layout="cholec80", phase_order="tf-cholec80"))
    assert "--force" in message


@pytest.mark.slow
def test_round_trip_with_real_frames(shared_data: Path, tmp_path: Path) -> None:
    config = Config(
        data=DataConfig(
            root=shared_data / "mini-cholec80", index=tmp_path / "a.json", fps=0.25, split={"rule": "3/1/1"}
        )
    )
    index = index_dataset(config)
    out = tmp_path / "out.pkl"
    pickle_from_index(config, out, layout="train_val_test", phase_order="mtrcnet")
    asked = {"index": tmp_path / "b.json", "split": SplitConfig()}
    other = config.model_copy(update={"data": config.data.model_copy(update=asked)})
    again = index_from_pickles(other, [out], phase_order="mtrcnet")
    assert again.model_copy(update={"made_from": None}) == index
    assert sum(map(sum, load_plain(out)[6:])) == 3568
    assert Path(load_plain(out)[0][0]).is_file()


# ---------------------------------------------------------------------------------------------- bad input


def set_cell(video: int, row: int, cell: int, value: Any) -> Callable[[Any], None]:
    def change(videos: Any) -> None:
        videos[video][row][cell] = value

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda v: [], "not an index"),
        (lambda v: {"a": 1}, "not an index"),
        (lambda v: [1, 2], "not an index"),
        (lambda v: [[1, 2]], "not an index"),
        (lambda v: [[], []], "not an index"),
        (lambda v: [*v, []], "video 5: has no rows"),
        (lambda v: v[0][3].pop(), "video 1, row 4: 7 labels; cholec80 has 7 tools and a phase, or a phase"),
        (set_cell(1, 2, 8, 7), "video 2, row 3: phase 7; cholec80 has phases 0 to 6"),
        (set_cell(1, 2, 8, -1), "video 2, row 3: phase -1"),
        (set_cell(1, 2, 8, 2**63), "video 2, row 3: phase 9223372036854775808"),
        (set_cell(1, 2, 8, True), "video 2, row 3: a label is not an integer"),
        (set_cell(1, 2, 3, 2), "video 2, row 3: a tool label is neither 0 nor 1"),
        (set_cell(1, 2, 3, "1"), "video 2, row 3: a label is not an integer"),
        (set_cell(1, 2, 0, 5), "video 2, row 3: its path is not a file name"),
        (set_cell(1, 2, 0, "x/2/2-3.jpg\n"), "video 2, row 3: its path is not a file name"),
        (set_cell(1, 2, 0, "x/3/2-3.jpg"), "video 2: its images are in several folders (2, 3)"),
        (set_cell(1, 2, 0, "x/2/2-2.jpg"), "2-2.jpg comes after 2-2.jpg, so they are not in the order of time"),
        (set_cell(1, 2, 0, "x/2/notes.txt"), "'notes.txt' is not named like an image"),
        (lambda v: [v[0], v[1], v[0]], "video 3: video01 occurs twice"),
        (lambda v: [rows_of("x/5", 5, 9)], "no video05 (folder '5') below"),
        (lambda v: [rows_of("../../etc", 5, 9)], "folder 'etc' is not named like a video"),
        (lambda v: [rows_of("x/..", 5, 9)], "folder '..' is not named like a video"),
        (lambda v: [rows_of("x/1", 1, 41)], "41 rows, but"),
        (lambda v: in_parts([v[:1], v[1:2], v[2:3]])[:8], "contains 8 lists instead of 9, 6 or 3"),
        (lambda v: [*in_parts([v])[:2], [40, 31, 36, 43]], "151 paths, 151 labels and 150 frames in 4 videos"),
        (lambda v: [*in_parts([v])[:2], [40, 31, 36, -44]], "frames per video are not integers"),
    ],
)
def test_errors_are_named_and_nothing_is_written(
    root: Path, tmp_path: Path, change: Callable[[Any], Any], expected: str
) -> None:
    value = change(videos := [rows_of(f"x/{n}", n, count) for n, count in VIDEOS])
    file = write(tmp_path / "x.pkl", value if isinstance(value, (list, dict)) else videos)
    message = refusal(lambda: index_from_pickles(config_of(root), [file], phase_order="mtrcnet"))
    assert expected in message
    assert message.startswith(str(file))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "x.pkl"]
    assert [path.name for path in root.iterdir()] == ["frames"]


def test_phase_orders_are_required(root: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "x.pkl", videos_of(root))
    config = config_of(root)
    assert "--phase-order" in refusal(lambda: index_from_pickles(config, [file], phase_order=None))
    index_from_pickles(config, [file], phase_order="mtrcnet")
    out = tmp_path / "out.pkl"
    message = refusal(lambda: pickle_from_index(config, out, layout="cholec80", phase_order=None))
    assert "--phase-order" in message
    assert not out.exists()


def test_labels_are_written_to_a_subfolder_of_the_root_only(root: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "x.pkl", videos_of(root))
    for folder in (tmp_path / "labels", root, root / "frames/..", root / "../data", root / ".labels"):
        message = refusal(
            lambda folder=folder: index_from_pickles(config_of(root), [file], phase_order="mtrcnet", labels_to=folder)
        )
        assert "--labels-to" in message
    assert [path.name for path in root.iterdir()] == ["frames"]
    index = index_from_pickles(config_of(root), [file], phase_order="mtrcnet", labels_to=root / "mine")
    assert index.videos[0].phase_file is not None
    assert index.videos[0].phase_file.path == "mine/video01-phase.txt"


def test_no_labels_are_left_if_the_index_is_not_written(root: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "x.pkl", videos_of(root))
    config = config_of(root)
    index_from_pickles(config, [write(tmp_path / "y.pkl", videos_of(root)[:1])], phase_order="mtrcnet")
    before = sorted(path.relative_to(root) for path in root.rglob("*.txt"))
    message = refusal(lambda: index_from_pickles(config, [file], phase_order="mtrcnet"))
    assert "replace it with --force" in message
    assert before == sorted(path.relative_to(root) for path in root.rglob("*.txt"))
    refusal(lambda: index_from_pickles(config, [file], phase_order="mtrcnet", labels_to=root / "mine"))
    assert not (root / "mine").exists()
    (root / "mine").mkdir()
    (root / "mine/video02-phase.txt").symlink_to(tmp_path / "elsewhere.txt")
    message = refusal(lambda: index_from_pickles(config, [file], phase_order="mtrcnet", labels_to=root / "mine"))
    assert "video02-phase.txt" in message
    assert not (tmp_path / "elsewhere.txt").exists()


def test_an_image_without_a_row_has_no_label(root: Path, tmp_path: Path) -> None:
    videos = videos_of(root)
    file = write(tmp_path / "x.pkl", [videos[0][:-1], *videos[1:]])
    index = index_from_pickles(config_of(root), [file], phase_order="mtrcnet")
    phase, _ = load_labels(Dataset(index, root), index.videos[0], sampled_frames(index.videos[0], 1.0))
    assert phase.tolist() == [*labels_of(1, 40)[0][:-1], -1]


def test_a_pickle_cannot_replace_a_folder(root: Path, tmp_path: Path) -> None:
    index_from_pickles(config_of(root), [write(tmp_path / "x.pkl", videos_of(root))], phase_order="mtrcnet")
    assert "is a folder" in refusal(
        lambda: pickle_from_index(config_of(root), root, layout="cholec80", phase_order="mtrcnet", replace=True)
    )
    assert "no video in split test" in refusal(
        lambda: pickle_from_index(config_of(root), tmp_path / "o.pkl", layout="test", phase_order="mtrcnet")
    )


def test_missing_images_are_named(root: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "x.pkl", [rows_of("x/1", 1, 38)])
    for number in (1, 2):
        (root / f"frames/video01/video01-{number}.jpg").unlink()
    config = config_of(root, frame_base=1)
    message = refusal(lambda: index_from_pickles(config, [file], phase_order="mtrcnet"))
    assert "38 rows, but" in message
