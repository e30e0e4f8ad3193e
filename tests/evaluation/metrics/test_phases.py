"""Every convention against published numbers, hand-made tables, restatements of the definitions, and its properties."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score, precision_recall_fscore_support

from configs.errors import UserError
from evaluation.metrics.conventions import CONVENTIONS
from evaluation.metrics.counts import NO_PREDICTION, PhasePair
from evaluation.metrics.phases import majority_phase, unavailable_conventions
from evaluation.metrics.relaxed import CHOLEC80, relaxed_right, relaxed_window_frames
from tests.evaluation.in_json import evaluate_phases

CHOLEC80_PHASES = CHOLEC80.phases
ABC = ("A", "B", "C")
METRICS = ("precision", "recall", "jaccard", "f1")

# The worked example of docs/evaluation.md.
EXAMPLE_TRUTH = {"v1": "AAAABBBBBB", "v2": "AABBBBCCCC"}
EXAMPLE_PREDICTED = {"v1": "AAABBBBBBC", "v2": "AAABBBCCCC"}


def ids(text: str) -> np.ndarray:
    """Phase ids from letters or from digits counted from 1; '-' is no label."""
    return np.array([-1 if c == "-" else ord(c) - (ord("A") if c.isalpha() else ord("1")) for c in text], dtype=np.int8)


def score(truth: dict[str, str], predicted: dict[str, str], fps: float = 1.0, phases=ABC, **options) -> dict:
    return evaluate_phases(
        {k: ids(v) for k, v in truth.items()}, {k: ids(v) for k, v in predicted.items()}, phases, fps, **options
    )


def means(result: dict) -> dict[str, float]:
    return {metric: result[metric]["mean"] for metric in ("accuracy", *METRICS)}


# ------------------------------------------------------------------------------------- published numbers


def tmrnet(shared_data: Path, folder: str, skip: int) -> dict[str, np.ndarray]:
    files = sorted((shared_data / "predictions/tmrnet" / folder).glob("*.txt"))
    assert len(files) == 40
    return {f.name[:7]: np.loadtxt(f, dtype=int)[skip:, 1].astype(np.int8) for f in files}


@pytest.mark.parametrize(("rows", "skip"), [("all_rows", 0), ("skip_first_row", 1)])
def test_published_model_gives_the_official_numbers(shared_data, rows, skip):
    expected = json.loads((shared_data / "predictions/tmrnet/expected.json").read_text())[rows]
    truth, predicted = tmrnet(shared_data, "gt-phase", skip), tmrnet(shared_data, "phase", skip)
    results = evaluate_phases(truth, predicted, CHOLEC80_PHASES, 1.0)
    assert list(results) == [name for name in CONVENTIONS.names() if name != "calibration"]
    for convention, metrics in expected.items():
        for metric, (mean, std) in metrics.items():
            found = results[convention][metric]
            assert found["mean"] == pytest.approx(mean, abs=0.01), (convention, metric)
            assert found["std"] == pytest.approx(std, abs=0.01), (convention, metric)
    assert results["pooled"]["video_accuracy"] == pytest.approx(results["phase_mean"]["accuracy"])


# ------------------------------------------------------------------------------------- hand-computed tables


def test_worked_example_phase_mean():
    result = score(EXAMPLE_TRUTH, EXAMPLE_PREDICTED)["phase_mean"]
    # Phase A: 3 of 3 and 2 of 3 right; B: 5 of 6 and 3 of 3; C only in video 2 (its false frame in video 1 is ignored).
    by_hand = {
        "precision": [(100 + 200 / 3) / 2, (500 / 6 + 100) / 2, 100],
        "recall": [(75 + 100) / 2, (500 / 6 + 75) / 2, 100],
        "jaccard": [(75 + 200 / 3) / 2, (500 / 7 + 75) / 2, 100],
        "f1": [(600 / 7 + 80) / 2, (1000 / 12 + 600 / 7) / 2, 100],
    }
    for metric, per_phase in by_hand.items():
        assert result[metric]["mean"] == pytest.approx(np.mean(per_phase))
        assert result[metric]["std"] == pytest.approx(np.std(per_phase, ddof=1))
        assert [result["per_phase"][p][metric]["mean"] for p in ABC] == pytest.approx(per_phase)
    assert result["accuracy"] == {"mean": pytest.approx(85), "std": pytest.approx(np.std([80, 90], ddof=1))}
    assert [result["per_phase"][p]["videos"] for p in ABC] == [2, 2, 1]
    assert result["per_phase"]["C"]["f1"]["std"] is None
    assert result["per_video"]["v1"]["precision"] == pytest.approx((100 + 500 / 6) / 2)
    precision, recall = np.mean(by_hand["precision"]), np.mean(by_hand["recall"])
    assert result["f1_of_means"] == pytest.approx(2 * precision * recall / (precision + recall))


def test_worked_example_video_macro():
    result = score(EXAMPLE_TRUTH, EXAMPLE_PREDICTED)["video_macro"]
    # Video 1 has A, B and the falsely predicted C, which scores 0; video 2 has all three.
    by_hand = {
        "precision": [(100 + 500 / 6 + 0) / 3, (200 / 3 + 100 + 100) / 3],
        "recall": [(75 + 500 / 6 + 0) / 3, (100 + 75 + 100) / 3],
        "jaccard": [(75 + 500 / 7 + 0) / 3, (200 / 3 + 75 + 100) / 3],
        "f1": [(600 / 7 + 1000 / 12 + 0) / 3, (80 + 600 / 7 + 100) / 3],
    }
    for metric, per_video in by_hand.items():
        assert result[metric]["mean"] == pytest.approx(np.mean(per_video))
        assert result[metric]["std"] == pytest.approx(np.std(per_video, ddof=1))
        assert [result["per_video"][v][metric] for v in ("v1", "v2")] == pytest.approx(per_video)
    assert result["accuracy"]["mean"] == pytest.approx(85)


def test_worked_example_pooled():
    result = score(EXAMPLE_TRUTH, EXAMPLE_PREDICTED)["pooled"]
    # Over both videos: A 5 hits, 6 predicted, 6 true; B 8, 9, 10; C 4, 5, 4.
    by_hand = {
        "precision": [500 / 6, 800 / 9, 80],
        "recall": [500 / 6, 80, 100],
        "jaccard": [500 / 7, 800 / 11, 80],
        "f1": [1000 / 12, 1600 / 19, 800 / 9],
    }
    for metric, per_phase in by_hand.items():
        assert result[metric]["mean"] == pytest.approx(np.mean(per_phase))
        assert result[metric]["std"] == pytest.approx(np.std(per_phase, ddof=1))
        assert [result["per_phase"][p][metric]["mean"] for p in ABC] == pytest.approx(per_phase)
    assert result["accuracy"] == {"mean": pytest.approx(85), "std": None}
    assert result["video_accuracy"] == {"mean": pytest.approx(85), "std": pytest.approx(np.sqrt(50))}
    balanced = [(75 + 500 / 6) / 2, (100 + 75 + 100) / 3]
    assert result["video_balanced_accuracy"]["mean"] == pytest.approx(np.mean(balanced))
    assert [result["per_video"][v]["balanced_accuracy"] for v in ("v1", "v2")] == pytest.approx(balanced)


def test_worked_example_segmental():
    result = score(EXAMPLE_TRUTH, EXAMPLE_PREDICTED)["segmental"]
    # Video 1: AB against ABC, one deletion of three; overlaps A 3/4, B 5/7. Video 2: ABC twice, A 2/3, B 3/4, C 1.
    assert result["edit"] == {"mean": pytest.approx((200 / 3 + 100) / 2), "std": pytest.approx(100 / 3 / np.sqrt(2))}
    for name in ("f1@10", "f1@25", "f1@50"):
        assert result[name]["pooled"] == pytest.approx(2000 / 22)
        assert result[name]["mean"] == pytest.approx((80 + 100) / 2)
    assert result["per_video"]["v1"] == {
        "edit": pytest.approx(200 / 3),
        "f1@10": 80,
        "f1@25": 80,
        "f1@50": 80,
        "segments_truth": 2,
        "segments_predicted": 3,
    }
    assert result["accuracy"]["mean"] == pytest.approx(85)


def test_worked_example_relaxed():
    """At 0.2 fps ten seconds are two samples. Phase 1 ends early by one sample, phase 2 starts late by one."""
    truth, predicted = {"v": "11112222"}, {"v": "11121222"}
    results = score(truth, predicted, fps=0.2, phases=CHOLEC80_PHASES)
    assert means(results["phase_mean"]) == pytest.approx(
        {"accuracy": 75, "precision": 75, "recall": 75, "jaccard": 60, "f1": 75}
    )
    # Both errors are forgiven: five right samples for four true ones, so 125 % is clipped to 100.
    assert means(results["relaxed_fixed"]) == pytest.approx(dict.fromkeys(("accuracy", *METRICS), 100.0))
    # The script marks sample 2 instead of sample 4, so the early error still counts.
    assert means(results["relaxed_matlab"]) == pytest.approx(
        {"accuracy": 87.5, "precision": 100, "recall": 100, "jaccard": 80, "f1": 100}
    )


# ------------------------------------------------------------------------------------- the official script


def official_script(truth: np.ndarray, predicted: np.ndarray, window: int, mask_fault: bool):
    """Evaluate.m line by line, with its indices from 1: Jaccard, precision and recall per phase, and accuracy."""
    n = len(truth)
    gt = dict(enumerate((truth + 1).tolist(), start=1))
    pred = dict(enumerate((predicted + 1).tolist(), start=1))
    updated = {}
    for phase in range(1, 8):
        starts = [i for i in gt if gt[i] == phase and gt.get(i - 1) != phase]
        for start in starts:
            end = start
            while gt.get(end + 1) == phase:
                end += 1
            current = [pred[i] - gt[i] for i in range(start, end + 1)]
            t = min(window, len(current))
            late = {-1, -2} if phase in (6, 7) else {-1}
            early = {1, 2} if phase in (4, 5, 6, 7) else {1}
            for i in range(t):
                if current[i] in late:
                    current[i] = 0
            mask = [value in early for value in current[len(current) - t :]]
            for i, hit in enumerate(mask):
                if hit:
                    current[i if mask_fault else len(current) - t + i] = 0
            updated.update(zip(range(start, end + 1), current, strict=True))
    jaccard, precision, recall = [], [], []
    for phase in range(1, 8):
        in_gt, in_pred = {i for i in gt if gt[i] == phase}, {i for i in pred if pred[i] == phase}
        if not in_gt:
            for column in (jaccard, precision, recall):
                column.append(np.nan)
            continue
        tp = sum(updated[i] == 0 for i in in_gt | in_pred)
        jaccard.append(tp / len(in_gt | in_pred) * 100)
        recall.append(tp * 100 / len(in_gt))
        precision.append(tp * 100 / len(in_pred) if in_pred else (np.inf if tp else np.nan))
    return jaccard, precision, recall, sum(v == 0 for v in updated.values()) / n * 100


def official_means(truths, predictions, window, mask_fault):
    """Main.m: cut to 100, means over videos, mean and std over phases; phases of no video left out."""
    rows = [official_script(t, p, window, mask_fault) for t, p in zip(truths, predictions, strict=True)]
    columns = list(zip(*rows, strict=True))
    result = {"accuracy": (np.mean(columns[3]), np.std(columns[3], ddof=1))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for name, cells in zip(("jaccard", "precision", "recall"), columns[:3], strict=True):
            per_phase = np.nanmean(np.minimum(np.array(cells), 100), axis=0)
            result[name] = (np.nanmean(per_phase), np.nanstd(per_phase, ddof=1))
    return result


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("convention", ["relaxed_matlab", "relaxed_fixed"])
def test_relaxed_equals_a_restatement_of_the_script(convention, seed):
    """Random videos with short runs, missing and repeated phases and every kind of error."""
    rng = np.random.default_rng(seed)
    truths, predictions = [], []
    for _ in range(4):
        runs = rng.integers(1, 30, size=12)
        truth = np.repeat(rng.integers(0, 7, size=12), runs)
        slip = np.where(rng.random(len(truth)) < 0.4, rng.integers(-3, 4, size=len(truth)), 0)
        truths.append(truth.astype(np.int8))
        predictions.append(np.clip(truth + slip, 0, 6).astype(np.int8))
    names = [f"v{k}" for k in range(4)]
    result = evaluate_phases(
        dict(zip(names, truths, strict=True)), dict(zip(names, predictions, strict=True)), CHOLEC80_PHASES, 1.0
    )[convention]
    for metric, (mean, std) in official_means(truths, predictions, 10, convention == "relaxed_matlab").items():
        assert result[metric]["mean"] == pytest.approx(mean)
        assert result[metric]["std"] == pytest.approx(std)


def surgformer_f1(truths, predictions, window):
    """The f1 of Surgformer's Evaluate.m and Main.m: of uncut values, cut at 100; NaN dropped; std over videos."""
    cells = []
    for truth, predicted in zip(truths, predictions, strict=True):
        _, precision, recall, _ = official_script(truth, predicted, window, mask_fault=True)
        row = []
        for p, r in zip(precision, recall, strict=True):
            product, total = np.float64(p) * np.float64(r), np.float64(p) + np.float64(r)
            row.append(2 * product / total)
        cells.append(row)
    table = np.array(cells)
    table[table > 100] = 100
    per_phase, per_video = np.nanmean(table, axis=0), np.nanmean(table, axis=1)
    return np.nanmean(per_phase), np.nanstd(per_video, ddof=1)


