"""Stage two: train a head, and a per-frame baseline, on features.

`train_head` is the loop. It runs once for the head in the settings and once for the baseline, a linear head. Both use
the same features, number of epochs, optimiser, and selection of the best epoch on validation videos.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from configs import head_settings, schema
from configs.errors import UserError
from configs.load import NO_KEYS, GivenKeys
from configs.schema import MAIN_TRACK, TEMPORAL_FOLDER, Config
from engine.device import choose_device, choose_precision, make_accelerator, require_bf16, seed_everything, start_stage
from engine.files import make_folder, sha256_file
from engine.logs import METRICS_LOG, read_metrics
from engine.memory import give_back_freed_memory, needs_gpu_memory
from engine.processes import Processes, join
from engine.progress import progress_bar, say
from engine.runs import ABSENT, StageFolder, StageIdentity, settings_without
from engine.session import TrainingSession
from engine.stopping import StopRequest
from engine.training_result import TrainingResult
from evaluation.metrics.phases import majority_phase
from features.dataset.catalogue import say_left_out
from features.dataset.trained_on import inherited_from, record_training
from features.frames.settings_match import require_features_of
from features.video_labels import NO_LABEL
from stage2_temporal.data import Batch, FeatureBank, Span, TrainingData, epoch_batches, read_training_data
from stage2_temporal.feature_dropout import FeatureDropout
from stage2_temporal.fit_decoding import write_decoding
from stage2_temporal.heads.base import build_head, detach_state, first_rows
from stage2_temporal.heads.standardise import Standardise
from stage2_temporal.loss import TracksLoss
from stage2_temporal.model import PhaseModel
from stage2_temporal.predict import FRAME_FOLDER, TemporalAbout, predict_spans

# Freed memory is given back no more often, since mapping it again makes the next epoch a few percent slower.
TRIM_INTERVAL_S = 60.0
# From phases, head and width of the features to the state dict of a `PhaseModel`.
StartWeights = Callable[[Sequence[str], head_settings.HeadSettings, int], Mapping[str, Any]]
SCORE = "frame accuracy, mean over the validation videos"  # of several label tracks: see `score_of`


def train_temporal(
    config: Config,
    run: Path,
    folder: Path,
    stop: StopRequest,
    data: TrainingData | None = None,
    *,
    start: StartWeights | None = None,
    given: GivenKeys = NO_KEYS,
) -> TrainingResult:
    """Train on the features in `folder`, write `RUN/temporal`, and return the content of its `result.json`.

    `data` is the return value of `read_training_data(folder)`; several trainings can share it. `start` reads the
    weights that `temporal.start_from` names (see `stage2_temporal.joint.start`). `given` holds the settings that the
    user gave, which must not contradict the features.

    The best epoch is the one with the highest score (`score_of`). A finished run with the same settings, features and
    labels is not repeated, and an unfinished one resumes where it stopped. Raises UserError if there is nothing to
    train on, if settings contradict each other or the features, or if the run exists with other settings. When `stop`
    is set, saves everything and raises Stopped.
    """
    _require_sensible(config)
    processes = join(config.device, stop)
    if data is None:
        where, tracks = config.temporal.features, config.data.tracks
        data = processes.each(lambda: read_training_data(folder, where, config.device, tracks))
    require_features_of(data.encoder, config, given, folder)
    data.index.require_excluded(config.data.exclude, folder)
    data.index.require_split(config.data.split, given, folder)
    starts = [folder] if config.temporal.start_from is None else [folder, config.temporal.start_from.parent]
    inherited = processes.each(partial(inherited_from, starts, data.index, config.data.allow_overlap))
    data = data.with_tool_logits() if config.temporal.tool_logits else data
    say_left_out(data.index)
    stage = StageFolder(run, TEMPORAL_FOLDER, config, _identity(config, data))
    finished = processes.from_first(lambda: stage.result)
    if finished is not None:
        processes.from_first(partial(write_decoding, stage.path, config, data, choose_device(config.device)))
        return replace(TrainingResult.from_json(finished), left_out=data.index.left_out_records())
    accelerator, precision = make_accelerator(config.device, config.temporal.precision, "temporal.precision")
    require_arithmetic(config.temporal, accelerator.device)
    start_stage("train-temporal", config, accelerator.device, precision)
    processes.from_first(stage.open)  # not earlier, so that settings that do not allow training leave no folder behind
    processes.from_first(partial(record_training, stage.path, inherited, data.index))
    _note_on_validation(folder, data)
    constants = _constants(config, data)
    data = data.to(accelerator.device)
    outcome = train_head(stage.path, config.temporal.head, config, data, constants, accelerator, processes, start)
    frame = None
    if config.temporal.baseline:
        linear = head_settings.LinearHead(name="linear")
        frame = train_head(stage.path / FRAME_FOLDER, linear, config, data, constants, accelerator, processes, start)
    processes.from_first(partial(write_decoding, stage.path, config, data, accelerator.device))
    computed: dict[str, Any] = {"device": str(accelerator.device), "precision": precision, "features": str(folder)}
    computed |= {} if config.temporal.head.causal else {"offline": True}
    return processes.from_first(lambda: _combined(data, outcome, frame, computed).write(stage))


def _note_on_validation(folder: Path, data: TrainingData) -> None:
    """Say if validation videos cannot show which epoch is the best, or only for some of the tracks."""
    if not data.val:
        which = " or ".join(data.tracks)
        say(f"{folder}: no validation videos with {which}, so the last epoch is kept instead of the best")
        return
    labelled = torch.cat([data.bank.labels_of(span) >= 0 for span in data.val], dim=1).any(dim=1)  # (L,)
    if bare := [name for name, found in zip(data.tracks, labelled.tolist(), strict=True) if not found]:
        which = " and ".join(bare)
        say(f"note: no validation video has labels of {which}, so the best epoch is chosen by the other tracks alone")


@needs_gpu_memory("temporal.sequence.batch, or set temporal.sequence.mode=chunked with fewer temporal.sequence.frames")
def train_head(
    folder: Path,
    head: head_settings.HeadSettings,
    config: Config,
    data: TrainingData,
    constants: tuple[Tensor, Tensor],
    accelerator: Accelerator,
    processes: Processes,
    start: StartWeights | None,
) -> TrainingResult:
    """The training loop of stage two for one head: writes `best.pt`, `last.pt` and `metrics.jsonl` into `folder`."""
    settings = config.temporal
    give_back_freed_memory()
    trimmed = time.monotonic()
    seed_everything(config.seed)
    model = _initial_model(head, config, data, constants, start)
    labelled = [count_labels(data.bank, data.train, track, width) for track, width in enumerate(data.widths)]
    criterion = TracksLoss(settings, labelled, processes.total)
    dropout = FeatureDropout(settings.feature_dropout, model.standardise, config.seed)
    frames = max(int(counts.sum()) for counts in labelled)
    groups = [{"params": model.head.parameters(), "name": "head"}]
    make_folder(folder)
    about, steps_take_long = _describe(head, config, data).to_json(), settings.sequence.mode == "clips"
    session = TrainingSession(folder, accelerator, model, groups, settings, about, processes, bar=steps_take_long)
    session.resume()
    with progress_bar(
        settings.epochs, head.name, "epoch", initial=session.position.epoch, disable=not processes.first
    ) as bar:
        for epoch in session.epochs():
            batches = epoch_batches(data.train, settings.sequence, config.seed, epoch)
            remaining = len(batches) - session.position.step
            started = time.monotonic()
            _train_epoch(session, model, criterion, data.bank, batches, settings.sequence.mode == "chunked", dropout)
            seconds = max(time.monotonic() - started, 1e-9)
            if time.monotonic() - trimmed > TRIM_INTERVAL_S:
                give_back_freed_memory()
                trimmed = time.monotonic()
            speed = frames * remaining / len(batches) / seconds
            scores = validate(session.evaluated, data, settings.sequence, session)
            bar.set_postfix(loss=f"{session.mean_loss:.4f}", val_accuracy=scores["val_accuracy"], refresh=False)
            bar.update(1)
            session.finish_epoch({**scores, "frames_per_s": round(speed, 1)}, scores["val_accuracy"])
    return processes.from_first(lambda: _outcome(folder, session, model))


def _initial_model(
    head: head_settings.HeadSettings,
    config: Config,
    data: TrainingData,
    constants: tuple[Tensor, Tensor],
    start: StartWeights | None,
) -> PhaseModel:
    """The model before the first step, with new weights or, if `head` is the one in the settings, `start_from`'s."""
    settings, width = config.temporal, data.bank.embedding_dim
    model = PhaseModel(Standardise(*constants), build_head(head, width, *data.widths))
    model.head.configure_training(settings)
    if settings.start_from is not None and head == settings.head:
        assert start is not None
        model.load_state_dict(start(data.phases, head, width))
    return model


