"""A running video is recognised as the whole one: by every causal head, in both modes, on real and simulated videos."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import yaml

from configs.errors import UserError
from configs.load import load_dataset
from engine.checkpoints import load_checkpoint, save_checkpoint
from evaluation.metrics.tools import sigmoid
from features.dataset.build import dataset_of_source
from features.dataset.sampling import frame_times_s, sampled_frames
from features.frames.source import source_frames
from features.simulation.write import simulate
from live.nets import Nets
from live.recogniser import PhaseRecogniser, Recognition
from live.sampling import Counts
from stage2_temporal.data import Span
from stage2_temporal.decoding.tools import ToolSmoother
from stage2_temporal.heads.base import build_head
from stage2_temporal.model import PhaseModel
from stage2_temporal.predict import predict_spans
from tests.live.material import SPEC, joint, settings, two_stage, with_memory
from tests.stage2_temporal.heads.test_heads import CAUSAL

HEADS = (*CAUSAL, "lstm on clips", "tcn on clips")
CLIPS = ("video05", "video15", "video18", "video25", "video47")


@dataclass
class Offline:
    """A video as offline commands see it: sampled frames, their times, and the resized frames (T, R, R, 3)."""

    numbers: list[int]
    times_s: list[float]
    frames: torch.Tensor


def offline(path: Path, fps: float = 1.0) -> Offline:
    config = settings(path.parent, fps)
    dataset = dataset_of_source(path, SPEC, config.data)
    [entry] = dataset.index.videos
    numbers = sampled_frames(entry, fps)
    with source_frames(config, dataset, entry, numbers) as found:
        frames = torch.from_numpy(np.stack(list(found.frames)))
    return Offline(numbers.tolist(), frame_times_s(entry, numbers).tolist(), frames)


def pushed(recogniser: PhaseRecogniser, path: Path, every: int, until_s: float) -> list[Recognition]:
    """What is recognised when every n-th frame of the first seconds of a video is pushed, at its time stamp."""
    found = []
    with av.open(str(path)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if float(frame.time) >= until_s:
                break
            if number % every == 0:
                found += recogniser.push(frame.to_ndarray(format="rgb24"), float(frame.time), number)
    return found


def stepped(nets: Nets, video: Offline) -> list[Recognition]:
    """What is recognised in the sampled frames, one by one."""
    recogniser = PhaseRecogniser(nets)
    one_by_one = zip(video.frames.split(1), video.numbers, video.times_s, strict=True)
    found = [one for frame, number, time_s in one_by_one for one in recogniser.recognise(frame, [number], [time_s])]
    return found + recogniser.finish()


def with_head(nets: Nets, name: str) -> Nets:
    """The nets with another head, which has random weights; with `clips` in the name, it sees clips of 5 frames."""
    torch.manual_seed(5)
    standardise, config = nets.phase.standardise, CAUSAL[name.removesuffix(" on clips")]
    phase = PhaseModel(standardise, build_head(config, len(standardise.mean), *nets.phase.head.widths)).eval()
    return replace(nets, phase=phase, **({"inference": "clip", "clip_frames": 5} if "clips" in name else {}))


def require_same(nets: Nets, found: list[Recognition], video: Offline) -> None:
    """The recognitions are those of stage two on the whole video, and of the encoder on batches."""
    embedding, logits = nets.encode(video.frames)
    spans = [Span(0, len(embedding))]
    [whole] = predict_spans(nets.phase, embedding, spans, nets.inference, nets.clip_frames)
    assert [one.frame for one in found] == video.numbers
    np.testing.assert_allclose([one.time_s for one in found], video.times_s, atol=1e-9)
    parts = nets.by_track(whole.numpy())
    np.testing.assert_allclose([one.probabilities for one in found], parts[0], atol=1e-4)
    assert [one.phase for one in found] == parts[0].argmax(axis=1).tolist()
    for track, part in zip(nets.tracks, parts[1:], strict=True):
        np.testing.assert_allclose([one.tracks[track].probabilities for one in found], part, atol=1e-4)
    assert logits is not None
    np.testing.assert_allclose([one.tools for one in found], sigmoid(logits), atol=1e-4)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SIMULATED operation such as those of the demo."""
    folder = tmp_path_factory.mktemp("simulated")
    spec = load_dataset("simulated")
    simulate(folder, videos=1, seed=3, spec=spec, fps=2, width_px=48, height_px=48, speed_up=60.0)
    return next((folder / "videos").glob("*.mp4"))


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Nets]:
    """Nets of two stages and a joint net."""
    folder = tmp_path_factory.mktemp("nets")
    return {"two stages": with_memory(two_stage(folder), {}), "joint": with_memory(joint(folder), {})}