@pytest.mark.parametrize("seed", range(5))
def test_surgformer_f1_equals_a_restatement(seed):
    rng = np.random.default_rng(seed)
    truths = [np.repeat(rng.integers(0, 7, 10), rng.integers(1, 30, 10)) for _ in range(4)]
    slips = [np.where(rng.random(len(t)) < 0.5, rng.integers(-3, 4, len(t)), 0) for t in truths]
    predictions = [np.clip(t + slip, 0, 6) for t, slip in zip(truths, slips, strict=True)]
    names = [f"v{k}" for k in range(4)]
    results = evaluate_phases(
        dict(zip(names, truths, strict=True)), dict(zip(names, predictions, strict=True)), CHOLEC80_PHASES, 1.0
    )
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)
        mean, std = surgformer_f1(truths, predictions, 10)
    assert results["relaxed_matlab"]["f1_surgformer"] == {"mean": pytest.approx(mean), "std": pytest.approx(std)}
    assert [name for name, result in results.items() if "f1_surgformer" in result] == ["relaxed_matlab"]


def test_surgformer_f1_by_hand():
    """The example of docs/evaluation.md, and beside it a video whose second phase is never right."""
    results = score({"v1": "11112222"}, {"v1": "11121222"}, 0.2, CHOLEC80_PHASES)["relaxed_matlab"]
    # Phase 1: H 4 of P 4 and G 4: 100. Phase 2: H 4 (sample 5 counts for it too) of P 4 and G 4: 100.
    assert results["f1_surgformer"]["mean"] == pytest.approx(100)
    results = score({"v1": "1" * 30 + "2" * 30}, {"v1": "1" * 40 + "3" * 20}, 1.0, CHOLEC80_PHASES)["relaxed_matlab"]
    # Phase 1: H 40 of P 40 and G 30, so P 100 and R 133.3 uncut: 114.3, cut to 100. Phase 2 is never predicted, yet ten
    # of its frames are forgiven: x/0, dropped by the copy and cut to 100 by ours.
    assert results["f1_surgformer"] == {"mean": pytest.approx(100), "std": None}
    assert results["f1"]["mean"] == pytest.approx((100 + 50) / 2)
    results = score({"v1": "1" * 30 + "2" * 30}, {"v1": "1" * 30 + "4" * 29 + "2"}, 1.0, CHOLEC80_PHASES)
    below = score({"v1": "1" * 30 + "2" * 30}, {"v1": "2" * 30 + "1" * 30}, 0.01, CHOLEC80_PHASES)["relaxed_matlab"]
    assert results["relaxed_matlab"]["f1_surgformer"]["mean"] == pytest.approx(
        (100 + 2 * 100 * (1 / 30) / (1 + 1 / 30)) / 2
    )
    assert below["f1_surgformer"] == {"mean": None, "std": None}  # 0/0 everywhere: dropped, where ours is 0
    assert below["f1"]["mean"] == 0


