"""Fit the decoding of a trained run (`RUN/temporal/decoding.json`): training labels, validation predictions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from configs.errors import UserError
from configs.schema import Config
from engine.files import sha256_file
from engine.progress import say
from engine.runs import BEST_FILE
from stage2_temporal.data import TrainingData
from stage2_temporal.decoding.fit import fit_track
from stage2_temporal.decoding.fitted import DECODING_FILE, FittedDecoding, load_decoding
from stage2_temporal.predict import load_temporal, predict_spans


def write_decoding(folder: Path, config: Config, data: TrainingData, device: torch.device) -> None:
    """Write `decoding.json` for the best model in `folder`, unless there is one that can be used.

    The transition graphs are learnt from the labels of the training videos alone, and the parameters are fitted on the
    validation videos.
    """
    path = folder / DECODING_FILE
    model, about = load_temporal(folder)
    if path.is_file():
        try:
            load_decoding(folder, about.classes)
            return
        except UserError:
            say(f"note: {path}: damaged, or fitted to another checkpoint, so it is written again")
    if not about.fps:
        say(f"note: {path}: not written, since the features do not record their sampling rate")
        return
    predicted = []
    if data.val:
        features, sequence = data.bank.features.to(device), config.temporal.sequence
        found = predict_spans(model.to(device), features, data.val, sequence.inference, sequence.frames)
        predicted = [about.by_track(one.numpy()) for one in found]
    if not all(np.isfinite(part).all() for one in predicted for part in one.values()):
        say(f"note: {path}: not written, since the model gave probabilities that are not finite")
        return
    truths = [data.truth_of(span).numpy() for span in data.val]
    tracks = {
        name: fit_track(
            classes,
            [data.bank.labels_of(span)[track].cpu().numpy() for span in data.train],
            [one[name] for one in predicted],
            [truth[track] for truth in truths],
            about.fps,
        )
        for track, (name, classes) in enumerate(about.classes.items())
    }
    FittedDecoding(
        weights_sha256=sha256_file(folder / BEST_FILE),
        fps=about.fps,
        train=tuple(data.split["train"]),
        val=tuple(data.split["val"]),
        tracks=tracks,
        inference=config.temporal.sequence.inference,
    ).write(folder)
