"""The input of a training step: rows, order, augmentation, and that loader processes change nothing."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from configs.schema import AugmentConfig, Config
from engine.stopping import Stopped, StopRequest
from features.dataset.sampling import sampled_frames
from features.frames.preprocess import Geometry, crop_frames
from features.frames.source import cache_request, frame_cache, open_frames
from features.frames.training_cache import fill_cache
from stage1_cnn.data import (
    ClipDataset,
    FrameLoader,
    LabelledFrames,
    Request,
    choose_workers,
    labelled_frames,
    training_requests,
    validation_requests,
)
from tests.stage1_cnn.material import FRAMES, World, flip_bytes, phase_at, tools_at
from tests.videos import decode_everything

CPU = torch.device("cpu")


def frames_of(world: World, config: Config | None = None, with_phases: bool = False) -> LabelledFrames:
    config = config or world.config
    entries = world.index().by_split("train")
    fill_cache(config, world.dataset(), entries, StopRequest())
    return labelled_frames(config, world.dataset(), entries, with_phases)


def dataset_of(world: World, augment: AugmentConfig | None = None) -> ClipDataset:
    frames = frames_of(world)
    return ClipDataset({"train": frames, "val": frames}, 32, augment or AugmentConfig(), seed=0)


# ---------------------------------------------------------------------------------------------- rows and order


def test_rows_are_the_labelled_samples_with_their_pixels(world: World) -> None:
    frames = frames_of(world)
    assert (len(frames), frames.videos) == (26, ("video01", "video02"))
    pictures = decode_everything(world.root / "video02.mp4")
    for row in (13, 20, 25):
        number = int(sampled_frames(world.index().entry("video02"), 5)[frames.sample[row]])
        assert frames.name(row) == f"video02, frame {number}"
        assert tuple(frames.tools[row]) == tools_at(number)
        assert frames.phase[row] == phase_at(number)
        cached = frames.caches[frames.video[row]][int(frames.sample[row])]
        np.testing.assert_array_equal(cached, Geometry(40).resize_frame(pictures[number]))


def test_frames_between_tool_rows(own_world: World) -> None:
    config = own_world.set(data={"fps": 25})
    path = own_world.root / "video02-phase.txt"
    path.unlink()
    masked = frames_of(own_world, config)
    assert len(masked) == 26
    with_phases = frames_of(own_world, config, with_phases=True)
    assert len(with_phases) == FRAMES + 13  # every frame of the first video has a phase
    assert (with_phases.tools[:FRAMES] < 0).all(axis=1).sum() == FRAMES - 13
    held = frames_of(own_world, own_world.set(data={"fps": 25, "tools_between_rows": "hold"}))
    assert len(held) == 2 * FRAMES


@given(
    frames=st.integers(1, 200), size=st.integers(1, 17), subset=st.none() | st.integers(1, 250), seed=st.integers(0, 9)
)
@settings(deadline=None, max_examples=60)
def test_an_epoch_is_a_permutation_cut_into_batches(frames: int, size: int, subset: int | None, seed: int) -> None:
    requests = training_requests(seed, 3, frames, size, subset)
    rows = [row for request in requests for row in request.first]
    wanted = min(subset or frames, frames)
    alone = size > 1 and wanted > size and wanted % size == 1
    assert len(rows) == len(set(rows)) == wanted - alone
    assert set(rows) <= set(range(frames))
    assert all(len(request.first) == size for request in requests[:-1])
    assert {(request.split, request.epoch) for request in requests} == {("train", 3)}
    assert requests == training_requests(seed, 3, frames, size, subset)


def test_epochs_differ_in_order_and_seeds_too() -> None:
    orders = {training_requests(seed, epoch, 50, 50, None)[0].first for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_validation_takes_every_row_in_order() -> None:
    requests = validation_requests(10, 4)
    assert [request.first for request in requests] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    assert {request.epoch for request in requests} == {None}


@given(rows=st.integers(1, 40), count=st.integers(1, 9))
@settings(deadline=None, max_examples=60)
def test_processes_share_the_rows_of_a_batch(rows: int, count: int) -> None:
    request = Request.of_frames("train", 0, tuple(range(rows)))
    shares = [request.share(rank, count, smallest=2) for rank in range(count)]
    assert sorted(row for share in shares if share.counts for row in share.first) == list(range(rows))
    assert all(share.first == shares[0].first for share in shares if not share.counts)
    assert rows == 1 or min(len(share.first) for share in shares) > 1 or rows >= 2 * count - 1


def test_rows_that_do_not_count_have_no_labels(world: World) -> None:
    dataset = dataset_of(world)
    batch = dataset[Request.of_frames("train", 0, (0, 1))._replace(counts=False)]
    assert torch.equal(batch.images, dataset[Request.of_frames("train", 0, (0, 1))].images)
    assert (batch.phase == -1).all()
    assert (batch.tools == -1).all()


# ---------------------------------------------------------------------------------------------- batches


def test_batches_hold_what_they_say(world: World) -> None:
    dataset = dataset_of(world)
    batch = dataset[Request.of_frames("val", None, (3, 20))]
    assert batch.images.shape == (2, 1, 32, 32, 3)  # a frame is a clip of length 1
    assert batch.images.dtype == torch.uint8
    frames = dataset.splits["val"]
    for place, row in enumerate((3, 20)):
        picture = frames.caches[frames.video[row]][int(frames.sample[row])]
        np.testing.assert_array_equal(batch.images[place, 0], crop_frames(picture[None], 32)[0, 0])
    assert batch.tools[:, 0].tolist() == frames.tools[[3, 20]].tolist()
    assert batch.phase[:, 0].tolist() == frames.phase[[3, 20]].tolist()
    assert batch.first.tolist() == [3, 20]
    assert frames.start_of(batch)() == f"first frame: {frames.name(3)}"


@pytest.mark.parametrize("more", [{}, {"scale": (0.3, 1.0), "aspect": 1.3, "hue": 0.1}])
def test_augmentation_depends_on_the_frame_and_epoch_only(world: World, more: dict[str, Any]) -> None:
    """A frame looks the same whichever batch it is in, and different in another epoch."""
    dataset = dataset_of(world, AugmentConfig(brightness=0.2, contrast=0.2, saturation=0.2, **more))
    together = dataset[Request.of_frames("train", 1, tuple(range(10)))]
    alone = [dataset[Request.of_frames("train", 1, (row,))] for row in range(10)]
    other = dataset[Request.of_frames("train", 2, tuple(range(10)))]
    for part in ("images", "flip", "colour"):
        assert torch.equal(getattr(together, part), torch.cat([getattr(batch, part) for batch in alone]))
        assert not torch.equal(getattr(together, part), getattr(other, part))
    evaluated = dataset[Request.of_frames("val", None, (4,))]
    assert (evaluated.flip.any(), len(evaluated.colour)) == (False, 0)
    assert len(dataset_of(world)[Request.of_frames("train", 1, (0, 1))].colour) == 0  # with strength 0, nothing is sent
    assert torch.equal(
        dataset[Request.of_frames("val", None, (4,))].images, dataset[Request.of_frames("val", None, (4,))].images
    )


@pytest.mark.slow
def test_loader_processes_change_nothing(world: World) -> None:
    dataset = dataset_of(world)
    expected = {}
    for workers in (0, 2):
        before = torch.get_rng_state()
        with FrameLoader(dataset, workers, CPU, StopRequest()) as loader:
            for epoch in range(2):
                requests = training_requests(0, epoch, 26, 4, None)
                batches = list(loader.batches(requests[epoch:]))
                if workers == 0:
                    expected[epoch] = batches
                    continue
                assert len(batches) == len(expected[epoch])
                for batch, other in zip(batches, expected[epoch], strict=True):
                    assert all(
                        torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(batch, other, strict=True)
                    )
        assert torch.equal(torch.get_rng_state(), before)


class Meeting:
    """Waits, when a process unpickles it, until two have begun to."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.complete = folder, False

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.folder = state["folder"]
        (self.folder / str(os.getpid())).touch()
        until = time.monotonic() + 60
        while not (complete := len(list(self.folder.iterdir())) == 2) and time.monotonic() < until:
            time.sleep(0.02)
        self.complete = complete


