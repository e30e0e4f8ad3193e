"""The decoding of a run as the settings choose it, for `evaluate`, `predict` and recognition frame by frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from configs.schema import Config, DecodingConfig, Inference
from engine.files import sha256_file
from engine.progress import say
from evaluation.metrics.results import HEAD, UNDECODED
from stage2_temporal.decoding.decoder import Decoder, decode, lag_frames
from stage2_temporal.decoding.fitted import DECODING_FILE, FittedDecoding, load_decoding

Videos = Mapping[str, NDArray[np.float32]]  # probabilities (T, C) by video


@dataclass(frozen=True)
class ChosenDecoding:
    """The fitted decoding of a run (its file has the hash `sha256`), and the settings with which it is used."""

    fitted: FittedDecoding
    settings: DecodingConfig
    sha256: str

    @classmethod
    def of_run(
        cls,
        folder: Path,
        settings: DecodingConfig,
        classes: Mapping[str, Sequence[str]],
        trained: Inference,
        asked: Inference | None = None,
    ) -> ChosenDecoding | None:
        """The decoding of the run whose stage two is in `folder`, with these classes of each track.

        `trained` is the inference mode of its training, and `asked` another one that the user asked for. None if the
        settings choose none. Raises UserError as `load_decoding` does, and if the parameters were fitted to the
        probabilities of another inference mode.
        """
        if settings.mode == "none":
            for name, reason in settings.given_unused.items():
                say(f"note: temporal.decoding.{name} has no effect with {reason}")
            return None
        found = load_decoding(folder, classes)
        fitted = found.inference or trained
        if asked not in (None, fitted):
            raise UserError(
                f"--inference {asked}: {folder / DECODING_FILE} was fitted to --inference {fitted}; leave it out, or "
                "add --decoding none"
            )
        return cls(found, settings, sha256_file(folder / DECODING_FILE))

    def to_json(self, fps: float) -> dict[str, Any]:
        """What results at `fps` depend on, and how far ahead a decision looks.

        That is nothing, `lag_s` (of whole frames, so it may be less than in the settings), or the whole video.
        """
        mode, given = self.settings.mode, self.settings.min_duration_s
        found: dict[str, Any] = {"mode": mode, "fitted_sha256": self.sha256}
        if mode in ("causal", "offline"):
            found |= {"offline": True} if mode == "offline" else {"lag_s": lag_frames(self.settings.lag_s, fps) / fps}
        of_tracks = {}
        for name, one in self.fitted.tracks.items():
            of_tracks[name] = {"temperature": one.temperature}
            if mode != "calibrated":
                of_tracks[name]["filter_kappa"] = one.filter_kappa
            if mode in ("causal", "offline"):
                minimum = one.min_duration_s if given is None else given
                of_tracks[name] |= {"viterbi_kappa": one.viterbi_kappa, "min_duration_s": minimum}
        return {**found, "tracks": of_tracks}

    def decoder(self, track: str, fps: float) -> Decoder:
        """A decoder of one video's frames at `fps`."""
        return Decoder(self.fitted.tracks[track], self.settings, fps)

    def decode(
        self, track: str, fps: float, probabilities: NDArray[np.float32]
    ) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """Labels (T,) and probabilities (T, C) of a whole video."""
        return decode(self.fitted.tracks[track], self.settings, fps, probabilities)

    def of_heads(
        self, track: str, fps: float, heads: Mapping[str, Videos]
    ) -> tuple[dict[str, Videos], dict[str, dict[str, NDArray[np.int8]]]]:
        """The probabilities of the heads, with those of `temporal` decoded, and its labels {head: {video: (T,)}}.

        The undecoded ones become those of a further head. Raises UserError for probabilities that are not finite.
        """
        found = {}
        for name, values in heads[HEAD].items():
            try:
                found[name] = self.decode(track, fps, values)
            except UserError as error:
                raise UserError(f"{name}, {error}") from error
        decoded = {name: values for name, (_, values) in found.items()}
        others = {head: videos for head, videos in heads.items() if head != HEAD}
        labels = {name: one for name, (one, _) in found.items()}
        return {HEAD: decoded, UNDECODED: heads[HEAD], **others}, {HEAD: labels}


def require_none(config: Config, where: Path) -> None:
    """Raise UserError if the settings choose a decoding, for a joint net, which has none."""
    settings = config.temporal.decoding
    for name, value, off in (("mode", settings.mode, "none"), ("tool_smoothing_s", settings.tool_smoothing_s, 0)):
        if value != off:
            raise UserError(
                f"temporal.decoding.{name}={value}: {where} is a joint net, and only stage two is decoded; set "
                f"temporal.decoding.{name}={off}, or train stage two on its features (extract --from-joint)"
            )
