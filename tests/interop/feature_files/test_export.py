"""Feature folders written for other programs: names that they cannot read, frames without labels, and the way back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError
from configs.load import load_config
from engine.stopping import StopRequest, watch_signals
from features.dataset.index import Index, VideoEntry
from features.store import EncoderSpec, SourceIdentity, feature_path, read_features, write_features
from interop.feature_files.export import export_features
from interop.feature_files.importing import Request, import_features

SPEC = DataSetSpec(
    name="rounds",
    annotation_fps=2.0,
    phases=("Round 1.2", "Knot tying", "End"),
    tools=("Hook",),
    patterns={"video": r"(?P<id>.+)\.{video}", "frames": "(?P<id>.+)"},
)
ENCODER = EncoderSpec("tiny", "ab" * 32, {}, 2.0, "fp32", "float16", 3)
VIDEOS = {"op 1.a": [0, 0, 1, 2], "op2": [1, 1, 2], "op3": [2, 0]}


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    with watch_signals(leaving=False) as request:
        yield request


def folder(place: Path, videos: dict[str, list[int]]) -> Path:
    """A feature folder with these videos and phases; the last one is for testing."""
    entries = []
    for number, (name, phases) in enumerate(videos.items()):
        frames, fps = len(phases), 2.0
        source = SourceIdentity(name, "cd" * 32, 10, fps)
        phase, tools = np.array(phases, np.int8), np.ones((frames, 1), np.int8)
        path = feature_path(place, name)
        with write_features(path, ENCODER, source, np.arange(frames), phase, tools, {"phases": "[]"}) as writer:
            writer.append(features(frames, number), np.zeros((frames, 1), np.float32))
        split = "test" if name == list(videos)[-1] else "train"
        facts = {"size_bytes": 10, "modified_ns": 0, "sha256_ends": "cd" * 32, "fps": fps, "frame_count": frames}
        entries.append(VideoEntry(id=name, kind="video", source=f"{number}.mp4", split=split, **facts))
    Index(dataset=SPEC, videos=tuple(entries)).save(place / "index.json")
    return place


def features(frames: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-8, 8, (frames, 3)).astype(np.float32)


def test_names_and_the_way_back(tmp_path: Path, stop: StopRequest) -> None:
    out = tmp_path / "theirs"
    export_features(folder(tmp_path / "in", VIDEOS), out, "mstcn", unlabelled=None, replace=False, stop=stop)
    assert (out / "mapping.txt").read_text() == "0 Round_1_2\n1 Knot_tying\n2 End\n"
    assert (out / "splits/train.split1.bundle").read_text() == "op_1_a.txt\nop2.txt\n"
    assert (out / "groundTruth/op_1_a.txt").read_text() == "Round_1_2\nRound_1_2\nKnot_tying\nEnd\n"
    assert np.array_equal(np.load(out / "features/op_1_a.npy", allow_pickle=False), features(4, 0).T)
    back = import_features(out, tmp_path / "back", load_config("cholec80"), Request(), stop)
    assert sorted(back.done) == sorted(VIDEOS)
    for number, (name, phases) in enumerate(VIDEOS.items()):
        found = read_features(feature_path(tmp_path / "back", name))
        assert found.phase.tolist() == phases
        assert np.array_equal(np.asarray(found.features), features(len(phases), number))
    assert {one.id: one.split for one in Index.load(tmp_path / "back/index.json").videos} == {
        "op 1.a": "train",
        "op2": "train",
        "op3": "test",
    }


def test_archives_are_read_by_numpy_alone(tmp_path: Path, stop: StopRequest) -> None:
    out = tmp_path / "theirs"
    bare = {**VIDEOS, "op4": [-1, 2, -1]}
    export_features(folder(tmp_path / "in", bare), out, "npz", unlabelled=None, replace=False, stop=stop)
    with np.load(out / "op4.npz", allow_pickle=False) as found:
        assert (found["features"].shape, found["features"].dtype) == ((3, 3), np.float32)
        assert (found["phase"].tolist(), found["tools"].tolist()) == ([-1, 2, -1], [[1], [1], [1]])
        assert (float(found["fps"]), found["time_s"].tolist()) == (2.0, [0, 0.5, 1])
        assert found["phase_names"].tolist() == list(SPEC.phases)
    request = Request(index=tmp_path / "in/index.json", labels="files")
    import_features(out, tmp_path / "back", load_config("cholec80"), request, stop)
    found = read_features(feature_path(tmp_path / "back", "op4"))
    assert (found.phase.tolist(), found.tools.tolist()) == ([-1, 2, -1], [[1], [1], [1]])


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        export_features(*arguments, **{"unlabelled": None, "replace": False} | options)
    return str(caught.value)


def test_frames_without_labels(tmp_path: Path, stop: StopRequest) -> None:
    place = folder(tmp_path / "in", {"a": [0, -1, 2], "b": [-1, -1], "c": [1, 2]})
    assert "a: 1 of 3 frames have no phase label" in refusal(place, tmp_path / "x", "mstcn", stop=stop)
    assert not (tmp_path / "x/mapping.txt").exists()
    out = tmp_path / "theirs"
    export_features(place, out, "mstcn", unlabelled="no label", replace=False, stop=stop)
    assert (out / "mapping.txt").read_text().endswith("3 no_label\n")
    assert (out / "groundTruth/a.txt").read_text() == "Round_1_2\nno_label\nEnd\n"
    assert (out / "groundTruth/b.txt").read_text() == "no_label\n" * 2
    assert "is a phase of rounds" in refusal(place, tmp_path / "y", "mstcn", unlabelled="End", stop=stop)


def test_a_video_without_labels_is_in_no_bundle(
    tmp_path: Path, stop: StopRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    place = folder(tmp_path / "in", {"a": [0, 1], "b": [-1, -1], "c": [1, 2]})
    export_features(place, tmp_path / "out", "mstcn", unlabelled=None, replace=False, stop=stop)
    assert (tmp_path / "out/splits/train.split1.bundle").read_text() == "a.txt\n"
    assert not (tmp_path / "out/groundTruth/b.txt").exists()
    assert "in no bundle, since they have no phase labels: b" in capsys.readouterr().err


def test_what_is_refused(tmp_path: Path, stop: StopRequest) -> None:
    place = folder(tmp_path / "in", {"a.1": [0, 1], "a 1": [1, 2]})
    assert "'a 1': would be written as 'a_1'" in refusal(place, tmp_path / "x", "mstcn", stop=stop)
    export_features(place, tmp_path / "npz", "npz", unlabelled=None, replace=False, stop=stop)
    assert "exists and is not empty" in refusal(place, tmp_path / "npz", "npz", stop=stop)
    export_features(place, tmp_path / "npz", "npz", unlabelled=None, replace=True, stop=stop)
    (tmp_path / "empty").mkdir()
    assert "contains no index.json" in refusal(tmp_path / "empty", tmp_path / "y", "npz", stop=stop)
    for text in ('{"fps": NaN}', f'{{"fps": 1{"0" * 400}}}', '{"fps": 1, "videos": {"a": 3}}', '{"fps": true}'):
        (tmp_path / "npz/surgstage.json").write_text(text)
        with pytest.raises(UserError, match="needs a rate fps and names of videos"):
            import_features(tmp_path / "npz", tmp_path / "o", load_config("cholec80"), Request(), stop)
    damaged = bytearray((place / "a 1.h5").read_bytes())
    damaged[-1] ^= 1
    (place / "a 1.h5").write_bytes(damaged)
    assert "damaged" in refusal(place, tmp_path / "z", "npz", stop=stop)
    assert not (tmp_path / "z/surgstage.json").exists()