@pytest.fixture(scope="module")
def stored(shared_data: Path, simulated: Path) -> dict[str, Offline]:
    """The real clips and the simulated operation."""
    clips = {name: offline(shared_data / "clips/videos" / f"{name}.mp4") for name in CLIPS}
    return {**clips, "simulated": offline(simulated)}


@pytest.mark.parametrize(("mode", "name"), [*(("two stages", name) for name in CLIPS), ("joint", "video15")])
def test_pushed_frames_of_real_clips_are_recognised_as_the_whole_clip(
    mode: str, name: str, nets: dict[str, Nets], stored: dict[str, Offline], shared_data: Path
) -> None:
    recogniser, whole = PhaseRecogniser(nets[mode]), name == "video05"
    every, seconds = (1, 32) if whole else (5, 12)
    found = pushed(recogniser, shared_data / "clips/videos" / f"{name}.mp4", every, seconds)
    video = stored[name]
    require_same(nets[mode], found, Offline(video.numbers[:seconds], video.times_s[:seconds], video.frames[:seconds]))
    assert recogniser.sampler.counts == Counts(frames=seconds * 25 // every, sampled=seconds)


@pytest.mark.parametrize("mode", ["two stages", "joint"])
@pytest.mark.parametrize("name", HEADS)
def test_every_causal_head_recognises_single_frames_as_whole_videos(
    mode: str, name: str, nets: dict[str, Nets], stored: dict[str, Offline]
) -> None:
    of_head = with_head(nets[mode], name)
    for video in stored.values():
        require_same(of_head, stepped(of_head, video), video)


# ---------------------------------------------------------------------------------------------- decoding, tracks

DESCRIBED = {
    **SPEC.model_dump(mode="json", exclude_defaults=True),
    "tracks": {"steps": {"classes": ["enter", "cut", "leave"]}},
    "labels": {"steps": {"files": "s(?P<id>.)", "form": "rows", "columns": {"label": "step"}}},
}
SETTINGS = {
    "none": {},
    "filter": {"mode": "filter", "tool_smoothing_s": 3.0},
    "lag": {"mode": "causal", "lag_s": 4.0},
    "offline": {"mode": "offline"},
}


@pytest.fixture(scope="module")
def decoded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Nets]:
    """Nets for two label tracks, with each kind of decoding."""
    folder, known = tmp_path_factory.mktemp("tracks"), dict[bytes, Any]()
    (folder / "steps.yaml").write_text(yaml.safe_dump(DESCRIBED))
    spec, made = load_dataset(str(folder / "steps.yaml")), {}
    for name, decoding in SETTINGS.items():
        blocks = {"temporal": {"decoding": decoding}, "data": {"dataset": str(folder / "steps.yaml"), "fps": 1.0}}
        made[name] = with_memory(two_stage(folder / name, spec=spec, **blocks), known)
    return made


@pytest.mark.parametrize("name", SETTINGS)
def test_decoded_labels_of_all_tracks_are_those_of_the_whole_video(
    name: str, decoded: dict[str, Nets], stored: dict[str, Offline]
) -> None:
    nets, video = decoded[name], stored["simulated"]
    found = stepped(nets, video)
    embedding, logits = nets.encode(video.frames)
    [whole] = predict_spans(nets.phase, embedding, [Span(0, len(embedding))], "carried", 1)
    for track, part in zip(("phases", "steps"), nets.by_track(whole.numpy()), strict=True):
        labels, values = part.argmax(axis=1), part
        if nets.decoding is not None:
            labels, values = nets.decoding.decode(track, 1.0, part)
        given = [one.main if track == "phases" else one.tracks[track] for one in found]
        np.testing.assert_allclose([one.probabilities for one in given], values, atol=1e-4)
        assert [one.label for one in given] == labels.tolist()
        begins = [time_s for time_s, new in zip(video.times_s, np.diff(labels, prepend=-1) != 0, strict=True) if new]
        assert sorted({one.since_s for one in given}) == begins
    assert [one.frame for one in found] == video.numbers
    smooth = ToolSmoother(nets.tool_smoothing_s, 1.0).step(sigmoid(logits))
    np.testing.assert_allclose([one.tools for one in found], smooth, atol=1e-4)


