"""Comparing models: finding their results, keeping seeds and videos apart, and refusing what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from configs.errors import UserError
from configs.load import load_dataset
from evaluation.comparison import Place, require_use
from evaluation.external import Reading
from evaluation.metrics.statistics import holm, paired_permutation
from tests.evaluation.in_json import compare_models, evaluate_phases

CHOLEC80 = load_dataset("cholec80")
RNG = np.random.default_rng(0)
TRUTH = {f"video{k:02d}": np.sort(RNG.integers(0, 7, 80)) for k in range(1, 9)}


def predictions(noise: float, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: np.where(rng.random(80) < noise, rng.integers(0, 7, 80), track) for name, track in TRUTH.items()}


def results(noise: float, seed: int, truth=TRUTH, fps: float = 1.0):
    found = predictions(noise, seed)
    return evaluate_phases(truth, {name: found[name] for name in truth}, CHOLEC80.phases, fps, split="test")


def save_run(folder: Path, name: str, found) -> None:
    path = folder / name / "evaluate" / "test" / "metrics.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"split": "test", "phases": {"temporal": found, "frame": {}}, "tools": None}))


@pytest.fixture
def place(tmp_path) -> Place:
    """Two models with three seeds each, as runs."""
    for seed in range(3):
        save_run(tmp_path / "runs", f"good-{seed}", results(0.1, seed))
        save_run(tmp_path / "runs", f"bad-{seed}", results(0.3, 10 + seed))
    return Place(tmp_path / "runs", "test", CHOLEC80)


def test_two_runs_as_the_statistics_have_them(place, tmp_path):
    found = compare_models(["good-0", "bad-0"], place, out=tmp_path / "c.json")
    assert json.loads((tmp_path / "c.json").read_text()) == found
    (pair,) = found["comparisons"]
    rows = [results(*one)["video_macro"]["per_video"] for one in ((0.1, 0), (0.3, 10))]
    assert set(pair["metrics"]) == {"accuracy", "precision", "recall", "jaccard", "f1"}
    for metric, entry in pair["metrics"].items():
        expected = paired_permutation(*({video: row[metric] for video, row in videos.items()} for videos in rows))
        assert entry | expected.to_json() == entry, metric
        assert entry["first"]["mean"] - entry["second"]["mean"] == pytest.approx(entry["difference"])
        assert entry["low"] <= entry["difference"] <= entry["high"]
        assert entry["first"]["std"] is None
    # In video_macro the mean over videos is the model's number.
    assert pair["metrics"]["f1"]["first"]["mean"] == pytest.approx(results(0.1, 0)["video_macro"]["f1"]["mean"])
    assert found["about"]["convention"] == "video_macro"
    assert (found["about"]["split"], found["about"]["videos"], found["about"]["seeds"]) == ("test", 8, [1, 1])


def test_seeds_are_averaged_per_video_and_their_std_is_separate(place):
    found = compare_models(["good-0,good-1, good-2", "bad-0,bad-1,bad-2"], place, metrics=["accuracy"])
    (pair,) = found["comparisons"]
    entry = pair["metrics"]["accuracy"]
    seeds = [results(0.1, seed)["video_macro"]["accuracy"]["mean"] for seed in range(3)]
    assert entry["first"] == {"mean": pytest.approx(np.mean(seeds)), "std": pytest.approx(np.std(seeds, ddof=1))}
    assert entry["videos"] == 8  # not 24: three seeds on one video are not three patients
    for video, difference in entry["per_video"].items():
        each = [
            np.mean([results(noise, base + s)["video_macro"]["per_video"][video]["accuracy"] for s in range(3)])
            for noise, base in ((0.1, 0), (0.3, 10))
        ]
        assert difference == pytest.approx(each[0] - each[1])
    assert found["models"][0] == {
        "name": "good-0 (3 seeds)",
        "members": ["good-0", "good-1", "good-2"],
        "seeds": 3,
    }


def test_holm_is_over_all_tests(place):
    found = compare_models(["good-0", "bad-0", "good-1"], place, convention="segmental")
    entries = [entry for pair in found["comparisons"] for entry in pair["metrics"].values()]
    assert [pair["second"] for pair in found["comparisons"]] == ["bad-0", "good-1"]
    assert len(entries) == 8
    corrected = holm({str(k): entry["p_value"] for k, entry in enumerate(entries)})
    assert [entry["p_holm"] for entry in entries] == list(corrected.values())
    assert found["about"]["correction"] == "Holm over 8 tests"


def test_runs_files_and_folders_are_the_same_model(place, tmp_path):
    folders = {}
    for name, tracks in {"truth": TRUTH, "good": predictions(0.1, 0), "bad": predictions(0.3, 10)}.items():
        folders[name] = tmp_path / name
        folders[name].mkdir()
        for video, track in tracks.items():
            (folders[name] / f"{video}.txt").write_text("".join(f"{phase}\n" for phase in track))
    (tmp_path / "good.json").write_text(json.dumps(results(0.1, 0)))
    runs = compare_models(["good-0", "bad-0"], place)
    mixed = Place(place.runs, "test", CHOLEC80, Reading(folders["truth"]))
    for first, second in (
        (tmp_path / "good.json", "bad-0"),
        (folders["good"], folders["bad"]),
        (place.runs / "good-0", place.runs / "bad-0/evaluate/test"),
    ):
        found = compare_models([str(first), str(second)], mixed)
        assert found["comparisons"][0]["metrics"] == runs["comparisons"][0]["metrics"]


def test_options_without_an_effect_on_any_model_are_refused(place, tmp_path):
    (tmp_path / "theirs").mkdir()
    theirs = str(tmp_path / "theirs")
    require_use(["good-0,good-1", "bad-0"], place.runs, reading=False, split=True)
    require_use(["good-0", theirs], place.runs, reading=True, split=True)
    with pytest.raises(UserError, match="--ground-truth: all these models are evaluated already"):
        require_use(["good-0,good-1", "bad-0"], place.runs, reading=True, split=False)
    with pytest.raises(UserError, match="--split: no model here is a run"):
        require_use([theirs, theirs], place.runs, reading=True, split=True)


def test_a_number_that_a_seed_lacks_is_left_out_of_the_pair(place):
    holes = results(0.1, 5)
    holes["video_macro"]["per_video"]["video03"]["f1"] = None
    save_run(place.runs, "holes", holes)
    entry = compare_models(["good-0,holes", "bad-0"], place)["comparisons"][0]["metrics"]["f1"]
    assert entry["per_video"]["video03"] is None
    assert entry["videos"] == 7
    assert entry["first"]["mean"] - entry["second"]["mean"] == pytest.approx(entry["difference"])


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["good-0"], {}, "needs two models or more"),
        (["good-0", "no"], {}, "no: no such run or folder"),
        (["good-0", "plain"], {}, r"plain: run evaluate first .*plain/evaluate/test/metrics\.json"),
        (["good-0", "bad-0,bad-0"], {}, "name each seed's run once"),
        (["good-0", ","], {}, "name each seed's run once"),
        (["good-0", "fewer"], {}, "good-0 and fewer: only good-0 was evaluated on video08"),
        (["good-0", "short"], {}, "640 and 632 frames; evaluate both on the same frames"),
        (["good-0", "faster"], {}, r"1\.0 and 5\.0 fps"),
        (["good-0,fewer", "bad-0"], {}, "was evaluated on video08"),
        (["good-0", "tools"], {}, "contains no phase results under the convention video_macro"),
        (["good-0", "bad-0"], {"convention": "x"}, "unknown convention 'x'"),
        (["good-0", "bad-0"], {"metrics": ["edit"]}, "--metric edit: video_macro has accuracy, precision"),
    ],
)
def test_what_cannot_be_compared_is_one_line(names, options, message, place):
    save_run(place.runs, "fewer", results(0.1, 0, {name: TRUTH[name] for name in list(TRUTH)[:-1]}))
    save_run(place.runs, "short", results(0.1, 0, {n: np.r_[t[:-1], -1] for n, t in TRUTH.items()}))
    save_run(place.runs, "faster", results(0.1, 0, fps=5.0))
    save_run(place.runs, "tools", {})
    (place.runs / "plain").mkdir()
    with pytest.raises(UserError, match=message) as error:
        compare_models(names, place, **options)
    assert "\n" not in str(error.value)
