"""Run all stages in order, from one file of settings. A stage whose inputs have not changed is skipped."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from configs.schema import CNN_FOLDER, EXTRACT_FOLDER, TEMPORAL_FOLDER, TOOLS_FOLDER, Config
from engine.device import choose_device, choose_precision
from engine.progress import say
from engine.runs import RESULT_FILE
from engine.stopping import StopRequest
from evaluation.metrics.results import METRICS_FILE
from evaluation.reports.summary import update_summary
from features.dataset.catalogue import index_dataset, open_dataset
from features.store_folder import usable_index
from stage1_cnn.extract import extract
from stage1_cnn.train import train_cnn
from stage2_temporal.evaluate import evaluate_run
from stage2_temporal.joint.start import start_weights
from stage2_temporal.tool_probe import train_tools, wants_probe
from stage2_temporal.train import require_arithmetic, train_temporal

Value = TypeVar("Value")


def run_all(config: Config, run: Path, stop: StopRequest) -> dict[str, Any]:
    """Run index, train-cnn, extract, train-tools, train-temporal and evaluate.

    train-cnn is left out if the features come from the initial backbone, and train-tools unless they do and there are
    tool labels. Returns the summary in `RUN/summary.json`: results on the test videos, seconds per stage, and the
    videos that any stage left out, with reasons. For a skipped stage, the summary keeps the seconds of the start that
    did the work. Raises UserError at the first stage that fails, and Stopped when asked to stop; the results of earlier
    stages are kept.
    """
    started = time.monotonic()
    require_precisions(config, run)

    def stage(name: str, work: Callable[[], Value], worked: Callable[[Value], bool] = lambda value: True) -> Value:
        stop.raise_if_set()
        say(f"== {name}")
        begun = time.monotonic()
        value = work()
        if worked(value):
            update_summary(run, {"name": run.name}, {name: time.monotonic() - begun})
        return value

    stage("index", lambda: index_dataset(config))
    dataset = open_dataset(config)
    dataset.index.require_videos("train", "val", "test")  # before hours of training
    if config.extract.encoder == "finetuned":
        stage("train-cnn", lambda: train_cnn(config, run, dataset, stop), _writes(run / CNN_FOLDER / RESULT_FILE))
    first = not (run / EXTRACT_FOLDER / RESULT_FILE).exists()
    report = stage(
        "extract",
        lambda: extract(config, run, dataset, stop=stop),
        lambda report: first or bool(report.done or report.relabelled),
    )
    report.require_others_done()
    say(report.sentence())
    usable_index(report.folder).require_videos("train", "val", "test")
    if config.extract.encoder == "initial" and wants_probe(report.folder):
        probed = _writes(run / TOOLS_FOLDER / RESULT_FILE)
        say(f"tools: {stage('train-tools', lambda: train_tools(config, run, report.folder, stop), probed).sentence}")
    start, trained = start_weights(config), _writes(run / TEMPORAL_FOLDER / RESULT_FILE)
    stage("train-temporal", lambda: train_temporal(config, run, report.folder, stop, start=start), trained)
    evaluated = _writes(run / "evaluate" / "test" / METRICS_FILE)
    stage("evaluate", lambda: evaluate_run(config, run, stop=stop, redo=False), evaluated)
    summary = update_summary(run, {})
    for line in closing_lines(run, summary, time.monotonic() - started):
        say(line)
    for video in summary["left_out"]:
        say(f"left out: {video['id']}: {video['reason']}")
    passed_over = [one.model_dump(mode="json") for one in dataset.index.passed_over]  # `index` has reported them
    return {**summary, "left_out": [*summary["left_out"], *passed_over]}


def require_precisions(config: Config, run: Path | None = None) -> None:
    """Raise UserError if this device cannot compute a stage in its precision, before hours of work are lost.

    Trainings that are finished in `run` are not checked.
    """
    device, cnn, extract, temporal = choose_device(config.device), config.cnn, config.extract, config.temporal
    if extract.encoder == "finetuned" and not (run and _finished(run / CNN_FOLDER)):
        choose_precision("cnn.precision", cnn.precision, device, training=True)
    choose_precision("extract.precision", extract.torch_precision, device, training=False)
    if not (run and _finished(run / TEMPORAL_FOLDER)):
        require_arithmetic(temporal, device)


def closing_lines(run: Path, summary: Mapping[str, Any], now_s: float) -> list[str]:
    """Return the last lines that `run` prints: results on the test videos, seconds per stage, and result files."""

    def percent(key: str) -> str:
        return "none" if summary[key] is None else f"{100 * summary[key]:.1f} %"

    costs = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in summary["seconds"].items())
    return [
        f"== {run.name}: {summary['test_videos']} test videos of {summary['dataset']}, split {summary['split']}",
        f"tools: mAP {percent('tool_map')}",
        f"phases: accuracy {percent('phase_accuracy_temporal')} of stage two, {percent('phase_accuracy_frame')} of the "
        f"per-frame head on the same features, {percent('phase_accuracy_majority')} of the most frequent phase alone; "
        f"F1 {percent('phase_f1_temporal')} ({summary['convention']})",
        *(
            f"{track}: accuracy {100 * scores['accuracy_temporal']:.1f} %, F1 {100 * scores['f1_temporal']:.1f} %"
            for track, scores in summary.get("tracks", {}).items()
            if None not in (scores.get("accuracy_temporal"), scores.get("f1_temporal"))
        ),
        f"time: {costs}; {now_s:.0f} s in this start",
        f"see: {run / 'evaluate/test/ribbons.png'} (truth and predictions), {run / 'evaluate/test/metrics.json'} "
        f"(every convention), {run / 'summary.json'}",
        f"HTML report: python pipeline.py report {run}",
    ]


def _finished(folder: Path) -> bool:
    return (folder / RESULT_FILE).exists()


def _writes(path: Path) -> Callable[[object], bool]:
    """A function that returns whether the file has been written since this call; its argument is not used."""

    def state() -> tuple[int, int] | None:
        return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None

    before = state()
    return lambda _: state() != before
