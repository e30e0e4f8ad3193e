from __future__ import annotations

import os
import pickle
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import stage1_cnn.extract as module
from configs.errors import UserError
from configs.schema import Config, ExtractConfig
from engine.files import NoRoomError, remove_stale_temporaries, sha256_ends
from engine.stopping import Stopped, StopRequest
from features.dataset.index import Dataset, Index
from features.store import read_features
from stage1_cnn.encoders.encoder import encoded_at_once
from stage1_cnn.extract import ExtractReport, extract
from stage1_cnn.segments import Assembly, VideoJob, split_among
from stage1_cnn.shared_decode import SharedJob
from tests.stage1_cnn.material import FRAMES, SPEC, StopAfter, World, make_world, paint, write_labels
from tests.videos import VideoSpec, damage_packet, write_video

SPLIT = {"encoder": "initial", "workers": 2, "segment_frames": 1}


@pytest.fixture
def long_world(tmp_path: Path) -> World:
    """One video of six groups of pictures, with B-frames."""
    root = tmp_path / "data"
    root.mkdir()
    spec = VideoSpec(count=FRAMES, width_px=160, height_px=120, paint=paint, codec_options={"crf": "12"})
    write_video(root / "video01.mp4", spec)
    write_labels(root, 1)
    base = make_world(tmp_path, root)
    return World(tmp_path, root, base.set(data={"split": {"rule": "1/0/0"}}, extract={"encoder": "initial"}))


def dump(world: World, config: Config | None = None, *, index: Index | None = None, stop=None) -> ExtractReport:
    stop = StopRequest() if stop is None else stop
    return extract(config or world.config, None, world.dataset(index), stop=stop)


def content(report: ExtractReport) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in sorted(report.folder.glob("*.h5"))}
    shutil.rmtree(report.folder)
    return found


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------------------------------- planning


@given(
    st.lists(st.integers(0, 500), min_size=1, max_size=8), st.integers(1, 6), st.integers(1, 40), st.integers(1, 100)
)
@settings(deadline=None, max_examples=100)
def test_pieces_cover_every_sample_once_and_start_at_batches(
    lengths: list[int], processes: int, batch: int, least: int
) -> None:
    jobs = [VideoJob(f"v{number}", frames) for number, frames in enumerate(lengths)]
    pieces = split_among(jobs, processes, batch, least, lambda job: job.video_id != "v0")
    for job in jobs:
        own = sorted((piece for piece in pieces if piece.video_id == job.video_id), key=lambda piece: piece.first)
        covered = [sample for piece in own for sample in range(job.frames)[piece.samples]]
        assert covered == list(range(job.frames))
        assert all(piece.first % batch == 0 for piece in own)
        assert len(own) == 1 or job.video_id != "v0"
        assert len(own) == 1 or min(piece.frames for piece in own) >= max(least, batch)


def test_only_what_helps_is_split() -> None:
    even = [VideoJob(f"v{number}", 1000) for number in range(4)]
    assert len(split_among(even, 2, 32, 128, lambda job: True)) == 4
    assert len(split_among(even[:3], 2, 32, 128, lambda job: True)) == 4
    assert len(split_among(even[:1], 16, 32, 128, lambda job: True)) == 7  # none under 128 samples
    assert split_among(even, 1, 32, 128, lambda job: True) == even
    assert len(split_among([VideoJob("v0", 256)], 2, 100, 128, lambda job: True)) == 1  # 200 and 56


# ---------------------------------------------------------------------------------------------- the same bytes


@pytest.mark.slow
def test_workers_segments_and_decoding_ahead_give_the_same_bytes(long_world: World) -> None:
    expected = content(dump(long_world))
    for changes in (
        {"encoder": "initial", "workers": 1, "segments": False},
        SPLIT,
        {**SPLIT, "segments": False},
        {"encoder": "initial", "workers": 1, "segments": True, "decode_ahead": "on"},
        {**SPLIT, "decode_ahead": "on"},
    ):
        report = dump(long_world, long_world.set(extract=changes))
        assert report.done == ["video01"]
        assert names(report.folder) == ["encoder.json", "index.json", "video01.h5"]
        assert content(report) == expected, changes


