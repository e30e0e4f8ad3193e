"""TFRecord files made by another library: labels and frames read exactly, or refused with record and reason."""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tfrecord.writer import TFRecordWriter

from configs.errors import UserError
from configs.load import load_dataset
from configs.schema import Config, DataConfig
from features.dataset import tfrecord
from features.dataset.annotations import LabelTrack
from features.dataset.build import build_index
from features.dataset.check import check_index
from features.dataset.formats.cholec80 import write_label_file
from features.dataset.index import Dataset, Index
from features.dataset.labels import load_labels
from features.dataset.layouts import RecordLayout
from features.dataset.sampling import sampled_frames
from features.dataset.summary import count_frames, index_summary
from features.dataset.tfrecord import FrameRecord, TfrecordReader, parse_record, scan_records
from features.frames.source import open_source
from features.store import read_features
from features.video.base import ReaderError
from features.video.open import open_video
from stage1_cnn.video_features import label_attributes
from tests.cli import succeed
from tests.test_cli import SETTINGS, joint_file, refuse

SPEC = load_dataset("cholec80")
SWAPPED = [0, 1, 2, 3, 6, 5, 4]  # TF-Cholec80's numbers in Cholec80's, and the other way round
Datum = dict[str, tuple[Any, str]]


def png(rgb: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(rgb).save(out, "PNG")
    return out.getvalue()


def frame_pixels(number: int, height_px: int = 6, width_px: int = 8) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (height_px, width_px, 3), dtype=np.uint8)


