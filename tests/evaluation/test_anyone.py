"""Two folders of phase files: pairing of videos and rows, what is assumed, and what stands beside the numbers."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from configs.load import load_dataset
from evaluation.anyone import Reading, evaluate_folder, read_pairs, score_folder
from evaluation.phases import CONVENTIONS, evaluate_phases
from evaluation.predictions import write_prediction_csv

CHOLEC80 = load_dataset("cholec80")


def folder(path: Path, **files: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (path / f"{name}.txt").write_text(text)
    return path


def rows(phases, step: float = 1, first: float = 0) -> str:
    return "".join(f"{first + k * step:g}\t{phase}\n" for k, phase in enumerate(phases))


def pairs(tmp_path: Path, predicted: dict[str, str], truth: dict[str, str], **options):
    reading = Reading(folder(tmp_path / "truth", **truth), **options)
    return read_pairs(folder(tmp_path / "predicted", **predicted), reading, CHOLEC80)


def without_paths(results):
    tree = json.loads(json.dumps(results))
    for result in tree.values():
        for key in ("predictions", "ground_truth"):
            del result["about"][key]
    return tree


def test_the_form_of_the_files_changes_nothing(shared_data, tmp_path):
    """Published predictions as they are, and rewritten: names in a CSV below a header, frames at 1 fps, other names."""
    published = shared_data / "predictions/tmrnet"
    (tmp_path / "csv").mkdir()
    for path in (published / "phase").iterdir():
        ids = np.loadtxt(path, dtype=int)[:, 1]
        lines = [f"{k},{CHOLEC80.phases[i]}\n" for k, i in enumerate(ids)]
        (tmp_path / "csv" / f"{int(path.name[5:7])}.csv").write_text("frame,phase\n" + "".join(lines))
    reading = Reading(published / "gt-phase")
    first, _ = score_folder(published / "phase", reading, CHOLEC80)
    second, _ = score_folder(tmp_path / "csv", reading, CHOLEC80)
    assert without_paths(first) == without_paths(second)
    assert set(first) == set(CONVENTIONS)


def test_names_and_order_of_files_change_nothing(shared_data, tmp_path):
    """Videos under other numbers in another order give the same numbers."""
    published = shared_data / "predictions/tmrnet"
    numbers = list(range(1, 41))
    random.Random(0).shuffle(numbers)
    for kind in ("phase", "gt-phase"):
        (tmp_path / kind).mkdir()
        for number, path in zip(numbers, sorted((published / kind).iterdir()), strict=True):
            shutil.copy(path, tmp_path / kind / f"{number}.txt")
    first, _ = score_folder(published / "phase", Reading(published / "gt-phase"), CHOLEC80)
    second, _ = score_folder(tmp_path / "phase", Reading(tmp_path / "gt-phase"), CHOLEC80)
    for name, result in first.items():
        for metric in ("accuracy", "precision", "jaccard", "edit", "f1@10"):
            if metric in result:
                assert second[name][metric] == pytest.approx(result[metric], abs=1e-9), (name, metric)


def test_truth_at_25_fps_is_matched_by_frame_number(tmp_path):
    truth = np.repeat([0, 1, 2], 100)
    found = pairs(tmp_path, {"1": rows([0, 1, 1, 1], 75)}, {"video01-phase": rows(truth)})
    assert found.truth["video01"].tolist() == truth[::75].tolist()
    assert found.predicted["video01"].tolist() == [0, 1, 1, 1]
    assert "rows are matched by frame number" in " ".join(found.notes)


def test_real_annotations_at_25_fps_serve_predictions_at_1_fps(shared_data, tmp_path):
    annotations = shared_data / "mini-cholec80/phase_annotations"
    predicted = folder(tmp_path / "p")
    for path in annotations.iterdir():
        header, *lines = path.read_text().splitlines(keepends=True)
        (predicted / f"{int(path.name[5:7])}.txt").write_text(header + "".join(lines[::25]))
    found = read_pairs(predicted, Reading(annotations), CHOLEC80)
    assert len(found.truth) == 5
    for video, track in found.truth.items():
        assert len(track) > 1000
        assert np.array_equal(track, found.predicted[video])


def test_truth_at_1_fps_takes_what_it_needs_of_dense_predictions(tmp_path):
    found = pairs(tmp_path, {"1": rows(np.repeat([0, 1], 50))}, {"1": rows([0, 0, 1, 2], 25)})
    assert found.predicted["video01"].tolist() == [0, 0, 1, 1]
    assert found.truth["video01"].tolist() == [0, 0, 1, 2]


@given(
    st.lists(st.integers(0, 6), min_size=3, max_size=60),
    st.integers(2, 30),
    st.integers(0, 29),
    st.sampled_from([1, 2, 0.5]),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
def test_every_kth_row_is_found(tmp_path, phases, k, start, unit):
    start %= k
    kept = phases[start::k]
    text = rows(kept, k * unit, start * unit)
    if len(kept) < 2:
        with pytest.raises(UserError, match=r"rows, but|holds no rows"):
            pairs(tmp_path, {"1": text}, {"1": rows(phases, unit)})
        return
    found = pairs(tmp_path, {"1": text}, {"1": rows(phases, unit)})
    assert found.truth["video01"].tolist() == kept == found.predicted["video01"].tolist()


@pytest.mark.parametrize(
    ("predicted", "truth", "message"),
    [
        (rows([0] * 9), rows([0] * 10), r"1\.txt: 9 rows, but .*1\.txt has 10; .*0 to 8 and 0 to 9"),
        ("0\n" * 9, rows([0] * 10), r"9 rows, but .* has 10; both must cover.*without a frame column"),
        (rows([0] * 4), rows([0] * 100), "4 rows, but .* has 100"),  # samples against source frames: units differ
        (rows([0] * 3, 25), rows([0] * 100), "3 rows, but .* has 100"),  # the last second is missing
        (rows([0] * 5, 1, 40), rows([0] * 5), "starts at frame 40, but .* at 0"),
    ],
)
def test_files_of_other_lengths_are_errors_with_both_counts_and_names(predicted, truth, message, tmp_path):
    with pytest.raises(UserError, match=message):
        pairs(tmp_path, {"1": predicted}, {"1": truth})


def test_frames_in_any_unit_and_from_any_base_are_the_same_rows(tmp_path):
    for k, text in enumerate(("0\n0\n1\n", rows([0, 0, 1], 1, 1), rows([0, 0, 1], 25), rows([0, 0, 1], 0.04, 0.04))):
        found = pairs(tmp_path / str(k), {"1": text}, {"1": rows([0, 1, 1], 25)})
        assert found.predicted["video01"].tolist() == [0, 0, 1]


def test_a_video_in_one_folder_only(tmp_path):
    both = {"1": rows([0, 1]), "2": rows([0, 1])}
    with pytest.raises(UserError, match=r"truth/2\.txt: .*predicted has no file for this video; .*--allow-missing"):
        pairs(tmp_path / "a", {"1": rows([0, 1])}, both)
    with pytest.raises(UserError, match=r"predicted/2\.txt: .*truth has no file for this video"):
        pairs(tmp_path / "b", both, {"1": rows([0, 1])})
    found = pairs(tmp_path / "c", {"1": rows([0, 1]), "3": rows([0])}, both, allow_missing=True)
    assert list(found.truth) == ["video01"]
    assert found.about["files_left_out"] == ["2.txt", "3.txt"]
    assert sum("left out, in one folder only" in note for note in found.notes) == 2
    with pytest.raises(UserError, match="no video is in both"):
        pairs(tmp_path / "d", {"4": rows([0])}, both, allow_missing=True)


def test_ids_are_numbered_as_asked_and_never_silently(tmp_path):
    truth = {"1": "Frame\tPhase\n0\tGallbladderPackaging\n1\tGallbladderRetraction\n"}
    own = pairs(tmp_path / "a", {"1": rows([4, 6])}, truth)
    assert own.predicted["video01"].tolist() == own.truth["video01"].tolist() == [4, 6]
    assert "ids are numbered as in the data set cholec80: 0 Preparation" in own.notes[0]
    assert own.about["phase_order"] == list(CHOLEC80.phases)
    other = pairs(tmp_path / "b", {"1": rows([4, 6])}, truth, phase_order="tf-cholec80")
    assert other.predicted["video01"].tolist() == [6, 4]
    assert other.truth["video01"].tolist() == [4, 6]
    assert "--phase-order tf-cholec80: 0 Preparation" in other.notes[0]
    names = pairs(tmp_path / "c", truth, truth, phase_order="tf-cholec80")
    assert names.about["phase_order"] is None
    assert "not needed" in names.notes[0]


def test_the_rate_is_given_or_read_or_assumed_and_always_said(tmp_path):
    plain = {"1": rows([0, 1])}
    assumed = pairs(tmp_path / "a", plain, plain)
    assert (assumed.fps, assumed.about["fps_from"]) == (1, "assumed")
    assert "rate: 1 rows a second (assumed" in assumed.notes[-1]
    given = pairs(tmp_path / "a", plain, plain, fps=25.0)
    assert (given.fps, given.about["fps_from"]) == (25, "--fps")
    shown = folder(tmp_path / "b")
    for number in (1, 2):
        phase = np.zeros(3, np.int8)
        write_prediction_csv(
            shown / f"{number}.csv", np.arange(3) * 5, np.arange(3) / 5, phase, np.eye(7)[phase], None, CHOLEC80
        )
    truth = folder(tmp_path / "c", **{"1": rows([0] * 3), "2": rows([0] * 3)})
    found = read_pairs(shown, Reading(truth), CHOLEC80)
    assert (found.fps, found.about["fps_from"]) == (5, "time_s")
    with pytest.raises(UserError, match=r"1\.csv: its column time_s means 5 rows a second, but --fps says 25"):
        read_pairs(shown, Reading(truth, fps=25.0), CHOLEC80)


def test_first_rows_are_skipped_on_both_sides(tmp_path):
    found = pairs(tmp_path, {"1": rows([0, 1, 2])}, {"1": "Frame Phase\n" + rows([3, 4, 5])}, skip_first_row=True)
    assert (found.predicted["video01"].tolist(), found.truth["video01"].tolist()) == ([1, 2], [4, 5])
    assert "first row of every video is left out; 1 files have a header" in found.notes[-1]


def test_results_carry_what_they_mean(tmp_path):
    truth = folder(tmp_path / "t", **{"1": rows([0, 0, 1]), "2": rows([-1, 0, 1])})
    predicted = folder(tmp_path / "p", **{"1": rows([0, 1, 1]), "2": rows([3, 0, 0])})
    results, _ = score_folder(predicted, Reading(truth, fps=2.0), CHOLEC80, split="test")
    expected = evaluate_phases(
        {"video01": np.array([0, 0, 1]), "video02": np.array([-1, 0, 1])},
        {"video01": np.array([0, 1, 1]), "video02": np.array([3, 0, 0])},
        CHOLEC80.phases,
        2.0,
        split="test",
    )
    for name, result in results.items():
        about = result["about"]
        assert (about["split"], about["fps"], about["videos"], about["seeds"]) == ("test", 2.0, 2, 1)
        assert about["absent_phase"]
        assert about["std"]
        assert about | expected[name]["about"] == about
        for metric in ("accuracy", "per_video"):
            assert result[metric] == expected[name][metric]
        interval = result["intervals"]["accuracy"]
        assert interval["low"] <= interval["mean"] <= interval["high"]
    assert "video_balanced_accuracy" in results["pooled"]


def test_nothing_is_written_when_something_is_wrong(tmp_path):
    truth, predicted = folder(tmp_path / "t", **{"1": rows([0])}), folder(tmp_path / "p", **{"1": rows([9])})
    out = tmp_path / "out" / "a.json"
    with pytest.raises(UserError, match="has phase '9'"):
        evaluate_folder(predicted, Reading(truth), CHOLEC80, out=out)
    with pytest.raises(UserError, match="unknown convention 'no'"):
        evaluate_folder(truth, Reading(truth), CHOLEC80, ["no"], out=out)
    assert not out.parent.exists()
    evaluate_folder(truth, Reading(truth), CHOLEC80, ["pooled"], out=out)
    assert list(json.loads(out.read_text())) == ["pooled"]
