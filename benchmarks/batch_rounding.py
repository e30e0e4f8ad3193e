"""Whether features depend on how many frames are computed at once: the same frames in batches of several sizes.

    python benchmarks/batch_rounding.py --json FILE

Weights and pixels are random. The features are computed on a CPU, by one thread, with the arithmetic of `extract`. The
keys are `<backbone>_<precision>`. Each holds, for every batch size, the largest difference from the features of one
batch of all frames, as a fraction of the largest value (0: the same bits).
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from command import PROJECT, options, say

sys.path.insert(0, str(PROJECT))
BACKBONES, PRECISIONS = ("resnet50", "shufflenet_v2_x0_5", "mobilenet_v3_small"), ("fp32", "bf16")


def main() -> None:
    """Parse the options, compare, and print and write the result."""
    parser = options(__doc__, repeat=None)
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 3, 8, 16, 31])
    given = parser.parse_args()
    torch.set_num_threads(1)
    figures = {
        f"{backbone}_{precision}": differences(backbone, precision, given.frames, given.batches)
        for backbone in BACKBONES
        for precision in PRECISIONS
    }
    say(figures, given.json)


def differences(backbone: str, precision: str, frames: int, batches: list[int]) -> dict[str, object]:
    """The arithmetic that was used, and the largest difference for each batch size."""
    from configs.schema import Config
    from stage1_cnn.encoders.backbone import initial_backbone
    from stage1_cnn.encoders.encoder import Encoder

    settings = {
        "device": "cpu",
        "cnn": {"backbone": backbone, "weights": "random"},
        "extract": {"precision": precision},
    }
    config = Config.model_validate(settings)
    encoder = Encoder(config, initial_backbone(config), None, "", 7)
    size_px = config.preprocess.crop_px
    crops = np.random.default_rng(0).integers(0, 256, (frames, size_px, size_px, 3), dtype=np.uint8)
    whole, _ = encoder(crops)  # (N, D)
    found: dict[str, object] = {"arithmetic": encoder.spec.arithmetic}
    for batch in batches:
        parts = [encoder(crops[first : first + batch])[0] for first in range(0, frames, batch)]
        found[str(batch)] = float(np.abs(np.concatenate(parts) - whole).max() / np.abs(whole).max())
    return found


if __name__ == "__main__":
    main()
