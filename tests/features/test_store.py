"""The feature store: files read back as written, damage is noticed, encoders never mix."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from features.sealed_hdf5 import USER_BLOCK_BYTES, seal
from features.store import (
    EncoderSpec,
    FeatureFileError,
    SourceIdentity,
    read_every_chunk,
    read_features,
    recorded_encoder,
    rewrite_labels,
    verify_file,
    write_features,
)
from features.store_folder import (
    describe_folder,
    feature_files,
    find_feature_folder,
    load_feature_set,
    prepare_folder,
    verify_folder,
)

ENCODER = EncoderSpec("tiny", "ab" * 32, {"resize_px": 250, "crop_px": 224}, 1.0, "fp32", "float32", 16)


def source(video_id: str = "video01") -> SourceIdentity:
    return SourceIdentity(video_id, "cd" * 32, 1000, 25.0)


def write(
    path: Path, frames: int = 30, tools: int = 7, encoder: EncoderSpec = ENCODER, blocks: int = 2, **attributes: Any
) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(frames)
    values = random.normal(size=(frames, encoder.embedding_dim)).astype(np.float32)
    logits = random.normal(size=(frames, tools)).astype(np.float32)
    phase, present = random.integers(-1, 7, frames), random.integers(-1, 2, (frames, tools))
    with write_features(path, encoder, source(path.stem), np.arange(frames) * 25, phase, present, attributes) as writer:
        for part, part_logits in zip(np.array_split(values, blocks), np.array_split(logits, blocks), strict=True):
            writer.append(part, part_logits)
    return values, logits


@given(
    frames=st.integers(1, 600),
    tools=st.sampled_from([0, 1, 7]),
    storage=st.sampled_from(["float16", "float32"]),
    blocks=st.integers(1, 4),
)
@settings(deadline=None, max_examples=25)
def test_what_is_written_comes_back(
    tmp_path_factory: pytest.TempPathFactory, frames: int, tools: int, storage: str, blocks: int
) -> None:
    path = tmp_path_factory.mktemp("store") / "video01.h5"
    values, logits = write(path, frames, tools, replace(ENCODER, storage=storage), blocks)
    found = read_features(path)
    assert np.array_equal(found.features, values.astype(storage))
    assert np.array_equal(found.tool_logits, logits)
    assert np.array_equal(found.time_s, np.arange(frames))
    assert (found.phase.dtype, found.tools.shape) == (np.int8, (frames, tools))
    assert os.listdir(path.parent) == ["video01.h5"]


def test_layout_is_the_contracts(tmp_path: Path) -> None:
    write(tmp_path / "video01.h5", 600, phase_sha256="x")
    with h5py.File(tmp_path / "video01.h5") as file:
        features = file["features"]
        assert (features.chunks, features.fletcher32, features.compression) == ((256, 16), True, None)
        assert file["phase"].fletcher32
        assert {"schema_version", "video_id", "source_sha256_ends", "source_fps", "fps", "backbone", "weights_sha256",
                "preprocess", "precision", "encoder_digest", "package_version", "complete", "phase_sha256"} <= set(
            file.attrs
        )  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"backbone": "other"},
        {"weights_sha256": "00" * 32},
        {"preprocess": {"resize_px": 250, "crop_px": 200}},
        {"fps": 5.0},
        {"precision": "bf16"},
        {"storage": "float16"},
    ],
)
def test_whatever_changes_the_numbers_changes_the_folder(change: dict[str, Any]) -> None:
    other = replace(ENCODER, **change)
    assert other.folder_name != ENCODER.folder_name
    assert replace(other) == other
    assert replace(other).folder_name == other.folder_name


@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(deadline=None, max_examples=200)
def test_every_flipped_bit_is_found_before_hdf5_opens_the_file(
    tmp_path_factory: pytest.TempPathFactory, position: float, bit: int
) -> None:
    """Some flips inside HDF5's structures send the library into an endless loop, so it must never open such a file."""
    path = tmp_path_factory.mktemp("flip") / "video01.h5"
    write(path)
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 1 << bit
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(h5py, "File", lambda *_, **__: pytest.fail("HDF5 was asked to open a damaged file"))
        problem = verify_file(path)
    assert problem in (
        "damaged or cut short; run extract again",
        "not a file of this project, or damaged; run extract again",
    )


