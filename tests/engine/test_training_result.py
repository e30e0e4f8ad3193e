"""The results of trainings, as files hold them, and the score that chooses an epoch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.training_result import TrainingResult, deciding_score, result_on_frames

RELEASED = Path(__file__).resolve().parent.parent / "released" / "7ce8cba" / "runs"
JOINT = ("val_accuracy", "val_map")
TITLES = {"val_accuracy": "validation accuracy", "val_map": "validation mAP"}


@pytest.mark.parametrize("stage", ["old/cnn", "old/temporal", "joint/joint/multitask"])
def test_results_of_an_earlier_version_are_read(stage: str) -> None:
    tree = json.loads((RELEASED / stage / "result.json").read_text())
    result = TrainingResult.from_json(tree)
    assert (result.sentence, result.epochs, result.left_out) == (tree["sentence"], tree["epochs"], None)
    assert result.to_json() == tree


@pytest.mark.parametrize("stage", ["cnn", "joint"])
def test_the_result_of_a_training_on_frames(stage: str, tmp_path: Path) -> None:
    rows = [{"kind": "epoch", "global_step": epoch, "epoch": epoch, "seconds": 1.254} for epoch in range(3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    step, left_out = ("mapping", None) if stage == "joint" else (None, [{"id": "v1", "reason": "no such file"}])
    best, about = {"epoch": 1, "val_map": 0.25}, {"train_frames": 1200, "checkpoint": "best.pt"}
    result = result_on_frames(tmp_path, best, TITLES, (JOINT,), about, step=step, left_out=left_out)
    sentence = "validation mAP 0.250 at epoch 2 of 3; 1,200 training frames, 4 s; best.pt"
    outcome = {"best_epoch": 2, "epochs": 3, "chosen_by": "validation mAP", "seconds": 3.76}
    expected = {"val_accuracy": None, "val_map": 0.25, **outcome, **about}
    if stage == "joint":
        expected = {"step": "mapping", **expected, "sentence": f"mapping: {sentence}"}
    else:
        expected = {**expected, "left_out": left_out, "sentence": sentence}
    assert list(result.to_json().items()) == list(expected.items())


@pytest.mark.parametrize(
    ("best", "expected"),
    [
        ({"val_accuracy": 0.5, "val_map": 0.25}, "validation accuracy and validation mAP"),
        ({"val_map": None}, "no validation score, so the last epoch"),
    ],
)
def test_a_result_names_the_scores_that_chose_its_epoch(
    best: dict[str, float | None], expected: str, tmp_path: Path
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "epoch", "global_step": 0, "epoch": 0, "seconds": 1.0}\n')
    about = {"train_frames": 1, "checkpoint": "best.pt"}
    assert result_on_frames(tmp_path, {"epoch": 0, **best}, TITLES, (JOINT,), about).chosen_by == expected


def test_the_score_that_chooses_an_epoch() -> None:
    scores = {"val_accuracy": 0.5, "val_map": 0.25, "val_map_mapped": None}
    assert deciding_score(scores, [JOINT]) == (["val_accuracy", "val_map"], 0.375)
    assert deciding_score({"val_map": 0.25}, [JOINT]) == (["val_map"], 0.25)
    assert deciding_score(scores, [["val_map_mapped"], ["val_map"]]) == (["val_map"], 0.25)
    assert deciding_score({}, [JOINT]) == ([], None)
