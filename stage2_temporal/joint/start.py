"""Where a training of stage two finds the weights that `temporal.start_from` names."""

from __future__ import annotations

from functools import partial

from configs.schema import Config
from stage2_temporal.train import StartWeights


def start_weights(config: Config) -> StartWeights | None:
    """The function that reads the phase branch of the joint checkpoint `temporal.start_from`; None if it is not set."""
    if config.temporal.start_from is None:
        return None
    from stage2_temporal.joint.net import phase_weights  # here, since it imports the image encoders

    return partial(phase_weights, config.temporal.start_from)
