"""Comparisons of encoders: numbers against a table made by hand, sentences, and the page."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.encoder_comparison import PROBE
from evaluation.encoders import EncoderFacts, Encoders, EncodersAbout, Training, compare_encoders
from evaluation.reports.encoders import (
    encoders_notes,
    encoders_tables,
    ranking_sentences,
    write_encoders_csv,
    write_encoders_page,
)
from tests.stage2_temporal.toy import spec

TRUTH = {f"v{number}": np.array([0, 0, 1, 1], np.int8) for number in range(4)}
# Correct frames of four, of each video: {(encoder, head, seed): ...}. Accuracy in percent is 25 times that.
CORRECT = {
    ("a", PROBE, None): (3, 3, 3, 3),
    ("a", "lstm", 0): (4, 4, 4, 4),
    ("a", "lstm", 1): (4, 2, 4, 2),
    ("b", PROBE, None): (4, 4, 4, 4),
    ("b", "lstm", 0): (2, 2, 2, 2),
    ("b", "lstm", 1): (4, 4, 2, 2),
}


def predicted(correct: int) -> np.ndarray:
    labels = np.array([0, 0, 1, 1], np.int8)
    labels[correct:] = 2
    return labels


def trainings(correct: dict[Any, tuple[int, ...]] = CORRECT) -> list[Training]:
    """Two folds, each with two test videos."""
    return [
        Training(
            encoder,
            head,
            fold,
            seed,
            {f"v{v}": predicted(counts[v]) for v in (2 * fold, 2 * fold + 1)},
            {"folder": "=x"},
        )
        for (encoder, head, seed), counts in correct.items()
        for fold in (0, 1)
    ]


def about(**changes: Any) -> EncodersAbout:
    values = {"title": "<b>t</b>", "dataset": "toy", "simulated": False, "fps": 1.0, "folds": "2 folds"}
    values |= {"videos": list(TRUTH), "frames": 16, "seeds": (0, 1), "reference": None}
    return EncodersAbout(**{**values, **changes})


def facts(name: str, **changes: Any) -> EncoderFacts:
    found = EncoderFacts(
        backbone=name,
        weights="random",
        finetuned=name == "b",
        crop_px=32 if name == "a" else (32, 64),
        embedding_dim=6,
        parameters=2_000_000 if name == "a" else 3_000_000,
        size_bytes=1_500_000,
        frames_per_s=30.0,
        encoded_per_s=50.0 if name == "a" else 40.0,
        finetuning_s=12.0 if name == "b" else None,
    )
    return replace(found, **changes)


def compared(correct: dict[Any, tuple[int, ...]] = CORRECT, **changes: Any) -> Encoders:
    known = {name: facts(name) for name in ("a", "b")}
    return compare_encoders(about(**changes), TRUTH, spec(), trainings(correct), known, {}, ["lstm"])


def test_means_are_over_videos_and_spread_is_over_seeds() -> None:
    rows = {row.name: row.scores for row in compared().encoders}
    lstm = rows["a"]["lstm"].metrics["accuracy"]
    assert (lstm.mean, lstm.std) == (87.5, pytest.approx(np.std([100, 75], ddof=1)))
    assert rows["b"]["lstm"].metrics["accuracy"].mean == 62.5
    probe = rows["a"][PROBE].metrics["accuracy"]
    assert (probe.mean, probe.std) == (75.0, None)  # a probe has no seeds


def test_differences_are_paired_by_video_and_against_the_best() -> None:
    comparisons = compared().comparisons
    (pair,) = comparisons["lstm"]
    found = pair.metrics["accuracy"]
    assert (pair.first, pair.second, found.difference) == ("a", "b", 25.0)
    # means over seeds: a 100, 75, 100, 75; b 75, 75, 50, 50
    assert found.per_video == {"v0": 25.0, "v1": 0.0, "v2": 50.0, "v3": 25.0}
    assert (comparisons[PROBE][0].first, comparisons[PROBE][0].metrics["accuracy"].difference) == ("b", 25.0)


def test_differences_are_shown_as_those_to_the_reference() -> None:
    table = next(table for table in encoders_tables(compared()) if "difference" in table.title)
    cells = dict(table.rows)
    assert cells["a"] == ["-25.0 [-25.0, -25.0]", "reference"]
    assert cells["b"][0] == "reference"
    assert cells["b"][1].startswith("-25.0 [-4")
    named = next(table for table in encoders_tables(compared(reference="b")) if "difference" in table.title)
    assert [cells[0] for _, cells in named.rows] == ["-25.0 [-25.0, -25.0]", "reference"]
    assert dict(named.rows)["a"][1].startswith("+25.0 [")


def test_heads_that_look_into_the_future_are_marked() -> None:
    for offline, title in ((None, "lstm"), (["lstm"], "lstm (offline)")):
        tables = encoders_tables(compared(offline=offline))
        assert all(table.columns == ["frame probe", title] for table in tables[:-1])


def test_whether_the_probe_ranks_as_the_head_does() -> None:
    (sentence,) = ranking_sentences(compared())
    assert sentence == "Under lstm the encoders rank a > b; by the frame probe they rank b > a (Kendall's tau -1.00)."
    same = {**CORRECT, ("b", PROBE, None): (2, 2, 2, 2)}
    (sentence,) = ranking_sentences(compared(same))
    assert sentence == "Under lstm the encoders rank as by the frame probe: a > b (Kendall's tau 1.00)."
    equal = {**CORRECT, ("b", PROBE, None): (3, 3, 3, 3)}
    assert "not defined" in ranking_sentences(compared(equal))[0]


def test_a_seed_without_all_folds_does_not_count() -> None:
    kept = [one for one in trainings() if (one.encoder, one.seed, one.fold) != ("a", 1, 1)]
    known = {name: facts(name) for name in ("a", "b")}
    result = compare_encoders(about(), TRUTH, spec(), kept, known, {}, ["lstm"])
    row = result.encoders[0].scores["lstm"]
    assert (row.seeds, row.metrics["accuracy"].mean, row.metrics["accuracy"].std) == (1, 100.0, None)
    assert "100.0 (1 seed)" in encoders_tables(result)[0].rows[0][1]
    without = [one for one in trainings() if one.encoder != "a"]
    result = compare_encoders(about(), TRUTH, spec(), without, known, {}, ["lstm"])
    assert encoders_tables(result)[0].rows[0] == ("a", ["-", "-"])
    assert (result.rankings, list(result.comparisons["lstm"])) == ({}, [])


def test_notes_say_what_the_numbers_do_not_show() -> None:
    notes = " ".join(encoders_notes(compared()))
    assert "4 test videos of toy (16 frames at 1 fps), 2 folds; 2 seeds per head." in notes
    assert "A difference whose interval contains 0 is not established." in notes
    assert "chosen on these same videos" in notes
    assert "SIMULATED" not in notes
    assert "chosen on these same videos" not in " ".join(encoders_notes(compared(reference="a")))
    assert "SIMULATED" in encoders_notes(compared(simulated=True))[0]
    trained = replace(compared(), encoders=[replace(compared().encoders[0], facts=facts("a", note="trained on toy"))])
    assert "a: trained on toy." in encoders_notes(trained)


def test_the_csv_has_one_row_per_training_and_no_formula(tmp_path: Path) -> None:
    write_encoders_csv(tmp_path / "e.csv", trainings())
    with (tmp_path / "e.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 12
    assert (rows[0]["encoder"], rows[0]["seed"], rows[0]["test_videos"], rows[0]["folder"]) == ("a", "", "v0 v1", "'=x")


def test_the_page_is_whole_and_names_are_escaped(tmp_path: Path) -> None:
    write_encoders_page(tmp_path / "encoders.html", compared(simulated=True))
    page = (tmp_path / "encoders.html").read_text(encoding="utf-8")
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page)
    assert "<b>t" not in page
    for part in ("SIMULATED operations", "Kendall&#39;s tau", "87.5 ± 17.7", "frozen", "fine-tuned in each fold"):
        assert part in page
    assert page.count("Plotly.newPlot") - page.partition("<body>")[0].count("Plotly.newPlot") == 2