def phase_at(number: int, total: int) -> int:
    return min(number * 7 // total, 6)


def tools_at(number: int) -> list[int]:
    return [int((number // (tool + 1)) % 2) for tool in range(7)]


def example(number: int, total: int, recorded: str = "video01", base: int = 0, **changes: Any) -> Datum:
    """A frame as TF-Cholec80 stores it; `changes` replace keys, None removes one."""
    datum: dict[str, Any] = {
        "frame": (png(frame_pixels(number)), "byte"),
        "video_id": (recorded.encode(), "byte"),
        "frame_id": (base + number, "int"),
        "total_frames": (total, "int"),
        "phase": (phase_at(number, total), "int"),
        "instruments": (tools_at(number), "int"),
    }
    return {key: value for key, value in (datum | changes).items() if value is not None}


def write(path: Path, examples: list[Datum]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = TFRecordWriter(str(path))
    for datum in examples:
        writer.write(datum)
    writer.close()
    return path


def video(path: Path, frames: int = 14, **fixed: Any) -> Path:
    return write(path, [example(k, frames, path.stem, **fixed) for k in range(frames)])


def index_of(root: Path, order: str | None = "tf-cholec80", **data: Any) -> Index:
    return build_index(root, SPEC, DataConfig(tfrecord_phase_order=order, **data))


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def scan(path: Path) -> RecordLayout:
    return scan_records(path, "video01", SPEC, SPEC.phase_orders["mtrcnet"])


def scan_refusal(path: Path) -> str:
    text = refusal(lambda: scan(path))
    assert text.startswith(str(path))
    return text


# ---------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("base", [0, 1])
def test_frames_and_labels_come_out_as_they_went_in(tmp_path: Path, base: int) -> None:
    for number in (1, 2, 10):
        video(tmp_path / f"video{number:02d}.tfrecord", base=base)
    index = index_of(tmp_path)
    assert [entry.id for entry in index.videos] == ["video01", "video02", "video10"]
    for entry in index.videos:
        assert (entry.kind, entry.fps, entry.frame_count, entry.most_fps) == ("tfrecord", 1.0, 14, 1.0)
        assert entry.records is not None
        assert entry.records.frame_base == base
        frames = sampled_frames(entry, 1.0)
        assert frames.tolist() == list(range(14))
        phase, tools = load_labels(Dataset(index, tmp_path), entry, frames)
        assert phase.tolist() == [SWAPPED[phase_at(k, 14)] for k in range(14)]
        assert tools.tolist() == [tools_at(k) for k in range(14)]
        assert sampled_frames(entry, 0.25).tolist() == [0, 4, 8, 12]
        with open_source(Config(), Dataset(index, tmp_path), entry) as reader:
            assert (reader.frame_count, reader.spread(3)) == (14, [0, 6, 13])
            for wanted in ([*range(14)], [3, 7, 13], [5]):
                for k, rgb in zip(wanted, reader.read(wanted), strict=True):
                    np.testing.assert_array_equal(rgb, frame_pixels(k))
            assert "has 14 frames, so frame 14 cannot be read" in refusal(lambda reader=reader: reader.read([14]))
    index.save(tmp_path / "index.json")
    assert Index.load(tmp_path / "index.json") == index
    assert check_index(Dataset(index, tmp_path)) == []
    rows = {str(row[0]): row[1] for row in index_summary(index, count_frames(Dataset(index, tmp_path), 1.0))[1:]}
    assert (rows["videos"], rows["frames"], rows["no phase label"], rows["GallbladderPackaging"]) == (3, 42, 0, 6)


def test_real_frames_in_full_size_are_the_same_bits(tmp_path: Path, shared_data: Path) -> None:
    source = shared_data / "clips/videos/video05.mp4"
    with open_video(source, "pyav") as reader:
        frames = list(reader.read([0, 25, 50]))
    assert frames[0].shape == (480, 854, 3)
    path = write(
        tmp_path / "video05.tfrecord", [example(k, 3, "video05", frame=(png(frames[k]), "byte")) for k in range(3)]
    )
    index = index_of(tmp_path)
    with open_source(Config(), Dataset(index, tmp_path), index.videos[0]) as reader:
        for rgb, truth in zip(reader.read(range(3)), frames, strict=True):
            np.testing.assert_array_equal(rgb, truth)
    assert path.stat().st_size > 400_000


def test_the_order_gives_numbers_their_meaning(tmp_path: Path) -> None:
    video(tmp_path / "video01.tfrecord")
    swapped, plain = index_of(tmp_path), index_of(tmp_path, "mtrcnet")
    named = index_of(tmp_path, ",".join(SPEC.phase_orders["tf-cholec80"]))
    datasets = [Dataset(index, tmp_path) for index in (swapped, plain)]
    phases = [load_labels(one, one.index.videos[0], range(14))[0].tolist() for one in datasets]
    assert phases[1] == [phase_at(k, 14) for k in range(14)]
    assert phases[0] == [SWAPPED[phase] for phase in phases[1]]
    assert swapped.digest() == named.digest() != plain.digest()
    attributes = [label_attributes(Config(), one.spec, one.index.videos[0])["labels_sha256"] for one in datasets]
    assert attributes[0] != attributes[1]
    asked = refusal(lambda: index_of(tmp_path, None))
    assert asked.startswith(f"{tmp_path / 'video01.tfrecord'}: contains phase numbers, not names")
    for hint in ("--phase-order", "mtrcnet, tf-cholec80", "data.tfrecord_phase_order"):
        assert hint in asked


def test_indices_without_tfrecords_keep_the_digest_that_they_had(tmp_path: Path) -> None:
    entry = {"id": "video01", "source": "video01.mp4", "size_bytes": 1, "modified_ns": 0, "sha256_ends": "0" * 64}
    toy = {"name": "toy", "annotation_fps": 25, "phases": ["a", "b"], "patterns": SPEC.patterns.model_dump()}
    video = {**entry, "kind": "video", "fps": 25.0, "frame_count": 50, "split": "train"}
    index = Index.from_json({"format_version": 1, "dataset": toy, "videos": [video], "notes": []})
    assert index.digest() == "899acce9671080287670b0d7d589dd8c50128e4050f4abaa32e2254e10aac8c2"


def test_a_stray_file_changes_nothing(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        video(tmp_path / f"video{number:02d}.tfrecord", frames=7 + number)
    before = index_of(tmp_path)
    for name in (
        ".DS_Store",
        "checksums.txt",
        "README.tfrecord",
        "video01 (copy).tfrecord",
        "a.tfrecord",
        "video.tfrecords",
    ):
        (tmp_path / name).write_bytes(b"stray")
    (tmp_path / ".video02.tfrecord").write_bytes(b"stray")
    after = index_of(tmp_path)
    assert after.videos == before.videos
    assert [entry.frame_count for entry in after.videos] == [8, 9, 10]
    assert (
        "4 TFRecord file(s) not used, since they are not named like a video: README.tfrecord, a.tfrecord, "
        "video.tfrecords, video01 (copy).tfrecord" in after.notes
    )
    (tmp_path / "video02.tfrecord").unlink()
    left = index_of(tmp_path)
    assert [(entry.id, entry.frame_count) for entry in left.videos] == [("video01", 8), ("video03", 10)]


@pytest.mark.parametrize("recorded", ["video01", "video1", "Video_01", "1", "01", "video 1"])
def test_a_record_may_spell_the_video_id_differently(tmp_path: Path, recorded: str) -> None:
    path = write(tmp_path / "video01.tfrecord", [example(k, 3, recorded) for k in range(3)])
    assert scan(path).frame_count == 3


def test_unpacked_numbers_and_additional_keys_are_read(tmp_path: Path) -> None:
    """Protocol buffers also allow lists of numbers that are stored one by one; TensorFlow reads both."""

    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    def entry(key: str, kind: int, values: bytes) -> bytes:
        return field(1, field(1, key.encode()) + field(2, field(kind, values)))

    def integers(*values: int) -> bytes:
        return b"".join(bytes([8, value]) for value in values)

    small = png(frame_pixels(0, 2, 2))
    features = [
        entry("frame", 1, field(1, small)),
        entry("video_id", 1, field(1, b"video01")),
        entry("frame_id", 3, integers(0)),
        entry("total_frames", 3, integers(1)),
        entry("phase", 3, integers(4)),
        entry("instruments", 3, integers(1, 0, 0, 0, 0, 0, 1)),
        entry("confidence", 2, field(1, struct.pack("<f", 0.5))),
    ]
    content = b"".join(features)
    length = len(content)
    data = bytes([10, length & 127 | 128, length >> 7]) + content
    assert parse_record(data, "here") == FrameRecord(small, "video01", 0, 1, 4, (1, 0, 0, 0, 0, 0, 1))


@given(st.lists(st.tuples(st.integers(0, 6), st.sets(st.integers(0, 6))), min_size=1, max_size=60))
def test_labels_survive_the_index(rows: list[tuple[int, set[int]]]) -> None:
    phase = np.array([phase for phase, _ in rows])
    tools = np.array([[int(tool in present) for tool in range(7)] for _, present in rows], dtype=np.int8)
    layout = RecordLayout.of_rows(
        0, len(rows), SPEC.phase_orders["mtrcnet"], [(phase, tuple(sorted(present))) for phase, present in rows]
    )
    layout = RecordLayout.model_validate_json(layout.model_dump_json())
    assert (layout.frame_count, layout.problem(SPEC)) == (len(rows), None)
    phase_track, tool_track = layout.tracks(SPEC)
    assert tool_track is not None
    np.testing.assert_array_equal(phase_track.labels, phase)
    np.testing.assert_array_equal(tool_track.labels, tools)
    assert (phase_track.labels.dtype, tool_track.labels.dtype) == (np.int8, np.int8)


# ---------------------------------------------------------------------------------------------- damage


def test_a_flipped_byte_is_found_wherever_it_is(tmp_path: Path) -> None:
    path = video(tmp_path / "video01.tfrecord", frames=3)
    intact = path.read_bytes()
    layout = scan(path)
    for position in range(len(intact)):
        damaged = bytearray(intact)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(ReaderError, match=r"video01\.tfrecord"):
            scan(path)
        with pytest.raises(ReaderError, match=r"video01\.tfrecord"), TfrecordReader(path, layout) as reader:
            list(reader.read(range(3)))


def test_damage_that_no_wanted_frame_needs_is_none(tmp_path: Path) -> None:
    path = video(tmp_path / "video01.tfrecord", frames=3)
    layout = scan(path)
    damaged = bytearray(path.read_bytes())
    damaged[-10] ^= 1
    path.write_bytes(damaged)
    with TfrecordReader(path, layout) as reader:
        np.testing.assert_array_equal(next(reader.read([1])), frame_pixels(1))
        got = reader.read([0, 2])
        np.testing.assert_array_equal(next(got), frame_pixels(0))
        assert "record 2 is damaged: its data does not fit its checksum" in refusal(lambda: next(got))


def test_a_file_cut_short_anywhere_is_found(tmp_path: Path) -> None:
    path = video(tmp_path / "video01.tfrecord", frames=3)
    intact = path.read_bytes()
    for length in range(len(intact)):
        path.write_bytes(intact[:length])
        scan_refusal(path)
    assert "is incomplete" in scan_refusal(path)
    path.write_bytes(b"")
    assert "contains no record" in scan_refusal(path)
    path.unlink()
    assert "cannot be read" in scan_refusal(path)


@settings(max_examples=200)
@given(content=st.binary(max_size=300))
def test_bytes_that_are_something_else_are_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    with pytest.raises(ReaderError, match=r"^here"):
        parse_record(content, "here")
    path = tmp_path_factory.getbasetemp() / "video01.tfrecord"
    path.write_bytes(content)
    scan_refusal(path)


@settings(max_examples=300)
@given(st.integers(0, 400), st.integers(0, 12), st.binary(max_size=12))
def test_an_example_with_any_bytes_changed_is_a_frame_or_refused(at: int, removed: int, added: bytes) -> None:
    """Checksums exclude such records, but another program may still write them."""
    content = TFRecordWriter.serialize_tf_example(example(3, 7))
    changed = content[:at] + added + content[at + removed :]
    outcome = None
    with contextlib.suppress(ReaderError):
        outcome = parse_record(changed, "here")
    if outcome is None:
        assert refusal(lambda: parse_record(changed, "here")).startswith("here")
    else:
        assert outcome.frame.startswith(b"\x89PNG")


def test_nothing_is_allocated_for_a_length_beyond_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = video(tmp_path / "video01.tfrecord", frames=3)
    intact = path.read_bytes()
    header = struct.pack("<Q", 1 << 62)
    path.write_bytes(header + TFRecordWriter.masked_crc(header) + intact)
    assert "record 0 is incomplete" in scan_refusal(path)
    path.write_bytes(intact)
    monkeypatch.setattr(tfrecord, "MAX_RECORD_BYTES", 20)
    assert "too many for a frame" in scan_refusal(path)


def test_a_compressed_or_other_file_is_named_as_such(tmp_path: Path) -> None:
    path = tmp_path / "video01.tfrecord"
    path.write_bytes(b"\x1f\x8b" + bytes(100))
    assert "is gzip-compressed; unpack it with gunzip" in scan_refusal(path)
    path.write_bytes(bytes(range(7, 107)))
    assert "is not a TFRecord file, or its length does not fit its checksum" in scan_refusal(path)


# ---------------------------------------------------------------------------------------------- wrong content


KEYS = ("frame", "video_id", "frame_id", "total_frames", "phase", "instruments")


@pytest.mark.parametrize("key", KEYS)
def test_missing_keys_and_other_types_are_refused(tmp_path: Path, key: str) -> None:
    path = tmp_path / "video01.tfrecord"
    write(path, [example(0, 2), example(1, 2, **{key: None})])
    assert f"record 1 lacks the key '{key}'" in scan_refusal(path)
    kind = "int64_list" if key in ("frame", "video_id") else "bytes_list"
    wrong = (1, "int") if kind == "int64_list" else (b"1", "byte")
    write(path, [example(0, 2, **{key: wrong})])
    assert f"record 0 contains a {kind} under '{key}'" in scan_refusal(path)
    write(path, [example(0, 2, **{key: (0.5, "float")})])
    assert f"record 0 contains a float_list under '{key}'" in scan_refusal(path)
    if key != "instruments":
        value, dtype = example(0, 2)[key]
        write(path, [example(0, 2, **{key: ([value, value], dtype)})])
        assert f"record 0 contains 2 values under '{key}', not one" in scan_refusal(path)
        write(path, [example(0, 2, **{key: ([], dtype)})])
        assert "record 0" in scan_refusal(path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"phase": (7, "int")}, "phase 7 is not one of the 7 phases of cholec80"),
        ({"phase": (-1, "int")}, "phase -1 is not one of the 7"),
        ({"instruments": ([0] * 6, "int")}, "6 instruments, but cholec80 has 7"),
        ({"instruments": ([0] * 6 + [2], "int")}, "instruments are [0, 0, 0, 0, 0, 0, 2], not all 0 or 1"),
        ({"instruments": ([0] * 6 + [-(1 << 63)], "int")}, "not all 0 or 1"),
        ({"video_id": (b"video02", "byte")}, "is of video 'video02', but the first record is of video 'video01'"),
        ({"frame_id": (3, "int")}, "is frame 3, but frame 1 was expected"),
        ({"frame_id": (0, "int")}, "is frame 0, but frame 1 was expected"),
        ({"total_frames": (4, "int")}, "total_frames is 4, but was 3 before"),
        ({"frame": (b"\xff\xd8\xff\xe0JFIF", "byte")}, "its frame is not a PNG"),
    ],
)
def test_wrong_content_is_named_with_its_record(tmp_path: Path, changes: Datum, reason: str) -> None:
    path = write(tmp_path / "video01.tfrecord", [example(0, 3), example(1, 3, **changes), example(2, 3)])
    text = scan_refusal(path)
    assert text.startswith(f"{path}: record 1")
    assert reason in text


def test_another_videos_file_under_this_name_is_refused(tmp_path: Path) -> None:
    for recorded in ("video02", "2", "operation01", "video101", "\x00", ""):
        path = write(tmp_path / "video01.tfrecord", [example(k, 2, recorded) for k in range(2)])
        assert "its file is named video01" in scan_refusal(path)


def test_lost_doubled_and_swapped_records_are_found(tmp_path: Path) -> None:
    path = tmp_path / "video01.tfrecord"
    whole = [example(k, 5) for k in range(5)]
    for broken in (whole[1:], whole[2:], whole[:4], whole[:2] + whole[3:], [*whole, whole[4]], whole[::-1]):
        write(path, broken)
        scan_refusal(path)
    write(path, whole[:4])
    assert "contains 4 records, but total_frames is 5" in scan_refusal(path)


def test_total_frames_may_be_the_last_frame_id_if_it_is_so_in_all_files(tmp_path: Path) -> None:
    for number in (1, 2):
        write(tmp_path / f"video{number:02d}.tfrecord", [example(k, 4, f"video{number:02d}") for k in range(5)])
    assert [entry.frame_count for entry in index_of(tmp_path).videos] == [5, 5]
    write(tmp_path / "video02.tfrecord", [example(k, 4, "video02") for k in range(4)])
    text = refusal(lambda: index_of(tmp_path))
    assert "video02.tfrecord: frame_id and total_frames are counted differently from" in text


def test_a_frame_that_pillow_cannot_decode_is_an_error_with_its_number(tmp_path: Path) -> None:
    broken = png(frame_pixels(1))[:40]
    write(tmp_path / "video01.tfrecord", [example(0, 2), example(1, 2, frame=(broken, "byte"))])
    index = index_of(tmp_path)  # decodes nothing
    with open_source(Config(), Dataset(index, tmp_path), index.videos[0]) as reader:
        frames = reader.read([0, 1])
        next(frames)
        assert "record 1: damaged or not an image, frame 1 cannot be read" in refusal(lambda: next(frames))


# ---------------------------------------------------------------------------------------------- index and files


def test_two_sources_or_two_sets_of_labels_are_refused(tmp_path: Path) -> None:
    video(tmp_path / "a/video01.tfrecord")
    (tmp_path / "video01.mp4").write_bytes(b"a video")
    assert "a video and a TFRecord file of its frames" in refusal(lambda: index_of(tmp_path))
    (tmp_path / "video01.mp4").unlink()
    video(tmp_path / "b/video1.tfrecords")
    assert "two TFRecord files for one video" in refusal(lambda: index_of(tmp_path))
    (tmp_path / "b/video1.tfrecords").unlink()
    write_label_file(tmp_path / "video01-phase.txt", LabelTrack(np.arange(3), np.zeros(3, dtype=np.int8), 1), SPEC)
    assert "both contain labels of video01" in refusal(lambda: index_of(tmp_path))


@pytest.mark.parametrize("full_hash", [False, True])
def test_a_changed_file_is_noticed(tmp_path: Path, full_hash: bool) -> None:
    path = video(tmp_path / "video01.tfrecord")
    index = index_of(tmp_path, full_hash=full_hash)
    entry = index.videos[0]
    intact = path.read_bytes()
    path.write_bytes(intact[:-100])
    assert "is incomplete" in check_index(Dataset(index, tmp_path))[0]
    assert "has changed since it was indexed" in refusal(lambda: open_source(Config(), Dataset(index, tmp_path), entry))
    video(path, frames=15)
    assert "its labels are not those that were indexed" in check_index(Dataset(index, tmp_path))[0]
    path.write_bytes(intact)
    os.utime(path, ns=(1, 1))
    assert len(check_index(Dataset(index, tmp_path))) == (0 if full_hash else 1)
    open_source(Config(), Dataset(index, tmp_path), entry).close()


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    video(tmp_path / "video01.tfrecord")
    whole = index_of(tmp_path).to_json()
    for key, value in (
        ("labels", "14x7:0"),
        ("labels", "14x0:7"),
        ("labels", "13x0:0"),
        ("labels", "14x0"),
        ("phase_order", ["Preparation"]),
        ("frame_base", 2),
    ):
        changed = {**whole, "videos": [{**whole["videos"][0]}]}
        changed["videos"][0]["records"] = {**changed["videos"][0]["records"], key: value}
        assert "damaged index" in refusal(lambda changed=changed: Index.from_json(changed))


# ---------------------------------------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def two_editions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Simulated operations at 1 fps, twice: TFRecord files by the other library, and folders of the same PNG files."""
    folder = tmp_path_factory.mktemp("editions")
    options = ["--videos", "3", "--seed", "1", "--fps", "5", "--width", "96", "--height", "96", "--speed-up", "60"]
    succeed(["simulate", str(folder / "videos"), *options], folder)
    index = build_index(folder / "videos", SPEC, DataConfig())
    seen: set[int] = set()
    for entry in index.videos:
        frames = sampled_frames(entry, 1.0)
        phase, tools = load_labels(Dataset(index, folder / "videos"), entry, frames)
        assert min(phase.min(), tools.min()) == 0
        seen |= set(phase.tolist())
        rows = np.arange(len(frames)) * 25
        write_label_file(folder / f"png/{entry.id}-phase.txt", LabelTrack(rows, phase, 25), SPEC)
        write_label_file(folder / f"png/{entry.id}-tool.txt", LabelTrack(rows, tools, 25), SPEC)
        (folder / "png" / entry.id).mkdir()
        examples = []
        with open_source(Config(), Dataset(index, folder / "videos"), entry) as reader:
            for k, rgb in enumerate(reader.read(frames.tolist())):
                content = png(rgb)
                (folder / "png" / entry.id / f"{entry.id}_{25 * k:06d}.png").write_bytes(content)
                labels = {"phase": (SWAPPED[phase[k]], "int"), "instruments": (tools[k].tolist(), "int")}
                examples.append(example(k, len(frames), entry.id, frame=(content, "byte"), **labels))
        write(folder / f"tf/{entry.id}.tfrecord", examples)
    assert {4, 6} <= seen
    (folder / "tf/video00 (copy).tfrecord").write_bytes(b"stray")
    tree = {**SETTINGS, "extract": {**SETTINGS["extract"], "encoder": "initial"}}
    tree["data"] = {**SETTINGS["data"], "split": {"rule": "1/1/1"}}
    tree["cnn"] = {**SETTINGS["cnn"], "epochs": 1}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    return folder


@pytest.mark.slow
def test_both_editions_give_the_same_features_and_labels(two_editions: Path) -> None:
    folder = two_editions

    def options(edition: str) -> list[str]:
        place = [f"data.root={edition}", f"data.index={edition}.json", f"extract.store=features-{edition}"]
        return ["--config", "tiny.yaml", *(word for setting in place for word in ("--set", setting))]

    assert "give their order with --phase-order NAME (mtrcnet, tf-cholec80, dataset)" in refuse(
        ["index", *options("tf")], folder
    )
    told = succeed(["index", *options("tf"), "--phase-order", "tf-cholec80"], folder)
    assert "phase numbers in 3 TFRecord file(s): 0 Preparation, 1 CalotTriangleDissection" in told
    assert "4 GallbladderRetraction, 5 CleaningCoagulation, 6 GallbladderPackaging (data.tfrecord_phase_order)" in told
    assert "1 TFRecord file(s) not used" in told
    assert "index and files agree" in succeed(["index", *options("tf"), "--check"], folder)

    def features(edition: str) -> dict[str, Path]:
        return {path.stem: path for path in (folder / f"features-{edition}").rglob("*.h5")}

    for edition in ("tf", "png"):
        succeed(["extract", *options(edition)], folder)
    assert features("tf").keys() == features("png").keys() == {"video01", "video02", "video03"}
    for video_id, path in features("tf").items():
        one, other = read_features(path), read_features(features("png")[video_id])
        for name in ("features", "phase", "tools", "time_s"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        np.testing.assert_array_equal(one.frame_index * 25, other.frame_index)
        assert path.parent.name == features("png")[video_id].parent.name

    other_order = ["extract", *options("tf"), "--set", "data.tfrecord_phase_order=mtrcnet"]
    assert "but the settings give mtrcnet" in refuse(other_order, folder)
    swapped = {video_id: read_features(path).phase for video_id, path in features("tf").items()}
    before = {video_id: read_features(path).attributes["labels_sha256"] for video_id, path in features("tf").items()}
    succeed(["index", *options("tf"), "--phase-order", "mtrcnet", "--force"], folder)
    assert "3 with new labels only" in succeed(["extract", *options("tf")], folder)
    for video_id, path in features("tf").items():
        np.testing.assert_array_equal(np.array(SWAPPED)[read_features(path).phase], swapped[video_id])
        assert read_features(path).attributes["labels_sha256"] != before[video_id]


@pytest.mark.slow
def test_both_trainings_run_on_tfrecords(two_editions: Path) -> None:
    """With the setting in the settings file instead of `--phase-order`, and without an explicit `index`."""
    folder = two_editions
    joint_file(folder, mapping=None, correlation=None, net={"tasks": "both"})
    place = ["data.root=tf", "data.index=joint.json", "data.tfrecord_phase_order=tf-cholec80"]
    options = ["--config", "joint.yaml", *(word for setting in place for word in ("--set", setting))]
    assert "(data.tfrecord_phase_order)" in succeed(["train-cnn", *options, "--name", "both"], folder)
    succeed(["train-joint", *options, "--name", "both", "--from-cnn", "both"], folder)
    succeed(["evaluate", *options, "--name", "both"], folder)
    assert {"temporal"} <= set(json.loads((folder / "runs/both/evaluate/test/metrics.json").read_text())["phases"])
