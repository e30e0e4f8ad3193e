"""Two folders of phase files: pairing of videos and rows, assumptions, and what is recorded with the numbers."""

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
from evaluation.external import Reading, evaluate_folder, read_pairs
from evaluation.files.predictions import PredictionFile, write_prediction_csv
from evaluation.metrics.conventions import CONVENTIONS
from evaluation.metrics.counts import NO_PREDICTION
from tests.evaluation.in_json import evaluate_phases, score_folder

CHOLEC80 = load_dataset("cholec80")


def folder(path: Path, **files: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (path / f"{name}.txt").write_text(text)
    return path


def rows(phases, step: float = 1, first: float = 0) -> str:
    return "".join(f"{first + k * step:.15g}\t{phase}\n" for k, phase in enumerate(phases))


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
    assert set(first) == set(CONVENTIONS.names()) - {"calibration"}


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


@pytest.mark.slow
def test_real_annotations_at_25_fps_match_predictions_at_1_fps(shared_data, tmp_path):
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


def test_truth_at_1_fps_selects_from_dense_predictions(tmp_path):
    found = pairs(tmp_path, {"1": rows(np.repeat([0, 1], 50))}, {"1": rows([0, 0, 1, 2], 25)})
    assert found.predicted["video01"].tolist() == [0, 0, 1, 1]
    assert found.truth["video01"].tolist() == [0, 0, 1, 2]


@given(
    st.lists(st.integers(0, 6), min_size=3, max_size=60),
    st.integers(2, 30),
    st.integers(0, 29),
    st.sampled_from([1, 2, 0.5]),
)
@settings(suppress_health_check=list(HealthCheck), deadline=None, max_examples=50)
def test_every_kth_row_is_found(tmp_path, phases, k, start, unit):
    start %= k
    kept = phases[start::k]
    text = rows(kept, k * unit, start * unit)
    if len(kept) < 2:
        with pytest.raises(UserError, match=r"rows, but|contains no rows"):
            pairs(tmp_path, {"1": text}, {"1": rows(phases, unit)})
        return
    found = pairs(tmp_path, {"1": text}, {"1": rows(phases, unit)})
    assert found.truth["video01"].tolist() == kept == found.predicted["video01"].tolist()


@pytest.mark.parametrize(
    ("predicted", "truth", "message"),
    [
        (rows([0] * 8), rows([0] * 10), r"1\.txt: 8 rows, but .*1\.txt has 10; .*0 to 7 and 0 to 9.*-1 stands for"),
        (rows([0] * 12), rows([0] * 10), r"12 rows, but .*1\.txt has 10"),
        (rows([0] * 9, 1, 1), rows([0] * 10), r"9 rows, but .*number both from 0 or both from 1"),
        (rows([0] * 10, 5), rows([0] * 10, 25), r"has 1 rows per second and the prediction 5; .* --prediction-fps 1"),
        ("0\n" * 9, rows([0] * 10), r"9 rows, but .* has 10; both must cover.*have a frame column"),
        # nearly as many: any rate fits, so none is proposed
        (
            "0\n" * 99,
            rows([0] * 100),
            "99 rows, but .* has 100; .*give the rate of the rows with --prediction-fps",
        ),
        ("0\n" * 120, rows([0] * 100), "120 rows, but .* has 100.* has 30 rows per second, add --prediction-fps 30"),
        # samples against source frames: units differ
        (rows([0] * 4), rows([0] * 100), "4 rows, but .* has 100.*if the prediction has 1 row per second, add --pred"),
        (
            "0\n" * 4,
            "0\n" * 100,
            "4 rows, but .* has 100.*if the prediction has 1 row per second, add --prediction-fps 1",
        ),
        (rows([0] * 20), rows([0] * 100), "20 rows, but .* has 100.* has 5 rows per second, add --prediction-fps 5"),
        ("0\n" * 100, rows([0] * 4), "100 rows, but .* has 4.* has 25 rows per second, add --prediction-fps 25"),
        (rows([0] * 100, 5), rows([0] * 20), "100 rows, but .* has 20.* has 5 rows per second, add --prediction-fps 5"),
        (rows([0]), rows([0] * 10), "1 rows, but .* has 10"),
        (rows([0] * 2, 25), rows([0] * 150), "2 rows, but .* has 150"),  # more than half is missing
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
    (note,) = [note for note in found.notes if "left out, since they are in only one folder" in note]
    assert note.count(".txt") == 2
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


def test_the_rate_is_given_or_read_and_always_reported(tmp_path):
    plain = {"1": rows([0, 1])}
    unknown = pairs(tmp_path / "a", plain, plain)
    assert (unknown.fps, unknown.about["fps_from"]) == (None, None)
    assert "rate: not known" in unknown.notes[-1]
    given = pairs(tmp_path / "a", plain, plain, fps=25.0)
    assert (given.fps, given.about["fps_from"]) == (25, "--fps")
    shown = folder(tmp_path / "b")
    for number in (1, 2):
        phase = np.zeros(3, np.int8)
        write_prediction_csv(
            shown / f"{number}.csv",
            PredictionFile(np.arange(3) * 5, np.arange(3) / 5, phase, np.eye(7)[phase], None),
            CHOLEC80,
        )
    truth = folder(tmp_path / "c", **{"1": rows([0] * 3), "2": rows([0] * 3)})
    found = read_pairs(shown, Reading(truth), CHOLEC80)
    assert (found.fps, found.about["fps_from"]) == (5, "time_s")
    with pytest.raises(UserError, match=r"1\.csv: its column time_s means 5 rows per second, but --fps says 25"):
        read_pairs(shown, Reading(truth, fps=25.0), CHOLEC80)


def test_numbers_further_apart_than_one_count_source_frames(tmp_path):
    published = pairs(tmp_path / "a", {"1": rows([0, 1], 25)}, {"1": rows([0, 1], 25)})
    assert (published.fps, published.about["fps_from"]) == (1, "frame numbers")
    assert "count source frames, 25 per second in cholec80" in published.notes[-1]
    other = pairs(tmp_path / "b", {"1": rows([0, 1])}, {"1": rows([0, 1], 5)})
    assert other.fps == 5
    sparse = pairs(tmp_path / "c", {"1": rows([0, 1], 5)}, {"1": rows([0] * 10)})
    assert (sparse.fps, sparse.about["fps_from"]) == (5, "frame numbers")
    given = pairs(tmp_path / "c", {"1": rows([0, 1], 5)}, {"1": rows([0] * 10)}, fps=2.0)
    assert given.fps == 2
    assert "rate: 2 rows per second (given; the frame numbers would mean 5)" in given.notes[-1]
    two = {"1": rows([0, 1], 25), "2": rows([0, 1], 5)}
    with pytest.raises(UserError, match=r"2\.txt: 5 rows per second by its frame numbers, but .*1\.txt has 1; .*--fps"):
        pairs(tmp_path / "d", two, two)
    assert pairs(tmp_path / "d", two, two, fps=1.0).fps == 1


TRUTH_25 = np.repeat([0, 1, 2, 3], [60, 70, 80, 91]).tolist()  # 301 rows, 12.04 s


@pytest.mark.parametrize("truth", [rows(TRUTH_25), "".join(f"{k}\n" for k in TRUTH_25), rows(TRUTH_25, 1, 1)])
@pytest.mark.parametrize("fps", [1, 5, 10, 25])
@pytest.mark.parametrize("numbered", [None, 0, 1])
def test_predictions_at_another_rate_are_matched_by_it(tmp_path, truth, fps, numbered):
    """By row, by sample number from 0 and from 1, against annotations at 25 per second."""
    kept = [TRUTH_25[int(k * 25 / fps)] for k in range(-(-301 * fps // 25))]
    text = "".join(f"{k}\n" for k in kept) if numbered is None else rows(kept, 1, numbered)
    found = pairs(tmp_path, {"1": text}, {"1": truth}, prediction_fps=float(fps))
    assert found.truth["video01"].tolist() == found.predicted["video01"].tolist() == kept
    assert (found.fps, found.about["fps_from"]) == (fps, "--prediction-fps")


def test_dense_predictions_by_row_against_truth_at_1_fps(tmp_path):
    dense = np.repeat([0, 1, 2, 3], 25)
    for k, truth in enumerate((rows([0, 1, 2, 3], 25), rows([0, 1, 2, 3]), "0\n1\n2\n3\n")):
        found = pairs(tmp_path / str(k), {"1": "".join(f"{p}\n" for p in dense)}, {"1": truth}, prediction_fps=25.0)
        assert found.predicted["video01"].tolist() == [0, 1, 2, 3]
        assert found.fps == 1


@pytest.mark.parametrize(
    ("predicted", "options", "message"),
    [
        ([0] * 12, {"prediction_fps": 5.0}, r"at 5 predicted rows per second .*they do not cover.*-fps 1$"),
        (
            [0] * 7525,
            {"prediction_fps": 1.0},
            r"at 1 predicted rows per second .*they do not cover.*-fps 25$",
        ),
        ([0] * 12, {"prediction_fps": float("inf")}, r"--prediction-fps inf: must be between 0\.001 and 10000 rows"),
        ([0] * 12, {"prediction_fps": 1e-4}, r"--prediction-fps 0\.0001: must be between 0\.001 and 10000 rows"),
        (
            [0] * 12,
            {"prediction_fps": 1.0, "fps": 25.0},
            r"--prediction-fps means 1 rows per second, but --fps says 25",
        ),
    ],
)
def test_rates_that_do_not_fit_are_refused(tmp_path, predicted, options, message):
    with pytest.raises(UserError, match=message):
        pairs(tmp_path, {"1": rows(predicted)}, {"1": rows(TRUTH_25)}, **options)


def test_frames_that_one_side_lacks(tmp_path):
    """Without a label: not scored. Without a prediction: wrong. Both are reported."""
    truth = {"1": "0\t0\n25\t-1\n50\t1\n75\t1\n150\t2\n175\t2\n"}  # 100 and 125 are missing
    guess = {"1": "25\t0\n75\t1\n100\t1\n125\t2\n150\t\n200\t2\n225\t2\n"}  # 0 is missing, 50 and 175 too
    found = pairs(tmp_path, guess, truth)
    assert found.truth["video01"].tolist() == [0, -1, 1, 1, -1, -1, 2, 2]
    scored = found.truth["video01"] >= 0
    assert found.predicted["video01"][scored].tolist() == [-2, -2, 1, -2, -2]
    assert found.about["frames_without_prediction"] == {"video01": 4}
    notes = "\n".join(found.notes)
    assert "2 ground truth rows are missing, according to the frame numbers" in notes
    assert "2 prediction rows are missing, according to the frame numbers" in notes
    assert "2 predictions are outside the frames of the ground truth and are not scored" in notes
    assert "4 labelled frames have no prediction and count as wrong: video01" in notes
    results, _ = score_folder(tmp_path / "predicted", Reading(tmp_path / "truth"), CHOLEC80)
    for name, result in results.items():
        assert result.get("accuracy", {"mean": 20})["mean"] == pytest.approx(20), name


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
def test_with_any_rows_lost_only_equal_frames_are_compared(tmp_path, data):
    """Each compared pair is of one source frame; a lost truth row is not scored, a lost prediction is wrong."""
    k, count, unit = data.draw(st.sampled_from([(1, 40, 25), (5, 120, 1), (25, 400, 1)]))
    truth = data.draw(st.lists(st.integers(0, 6), min_size=count, max_size=count))
    guess = data.draw(st.lists(st.integers(0, 6), min_size=count, max_size=count))[::k]

    def lost(rows: int) -> set[int]:
        return data.draw(st.sets(st.integers(0, rows - 1), max_size=rows // 4))

    lost_t, lost_p = lost(count), lost(len(guess))
    texts = [
        "".join(f"{step * j}\t{phase}\n" for j, phase in enumerate(track) if j not in gone)
        for track, gone, step in ((truth, lost_t, unit), (guess, lost_p, k * unit))
    ]
    found = pairs(tmp_path, {"1": texts[1]}, {"1": texts[0]})
    wanted = [(truth[j * k], -2 if j in lost_p else phase) for j, phase in enumerate(guess) if j * k not in lost_t]
    compared = zip(found.truth["video01"].tolist(), found.predicted["video01"].tolist(), strict=True)
    assert [(true, phase) for true, phase in compared if true >= 0] == wanted
    assert sum(found.about["frames_without_prediction"].values()) == sum(phase == -2 for _, phase in wanted)


def test_predictions_of_a_variable_rate_against_annotations_of_every_frame(tmp_path):
    """Uneven frame numbers with times, and a lost row: the existing rows are compared with their own frames."""
    frame = np.array([0, 24, 50, 74, 75, 100, 126, 175, 200, 225])
    time_s = np.array([0, 1.01, 1.98, 2.99, 8, 9, 10, 12, 13, 14])
    truth = np.repeat([0, 1, 2], [51, 60, 120])
    shown = folder(tmp_path / "p")
    write_prediction_csv(
        shown / "1.csv",
        PredictionFile(frame, time_s, truth[frame].astype(np.int8), np.eye(7)[truth[frame]], None),
        CHOLEC80,
    )
    found = read_pairs(shown, Reading(folder(tmp_path / "t", **{"1": rows(truth)})), CHOLEC80)
    assert found.predicted["video01"].tolist() == [0, 0, 0, 1, 1, 1, 2, -2, 2, 2, 2]
    assert found.truth["video01"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2]
    assert found.fps == pytest.approx(1, rel=0.02)


def test_as_many_rows_that_start_later_are_matched_by_number(tmp_path):
    found = pairs(tmp_path, {"1": rows([1, 2, 2, 3], 25, 25)}, {"1": rows([0, 1, 2, 2], 25)})
    assert found.truth["video01"].tolist() == [0, 1, 2, 2]
    assert found.predicted["video01"].tolist() == [-2, 1, 2, 2]


@pytest.mark.parametrize("count", [40, 41])
def test_frame_numbers_far_apart_are_not_the_same_frames(tmp_path, count):
    """Milliseconds since 1970: the rows between them and the truth's would not fit into memory."""
    stamps = rows([0] * count, step=40, first=1.7e12)
    with pytest.raises(UserError, match=r"\d+ rows, but .*truth/1.txt has 40; the frame columns .* do not cover"):
        pairs(tmp_path, {"1": stamps}, {"1": rows([0] * 40, step=40)})


def test_one_row_more_or_less_is_reported_and_counted(tmp_path):
    ten, nine = {"1": rows([0] * 10)}, {"1": rows([0] * 9)}
    short = pairs(tmp_path / "a", nine, ten)
    assert short.predicted["video01"].tolist() == [0] * 9 + [-2]
    long = pairs(tmp_path / "b", ten, nine)
    assert long.predicted["video01"].tolist()[:9] == long.truth["video01"].tolist()[:9] == [0] * 9
    assert "1 predictions are outside" in "\n".join(long.notes)


def test_files_without_any_label_or_prediction(tmp_path):
    truth = {"1": rows([0, 1]), "2": rows([-1, -1]), "3": "0\t-1\n1\tPreparation\n"}
    folder(tmp_path / "truth", **truth)
    predicted = folder(tmp_path / "predicted", **{"1": rows([0, 1]), "2": rows([0, 0]), "3": rows([1, 0])})
    results, notes = score_folder(predicted, Reading(tmp_path / "truth"), CHOLEC80)
    about = results["pooled"]["about"]
    assert (about["videos"], about["frames"], about["videos_without_labels"]) == (2, 3, ["video02"])
    assert "videos not counted, since their ground truth has no labels: video02" in notes
    assert "relaxed_matlab and relaxed_fixed: left out, for its window of 10 s needs the rate" in "\n".join(notes)
    (predicted / "1.txt").write_text(rows([-1, -1]))
    with pytest.raises(UserError, match=r"1\.txt: contains no prediction; leave the video out with --allow-missing"):
        read_pairs(predicted, Reading(tmp_path / "truth"), CHOLEC80)
    found = read_pairs(predicted, Reading(tmp_path / "truth", allow_missing=True), CHOLEC80)
    assert list(found.truth) == ["video02", "video03"]
    assert found.about["files_left_out"] == ["1.txt"]


def test_relaxed_conventions_of_unknown_rates_or_other_phases(tmp_path):
    plain = folder(tmp_path / "a", **{"1": rows([0, 1])})
    with pytest.raises(UserError, match=r"relaxed_fixed: its window of 10 s needs the rate of the rows.*add --fps"):
        score_folder(plain, Reading(plain), CHOLEC80, ["relaxed_fixed"])
    assert set(score_folder(plain, Reading(plain, fps=1.0), CHOLEC80)[0]) == set(CONVENTIONS.names()) - {"calibration"}
    m2cai = load_dataset("m2cai16-workflow")
    results, notes = score_folder(plain, Reading(plain, fps=1.0), m2cai)
    assert set(results) == {"phase_mean", "video_macro", "pooled", "segmental", "transitions", "phakir"}
    assert "relaxed_matlab and relaxed_fixed: left out, for the official script has rules for Cholec80" in notes[-1]
    assert notes[-2].startswith("calibration: left out, for it needs a probability of each phase in each frame")


def test_files_of_one_folder_may_have_different_forms(tmp_path):
    truth = folder(tmp_path / "t", **{str(k): rows([0, 2, 6], 25) for k in range(1, 5)})
    one_hot = "1 0 0 0 0 0 0\n0 0 1 0 0 0 0\n0 0 0 0 0 0 1\n"
    mixed = folder(
        tmp_path / "p", **{"1": "0\n2\n6\n", "2": "Preparation\r\nclipping & cutting\r\n-1\r\n", "3": one_hot}
    )
    (mixed / "video04").write_text(
        "### Frame level recognition: ###\nPreparation ClippingCutting GallbladderRetraction\n"
    )
    with pytest.raises(UserError, match=r"3\.txt: contains one-hot rows.*--phase-order"):
        read_pairs(mixed, Reading(truth), CHOLEC80)
    found = read_pairs(mixed, Reading(truth, phase_order="mtrcnet"), CHOLEC80)
    assert [track.tolist() for track in found.predicted.values()] == [[0, 2, 6], [0, 2, -2], [0, 2, 6], [0, 2, 6]]


def test_background_of_the_data_set_and_of_the_command(tmp_path):
    spec = CHOLEC80.model_copy(update={"background": ("Preparation",)})
    files = folder(tmp_path / "a", **{"1": "0\n1\n0\n2\n"})
    reading = Reading(files, background=("cleaning coagulation",))
    about = score_folder(files, reading, spec)[0]["segmental"]
    assert about["about"]["background"] == ["Preparation", "cleaning coagulation"]
    assert about["per_video"]["video01"]["segments_truth"] == 2
    with pytest.raises(UserError, match="background 'x': no such phase"):
        score_folder(files, Reading(files, background=("x",)), spec)


def test_numbers_that_cannot_be_source_frames_do_not_determine_the_rate(tmp_path):
    """Milliseconds of a long and of a short video, also against frames numbered one by one."""
    for k, count in enumerate((30_000, 500)):
        milliseconds = {"1": rows([0, 1] * count, 40)}
        for truth in (milliseconds, {"1": rows([0, 1] * count)}):
            found = pairs(tmp_path / str(k), milliseconds, truth)
            assert (found.fps, found.about["fps_from"]) == (None, None)


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
            assert result.get(metric) == expected[name].get(metric)
        if "accuracy" in result:
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


# ---------------------------------------------------------------------------------------------- probabilities


def written(name: str, probabilities: np.ndarray, phases: list[int]) -> dict[str, str]:
    """A file of predictions in one of the forms that have probabilities."""
    cells = [",".join(f"{value:.6f}" for value in row) for row in probabilities]
    rows_of = enumerate(zip(phases, cells, strict=True))
    beside = [f"{25 * k},{k}.000,{p},{CHOLEC80.phases[p]},{c}" for k, (p, c) in rows_of]
    header = ",".join(["frame", "time_s", "phase", "phase_name", *(f"p_{phase}" for phase in CHOLEC80.phases)])
    return {
        "columns": {"1": "\n".join([",".join(CHOLEC80.phases), *cells]) + "\n"},
        "beside": {"1": "\n".join([header, *beside]) + "\n"},
        "sparse": {"1": "\n".join([header, *(row for k, row in enumerate(beside) if k != 2)]) + "\n"},
    }[name]


@pytest.mark.parametrize("form", ["columns", "beside", "sparse"])
def test_probabilities_in_files_give_calibration(tmp_path, form):
    random = np.random.default_rng(3)
    truth = [0, 0, 0, 1, 1, 1, 2, 2]
    probabilities = random.dirichlet(np.ones(7), len(truth))
    phases = probabilities.argmax(axis=1).tolist()
    if form != "columns":
        phases[4] = 6  # decoded: not the most probable one
    files = folder(tmp_path / "p", **written(form, probabilities, phases))
    labels = folder(tmp_path / "t", **{"1": rows(truth, 25)})
    results, _ = score_folder(files, Reading(labels), CHOLEC80)
    if form == "sparse":
        phases[2] = NO_PREDICTION
    known = {"video01": np.array(truth)}, {"video01": np.array(phases)}
    expected = evaluate_phases(*known, CHOLEC80.phases, 1.0, scores={"video01": probabilities})
    assert set(results) == set(CONVENTIONS.names())
    for convention, keys in (("calibration", ("ece", "ece_near", "brier")), ("phakir", ("auroc", "f1"))):
        for key in keys:
            for what in ("mean", "pooled"):
                values = (found[convention][key].get(what) or 0 for found in (results, expected))
                assert next(values) == pytest.approx(next(values), rel=1e-4), (key, what)
    assert results["calibration"]["intervals"]["ece_pooled"]["mean"] == results["calibration"]["ece"]["pooled"]


def test_scores_that_are_no_probabilities_give_no_calibration(tmp_path):
    truth, logits = [0, 1, 1], np.array([[3, 0, 0, 0, 0, 0, 0], [0, 4, 0, 0, 0, 0, 0], [0, 2, 1, 0, 0, 0, 0]], float)
    files = folder(tmp_path / "p", **written("beside", logits, truth))
    results, notes = score_folder(files, Reading(folder(tmp_path / "t", **{"1": rows(truth, 25)})), CHOLEC80)
    assert "calibration" not in results
    assert results["phakir"]["auroc"]["mean"] is None
    assert sum("calibration: left out" in note for note in notes) == 1
    path = files / "1.txt"
    text = path.read_text()
    for cell in ("nan", "", "x"):  # columns that the prediction does not need
        path.write_text(text.replace("4.000000", cell))
        again, notes = score_folder(files, Reading(tmp_path / "t"), CHOLEC80)
        assert again["phase_mean"] == results["phase_mean"]
        assert "calibration" not in again
        assert sum("1.txt" in note and "not a number" in note for note in notes) == 1