def test_every_flipped_byte_inside_the_features_is_found(tmp_path: Path) -> None:
    path = tmp_path / "video01.h5"
    write(path, 300)
    with h5py.File(path) as file:
        chunk = file["features"].id.get_chunk_info(0)
    content = path.read_bytes()
    for offset in range(chunk.byte_offset, chunk.byte_offset + chunk.size, 997):
        path.write_bytes(content[:offset] + bytes([content[offset] ^ 0x10]) + content[offset + 1 :])
        assert "damaged" in (verify_file(path) or ""), offset


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.3, 0.7, 0.999])
def test_a_file_cut_short_is_one_line(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "video01.h5"
    write(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(FeatureFileError, match=r"video01\.h5: .*extract again") as caught:
        read_features(path)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_feature_files(tmp_path: Path) -> None:
    (tmp_path / "page.h5").write_text("<html>")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["features"] = np.zeros((3, 4))
    with h5py.File(tmp_path / "bomb.h5", "w", userblock_size=USER_BLOCK_BYTES) as file:
        file.attrs.update({"schema_version": 1, "complete": True})
        file.create_dataset("features", (1 << 40, 2048), "float32", chunks=(256, 2048), compression="gzip")
    with h5py.File(tmp_path / "group.h5", "w", userblock_size=USER_BLOCK_BYTES) as file:
        file.attrs.update({"schema_version": 1, "complete": True})
        file.create_group("features")
    for name in ("bomb.h5", "group.h5"):  # an attacker can seal a file, so its content is still validated
        seal(tmp_path / name)
    for name in ("page.h5", "other.h5", "bomb.h5", "group.h5", "missing.h5"):
        with pytest.raises(FeatureFileError, match=name):
            read_features(tmp_path / name)


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with write_features(
            tmp_path / "video01.h5", ENCODER, source(), np.arange(4), np.zeros(4), np.zeros((4, 7)), {}
        ) as writer:
            writer.append(np.zeros((2, 16)), np.zeros((2, 7)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == []


def test_missing_rows_and_numbers_too_large_are_refused(tmp_path: Path) -> None:
    def half(encoder: EncoderSpec, value: float, rows: int) -> None:
        with write_features(
            tmp_path / "video01.h5", encoder, source(), np.arange(4), np.zeros(4), np.zeros((4, 7)), {}
        ) as writer:
            writer.append(np.full((rows, 16), value), np.zeros((rows, 7)))

    with pytest.raises(UserError, match="2 of 4 frames"):
        half(ENCODER, 0.0, 2)
    with pytest.raises(UserError, match=r"storage=float32"):
        half(replace(ENCODER, storage="float16"), 1e6, 4)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    program = f"""
import resource, signal, sys
import numpy as np
from pathlib import Path
from features.store import EncoderSpec, write_features, SourceIdentity
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
encoder = EncoderSpec("tiny", "ab", {{}}, 1.0, "fp32", "float32", 2048)
n = 1000
with write_features(Path({str(tmp_path)!r}) / "video01.h5", encoder, SourceIdentity("video01", "x", 1, 25.0),
                   np.arange(n), np.zeros(n), np.zeros((n, 7)), {{}}) as writer:
    for _ in range(10):
        writer.append(np.random.rand(100, 2048), np.zeros((100, 7)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "no room left on the disk" in done.stderr.strip().splitlines()[-1]
    assert os.listdir(tmp_path) == []


def test_new_labels_keep_the_features(tmp_path: Path) -> None:
    path = tmp_path / "video01.h5"
    values, _ = write(path, 30, phase_sha256="old")
    rewrite_labels(path, np.full(30, 3), np.ones((30, 7)), {"phase_sha256": "new"})
    found = read_features(path)
    assert np.array_equal(found.features, values)
    assert (found.phase == 3).all()
    assert (found.tools == 1).all()
    assert found.attributes["phase_sha256"] == "new"
    with pytest.raises(FeatureFileError, match="another number of frames"):
        rewrite_labels(path, np.zeros(29), np.ones((29, 7)), {})


def test_label_tracks_are_stored_replaced_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "video01.h5"
    steps, none = np.arange(30, dtype=np.int8) % 5, np.full(30, -1, np.int8)
    labels = np.arange(30) * 25, np.zeros(30), np.zeros((30, 0))
    tracks = {"steps": steps, "events": none}
    with write_features(path, ENCODER, source(), *labels, {"tracks": '{"steps": ["a"]}'}, tracks=tracks) as writer:
        writer.append(np.ones((30, 16)), np.zeros((30, 0)))
    found = read_features(path).tracks
    assert {name: values.tolist() for name, values in found.items()} == {
        name: values.tolist() for name, values in tracks.items()
    }
    assert describe_folder(tmp_path)[-2].endswith("30 with a phase, 0 with tools, 0 with events, 30 with steps")
    rewrite_labels(path, *labels[1:], {}, {"steps": none})
    assert (list(read_features(path).tracks), "tracks" in read_features(path).attributes) == (["steps"], False)
    rewrite_labels(path, *labels[1:], {})
    assert read_features(path).tracks == {}
    assert verify_file(path, ENCODER, source()) is None
    with h5py.File(path) as file:
        assert set(file) == {"features", "tool_logits", "frame_index", "time_s", "phase", "tools"}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: file.create_dataset("tracks", data=np.zeros(30, np.int8)), "tracks is not a group"),
        (lambda file: file.update({"tracks": h5py.ExternalLink("/etc/passwd", "/")}), "tracks is not a group"),
        (lambda file: file.update({"tracks": h5py.SoftLink("/tracks")}), "tracks is not a group"),
        (lambda file: file.create_dataset("tracks/steps", data=np.zeros(3, np.int8)), "lengths differ"),
        (lambda file: file.create_dataset("tracks/steps", data=np.zeros(30)), "not a data set of 1 dimension"),
        (lambda file: file.create_group("tracks/steps"), "not a data set of 1 dimension"),
        (lambda file: file.update({"tracks/steps": h5py.ExternalLink("other.h5", "/x")}), ""),
        (
            lambda file: file.create_dataset("tracks/Steps!", data=np.zeros(30, np.int8)),
            "not the name of a label track",
        ),
        (lambda file: file.attrs.update({"tracks": "[1]"}), "tracks is not a list of classes"),
    ],
)
def test_label_tracks_that_this_project_never_writes_are_one_line(
    tmp_path: Path, spoil: Callable[[h5py.File], object], message: str
) -> None:
    path = tmp_path / "video01.h5"
    write(path)
    with h5py.File(path, "r+") as file:
        spoil(file)
    seal(path)
    for read in (read_every_chunk, read_features):
        with pytest.raises(FeatureFileError, match=rf"video01\.h5: .*{message}.*extract again"):
            read(path)


def test_a_file_of_another_source_or_encoder_does_not_verify(tmp_path: Path) -> None:
    path = tmp_path / "video01.h5"
    write(path)
    assert verify_file(path, ENCODER, source()) is None
    changed = replace(source(), source_sha256_ends="other")
    assert verify_file(path, ENCODER, changed) == "the source video has changed since"
    assert verify_file(path, replace(ENCODER, fps=5.0), source()) == "made by another encoder"
    assert verify_file(path, ENCODER, source("video02")) == "contains the features of video video01"


def test_the_recorded_encoder_includes_its_arithmetic(tmp_path: Path) -> None:
    path = tmp_path / "video01.h5"
    write(path, encoder=replace(ENCODER, arithmetic="folded"))
    found = recorded_encoder(read_features(path).attributes)
    assert found["arithmetic"] == "folded"
    assert found["preprocess"] == ENCODER.preprocess
    assert recorded_encoder({"backbone": "resnet50"})["arithmetic"] == "plain"  # files older than folding


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("preprocess", text) for text in ("{", "", "[" * 60_000, "9" * 5000)),
        *(("phases", value) for value in ("{", "[" * 60_000, "3", "[3]", 3)),
        ("fps", "often"),
    ],
)
def test_a_sealed_file_whose_attributes_are_not_what_stage_two_reads_is_one_line(
    tmp_path: Path, name: str, value: Any
) -> None:
    """Earlier, `train-temporal` ended in a traceback after every check had passed."""
    path = tmp_path / "video01.h5"
    write(path)
    with h5py.File(path, "r+") as file:
        file.attrs[name] = value
    seal(path)
    assert "damaged" in (verify_file(path) or "")
    for read in (read_every_chunk, read_features):
        with pytest.raises(FeatureFileError, match=r"video01\.h5: damaged .*extract again") as caught:
            read(path)
        assert str(caught.value).isprintable()


def test_mixed_encoders_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "video01.h5")
    write(tmp_path / "video02.h5", encoder=replace(ENCODER, weights_sha256="00" * 32))
    with pytest.raises(FeatureFileError, match=r"video02\.h5: made by encoder .* cannot be combined"):
        load_feature_set(tmp_path, ["video01", "video02"])
    problems = dict(verify_folder(tmp_path))
    assert problems[tmp_path / "video01.h5"] is None
    assert "another encoder" in (problems[tmp_path / "video02.h5"] or "")


def test_missing_videos_are_named(tmp_path: Path) -> None:
    write(tmp_path / "video01.h5")
    with pytest.raises(UserError, match="no features of video02, video03; run extract"):
        load_feature_set(tmp_path, ["video01", "video02", "video03"])
    with pytest.raises(UserError, match="no such feature folder"):
        list(verify_folder(tmp_path / "none"))


def test_room_is_checked_before_the_work(tmp_path: Path) -> None:
    prepare_folder(tmp_path / "new", [100, 200], ENCODER)
    with pytest.raises(UserError, match="the features needs about"):
        prepare_folder(tmp_path / "new", [1 << 45], ENCODER)


def test_reading_features_imports_no_torch_and_no_image_library(tmp_path: Path) -> None:
    write(tmp_path / "video01.h5")
    program = (
        "import sys; from pathlib import Path; from features.store_folder import load_feature_set\n"
        f"load_feature_set(Path({str(tmp_path)!r}), ['video01'])\n"
        "print(sorted({'torch', 'torchvision', 'PIL', 'av', 'decord'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_folder_of_folders_points_to_the_one_with_features(tmp_path: Path) -> None:
    inside = tmp_path / "resnet50-abc"
    inside.mkdir()
    with pytest.raises(UserError, match="run extract first"):
        feature_files(tmp_path)
    (inside / "video01.h5").write_bytes(b"x")
    with pytest.raises(UserError, match=r"but .*resnet50-abc does: name that folder"):
        feature_files(tmp_path)


def test_a_run_whose_extract_names_no_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run/extract").mkdir(parents=True)
    for content in ('{"videos": 3}', '{"folder": null}', '{"folder": 7}'):
        (tmp_path / "run/extract/result.json").write_text(content)
        with pytest.raises(UserError, match=r"extract/result\.json: contains no feature folder; run extract again"):
            find_feature_folder(None, tmp_path / "run", tmp_path / "store")