def relaxed(truth: str, predicted: str, window: int, mask_fault: bool) -> str:
    """Which samples count as right, as a string of 1 and 0."""
    video = PhasePair("v", ids(truth).astype(np.int16), ids(predicted).astype(np.int16))
    return "".join(map(str, relaxed_right(video, window / 10, mask_fault).astype(int)))


@pytest.mark.parametrize(
    ("truth", "predicted", "matlab", "fixed"),
    [
        # Late and early transitions in the middle of the window.
        ("1111122222", "1111112222", "1111111111", "1111111111"),
        # The mask fault: the early transition in sample 5, second of the last two, marks the second of the first two.
        ("1111122222", "1111222222", "1111011111", "1111111111"),
        # The mask fault counts a sample as right that is clearly wrong: sample 2 has phase 7.
        ("1111122222", "1711222222", "1111011111", "1011111111"),
        # A run shorter than the window: t is its length, and both rules see the whole of it.
        ("1112333", "1113333", "1111111", "1111111"),
        # Two steps are forgiven for packaging (5) ending early and for cleaning (6) starting late, not elsewhere.
        ("5555666", "5557666", "1110111", "1111111"),
        ("4444666", "4444466", "1111111", "1111111"),
        ("2222444", "2224444", "1110111", "1110111"),
        ("3333444", "3333244", "1111011", "1111011"),
        # An unlabelled frame in the last window marks none of the first, and none in the first is marked.
        ("1111-1222", "711111222", "011101111", "011101111"),
        ("1-1112222", "111122222", "101101111", "101111111"),
    ],
)
def test_relaxed_sample_by_sample(truth, predicted, matlab, fixed):
    assert relaxed(truth, predicted, 2, mask_fault=True) == matlab
    assert relaxed(truth, predicted, 2, mask_fault=False) == fixed