def test_a_lag_delays_decisions_by_as_many_seconds(decoded: dict[str, Nets], stored: dict[str, Offline]) -> None:
    found = stepped(decoded["lag"], stored["simulated"])
    assert [one.delay_s for one in found[:-4]] == [4.0] * (len(found) - 4)
    assert [one.delay_s for one in found[-4:]] == [3.0, 2.0, 1.0, 0.0]
    assert {one.delay_s for one in stepped(decoded["filter"], stored["simulated"])} == {0.0}


# ---------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("name", [*SETTINGS, *(f"head {head}" for head in HEADS)])
def test_a_restart_in_the_middle_continues_as_if_there_had_been_none(
    name: str, decoded: dict[str, Nets], nets: dict[str, Nets], stored: dict[str, Offline], tmp_path: Path
) -> None:
    chosen = with_head(nets["two stages"], name[5:]) if name.startswith("head ") else decoded[name]
    video, cut = stored["simulated"], 11
    whole, first, second = (PhaseRecogniser(chosen) for _ in range(3))
    expected = [
        *whole.recognise(video.frames, video.numbers, video.times_s), *whole.finish()
    ]  # fmt: skip
    found = first.recognise(video.frames[:cut], video.numbers[:cut], video.times_s[:cut])
    save_checkpoint(tmp_path / "state.pt", first.state())
    second.restore(load_checkpoint(tmp_path / "state.pt"), "state.pt")
    found += second.recognise(video.frames[cut:], video.numbers[cut:], video.times_s[cut:])
    found += second.finish()
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.frame, one.phase, one.since_s, list(one.tracks)) == (
            other.frame, other.phase, other.since_s, list(other.tracks)
        )  # fmt: skip
        np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-6)
        np.testing.assert_allclose(one.tools, other.tools, atol=1e-6)


def test_a_state_of_other_nets_and_a_damaged_one_are_refused(decoded: dict[str, Nets], nets: dict[str, Nets]) -> None:
    recogniser = PhaseRecogniser(decoded["lag"])
    for number in range(6):
        recogniser.push(np.full((40, 40, 3), 30 * number, np.uint8), float(number))
    state = recogniser.state()
    with pytest.raises(UserError, match="saved with another net or other settings"):
        PhaseRecogniser(nets["joint"]).restore(state, "state.pt")

    def change(value: Any, *keys: Any) -> dict[str, Any]:
        changed = copy.deepcopy(state)
        place = changed
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        return changed

    damaged = [
        change(None, "sampler"),
        change(float("nan"), "sampler", "first_s"),
        change([torch.zeros(1, 5)], "head", "carried"),
        change([torch.full((1, 6), torch.nan)] * 2, "head", "carried"),
        change(None, "decoders", "phases", "viterbi"),
        change(torch.zeros(1, 2), "decoders", "phases", "viterbi", "score"),
        change([], "undecided"),
        change({"phases": "x"}, "segments"),
        change({"seen": 1, "fields": [(1, 2)], "size": None}, "margin"),
    ]
    for one in damaged:
        with pytest.raises(UserError, match=r"state\.pt: damaged \(.+; delete it to begin anew"):
            recogniser.restore(one, "state.pt")
    assert recogniser.last is None
    recogniser.restore(state, "state.pt")
    assert recogniser.last == (5, 5.0)


def test_reset_begins_a_new_video(nets: dict[str, Nets], stored: dict[str, Offline]) -> None:
    recogniser, frame = PhaseRecogniser(nets["joint"]), np.full((40, 60, 3), 90, np.uint8)
    first = [one for time_s in (3.0, 4.0, 4.0) for one in recogniser.push(frame, time_s)]
    recogniser.reset()
    again = [one for time_s in (3.0, 4.0) for one in recogniser.push(frame, time_s)]
    assert [one.frame for one in first] == [one.frame for one in again] == [0, 1]
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.probabilities, other.probabilities)
    assert recogniser.sampler.counts == Counts(frames=2, sampled=2)
