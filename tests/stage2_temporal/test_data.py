"""Sequences: every frame used as promised, order kept, one video per sequence, order a function of the epoch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from configs.schema import SequenceConfig
from features.sealed_hdf5 import seal
from features.store import VideoFeatures, feature_path
from stage2_temporal.data import Batch, FeatureBank, Span, epoch_batches, group_by_length, read_training_data
from tests.stage2_temporal.toy import PHASES, Video, cue_video, write_folder

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=9)
SEEDS = st.integers(0, 2**31)


def spans_of(lengths: list[int]) -> list[Span]:
    firsts = np.cumsum([0, *lengths[:-1]])
    return [Span(int(first), length) for first, length in zip(firsts, lengths, strict=True)]


def sequences(batch: Batch) -> list[list[int]]:
    """Rows of each sequence; checks on the way that padding stands at the end only."""
    found = []
    for row in batch.rows.tolist():
        real = [value for value in row if value >= 0]
        assert row == real + [-1] * (len(row) - len(real))
        found.append(real)
    return found


def require_order_in_one_video(rows: list[int], spans: list[Span]) -> None:
    assert rows == list(range(rows[0], rows[0] + len(rows)))
    assert sum(span.first <= rows[0] and rows[-1] < span.first + span.frames for span in spans) == 1


@given(lengths=LENGTHS, size=st.integers(1, 5), seed=SEEDS, epoch=st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_full_uses_every_video_once_and_whole(lengths: list[int], size: int, seed: int, epoch: int) -> None:
    spans = spans_of(lengths)
    batches = epoch_batches(spans, SequenceConfig(mode="full", batch=size), seed, epoch)
    found = [rows for batch in batches for rows in sequences(batch)]
    assert sorted(found) == [list(range(span.first, span.first + span.frames)) for span in spans]
    assert all(batch.fresh and 1 <= len(batch) <= size for batch in batches)
    assert all(batch.lengths.tolist() == sorted(batch.lengths.tolist(), reverse=True) for batch in batches)


@given(lengths=LENGTHS, size=st.integers(1, 5), frames=st.integers(1, 50), seed=SEEDS)
@settings(max_examples=60, deadline=None)
def test_chunks_follow_each_other_and_videos_never_mix(lengths: list[int], size: int, frames: int, seed: int) -> None:
    spans = spans_of(lengths)
    batches = epoch_batches(spans, SequenceConfig(mode="chunked", batch=size, frames=frames), seed, 0)
    ends: list[int] = []  # last row of each sequence of the batch before
    used: Counter[int] = Counter()
    for batch in batches:
        found = sequences(batch)
        assert len(batch) <= size
        for i, rows in enumerate(found):
            assert len(rows) <= frames
            require_order_in_one_video(rows, spans)
            used.update(rows)
            if batch.fresh:
                assert rows[0] in {span.first for span in spans}
            else:  # sequence i continues exactly where sequence i of the batch before stopped
                assert rows[0] == ends[i] + 1
                assert rows[0] not in {span.first for span in spans}
        if not batch.fresh:  # only ended videos were dropped
            finished = {span.first + span.frames - 1 for span in spans}
            assert set(ends[len(found) :]) <= finished
        ends = [rows[-1] for rows in found]
    assert used == Counter(range(sum(lengths)))


@given(lengths=LENGTHS, size=st.integers(1, 7), frames=st.integers(1, 15), stride=st.integers(1, 12), seed=SEEDS)
@settings(max_examples=80, deadline=None)
def test_clips_start_at_every_stride(lengths: list[int], size: int, frames: int, stride: int, seed: int) -> None:
    spans = spans_of(lengths)
    config = SequenceConfig(mode="clips", batch=size, frames=frames, stride=stride)
    batches = epoch_batches(spans, config, seed, 3)
    found = [rows for batch in batches for rows in sequences(batch)]
    expected = []
    for span in spans:
        video = list(range(span.first, span.first + span.frames))
        starts = range(0, span.frames - frames + 1, stride) if span.frames >= frames else [0]
        expected += [video[start : start + frames] for start in starts]
    assert sorted(found) == sorted(expected)
    assert all(batch.fresh for batch in batches)
    assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    if stride == 1:
        assert {row for rows in found for row in rows} == set(range(sum(lengths)))


@pytest.mark.parametrize("mode", ["full", "chunked", "clips"])
def test_the_order_is_a_function_of_seed_and_epoch(mode: str) -> None:
    spans = spans_of([12, 15, 9, 30, 14, 13, 11, 10])
    config = SequenceConfig(mode=mode, batch=3, frames=5)  # type: ignore[arg-type]

    def order(seed: int, epoch: int) -> list[list[list[int]]]:
        torch.manual_seed(epoch * 7 + 1)  # the global generator has no effect
        return [sequences(batch) for batch in epoch_batches(spans, config, seed, epoch)]

    assert order(0, 4) == order(0, 4)
    assert order(0, 4) != order(0, 5)
    assert order(0, 4) != order(1, 4)


def test_groups_hold_videos_of_similar_length() -> None:
    lengths = [1733, 2839, 5828, 1522, 2344, 2153, 4557, 1519, 2702, 1749, 3220, 1090, 981, 1708, 2058, 2957]
    spans = spans_of(lengths)
    for epoch in range(20):
        padded = sum(
            len(batch) * int(batch.lengths.max())
            for batch in epoch_batches(spans, SequenceConfig(mode="full", batch=4), 0, epoch)
        )
        assert padded <= 1.45 * sum(lengths)  # at random it is about 1.8
    exact = [[span.frames for span in group] for group in group_by_length(spans, 4, None)]
    assert [n for group in exact for n in group] == sorted(lengths, reverse=True)


def features(frames: int, first: float, dtype: type = np.float16) -> VideoFeatures:
    values = (first + np.arange(frames * 3).reshape(frames, 3)).astype(dtype)
    phase = np.arange(frames, dtype=np.int8) % 4 - 1
    none: Any = np.zeros((frames, 0))
    return VideoFeatures(np.arange(frames), np.arange(frames) / 1.0, phase, none, values, none)


def test_gather_keeps_storage_and_marks_padding() -> None:
    videos = {"a": features(4, 0), "b": features(2, 100)}
    bank = FeatureBank.of(videos)
    x, labels = bank.gather(Batch(torch.tensor([1, 4]), torch.tensor([3, 2])))
    assert x.dtype == torch.float16
    assert x[0].tolist() == videos["a"].features[1:].tolist()
    assert x[1, :2].tolist() == videos["b"].features.tolist()
    assert labels.tolist() == [[[0, 1, 2], [-1, 0, -1]]]
    assert bank.names(Batch(torch.tensor([1, 4]), torch.tensor([3, 2]))) == "a, b"
    assert bank.names(Batch(torch.tensor([3]), torch.tensor([1]))) == "a"


def test_statistics_are_those_of_the_given_videos_in_double() -> None:
    rng = np.random.default_rng(0)
    videos = {name: features(n, 0) for name, n in (("a", 700), ("b", 300), ("c", 5))}
    for video in videos.values():
        video.features[:] = 100 + rng.normal(0, 0.5, video.features.shape)
    bank = FeatureBank.of(videos)
    mean, std = bank.statistics([bank.span_of("a"), bank.span_of("c")])
    together = np.concatenate([videos["a"].features, videos["c"].features]).astype(np.float64)
    np.testing.assert_allclose(mean.numpy(), together.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std.numpy(), together.std(0), rtol=1e-8)


# ---------------------------------------------------------------------------------------------- bad input


def toy(splits: str = "train train val", seed: int = 0) -> dict[str, Video]:
    rng = np.random.default_rng(seed)
    return {f"v{i}": cue_video(rng, split, 12 + i) for i, split in enumerate(splits.split())}


def test_reads_train_and_val_only(tmp_path: Path) -> None:
    data = read_training_data(write_folder(tmp_path / "set", toy("train none val test train")))
    assert data.split == {"train": ["v0", "v4"], "val": ["v2"]}
    assert data.bank.ids == ("v0", "v4", "v2")
    assert [span.frames for span in data.train] == [12, 16]
    assert [span.frames for span in data.val] == [14]
    assert data.phases == PHASES


def test_no_index(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", toy())
    (folder / "index.json").unlink()
    with pytest.raises(UserError, match=r"set: contains no index\.json"):
        read_training_data(folder)


def test_no_training_videos(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"index\.json: no video is in the split train"):
        read_training_data(write_folder(tmp_path / "set", toy("val test")))


def test_no_phases_in_training_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos = toy()
    for name in ("v0", "v1"):
        videos[name][2][:] = -1
    with pytest.raises(UserError, match=r"index\.json: no training video has phase labels"):
        read_training_data(write_folder(tmp_path / "set", videos))
    assert "no phase labels in v0, v1: left out of train" in capsys.readouterr().err


def test_frames_without_a_phase_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos = toy()
    videos["v1"][2][2:4] = -1
    read_training_data(write_folder(tmp_path / "set", videos))
    said = capsys.readouterr().err
    assert "note: 2 of " in said
    assert "frames have no phase label (v1) and do not count in train" in said


def test_videos_without_phases_are_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos = toy("train train val val")
    videos["v1"][2][:] = -1
    videos["v2"][2][:] = -1
    data = read_training_data(write_folder(tmp_path / "set", videos))
    assert data.split == {"train": ["v0"], "val": ["v3"]}
    said = capsys.readouterr().err
    assert "v1: left out of train" in said
    assert "v2: left out of val" in said


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", toy())
    feature_path(folder, "v1").unlink()
    with pytest.raises(UserError, match="no features of v1; run extract"):
        read_training_data(folder)


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    folder = write_folder(tmp_path / "set", toy())
    path = feature_path(folder, "v1")
    content = bytearray(path.read_bytes())
    needle = np.ascontiguousarray(toy()["v1"][1].astype(np.float16)).tobytes()[:64]
    place = content.index(needle)
    content[place] ^= 0x40
    path.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    with pytest.raises(UserError, match=r"v1\.h5: damaged or cut short"):
        read_training_data(folder)


def test_two_encoders_do_not_mix(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", toy(), weights={"v1": "f" * 64})
    with pytest.raises(UserError, match=r"v1\.h5: made by encoder .* but v0\.h5 by"):
        read_training_data(folder)


def test_a_phase_that_the_index_does_not_name(tmp_path: Path) -> None:
    videos = toy()
    videos["v2"][2][5] = 3
    with pytest.raises(UserError, match=r"v2\.h5: phase 3 at sample 5, but .*index\.json names 3 phases"):
        read_training_data(write_folder(tmp_path / "set", videos))


def test_phases_in_another_order(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", toy())
    other = write_folder(tmp_path / "other", toy(), phases=("Early", "Late", "Middle"))
    (folder / "index.json").write_bytes((other / "index.json").read_bytes())
    with pytest.raises(
        UserError, match=r"v0\.h5: its phases are Early, Middle, Late; .*index\.json has Early, Late, Middle"
    ):
        read_training_data(folder)


def test_a_file_that_lies_about_its_width(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", toy())
    with h5py.File(feature_path(folder, "v1"), "r+") as file:
        del file["features"]
        file["features"] = np.zeros((13, 4), np.float16)
    seal(feature_path(folder, "v1"))
    with pytest.raises(UserError, match=r"v1\.h5: features of width 4, float16; the others have 6, float16"):
        read_training_data(folder)