def test_relaxed_prediction_without_a_phase_of_the_truth():
    """Phase 2 is never predicted: no precision (0/0) where nothing is forgiven, 100 (x/0 cut) where something is."""
    far = score({"v": "1" * 30 + "2" * 30}, {"v": "1" * 30 + "5" * 30}, phases=CHOLEC80_PHASES)["relaxed_matlab"]
    second = far["per_phase"]["CalotTriangleDissection"]
    assert second["precision"]["mean"] is None
    assert (second["recall"]["mean"], second["jaccard"]["mean"], second["f1"]["mean"]) == (0, 0, 0)
    assert far["precision"]["mean"] == 100  # the mean is over phase 1 alone
    assert far["recall"]["mean"] == 50
    near = score({"v": "1" * 30 + "2" * 30}, {"v": "1" * 60}, phases=CHOLEC80_PHASES)["relaxed_matlab"]
    assert near["per_phase"]["CalotTriangleDissection"]["precision"]["mean"] == 100
    assert near["per_phase"]["CalotTriangleDissection"]["recall"]["mean"] == pytest.approx(100 / 3)


def test_relaxed_phase_absent_in_truth_is_left_out_even_where_predicted():
    result = score({"v": "1" * 40}, {"v": "1" * 30 + "4" * 10}, phases=CHOLEC80_PHASES)["relaxed_fixed"]
    assert result["per_phase"]["GallbladderDissection"]["precision"]["mean"] is None
    assert result["precision"]["mean"] == 100
    assert result["recall"]["mean"] == 75
    assert result["recall"]["std"] is None  # one phase has no standard deviation


