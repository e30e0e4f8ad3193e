"""`predict` through the command line: new videos get exactly the numbers that `evaluate` writes for known ones."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest

from configs.load import load_dataset
from evaluation.files.predictions import PredictionFile, read_prediction_csv
from features.annotation_files.eaf import read_eaf
from features.annotation_files.label_studio import read_label_studio
from features.annotation_files.table import read_csv
from tests.cli import run, succeed
from tests.test_cli import (  # noqa: F401 (fixtures)
    finished,
    no_temporaries,
    refuse,
    settings_file,
    videos,
    workplace,
)

SPEC = load_dataset("cholec80")
PREDICT = ["predict", "--config", "tiny.yaml"]


@pytest.fixture
def unknown(workplace: Path, videos: Path) -> Path:  # noqa: F811
    """The test video under a name of its own, without annotations, in a folder without a data set."""
    target = workplace / "theatre 3" / "case (A) été.mp4"
    target.parent.mkdir()
    shutil.copyfile(videos / "videos" / "video05.mp4", target)
    return target


@pytest.mark.slow
def test_a_new_video_gets_the_numbers_that_evaluate_gives(workplace: Path, unknown: Path) -> None:  # noqa: F811
    tools = ["--as", "eaf", "--as", "labelstudio", "--as", "csv"]
    output = succeed([*PREDICT, str(unknown), "--video", *tools], workplace)
    assert "1 video(s) predicted" in output
    out = workplace / "runs/tiny/predict"
    found = read_prediction_csv(out / "case (A) été.csv", SPEC)
    known = read_prediction_csv(workplace / "runs/tiny/evaluate/test/predictions/video05.csv", SPEC)
    assert np.array_equal(found.frame_index, known.frame_index)
    np.testing.assert_allclose(found.probabilities, known.probabilities, atol=2e-5)
    np.testing.assert_allclose(found.tool_probabilities, known.tool_probabilities, atol=2e-5)
    assert (out / "case (A) été.png").read_bytes().startswith(b"\x89PNG")
    with av.open(str(unknown)) as source, av.open(str(out / "case (A) été.mp4")) as drawn:
        shown = drawn.streams.video[0]
        assert shown.average_rate == source.streams.video[0].average_rate
        assert (shown.codec_context.width, shown.codec_context.height) == (96, 144)
        frames = [frame.to_ndarray(format="rgb24") for frame in drawn.decode(video=0)]
        assert len(frames) == sum(1 for _ in source.decode(video=0))
    with av.open(str(unknown)) as source:
        first = next(source.decode(video=0)).to_ndarray(format="rgb24")
    assert np.abs(frames[0][:96].astype(int) - first).mean() < 12  # the frame is above, the band below
    assert frames[0][96:].max() > 150  # and the band is not empty
    assert no_temporaries(out)
    require_intervals(out, "case (A) été", found)

    assert "0 video(s) predicted, 1 unchanged" in succeed([*PREDICT, str(unknown), "--video", *tools], workplace)
    clip = refuse([*PREDICT, str(unknown), "--inference", "clip"], workplace)
    assert "made by another net or from another video" in clip


def require_intervals(out: Path, name: str, found: PredictionFile) -> None:
    """The files for annotation tools have the predicted phases, and are read back alike."""
    [video] = read_csv((out / f"{name}.intervals.csv").read_bytes(), out / "all.csv").videos
    assert video.video == name
    for one in video.intervals:
        inside = (found.time_s >= one.start_s - 1e-3) & (found.time_s < one.end_s - 1e-3)
        number = SPEC.phases.index(one.label)
        assert set(found.phase[inside]) == {number}
        assert one.confidence == pytest.approx(found.probabilities[inside, number].mean(), abs=1e-4)
    assert all(one.end_s == after.start_s for one, after in pairwise(video.intervals))
    assert read_eaf((out / f"{name}.eaf").read_bytes(), out / f"{name}.eaf").videos[0].intervals == video.intervals
    tasks = (out / f"{name}.labelstudio.json").read_bytes()
    assert json.loads(tasks)[0]["data"]["video"].startswith("/data/local-files/?d=case%20")
    assert read_label_studio(tasks, out / "x.json").videos[0].intervals == video.intervals
    assert '<Label value="Preparation"/>' in (out / "labelstudio.xml").read_text(encoding="utf-8")


@pytest.mark.slow
def test_videos_that_other_processes_decode_get_the_same_numbers(workplace: Path, unknown: Path) -> None:  # noqa: F811
    second, broken = workplace / "case C.mp4", workplace / "broken.mp4"
    shutil.copyfile(unknown, second)
    broken.write_bytes(unknown.read_bytes()[:-2000])
    sources = [str(unknown), str(second), str(broken)]
    here, ahead = (
        run([*PREDICT, *sources, "--out", f"predict-{choice}", "--set", f"extract.decode_ahead={choice}"], workplace)
        for choice in ("off", "on")
    )
    assert (ahead.returncode, ahead.stdout) == (here.returncode, here.stdout.replace("predict-off", "predict-on"))
    tables = {path.name: path.read_bytes() for path in (workplace / "predict-off").glob("*.csv")}
    assert {path.name: path.read_bytes() for path in (workplace / "predict-on").glob("*.csv")} == tables
    assert len(tables) >= 2


@pytest.mark.slow
def test_a_folder_of_frames_and_a_damaged_video_beside(workplace: Path, unknown: Path) -> None:  # noqa: F811
    frames = workplace / "case B"
    frames.mkdir()
    with av.open(str(unknown)) as source:
        for number, frame in enumerate(source.decode(video=0)):
            if number % 5 == 0:
                frame.to_image().save(frames / f"{number // 5 + 1:06d}.png")
    broken = workplace / "broken.mp4"
    broken.write_bytes(unknown.read_bytes()[:3000])
    options = ["--set", "data.folder_fps=1", "--out", "new"]
    done = run([*PREDICT, *options, str(frames), str(broken)], workplace)
    assert done.returncode == 1, done.stderr
    assert "1 video(s) predicted, 1 failed" in done.stdout
    assert "failed: broken.mp4" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in (workplace / "new").iterdir()) == ["case B.csv", "case B.json", "case B.png"]
    found = read_prediction_csv(workplace / "new" / "case B.csv", SPEC)
    known = read_prediction_csv(workplace / "runs/tiny/evaluate/test/predictions/video05.csv", SPEC)
    assert len(found.phase) == len(known.phase)
    np.testing.assert_allclose(found.probabilities, known.probabilities, atol=2e-5)  # the same pixels, so the same


@pytest.mark.slow
def test_what_cannot_be_predicted_is_refused(workplace: Path, unknown: Path) -> None:  # noqa: F811
    assert "no such video" in refuse([*PREDICT, "nowhere.mp4"], workplace)
    assert "nothere" in refuse([*PREDICT, str(unknown), "--name", "nothere"], workplace)
    same = workplace / "other" / unknown.name
    same.parent.mkdir()
    shutil.copyfile(unknown, same)
    assert "another source is called" in refuse([*PREDICT, str(unknown), str(same)], workplace)
    offline_head = [
        "train-temporal",
        "--config",
        "tiny.yaml",
        "--name",
        "both",
        "--set",
        "temporal.head.name=mstcn++",
        "--set",
        "temporal.head.layers=3",
        "--set",
        "temporal.head.refinement_layers=3",
    ]
    features = next((workplace / "artifacts/features").iterdir())
    full = ["--set", "temporal.sequence.mode=full", "--features", str(features)]
    succeed([*offline_head, *full], workplace)
    offline = [*PREDICT, "--name", "both", "--from-cnn", "tiny", str(unknown)]
    assert "mstcn++ looks into the future and is offline only" in refuse(offline, workplace)


@pytest.mark.slow
def test_nothing_that_is_not_a_prediction_is_replaced(workplace: Path, unknown: Path) -> None:  # noqa: F811
    before = unknown.read_bytes()
    beside = [*PREDICT, str(unknown), "--video", "--out", str(unknown.parent)]
    assert "would be replaced by its own prediction" in refuse(beside, workplace)
    assert unknown.read_bytes() == before
    assert [path.name for path in unknown.parent.iterdir()] == [unknown.name]
    (workplace / "new").mkdir()
    mine = workplace / "new" / f"{unknown.stem}.csv"
    mine.write_text("my own notes")
    assert "is not a prediction of this program" in refuse([*PREDICT, str(unknown), "--out", "new"], workplace)
    assert mine.read_text() == "my own notes"


@pytest.mark.slow
def test_another_reading_of_a_folder_is_another_prediction(workplace: Path, unknown: Path) -> None:  # noqa: F811
    frames = workplace / "case B"
    frames.mkdir()
    with av.open(str(unknown)) as source:
        for number, frame in zip(range(60), source.decode(video=0), strict=False):
            frame.to_image().save(frames / f"{number:06d}.png")
    one, five = (["--set", f"data.folder_fps={rate}", "--out", "new"] for rate in (1, 5))
    succeed([*PREDICT, *one, str(frames)], workplace)
    assert "from another video" in refuse([*PREDICT, *five, str(frames)], workplace)


@pytest.mark.slow
def test_an_ablation_takes_stage_one_from_the_run_of_its_features(workplace: Path, unknown: Path) -> None:  # noqa: F811
    features = next((workplace / "artifacts/features").iterdir())
    small = ["--config", "tiny.yaml", "--name", "small", "--set", "temporal.head.hidden=8"]
    succeed(["train-temporal", *small, "--features", str(features)], workplace)
    assert "runs/small/cnn/best.pt: no such checkpoint" in refuse(
        [*PREDICT, "--name", "small", str(unknown)], workplace
    )
    succeed([*PREDICT, "--name", "small", "--from-cnn", "tiny", str(unknown)], workplace)
    about = json.loads((workplace / "runs/small/predict/case (A) été.json").read_text())
    assert set(about["made_by"]) >= {"temporal", "encoder", "fps", "inference", "source_sha256_ends"}

    other = ["train-cnn", "--config", "tiny.yaml", "--name", "other", "--set", "seed=3"]
    succeed(other, workplace)
    wrong = refuse([*PREDICT, "--name", "small", "--from-cnn", "other", "--out", "x", str(unknown)], workplace)
    assert "trained on features of another encoder" in wrong


@pytest.mark.slow
def test_a_model_that_reads_tool_logits_gets_them_from_new_videos(workplace: Path, unknown: Path) -> None:  # noqa: F811
    features = next((workplace / "artifacts/features").iterdir())
    named = ["--config", "tiny.yaml", "--name", "logits", "--set", "temporal.tool_logits=true"]
    succeed(["train-temporal", *named, "--features", str(features)], workplace)
    succeed(["evaluate", *named, "--features", str(features)], workplace)
    succeed([*PREDICT, "--name", "logits", "--from-cnn", "tiny", str(unknown)], workplace)
    found = read_prediction_csv(workplace / "runs/logits/predict/case (A) été.csv", SPEC)
    known = read_prediction_csv(workplace / "runs/logits/evaluate/test/predictions/video05.csv", SPEC)
    np.testing.assert_allclose(found.probabilities, known.probabilities, atol=2e-5)
    assert "tool_logits: true" in (workplace / "runs/logits/MODEL_CARD.md").read_text()
    joint = ["train-joint", "--config", "tiny.yaml", "--name", "end", "--from-cnn", "tiny", "--from-temporal", "logits"]
    assert "reads tool logits in addition to embeddings" in refuse(joint, workplace)
