"""The forward pass of `extract` alone, for `benchmarks/extract.py`.

    python benchmarks/extract_own.py PRECISION WEIGHTS

It runs the project's net in the loop of `extract_reference.py`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from extract_reference import FORWARD_BATCHES, resnet50, time_batches, time_calls

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def forward(precision: str, weights: str) -> dict[str, float]:
    """Run images through the encoder's net, in the form in which `extract` uses it on this CPU."""
    import torch

    if precision == "int8":
        return int8_forward(weights)
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


def int8_forward(weights: str) -> dict[str, float]:
    """Run images through OpenVINO's int8 net, which is calibrated on noise, since values do not affect its speed."""
    import torch

    from configs.schema import PreprocessConfig
    from stage1_cnn.encoders.openvino_net import calibrate

    crops = torch.randint(0, 256, (max(FORWARD_BATCHES), 224, 224, 3), dtype=torch.uint8)
    net = calibrate(resnet50(weights), PreprocessConfig(), list(crops[:4].numpy()))
    return time_calls(net, [crops[:size] for size in FORWARD_BATCHES])


if __name__ == "__main__":
    print(json.dumps(forward(*sys.argv[1:])))