def test_relaxed_window_is_in_seconds():
    assert relaxed_window_frames(1) == 10
    assert relaxed_window_frames(25) == 250
    assert relaxed_window_frames(0.1) == 1
    assert relaxed_window_frames(0.19) == 1
    assert relaxed_window_frames(0.09) == 0
    truth, predicted = np.repeat([0, 1], 100).astype(np.int8), np.repeat([0, 1], [115, 85]).astype(np.int8)
    slow = evaluate_phases({"v": truth}, {"v": predicted}, CHOLEC80_PHASES, 1.0)["relaxed_fixed"]
    fast = evaluate_phases({"v": np.repeat(truth, 25)}, {"v": np.repeat(predicted, 25)}, CHOLEC80_PHASES, 25.0)[
        "relaxed_fixed"
    ]
    assert means(slow) == pytest.approx(means(fast))
    assert slow["accuracy"]["mean"] == pytest.approx(97.5)  # ten of the fifteen late seconds are forgiven
    assert slow["about"]["window_s"] == 10.0


# ------------------------------------------------------------------------------------- unlabelled frames


def test_unlabelled_frames_are_not_counted():
    dense = score(EXAMPLE_TRUTH, EXAMPLE_PREDICTED)
    sparse = score(
        {k: "-".join(v) + "---" for k, v in EXAMPLE_TRUTH.items()},
        {k: "C".join(v) + "ABC" for k, v in EXAMPLE_PREDICTED.items()},
    )
    assert sparse["transitions"]["transitions_truth"] == 0  # they happen at unknown times
    for name, result in dense.items():
        assert name == "transitions" or {k: v for k, v in sparse[name].items() if k != "about"} == {
            k: v for k, v in result.items() if k != "about"
        }
        assert sparse[name]["about"]["frames"] == 20