def _train_epoch(
    session: TrainingSession,
    model: PhaseModel,
    criterion: TracksLoss,
    bank: FeatureBank,
    batches: Sequence[Batch],
    carries: bool,
    dropout: FeatureDropout,
) -> None:
    """Train the remaining steps of an epoch; if `carries`, each batch passes its state on to the batch after it."""
    processes = session.processes
    shares = [whole.share(processes.rank, processes.count) for whole in batches[session.position.step :]]
    for (batch, counts), (x, labels) in session.batches(bank.gathered(shares), len(batches)):  # (B, T, D), (L, B, T)
        if not counts:
            labels.fill_(NO_LABEL)
        numbers = bank.numbers(batch) if carries else batch.first.tolist()
        state = None if batch.fresh else first_rows(model.carried, len(batch))
        with session.autocast():
            output = session.model(dropout(x, session.position.epoch, numbers), state, batch.lengths)
        model.carried = detach_state(output.state) if carries and counts else ()
        loss = criterion(output.logits_per_stage, labels)
        del output  # otherwise its hidden features would take up memory during the backward pass
        session.update(loss, partial(bank.names, batch))
    model.carried = ()


def score_of(tracks: Sequence[str]) -> str:
    """What is compared between epochs and settings, in words: `SCORE`, and of several tracks the mean over these."""
    return SCORE if len(tracks) == 1 else f"{SCORE}, then over {' and '.join(tracks)}"


