"""The forward pass of `extract` alone, for `benchmarks/extract.py`: the project's net in the reference's loop.

python benchmarks/extract_own.py PRECISION WEIGHTS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from extract_reference import resnet50, time_batches

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def forward(precision: str, weights: str) -> dict[str, float]:
    """Run images through the encoder's net as it is used on this machine's CPU."""
    import torch

    from engine.device import DTYPES
    from engine.memory import keep_freed_memory
    from stage1_cnn.encoders.folding import fold_batch_norm
    from stage1_cnn.encoders.fusing import fuse_relu

    keep_freed_memory()
    net = resnet50(weights)
    if precision != "fp32":
        net = fold_batch_norm(net, 224) or net
        net = fuse_relu(net, 224) or net
    return time_batches(net.to(DTYPES[precision]).to(memory_format=torch.channels_last), DTYPES[precision])


if __name__ == "__main__":
    print(json.dumps(forward(*sys.argv[1:])))