def test_relaxed_windows_stay_in_time_where_only_some_frames_are_labelled():
    """With every fifth frame labelled, the window covers ten frames, which have two labels, and not ten labels."""
    truth, predicted = "----".join("1" * 10 + "2" * 10), "1" * 70 + "2" * 26
    sparse = relaxed(truth, predicted, 10, mask_fault=False)
    assert sparse[::5] == "1" * 10 + "11" + "00" + "1" * 6
    assert set("".join(sparse[i] for i in range(len(sparse)) if i % 5)) == {"0"}


def test_video_without_labels_is_left_out_and_named():
    result = score({"v1": "AAB", "v2": "---"}, {"v1": "ABB", "v2": "AAA"})["phase_mean"]
    assert list(result["per_video"]) == ["v1"]
    assert result["about"]["videos"] == 1
    assert result["about"]["videos_without_labels"] == ["v2"]
    assert result["accuracy"]["std"] is None


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_a_frame_without_a_prediction_is_wrong_under_every_convention(data):
    """Like a prediction of a phase that never occurs in the truth, except that no phase's precision is affected."""
    truth = np.repeat(data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=6)), data.draw(st.integers(1, 15)))
    holes = np.array(data.draw(st.lists(st.booleans(), min_size=len(truth), max_size=len(truth))))
    predicted = np.where(holes, NO_PREDICTION, truth)
    results = evaluate_phases({"v": truth}, {"v": predicted}, CHOLEC80_PHASES, 1.0)
    for name, result in results.items():
        if "accuracy" in result:
            assert result["accuracy"]["mean"] == pytest.approx(100 * (1 - holes.mean())), name
    strict = results["phase_mean"]["per_phase"]
    for c, phase in enumerate(CHOLEC80_PHASES):
        if (truth == c).any():
            assert strict[phase]["recall"]["mean"] == pytest.approx(100 * (1 - holes[truth == c].mean()))
            assert strict[phase]["precision"]["mean"] == (None if holes[truth == c].all() else 100)
    if holes.any():
        assert results["segmental"]["edit"]["mean"] < 100


# ------------------------------------------------------------------------------------- properties


@st.composite
def videos(draw, classes: int = 7, perfect: bool = False):
    """Truth and prediction of one to four videos: runs of phases, with or without unlabelled frames."""
    truth, predicted = {}, {}
    for k in range(draw(st.integers(1, 4))):
        runs = draw(st.lists(st.tuples(st.integers(-1, classes - 1), st.integers(1, 15)), min_size=1, max_size=8))
        track = np.repeat([p for p, _ in runs], [n for _, n in runs]).astype(np.int8)
        track[0] = max(track[0], 0)
        seed = draw(st.integers(0, 2**16))
        noisy = np.where(np.random.default_rng(seed).random(len(track)) < 0.3, (track + 1) % classes, track)
        truth[f"v{k}"] = track
        predicted[f"v{k}"] = np.maximum(track if perfect else noisy, 0).astype(np.int8)
    return truth, predicted


@settings(deadline=None, max_examples=40)
@given(videos(perfect=True))
def test_perfect_prediction_is_100_everywhere(pair):
    names = [name for name in CONVENTIONS.names() if name not in ("transitions", "calibration")]
    for name, result in evaluate_phases(*pair, CHOLEC80_PHASES, 1.0, names).items():
        keys = [k for k in result if k not in ("about", "per_phase", "per_video", "f1_of_means", "auroc")]
        assert all(result[k]["mean"] == pytest.approx(100) for k in keys), name
        assert all(result[k].get("pooled", 100) == pytest.approx(100) for k in keys), name