def validate(
    model: PhaseModel, data: TrainingData, sequence: schema.SequenceConfig, session: TrainingSession
) -> dict[str, float | None]:
    """The scores of the current model; the processes divide the validation videos among them."""
    if not data.val:
        return _scores(data, [])
    mine = session.processes.share(data.val)

    def work() -> list[list[float]]:
        predicted = predict_spans(model, data.bank.features, mine, sequence.inference, sequence.frames) if mine else []
        guesses = [torch.stack([part.argmax(dim=1) for part in model.by_track(one)]) for one in predicted]
        return _accuracies(data, mine, guesses)

    shares: list[list[Any]] = session.validate(work)
    return _scores(data, session.processes.merged(shares))


def _accuracies(data: TrainingData, spans: Sequence[Span], predicted: Sequence[Tensor]) -> list[list[float]]:
    """For each video and track, the fraction of labelled frames that are predicted correctly; NaN if none has a label.

    `predicted` are (L, T) for each of `spans`.
    """
    truths = [data.truth_of(span) for span in spans]
    pairs = zip(predicted, truths, strict=True)
    return [
        [float((guess == truth)[truth != NO_LABEL].double().mean()) for guess, truth in zip(*pair, strict=True)]
        for pair in pairs
    ]


def _scores(data: TrainingData, accuracies: Sequence[Sequence[float]]) -> dict[str, float | None]:
    """`val_accuracy` (see `score_of`) and, of several tracks, that of each; None without labelled validation videos.

    `accuracies` are those of each video and track.
    """
    found = {}
    for track, name in enumerate(data.tracks):
        known = [one[track] for one in accuracies if not math.isnan(one[track])]
        found[f"val_accuracy_{name}"] = statistics.fmean(known) if known else None
    known = [value for value in found.values() if value is not None]
    mean = statistics.fmean(known) if known else None
    return {"val_accuracy": mean, **(found if len(found) > 1 else {})}