class Meets(torch.utils.data.Dataset):
    """Larger than what a pipe holds."""

    def __init__(self, folder: Path) -> None:
        self.meeting, self.ballast = Meeting(folder), np.zeros(1 << 20, np.uint8)

    def __getitem__(self, request: int) -> bool:
        return self.meeting.complete


@pytest.mark.slow
def test_loader_processes_start_at_the_same_time(tmp_path: Path) -> None:
    """None waits until another has received the data set, which it does only after importing torch."""
    with FrameLoader(Meets(tmp_path), 2, CPU, StopRequest()) as loader:
        assert list(loader.batches([0, 1])) == [True, True]  # type: ignore[list-item]


@pytest.mark.slow
def test_a_damaged_frame_is_named_from_a_loader_process(world: World) -> None:
    dataset = dataset_of(world)
    path = dataset.splits["train"].caches[0].path
    flip_bytes(path, 0.5, path.stat().st_size // 4)
    for workers in (0, 1):
        with FrameLoader(dataset, workers, CPU, StopRequest()) as loader:
            with pytest.raises(UserError, match=r"video01.h5: damaged or missing") as error:
                list(loader.batches(training_requests(0, 0, 26, 4, None)))
            assert "\n" not in str(error.value)
        assert not multiprocessing.active_children()


@pytest.mark.slow
def test_closing_ends_processes_while_batches_are_half_read(world: World) -> None:
    with FrameLoader(dataset_of(world), 1, CPU, StopRequest()) as loader:
        batches = loader.batches(training_requests(0, 0, 26, 4, None))
        next(batches)
        assert multiprocessing.active_children()
    assert not multiprocessing.active_children()
    assert list(batches) == []


def test_dataset_travels_to_a_process_without_open_files(world: World) -> None:
    dataset = dataset_of(world)
    expected = dataset[Request.of_frames("val", None, (0,))]
    twin = pickle.loads(pickle.dumps(dataset))  # noqa: S301 - made a line above
    assert torch.equal(twin[Request.of_frames("val", None, (0,))].images, expected.images)


def test_number_of_loader_processes() -> None:
    assert choose_workers(3, CPU) == 3
    assert choose_workers(-1, CPU) == 0


@pytest.mark.parametrize(("cores", "loaders"), [(1, 1), (2, 1), (8, 7), (12, 11), (17, 16), (128, 16)])
def test_a_gpu_gets_a_loader_process_for_every_core_but_one(
    monkeypatch: pytest.MonkeyPatch, cores: int, loaders: int
) -> None:
    monkeypatch.setattr("stage1_cnn.data.available_cores", lambda: cores)
    assert choose_workers(-1, torch.device("cuda")) == loaders


# ---------------------------------------------------------------------------------------------- cache


def test_the_cache_is_filled_once_and_whole(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    index = world.index()
    fill_cache(world.config, world.dataset(index), index.videos, StopRequest())
    monkeypatch.setattr("features.frames.source.open_video", None)  # whoever decodes calls it
    fill_cache(world.config, world.dataset(index), index.videos, StopRequest())
    for entry in index.videos:
        frame_index = sampled_frames(entry, world.config.data.fps)
        request = cache_request(world.config, world.dataset(index), entry, frame_index)
        assert frame_cache(world.config).problem(request, deep=True) is None
        with open_frames(world.config, world.dataset(index), entry, frame_index) as pictures:
            assert len(list(pictures.frames)) == 13
            assert pictures.provenance["frames_from"] == "cache"


def test_videos_that_cannot_be_cached_are_named_and_the_others_kept(own_world: World) -> None:
    index = own_world.index()
    for name in ("video01", "video03"):
        (own_world.root / f"{name}.mp4").unlink()
    failed = fill_cache(own_world.config, own_world.dataset(index), index.videos, StopRequest())
    assert [(video_id, f"{video_id}.mp4: " in reason) for video_id, reason in failed] == [
        ("video01", True),
        ("video03", True),
    ]
    kept = sorted(path.name for path in own_world.config.cache.dir.rglob("*") if path.is_file())
    assert kept == ["video02.h5", "video04.h5"]


def test_a_changed_source_is_not_cached_under_the_old_name(own_world: World) -> None:
    index = own_world.index()
    path = Path(own_world.root / "video01.mp4")
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(UserError, match=r"video01.mp4: has changed since it was indexed; run `index --force`"):
        fill_cache(own_world.config, own_world.dataset(index), index.videos[:1], StopRequest())


@pytest.mark.parametrize(
    "error", [EOFError(), ConnectionResetError("reset"), RuntimeError("DataLoader worker (pid 7) is")]
)
def test_a_dead_loader_process_is_reported_in_every_way_it_can_show(world: World, error: Exception) -> None:
    stop = StopRequest()
    with (
        pytest.raises(UserError, match="a process that loads frames died"),
        FrameLoader(dataset_of(world), 0, CPU, stop),
    ):
        raise error


def test_a_signal_to_the_group_that_ends_a_loader_process_is_a_stop(world: World) -> None:
    """A process that has only just started still dies of SIGTERM; this must not be mistaken for a lack of memory."""
    stop = StopRequest()
    with pytest.raises(Stopped, match="SIGTERM"), FrameLoader(dataset_of(world), 0, CPU, stop):
        stop.number = signal.SIGTERM
        raise RuntimeError("DataLoader worker (pid(s) 15843) exited unexpectedly")


def test_closing_a_loader_with_a_dead_process_prints_nothing(world: World) -> None:
    """torch raises again whenever another process ends; in a destructor that would be a traceback."""

    class Ending:
        ended = 0

        def _shutdown_workers(self) -> None:
            self.ended += 1
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    ending = Ending()
    with FrameLoader(dataset_of(world), 0, CPU, StopRequest()) as loader:
        loader._loader._iterator = ending
    assert ending.ended == 1