@settings(deadline=None, max_examples=40)
@given(videos(), st.randoms(use_true_random=False))
def test_order_and_names_of_videos_change_nothing(pair, random):
    truth, predicted = pair
    names = list(truth)
    shuffled = random.sample(names, len(names))
    renamed = {f"w{i}": name for i, name in enumerate(shuffled)}
    before = evaluate_phases(truth, predicted, CHOLEC80_PHASES, 1.0)
    after = evaluate_phases(
        {new: truth[old] for new, old in renamed.items()},
        {new: predicted[old] for new, old in renamed.items()},
        CHOLEC80_PHASES,
        1.0,
    )
    for name in before:
        for key, value in before[name].items():
            if isinstance(value, dict) and "mean" in value:
                assert after[name][key] == pytest.approx(value, abs=1e-9), (name, key)
        assert {new: after[name]["per_video"][new] for new in renamed} == {
            new: before[name]["per_video"][old] for new, old in renamed.items()
        }


@settings(deadline=None, max_examples=60)
@given(videos())
def test_relaxed_fixed_is_never_below_strict(pair):
    results = evaluate_phases(*pair, CHOLEC80_PHASES, 1.0, ["phase_mean", "relaxed_fixed", "relaxed_matlab"])
    for convention in ("relaxed_fixed", "relaxed_matlab"):
        for metric in ("accuracy", *METRICS):
            assert results[convention][metric]["mean"] >= (results["phase_mean"][metric]["mean"] or 0) - 1e-9


@settings(deadline=None, max_examples=40)
@given(videos(classes=4))
def test_strict_conventions_equal_scikit_learn(pair):
    truth, predicted = pair
    results = evaluate_phases(truth, predicted, ("a", "b", "c", "d"), 1.0)
    labelled = [(truth[v][truth[v] >= 0], predicted[v][truth[v] >= 0]) for v in truth]

    def macro(y, p):
        return np.array(precision_recall_fscore_support(y, p, average="macro", zero_division=0)[:3]) * 100

    whole = tuple(map(np.concatenate, zip(*labelled, strict=True)))
    names = ("precision", "recall", "f1")
    assert [results["pooled"][m]["mean"] for m in names] == pytest.approx(macro(*whole))
    assert [results["video_macro"][m]["mean"] for m in names] == pytest.approx(
        np.mean([macro(y, p) for y, p in labelled], axis=0)
    )
    assert results["pooled"]["accuracy"]["mean"] == pytest.approx(100 * accuracy_score(*whole))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        balanced = [balanced_accuracy_score(y, p) for y, p in labelled]
    assert results["pooled"]["video_balanced_accuracy"]["mean"] == pytest.approx(100 * np.mean(balanced))
    cells = np.full((2, len(labelled), 4), np.nan)
    for v, (y, p) in enumerate(labelled):
        present = np.unique(y)
        cells[:, v, present] = precision_recall_fscore_support(y, p, labels=present, zero_division=0)[1:3]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        per_phase = np.nanmean(cells, axis=1)
    for row, metric in zip(per_phase, ("recall", "f1"), strict=True):
        assert results["phase_mean"][metric]["mean"] == pytest.approx(100 * np.nanmean(row))


@settings(deadline=None, max_examples=20)
@given(videos())
def test_results_are_json_without_nan(pair):
    results = evaluate_phases(*pair, CHOLEC80_PHASES, 1.0)
    assert json.loads(json.dumps(results, allow_nan=False)) == results


# ------------------------------------------------------------------------------------- content of a result


def test_every_result_says_what_it_is():
    results = score(EXAMPLE_TRUTH, EXAMPLE_PREDICTED, fps=5.0, split="test")
    assert list(results) == ["phase_mean", "video_macro", "pooled", "transitions", "phakir", "segmental"]
    for name, result in results.items():
        about = result["about"]
        assert about["convention"] == name
        assert (about["split"], about["fps"], about["videos"], about["seeds"]) == ("test", 5.0, 2, 1)
        assert "percent" in about["unit"]
        assert about["absent_phase"]
        assert "n - 1" in about["std"]


