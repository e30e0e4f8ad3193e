"""Clips of frames: order kept, one random draw per clip, never two videos in one clip."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import AugmentConfig, SequenceConfig
from engine.stopping import StopRequest
from features.frames.preprocess import augment_generator, draw_change
from features.frames.training_cache import fill_cache
from stage1_cnn.data import ClipDataset, labelled_frames
from stage2_temporal.data import Span
from stage2_temporal.joint.data import clip_requests, spans_of
from tests.stage1_cnn.material import World, make_world, truncate, write_dataset


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    base = tmp_path_factory.mktemp("joint")
    return make_world(base, write_dataset(base / "data"))


def dataset_of(world: World) -> ClipDataset:
    index = world.index()
    fill_cache(world.config, world.dataset(index), index.videos, StopRequest())
    frames = labelled_frames(world.config, world.dataset(index), index.videos, True, every_frame=True)
    return ClipDataset({"train": frames}, 32, AugmentConfig(brightness=0.3, scale=(0.4, 1.0), hue=0.1), seed=3)


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    frames=st.integers(1, 12),
    mode=st.sampled_from(["clips", "chunked"]),
    epoch=st.integers(0, 3),
)
@settings(deadline=None)
def test_clips_keep_order_and_never_span_two_videos(lengths: list[int], frames: int, mode: str, epoch: int) -> None:
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    spans = [Span(int(start), length) for start, length in zip(starts, lengths, strict=True)]
    sequence = SequenceConfig(mode=mode, frames=frames, batch=3)
    seen: list[int] = []
    for request in clip_requests(spans, sequence, 0, epoch, None):
        for first, length, draw in zip(request.first, request.lengths, request.draws, strict=True):
            video = next(span for span in spans if span.first <= first < span.first + span.frames)
            assert first + length <= video.first + video.frames
            assert draw == (first if mode == "clips" else video.first)
            seen += range(first, first + length) if mode == "chunked" else [first]
    if mode == "chunked":
        assert sorted(seen) == list(range(sum(lengths)))
    else:
        wanted = [span.first + n for span in spans for n in range(max(1, span.frames - frames + 1))]
        assert sorted(seen) == wanted
    assert clip_requests(spans, sequence, 0, epoch, None) == clip_requests(spans, sequence, 0, epoch, None)


@pytest.mark.parametrize(("subset", "batches"), [(7, [3, 3, 1]), (6, [3, 3]), (2, [2]), (1, [1]), (90, [3] * 15 + [2])])
def test_a_subset_of_clips_has_as_many_as_it_says(subset: int, batches: list[int]) -> None:
    sequence = SequenceConfig(mode="clips", frames=4, batch=3)
    some = clip_requests([Span(0, 50)], sequence, 0, 0, subset)
    assert [len(request.first) for request in some] == batches
    assert [len(request.lengths) for request in some] == batches
    every = [first for request in clip_requests([Span(0, 50)], sequence, 0, 0, None) for first in request.first]
    assert [first for request in some for first in request.first] == every[:subset]
    assert some != clip_requests([Span(0, 50)], sequence, 0, 1, subset)


def test_a_batch_holds_its_clips_with_one_draw_each(world: World) -> None:
    dataset = dataset_of(world)
    spans = spans_of(dataset.splits["train"])
    assert [span.frames for span in spans] == [13, 13, 13, 13]
    request = clip_requests(spans, SequenceConfig(mode="chunked", frames=9, batch=2), 3, 1, None)[1]
    batch = dataset[request]
    assert not isinstance(batch, Exception)
    assert batch.images.shape == (len(request.first), 4, 32, 32, 3)
    assert not batch.fresh
    for n, first in enumerate(request.first):
        cache = dataset.splits["train"].caches[dataset.splits["train"].video[first]]
        cached = np.stack([cache[int(dataset.splits["train"].sample[first + k])] for k in range(4)])
        draw = augment_generator(3, 1, request.draws[n])
        wanted = draw_change(draw, dataset.augment, 40, 32)
        assert np.array_equal(batch.images[n].numpy(), wanted.crop(cached, 32))
        assert bool(batch.flip[n]) == wanted.flip
        assert np.array_equal(batch.colour[n].numpy(), wanted.colour)
        assert batch.phase[n].tolist() == dataset.splits["train"].phase[first : first + 4].tolist()
        assert batch.tools[n].tolist() == dataset.splits["train"].tools[first : first + 4].tolist()


def test_padding_is_black_and_has_no_labels(world: World) -> None:
    dataset = dataset_of(world)
    requests = clip_requests(
        spans_of(dataset.splits["train"]), SequenceConfig(mode="clips", frames=5, batch=2), 0, 0, None
    )
    request = requests[0]._replace(lengths=(5, 2))
    batch = dataset[request]
    assert not isinstance(batch, Exception)
    assert torch.all(batch.images[1, 2:] == 0)
    assert batch.phase[1, 2:].tolist() == [-1] * 3
    assert torch.all(batch.tools[1, 2:] == -1)


def test_a_damaged_cache_file_is_named(tmp_path: Path) -> None:
    world = make_world(tmp_path, write_dataset(tmp_path / "data"))
    dataset = dataset_of(world)
    truncate(dataset.splits["train"].caches[1].path, 0.3)
    first = int(np.flatnonzero(dataset.splits["train"].video == 1)[0])
    request = clip_requests([Span(first, 4)], SequenceConfig(mode="clips", frames=2, batch=1), 0, 0, None)[0]
    found = dataset[request]
    assert isinstance(found, Exception)
    assert "video02" in str(found)