def count_labels(bank: FeatureBank, spans: Sequence[Span], track: int, classes: int) -> Tensor:
    """The number of labelled frames of each class (C,) of track number `track`."""
    labels = torch.cat([bank.labels_of(span)[track] for span in spans])
    return torch.bincount(labels[labels != NO_LABEL], minlength=classes)


def _majorities(data: TrainingData) -> list[int]:
    """The most frequent class of each track in the training videos."""
    labels = [data.bank.labels_of(span).cpu().numpy() for span in data.train]
    return [majority_phase([one[track] for one in labels]) for track in range(len(data.tracks))]


def _constant_scores(data: TrainingData, classes: Sequence[int]) -> dict[str, float | None]:
    """The scores of always predicting these classes, one of each track."""
    always = [torch.tensor(classes)[:, None].expand(-1, span.frames) for span in data.val]
    return _scores(data, _accuracies(data, data.val, always))


def _constants(config: Config, data: TrainingData) -> tuple[Tensor, Tensor]:
    """The constants of standardisation: mean and standard deviation (D,) over the training frames.

    They are 0 and 1 if features are not standardised.
    """
    if config.temporal.standardise:
        return data.bank.statistics(data.train)
    width = data.bank.embedding_dim
    return torch.zeros(width), torch.ones(width)


def _require_sensible(config: Config) -> None:
    settings = config.temporal
    if len(config.data.tracks) > 1 and settings.start_from is not None:
        raise UserError(
            "data.tracks cannot be combined with temporal.start_from: a joint net's phase branch recognises the phases "
            "only; leave out one of the two"
        )
    if not settings.head.causal and settings.sequence.mode == "chunked":
        raise UserError(
            f"temporal.head: {settings.head.name} looks into the future, so it is offline only and has no state to "
            "carry from chunk to chunk; use temporal.sequence.mode=full or clips, or choose a causal head (an LSTM is "
            "one with bidirectional=false)"
        )
    if settings.tool_logits and settings.start_from is not None:
        raise UserError(
            "temporal.tool_logits=true cannot be combined with temporal.start_from: a joint net's phase branch does "
            "not read tool logits; leave out one of the two"
        )


def require_arithmetic(settings: schema.TemporalConfig, device: torch.device) -> None:
    """Raise UserError if `device` does not support the precision or the projection, or the projection has no effect."""
    choose_precision("temporal.precision", settings.precision, device, training=True)
    if settings.projection != "bf16":
        return
    if not settings.head.has_bf16_projection:
        raise UserError("temporal.projection=bf16 applies to the unidirectional LSTM only; leave it at auto")
    if device.type != "cpu":
        raise UserError(f"temporal.projection=bf16 is for CPUs, not {device.type}; set temporal.precision=bf16 instead")
    require_bf16("temporal.projection", device)


def _identity(config: Config, data: TrainingData) -> StageIdentity:
    start, scored = config.temporal.start_from, data.scored
    return StageIdentity(
        {
            "seed": config.seed,
            "temporal": settings_without(config.temporal, "start_from", "features", "decoding"),
            "start_sha256": sha256_file(start) if start is not None and start.is_file() else None,
            "encoder_digest": data.encoder_digest,
            "dataset": data.index.dataset.name,
            "phases": list(data.phases),
            "tracks": data.classes if len(data.tracks) > 1 else ABSENT,
            "split": data.split,
            "labels_sha256": data.labels_sha256,
            "sources_sha256": data.sources_sha256,
            "sampled": "by time" if data.by_time else ABSENT,  # earlier versions sampled other frames in this case
            "scored_sha256": ABSENT if scored is None else sha256(scored.numpy().tobytes()).hexdigest(),
        },
        later={"sources_sha256"},
    )


