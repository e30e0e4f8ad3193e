"""Heads that look into the future: where they run, and where their results are marked as offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.errors import UserError
from configs.schema import Config
from engine.stopping import StopRequest
from evaluation.comparison import Place, load_model
from evaluation.reports.ablation import Trial, ablation_page, write_ablation_csv
from evaluation.reports.gather import gather
from evaluation.reports.html_tables import all_tables
from stage2_temporal.evaluate import evaluate_run
from stage2_temporal.predict import BatchSizes, OnlinePredictor, load_temporal, predict_phases
from tests.stage2_temporal.toy import small, spec

HEAD = {"name": "mstcn++", "layers": 3, "refinements": 1, "refinement_layers": 2, "maps": 6, "dropout": 0.0}


@pytest.fixture
def evaluated(train: Any, cue_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """`evaluated(name, head)`: a run that is trained and evaluated, and what was printed."""

    def run(name: str, head: dict[str, Any]) -> tuple[Path, str]:
        result = train(name, {"head": head, "epochs": 2})
        assert ("(offline, " in result["sentence"]) == result.get("offline", False) == (head == HEAD)
        config = Config.model_validate({"device": "cpu", "runs": tmp_path})
        evaluate_run(config, tmp_path / name, features=cue_folder, stop=StopRequest())
        return tmp_path / name, capsys.readouterr().out

    return run


def test_results_of_offline_heads_are_marked_everywhere(
    evaluated: Any, cue_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (offline, printed), (causal, plainly) = evaluated("offline", HEAD), evaluated("causal", small()["head"])
    assert "temporal (offline)" in printed
    assert "frame (offline)" not in printed
    assert "Phases (offline)" in printed
    assert "offline" not in plainly
    metrics = json.loads((offline / "evaluate/test/metrics.json").read_text())
    marks = {head: {one["about"].get("offline") for one in found.values()} for head, found in metrics["phases"].items()}
    assert marks == {"temporal": {True}, "frame": {None}, "majority": {None}}
    assert "offline" not in (causal / "evaluate/test/metrics.json").read_text()
    assert "**Offline**" in (offline / "MODEL_CARD.md").read_text()
    assert "**Offline**" not in (causal / "MODEL_CARD.md").read_text()
    place = Place(tmp_path, "test", spec())
    names = [load_model(name, place, "video_macro").name for name in ("offline", "causal")]
    assert names == ["offline (offline)", "causal"]
    tables = all_tables(gather([offline, causal]))
    shown = tables.conventions["video_macro"].tables[0]
    columns = ["Temporal head", "Per-frame head", "Most frequent phase"]
    assert shown.columns == ["Temporal head (offline)", *columns[1:], *columns]
    assert dict(tables.provenance.rows)["Model"] == ["toy; mstcn++ (offline)", "toy; lstm, hidden 12"]
    config = {"device": "cpu", "runs": tmp_path, "temporal": {"decoding": {"mode": "causal"}}}
    evaluate_run(Config.model_validate(config), offline, features=cue_folder, stop=StopRequest())
    printed = capsys.readouterr().err
    assert load_model("offline", place, "video_macro").name == "offline (offline, causal)"
    assert "decoded causally, without a lag, after a head that looks into the future" in " ".join(printed.split())


def test_offline_heads_see_whole_videos_or_clips(train: Any, cue_folder: Path, tmp_path: Path, videos_of: Any) -> None:
    train(
        temporal={"head": HEAD, "epochs": 1, "baseline": False, "sequence": {"mode": "clips", "frames": 6, "batch": 99}}
    )
    model, _ = load_temporal(tmp_path / "run/temporal")
    videos = videos_of(cue_folder, "val")
    found = predict_phases(model, videos, "carried", 1, "cpu", sizes=BatchSizes(videos=2, chunk_frames=7))
    clips = predict_phases(model, videos, "clip", 6, "cpu")
    for name, video in videos.items():
        x = torch.from_numpy(np.array(video.features))
        with torch.no_grad():
            whole, last = (model(one[None]).logits[0].softmax(1).numpy() for one in (x, x[14:20]))
        np.testing.assert_allclose(found[name], whole, atol=1e-5)
        np.testing.assert_allclose(clips[name][19], last[-1], atol=1e-5)
    with pytest.raises(UserError, match=r"mstcn\+\+ looks into the future and is offline only") as error:
        OnlinePredictor(model)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"mstcn\+\+ looks into .* use temporal\.sequence\.mode=full or clips"):
        train("chunked", {"head": HEAD, "sequence": {"mode": "chunked", "frames": 8}})
    assert not (tmp_path / "chunked").exists()


def test_ablations_mark_offline_settings(tmp_path: Path) -> None:
    result = {"val_accuracy": 0.5, "best_epoch": 1, "seconds": 1.0}
    base = Trial("base", {}, 0, True, result, "x")
    trials = [base, Trial("ms", {}, 0, False, result | {"offline": True}, "y")]
    page = ablation_page("t", trials, "accuracy", [])
    assert "ms (offline)" in page
    assert "base (offline)" not in page
    for name, shown in (("with", trials), ("without", [base])):
        write_ablation_csv(tmp_path / name, shown)
        assert ("offline" in (tmp_path / name).read_text()) == (name == "with")