# ---------------------------------------------------------------------------------------------- failures


def parts_of(world: World, folder: Path, parts: int = 3) -> tuple[Assembly, module.EncoderTask]:
    """An assembly of the world's video in parts, and the encoder that computes them."""
    folder.mkdir(parents=True, exist_ok=True)
    config, index = world.config, world.index()
    encoder = module.load_encoder(config, None, SPEC.tools)
    task = module.EncoderTask(config, None, world.dataset(index), folder, encoder.spec, False, encoder)
    pieces = split_among([VideoJob("video01", 13)], parts, 4, 1, lambda job: True)
    return Assembly(folder, pieces, task.assemble), task


def do(task: module.EncoderTask, piece: VideoJob) -> str | None:
    """Do one part here; returns why it failed."""
    return module.ExtractTask([task], module.Seconds(1, 1))(SharedJob(0, ((0, piece),)), lambda frames: None)


def test_another_process_gets_the_folded_net_and_computes_the_same(long_world: World, tmp_path: Path) -> None:
    _, task = parts_of(long_world, tmp_path / "parts")
    assert task.encoder is not None
    crops = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    expected = task.encoder(crops)[0]
    sent = pickle.loads(pickle.dumps(task))  # noqa: S301
    assert sent.encoder is not None  # nothing is loaded, hashed or folded again
    np.testing.assert_array_equal(sent.encoder(crops)[0], expected)


def test_a_net_that_cannot_be_sent_is_loaded_there(long_world: World, tmp_path: Path) -> None:
    _, task = parts_of(long_world, tmp_path / "parts")
    assert task.encoder is not None
    task.encoder._net.own = lambda: None  # type: ignore[assignment]
    sent = pickle.loads(pickle.dumps(task))  # noqa: S301
    assert sent.encoder is None
    assert sent.loaded_encoder().spec == task.spec


def test_frames_at_a_time_follow_the_device_unless_they_are_set() -> None:
    assert encoded_at_once(Config(device="cpu")) == 8
    assert encoded_at_once(Config(device="cpu", extract=ExtractConfig(batch_frames=5))) == 5


def test_parts_make_the_file_that_one_process_makes(long_world: World, tmp_path: Path) -> None:
    expected = content(dump(long_world))
    folder = tmp_path / "parts"
    assembly, task = parts_of(long_world, folder)
    with assembly:
        assert len(assembly.pieces) == 3
        assert len(names(folder)) == 3
        outcomes = []
        for piece in reversed(assembly.pieces):
            assert do(task, piece) is None
            outcomes.append(assembly.ended(piece, None))
        assert outcomes[:2] == [None, None]
        assert outcomes[2] == (VideoJob("video01", 13), None)
    assert names(folder) == ["video01.h5"]
    assert (folder / "video01.h5").read_bytes() == expected["video01.h5"]