def _describe(head: head_settings.HeadSettings, config: Config, data: TrainingData) -> TemporalAbout:
    tool_inputs = data.index.dataset.tools if data.has_tool_logits else ()
    return TemporalAbout(
        head=head,
        embedding_dim=data.bank.embedding_dim - len(tool_inputs),
        tool_inputs=tool_inputs,
        phases=data.phases,
        tracks={name: classes for name, classes in data.classes.items() if name != MAIN_TRACK} or None,
        dataset=data.index.dataset.name,
        encoder_digest=data.encoder_digest,
        encoder=data.encoder,
        backbone=str(data.encoder["backbone"]),
        fps=float(data.encoder["fps"] or 0.0),
        inference=config.temporal.sequence.inference,
        frames=config.temporal.sequence.frames,
        seed=config.seed,
    )


def _outcome(folder: Path, session: TrainingSession, model: PhaseModel) -> TrainingResult:
    """The result of one head. Times are read from its log, so that interruptions of the training do not change them."""
    rows = read_metrics(folder / METRICS_LOG, "epoch")
    position = session.position
    best = next((row for row in rows if row["epoch"] == position.best_epoch), {})
    of_tracks = {key: value for key, value in best.items() if key.startswith("val_accuracy_")}
    return TrainingResult(
        scores={"val_accuracy": position.best_score, **of_tracks},
        best_epoch=position.best_epoch,
        epochs=position.epoch,
        steps=position.global_step,
        parameters=sum(parameter.numel() for parameter in model.head.parameters()),
        frames_per_s=statistics.median(row["frames_per_s"] for row in rows),
        seconds=round(sum(row["seconds"] for row in rows), 2),
    )


def _combined(
    data: TrainingData, head: TrainingResult, frame: TrainingResult | None, computed: Mapping[str, Any]
) -> TrainingResult:
    """The result of a whole training: that of the head, with the baselines and the data added in `about`.

    `computed` holds further entries of `about`: the device, the precision, the feature folder, and
    `offline` for a head that looks into the future.
    """
    majority, *of_tracks = majorities = _majorities(data)
    always = _constant_scores(data, majorities)["val_accuracy"]
    return replace(
        head,
        score=score_of(data.tracks),
        seconds=round(head.seconds + (frame.seconds if frame else 0.0), 2),
        about={
            "frame": frame,
            "majority_phase": majority,
            "majority_name": data.phases[majority],
            **({"majority_tracks": dict(zip(data.tracks[1:], of_tracks, strict=True))} if of_tracks else {}),
            "majority_val_accuracy": always,
            "train_videos": len(data.train),
            "train_frames": int(count_labels(data.bank, data.train, 0, len(data.phases)).sum()),
            "val_videos": len(data.val),
            **computed,
        },
        left_out=data.index.left_out_records(),
        sentence=_sentence(head, frame, always, bool(computed.get("offline"))),
    )


def _sentence(head: TrainingResult, frame: TrainingResult | None, majority: float | None, offline: bool) -> str:
    """The result in one line; `majority` is the accuracy of the most frequent phase. Epochs are counted from 1."""
    speed, accuracy = f"{head.frames_per_s:,.0f} frames/s", head.scores["val_accuracy"]
    of_tracks = [(key.removeprefix("val_accuracy_"), value) for key, value in head.scores.items()][1:]
    each = "".join(f", {name} {value:.3f}" for name, value in of_tracks if value is not None)
    if accuracy is None:
        return f"{head.epochs} epochs, no validation videos, {speed}"
    others = "offline, " if offline else ""
    others += f"per-frame head {frame.scores['val_accuracy']:.3f}, " if frame else ""
    return (
        f"validation accuracy {accuracy:.3f}{each} ({others}majority {majority:.3f}), "
        f"epoch {head.best_epoch + 1} of {head.epochs}, {speed}"
    )