def test_relaxed_rules_exist_for_cholec80_alone():
    swapped = (*CHOLEC80_PHASES[:4], CHOLEC80_PHASES[6], CHOLEC80_PHASES[5], CHOLEC80_PHASES[4])
    for phases in (ABC, tuple("ABCDEFG"), swapped):
        assert set(unavailable_conventions(phases)) == {"relaxed_matlab", "relaxed_fixed"}
    assert unavailable_conventions(CHOLEC80_PHASES) == {}
    assert unavailable_conventions([name.lower() for name in CHOLEC80_PHASES]) == {}
    with pytest.raises(UserError, match=r"relaxed_fixed.*Cholec80"):
        score(EXAMPLE_TRUTH, EXAMPLE_PREDICTED, conventions=["relaxed_fixed"])


def test_relaxed_windows_need_a_rate():
    track = {"v1": ids("1122")}
    results = evaluate_phases(track, track, CHOLEC80_PHASES, None)
    assert set(results) == {"phase_mean", "video_macro", "pooled", "segmental", "phakir"}
    assert results["pooled"]["about"]["fps"] is None
    unavailable = {"relaxed_matlab", "relaxed_fixed", "transitions"}
    assert set(unavailable_conventions(CHOLEC80_PHASES, None)) == unavailable
    with pytest.raises(UserError, match=r"relaxed_matlab: its window of 10 s needs the rate.*--fps"):
        evaluate_phases(track, track, CHOLEC80_PHASES, None, ["relaxed_matlab"])


@pytest.mark.parametrize(
    ("truth", "predicted", "options", "message"),
    [
        ({"v1": "AB"}, {"v2": "AB"}, {}, r"v1: has a ground truth but no prediction; add the prediction, or leave"),
        ({"v1": "AB"}, {"v1": "AB", "v2": "A"}, {}, r"v2: has a prediction but no ground truth"),
        ({"v1": "AB"}, {"v1": "ABC"}, {}, r"v1: truth has 2 frames, but the prediction 3"),
        ({"v1": "AD"}, {"v1": "AB"}, {}, r"v1: truth has phase ids outside 0 to 2"),
        ({"v1": "-AA"}, {"v1": "DA-"}, {}, r"v1: row 2 predicts phase -1"),
        ({"v1": "--"}, {"v1": "AB"}, {}, r"no video has phase labels"),
        ({}, {}, {}, r"no video has phase labels"),
        (
            {"v1": "A"},
            {"v1": "A"},
            {"conventions": ["phasemean"]},
            r"unknown convention 'phasemean'; choose from phase_mean",
        ),
        ({"v1": "A"}, {"v1": "A"}, {"fps": 0.0}, r"fps 0.0: .*between 0\.001 and 10000 frames"),
        ({"v1": "A"}, {"v1": "A"}, {"fps": float("nan")}, r"fps nan"),
    ],
)
def test_what_cannot_be_compared_is_one_clear_line(truth, predicted, options, message):
    with pytest.raises(UserError, match=message) as caught:
        score(truth, predicted, **options)
    assert "\n" not in str(caught.value)


def test_counting_is_vectorised_over_frames():
    """Counts the executed lines of the package, which do not depend on the machine: far fewer than there are frames."""
    program = """
import sys, numpy as np
from evaluation.metrics.phases import evaluate_phases
from evaluation.metrics.relaxed import CHOLEC80
rng = np.random.default_rng(0)
truth, predicted = {}, {}
for v in range(40):
    track = np.sort(rng.integers(0, 7, 2455)).astype(np.int8)
    truth[f"v{v}"] = track
    wrong = np.repeat(rng.random(50) < 0.2, 50)[:2455]
    predicted[f"v{v}"] = np.where(wrong, (track + 1) % 7, track).astype(np.int8)
lines = 0
def count(frame, event, argument):
    global lines
    if "/evaluation/metrics/" not in frame.f_code.co_filename:
        return None
    lines += event == "line"
    return count
sys.settrace(count)
found = evaluate_phases(truth, predicted, CHOLEC80.phases, 1.0)
sys.settrace(None)
assert len(found) == 8
assert "sklearn" not in __import__("sys").modules and "torch" not in __import__("sys").modules
print(lines)
"""
    project = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=project)
    assert 0 < int(done.stdout) < 40 * 2455 / 2


def test_majority_phase() -> None:
    assert majority_phase([ids("AAB-"), ids("BB---")]) == 1
    assert majority_phase([ids("BA")]) == 0
    for tracks in ([ids("--")], []):
        with pytest.raises(UserError, match="no training video has phase labels"):
            majority_phase(tracks)