def test_a_part_that_failed_ends_the_later_ones_and_names_the_first_reason(long_world: World, tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    assembly, task = parts_of(long_world, folder)
    with assembly:
        first, second, third = sorted(assembly.pieces, key=lambda piece: piece.first)
        assert assembly.ended(second, "second") is None
        assert str(do(task, third)).startswith("abandoned: an earlier part")
        assert assembly.ended(third, "given up") is None
        assert do(task, first) is None
        assert assembly.ended(first, None) == (VideoJob("video01", 13), "second")
        assert names(folder) == []


def test_an_assembly_left_early_leaves_nothing(long_world: World, tmp_path: Path) -> None:
    assembly, task = parts_of(long_world, tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt), assembly:
        assert do(task, assembly.pieces[0]) is None
        assert remove_stale_temporaries(tmp_path / "parts") == 0
        raise KeyboardInterrupt
    assert names(tmp_path / "parts") == []


def test_no_room_for_the_video_that_parts_make_ends_the_work(long_world: World, tmp_path: Path) -> None:
    assembly, task = parts_of(long_world, tmp_path / "parts")

    def finish(video: VideoJob, parts: object) -> None:
        raise NoRoomError("video01.h5: no room left")

    assembly.finish = finish
    with pytest.raises(NoRoomError), assembly:
        for piece in assembly.pieces:
            assembly.ended(piece, do(task, piece))
    assert names(tmp_path / "parts") == []


@pytest.mark.slow
@pytest.mark.parametrize("ahead", ["off", "on"])
def test_no_room_for_a_part_ends_the_work(long_world: World, monkeypatch: pytest.MonkeyPatch, ahead: str) -> None:
    monkeypatch.setattr(module, "EncoderTask", Full)
    with pytest.raises(NoRoomError):
        dump(long_world, long_world.set(extract={**SPLIT, "decode_ahead": ahead}))
    (folder,) = long_world.config.extract.store.iterdir()
    assert names(folder) == ["encoder.json", "index.json"]


@pytest.mark.slow
@pytest.mark.parametrize("ahead", ["off", "on"])
def test_damage_in_the_middle_fails_the_video_with_the_same_words(long_world: World, ahead: str) -> None:
    index = long_world.index()
    path = long_world.root / "video01.mp4"
    damage_packet(path, 38)
    os.utime(path, ns=(0, 0))
    entry = index.videos[0].model_copy(update={"sha256_ends": sha256_ends(path)})
    index = index.model_copy(update={"videos": (entry,)})
    with pytest.raises(UserError, match="damaged, frame") as whole:
        dump(long_world, index=index)
    config = long_world.set(extract={**SPLIT, "decode_ahead": ahead})
    with pytest.raises(UserError) as in_parts:
        dump(long_world, config, index=index)
    assert str(in_parts.value) == str(whole.value)
    (folder,) = config.extract.store.iterdir()
    assert names(folder) == ["encoder.json", "index.json"]


@pytest.mark.slow
@pytest.mark.parametrize(("ahead", "asked"), [("off", 0), ("on", 1)])
def test_stopped_among_parts_nothing_is_left(long_world: World, ahead: str, asked: int) -> None:
    """On a busy machine all parts may have ended before the parent polls for the first time; it must still stop."""
    config = long_world.set(extract={**SPLIT, "decode_ahead": ahead})
    with pytest.raises(Stopped):
        dump(long_world, config, stop=StopAfter(asked))
    (folder,) = config.extract.store.iterdir()
    assert names(folder) == ["encoder.json", "index.json"]
    assert dump(long_world, config).done == ["video01"]


class Full(module.EncoderTask):
    """Raises because the disk has filled up since the start."""

    def require_room(self, job: VideoJob) -> None:
        raise NoRoomError(f"{self.folder}: no room left")


class KilledOnce(module.ExtractTask):
    """Dies in the second part, the first time."""

    def __call__(self, job: SharedJob, advance) -> str | None:
        mark = self.encoders[0].folder.parent / "killed"
        if job.video.first and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(job, advance)


@pytest.mark.slow
def test_a_killed_process_costs_its_own_part(long_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = content(dump(long_world))
    monkeypatch.setattr(module, "ExtractTask", KilledOnce)
    report = dump(long_world, long_world.set(extract=SPLIT))
    assert (report.folder.parent / "killed").exists()
    assert report.done == ["video01"]
    assert content(report) == expected


@pytest.mark.slow
def test_real_clips_in_parts_give_the_same_features(shared_data: Path, tmp_path: Path) -> None:
    from configs.load import load_dataset
    from features.dataset.build import build_index

    base = make_world(tmp_path, shared_data / "clips").config
    split = base.data.split.model_copy(update={"rule": "5/0/0"})
    data = base.data.model_copy(update={"root": shared_data / "clips", "fps": 5.0, "split": split})
    preprocess = base.preprocess.model_copy(update={"resize_px": 80, "crop_px": 64})
    index = build_index(shared_data / "clips", load_dataset("cholec80"), data)
    index = index.model_copy(update={"videos": index.videos[:1]})
    found = []
    for changes in ({"encoder": "initial", "workers": 1}, {**SPLIT, "batch_frames": 4}):
        chosen = base.extract.model_copy(update=changes)
        config = base.model_copy(update={"data": data, "preprocess": preprocess, "extract": chosen})
        report = extract(config, None, Dataset(index, shared_data / "clips"), stop=StopRequest())
        found.append(read_features(report.folder / "video05.h5").features)
        shutil.rmtree(report.folder)
    np.testing.assert_array_equal(found[0], found[1])
