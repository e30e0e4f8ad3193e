"""Memory of a training step of the joint net with and without `joint.gradient_checkpointing`.

    python benchmarks/checkpointing.py --json FILE [--frames 400] [--real 50]

The step consists of the forward and backward pass of ResNet50 at 224x224, as in `configs/mtrcnet.yaml`, and an update
by SGD with momentum. Two steps are run, and the second is measured. There are three variants: `without` checkpointing,
`blocks` (a checkpoint per block, which is the setting), and `whole` (one checkpoint around the whole backbone).

- `fake_gib_<bf16|fp32>`: the peak size of all tensors together, in GiB, for `--frames` frames, with and without
  autocast to bf16. The tensors are fake ones, which have shapes but no content, so the figure holds for any device.
  cuDNN's workspace and the fragmentation of the allocator are not included. Neither is the phase branch (about
  0.06 GiB, most of it weights), because its kernel needs the content of a tensor, the lengths.
- `real_gib`: the same figure for `--real` frames as real tensors on this CPU, in fp32, including the phase branch.
- `real_rss_gib`: by how much the peak memory (VmHWM) of this process exceeds its memory before the first step.
- `real_seconds`: the processor time of the second step, in seconds.
- `ratio_*`: the figure of `blocks` divided by that of `without`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from command import PROJECT, options, say

VARIANTS = ("without", "whole", "blocks")
SIZE_PX, CLIP, GIB = 224, 10, 2**30


def main() -> None:
    """Parse the options, measure each variant in its own process, and print and write the figures."""
    parser = options(__doc__, repeat=None)
    parser.add_argument("--frames", type=int, default=400, metavar="N", help="fake frames in a step (default: 400)")
    parser.add_argument("--real", type=int, default=50, metavar="N", help="real frames in a step (default: 50)")
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "WHAT"), help="fp32, bf16 or real, in this process")
    given = parser.parse_args()
    if given.one:
        variant, what = given.one
        found = real(variant, given.real) if what == "real" else fake(variant, given.frames, what)
        print(json.dumps(found))
        return
    numbers = ["--frames", str(given.frames), "--real", str(given.real)]
    figures: dict[str, Any] = {"frames": given.frames, "real_frames": given.real}
    for what in ("bf16", "fp32", "real"):
        each = {variant: one([*numbers, "--one", variant, what]) for variant in VARIANTS}
        for key in each["without"]:
            figures[key] = {variant: round(each[variant][key], 2) for variant in VARIANTS}
            figures[f"ratio_{key}"] = round(each["blocks"][key] / each["without"][key], 3)
    say(figures, given.json)


def one(words: list[str]) -> dict[str, float]:
    """The figures that one process, started with these words, measures."""
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)}: failed\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def fake(variant: str, frames: int, precision: str) -> dict[str, float]:
    """The peak size of the tensors of a step, counted with fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return {f"fake_gib_{precision}": peak_of_tensors(variant, frames, precision, phase=False)}


def real(variant: str, frames: int) -> dict[str, float]:
    """The peak size of the tensors of a step, the peak memory of the process, and the processor time in seconds."""
    marks: list[tuple[float, float]] = []
    mark = lambda: marks.append((time.process_time(), resident_gib("VmRSS")))  # noqa: E731
    peak = peak_of_tensors(variant, frames, "fp32", phase=True, before_step=mark)
    seconds = time.process_time() - marks[-1][0]
    return {"real_gib": peak, "real_rss_gib": resident_gib("VmHWM") - marks[0][1], "real_seconds": seconds}


def peak_of_tensors(
    variant: str, frames: int, precision: str, phase: bool, before_step: Callable[[], None] = lambda: None
) -> float:
    """The peak size, in GiB, of the parameters, gradients, momentum and activations of a step together."""
    import torch
    from torch.distributed._tools.mem_tracker import MemTracker

    net = joint_net(variant, phase)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    tracker = MemTracker()
    tracker.track_external(net, optimizer)
    with tracker:
        for _ in range(2):
            before_step()
            images = torch.rand(frames // CLIP, CLIP, 3, SIZE_PX, SIZE_PX)
            with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
                output = net(images)
            stages = output.phase_stages or []
            sum(logits.float().square().sum() for logits in (output.tool_logits, *stages)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            tracker.reset_mod_stats()
    return sum(place["Total"] for place in tracker.get_tracker_snapshot("peak").values()) / GIB


def joint_net(variant: str, phase: bool) -> Any:
    """The net of `configs/mtrcnet.yaml`, with or without its phase branch, in training mode."""
    import torch
    from torch.utils.checkpoint import checkpoint

    sys.path.insert(0, str(PROJECT))
    from configs.load import load_config
    from stage1_cnn.encoders.backbone import build_backbone
    from stage2_temporal.joint.net import build_joint

    config = load_config("mtrcnet")
    settings = config.joint.net if phase else config.joint.net.model_copy(update={"tasks": "tool"})
    net = build_joint(build_backbone("resnet50", "random", 0), settings, config.temporal.head, tools=7, phases=7)
    net.gradient_checkpointing = variant == "blocks"
    if variant == "whole":
        net.backbone.forward = partial(checkpoint, net.backbone.forward, use_reentrant=False)
    return net.to(memory_format=torch.channels_last).train() if phase else net.train()  # fake tensors: not converted


def resident_gib(name: str) -> float:
    """The memory of this process in GiB: the current one (`VmRSS`) or its peak (`VmHWM`)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(rf"{name}:\s+(\d+)", status)[1]) * 1024 / GIB  # type: ignore[index]


if __name__ == "__main__":
    main()
