"""One function opens every kind of source, with the reader that belongs to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.load import load_dataset
from configs.schema import Config, DataConfig
from features.dataset.build import build_index
from features.dataset.index import Dataset, Index
from features.dataset.tfrecord import TfrecordReader
from features.frames.source import ChangedSource, can_start_inside, open_source
from features.video.base import FrameReader
from features.video.images import FolderReader
from features.video.pyav import PyavReader
from tests.features.dataset.test_tfrecord import frame_pixels as frame_of_record
from tests.features.dataset.test_tfrecord import video as write_records
from tests.videos import VideoSpec, frame_number, painted_frame, write_video

SPEC = load_dataset("cholec80")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Index]:
    root = tmp_path_factory.mktemp("sources")
    write_video(root / "video01.mp4", VideoSpec(count=60))
    (root / "video02").mkdir()
    for number in range(0, 100, 25):
        Image.fromarray(painted_frame(number, 96, 64)).save(root / f"video02/video02_{number:06d}.png")
    write_records(root / "video03.tfrecord", frames=4)
    return root, build_index(root, SPEC, DataConfig(tfrecord_phase_order="tf-cholec80"))


@pytest.mark.parametrize(
    ("video_id", "reader_class", "wanted"),
    [("video01", PyavReader, [0, 7, 50]), ("video02", FolderReader, [0, 50]), ("video03", TfrecordReader, [1, 3])],
)
def test_every_kind_of_source_is_opened_by_one_function(
    sources: tuple[Path, Index], video_id: str, reader_class: type[FrameReader], wanted: list[int]
) -> None:
    root, index = sources
    entry = index.entry(video_id)
    with open_source(Config(), Dataset(index, root), entry) as reader:
        assert type(reader) is reader_class
        assert reader.spread(2) == [0, reader.frame_count - 1]
        frames = list(reader.read(wanted))
    if video_id == "video03":
        assert all(np.array_equal(rgb, frame_of_record(k)) for k, rgb in zip(wanted, frames, strict=True))
    else:
        assert [frame_number(rgb) for rgb in frames] == wanted


def test_reading_may_begin_inside_images_and_videos_with_many_key_frames(sources: tuple[Path, Index]) -> None:
    root, index = sources
    assert [can_start_inside(entry, root) for entry in index.videos] == [True, True, True]
    entry = index.entry("video01")
    assert not can_start_inside(entry.model_copy(update={"source": "missing.mp4"}), root)


def test_a_source_that_has_changed_is_not_opened(tmp_path: Path) -> None:
    write_video(tmp_path / "video01.mp4", VideoSpec(count=20))
    index = build_index(tmp_path, SPEC, DataConfig())
    write_video(tmp_path / "video01.mp4", VideoSpec(count=21))
    with pytest.raises(ChangedSource, match=r"video01\.mp4: has changed since it was indexed"):
        open_source(Config(), Dataset(index, tmp_path), index.videos[0])
