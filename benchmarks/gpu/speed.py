"""The steps that measure speed and memory; each is compared with a plain torch loop of the same size."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import (
    BACKBONE,
    CLIP,
    CORES,
    DEVICE,
    REHEARSE,
    ROOT,
    SIDE_PX,
    WORK,
    Watch,
    base,
    base_of_features,
    figure,
    make_clip,
    pipeline,
    rate,
    settings,
    timed_rate,
)


def stage_one() -> None:
    """Images per second of `train-cnn` with configs/cholec80.yaml, compared with plain loops on images on the GPU."""
    frames = 200 if REHEARSE else 14000
    batch = 20 if REHEARSE else 100
    small = ["cnn.epochs=1", f"cnn.batch_frames={batch}", f"cnn.frames_per_epoch={frames}"]
    with Watch() as watch:
        pipeline("train-cnn", "--name", "cnn", *settings(*base("data", *small)), timed=WORK / "cnn.json", timeout=70)
    found = timed_rate(WORK / "cnn.json", batch, 20)
    ours = found["rate"]
    figure("train-cnn, images per second", ours, "0.9 of the plain loop", **found, **watch.means())
    plain_s: dict[str, float] = {}
    for name, benchmark, deterministic in (("as train-cnn sets cuDNN", False, True), ("cudnn.benchmark", True, False)):
        plain_s[name] = plain_resnet(batch, benchmark, deterministic)
        figure(
            f"plain loop, {name}, images per second", plain_s[name], ratio_of_train_cnn=round(ours / plain_s[name], 3)
        )
    loaders(batch)


def switches() -> None:
    """Images per second of `train-cnn` with other values of `cuda.*` and in fp32."""
    batch, frames = (20, 60) if REHEARSE else (100, 4000)
    small = ["cnn.epochs=1", f"cnn.batch_frames={batch}", f"cnn.frames_per_epoch={frames}"]
    fast = ["cuda.deterministic=false", "cuda.benchmark=true"]
    variants: list[tuple[str, list[str]]] = [
        ("the preset", []),
        (", ".join(fast), fast),
        ("cnn.precision=fp32", ["cnn.precision=fp32"]),
        ("cnn.precision=fp32, cuda.tf32=true", ["cnn.precision=fp32", "cuda.tf32=true"]),
    ]
    for name, more in variants[-1:] if REHEARSE else variants:
        file, chosen = WORK / f"switches-{len(name)}.json", settings(*base("data", *small, *more))
        pipeline("train-cnn", "--name", file.stem, *chosen, timed=file, timeout=40)
        found = timed_rate(file, batch, 10)
        figure(f"train-cnn, {name}, images per second", found["rate"], **found)


def plain_resnet(batch: int, benchmark: bool, deterministic: bool, optimised: bool = False) -> float:
    """Images per second of ResNet50 in bf16, channels last, SGD, on one batch in the GPU's memory.

    `optimised` adds torch.compile and a fused optimiser.
    """
    import torch
    import torch.nn.functional as F
    import torchvision

    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = benchmark, deterministic
    net = torchvision.models.get_model(BACKBONE, weights=None, num_classes=7)
    net = net.to(DEVICE, memory_format=torch.channels_last).train()
    fused = True if optimised and DEVICE == "cuda" else None
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, fused=fused)
    # a rehearsal does not need the compiler, which takes half a minute
    forward = torch.compile(net, backend="eager" if REHEARSE else "inductor") if optimised else net
    images = torch.randn(batch, 3, SIDE_PX, SIDE_PX, device=DEVICE).contiguous(memory_format=torch.channels_last)
    labels = torch.rand(batch, 7, device=DEVICE).round()

    def once() -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            logits = forward(images)
        F.binary_cross_entropy_with_logits(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return batch * rate(once, 2 if REHEARSE else 40, 1 if REHEARSE else 10)


def loaders(batch: int) -> None:
    """Images per second of the loader alone, reading the cache that train-cnn has filled.

    If there is a GPU, images are loaded into pinned memory.
    """
    import numpy as np
    import torch

    from configs.load import load_config
    from engine.stopping import StopRequest
    from features.dataset.index import Dataset, Index
    from stage1_cnn.data import ClipDataset, FrameLoader, Request, choose_workers, labelled_frames

    config = load_config("cholec80", base("data"))
    index = Index.load(config.data.index)
    frames = labelled_frames(config, Dataset(index, WORK / "data"), index.by_split("train"), with_phases=False)
    dataset = ClipDataset({"train": frames}, SIDE_PX, config.cnn.augment, 0)
    device = torch.device(DEVICE)
    workers = choose_workers(-1, device)
    rows = np.random.default_rng(0).integers(0, len(frames), (4 * workers + (4 if REHEARSE else 40), batch))
    with FrameLoader(dataset, workers, device, StopRequest()) as loader:
        batches = loader.batches([Request.of_frames("train", 0, row) for row in rows.tolist()])
        for _ in range(3 * workers):
            next(batches)
        started = time.perf_counter()
        delivered = sum(len(one.first) for one in batches)
        seconds = time.perf_counter() - started
    figure("loader alone, images per second", delivered / seconds, "more than train-cnn", workers=workers)


def stage_two() -> None:
    """Seconds per epoch of `train-temporal` over 86,304 x 2048 features, compared with nn.LSTM on the same shapes."""
    epochs = 3
    variants: list[tuple[str, list[str]]] = [
        ("1 video per step, precision=auto (cholec80.yaml)", []),
        ("8 videos per step, precision=auto", ["temporal.sequence.batch=8"]),
        ("8 videos per step, fp32", ["temporal.sequence.batch=8", "temporal.precision=fp32"]),
    ]
    for name, more in variants[-2:] if REHEARSE else variants:
        tag = "t-" + "".join(mark for mark in name if mark.isalnum())
        chosen = [*base_of_features("data"), f"temporal.epochs={epochs}", "temporal.baseline=false", *more]
        with Watch() as watch:
            pipeline(
                "train-temporal",
                "--name",
                tag,
                "--features",
                str(WORK / "random_features"),
                *settings(*chosen),
                timed=WORK / f"{tag}.json",
                timeout=40,
            )
        rows = [
            json.loads(line) for line in (WORK / "runs" / tag / "temporal" / "metrics.jsonl").read_text().splitlines()
        ]
        seconds = [row["seconds"] for row in rows if row["kind"] == "epoch"]
        result = json.loads((WORK / "runs" / tag / "temporal" / "result.json").read_text())
        noted = json.loads((WORK / f"{tag}.json").read_text())
        figure(
            f"train-temporal, {name}, seconds per epoch",
            statistics.median(seconds[1:]),
            None,
            first_epoch=seconds[0],
            frames_per_second=result["frames_per_s"],
            precision=result["precision"],
            peak_allocated_gib=noted.get("peak_allocated_gib"),
            **watch.means(),
        )
    for dtype in ("fp32", "fp16", "bf16"):
        for batch in (1, 8):
            try:
                figure(f"plain nn.LSTM, {dtype}, {batch} x 2158, seconds for 86,304 frames", plain_lstm(dtype, batch))
            except Exception as error:  # an LSTM in bf16 needs cuDNN 9.13 and torch 2.10
                figure(f"plain nn.LSTM, {dtype}, {batch} x 2158", f"{type(error).__name__}: {str(error)[:160]}")


def plain_lstm(dtype: str, batch: int) -> float:
    """Seconds for 86,304 frames: forward, cross-entropy, backward and AdamW, without padding, weights in `dtype`."""
    import torch
    import torch.nn.functional as F

    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    frames = 50 if REHEARSE else 2158
    net = torch.nn.LSTM(2048, 512, batch_first=True).to(DEVICE, kind)
    last = torch.nn.Linear(512, 7).to(DEVICE, kind)
    optimizer = torch.optim.AdamW([*net.parameters(), *last.parameters()], lr=1e-4, eps=1e-4)
    x = torch.randn(batch, frames, 2048, device=DEVICE, dtype=kind)
    phase = torch.randint(7, (batch * frames,), device=DEVICE)

    def once() -> None:
        F.cross_entropy(last(net(x)[0]).flatten(0, 1).float(), phase).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return 86304 / (batch * frames * rate(once, 2 if REHEARSE else 6, 1 if REHEARSE else 2))


def require_clip() -> Path:
    """The path of the clip, which is written first if it does not exist."""
    if not CLIP.exists():
        CLIP.parent.mkdir(parents=True, exist_ok=True)
        make_clip(CLIP)
    return CLIP


def extract() -> None:
    """Frames per second of `extract` for 854x480 H.264, compared with decoding alone and the forward pass alone."""
    from scaling import repeat_packets

    clip = require_clip()
    seconds, frames, use = {}, {}, {}
    for turns in (
        (1, 2) if REHEARSE else (2, 14)
    ):  # repetitions of a clip of about 23 s; the difference between few and many excludes start-up
        data = WORK / f"long{turns}" / "videos"
        data.mkdir(parents=True, exist_ok=True)
        first = data / "video01.mp4"
        repeat_packets(clip, first, turns)
        for number in range(2, (3 if REHEARSE else CORES) + 1):
            (data / f"video{number:02d}.mp4").unlink(missing_ok=True)
            os.link(first, data / f"video{number:02d}.mp4")
        chosen = [
            *base(f"long{turns}"),
            "data.split.rule=60%/20%/20%",
            "extract.encoder=initial",
            f"extract.store={WORK / f'long-store{turns}'}",
        ]
        pipeline("index", *settings(*chosen), timeout=60)
        started = time.perf_counter()
        with Watch() as watch:
            pipeline("extract", "--name", f"long{turns}", *settings(*chosen), timeout=75)
        seconds[turns] = time.perf_counter() - started
        result = json.loads((WORK / "runs" / f"long{turns}" / "extract" / "result.json").read_text())
        frames[turns], use[turns] = result["frames"], watch.means()
    few, many = seconds
    ours = (frames[many] - frames[few]) / (seconds[many] - seconds[few])
    alone = decode_alone(str(WORK / f"long{many if REHEARSE else few}" / "videos" / "video01.mp4"))
    forward = forward_alone()
    figure(
        "extract, sampled frames per second",
        ours,
        "0.9 of decoding alone",
        cores=CORES,
        **use[many],
        start_up_seconds=round(seconds[few] - frames[few] / ours, 1),
    )
    figure(
        "decoding alone, one process per core, sampled frames per second",
        alone,
        ratio_of_extract=round(ours / alone, 3),
    )
    figure("forward pass alone, 64 at a time, frames per second", forward, ratio_of_extract=round(ours / forward, 3))


def decode_alone(path: str) -> float:
    """Sampled frames per second of `benchmarks/extract_reference.py decode`, with one process per core together."""
    words = [sys.executable, str(ROOT / "benchmarks" / "extract_reference.py"), "decode", path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    running = [subprocess.Popen(words, **options) for _ in range(CORES)]
    for process in running:
        process.stdout.readline()  # type: ignore[union-attr]
    for process in running:
        process.stdin.write("\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
    found = [json.loads(process.communicate()[0]) for process in running]
    return float(sum(one["frames"] / one["seconds"] for one in found))


def forward_alone() -> float:
    """Frames per second of the encoder on this device, from crops (uint8) in its memory to embeddings on the host."""
    import torch

    from configs.load import load_config
    from stage1_cnn.encoders.encoder import load_encoder

    encoder = load_encoder(load_config("cholec80", [*base("data"), "extract.encoder=initial"]), None, ())
    crops = torch.randint(256, (64, SIDE_PX, SIDE_PX, 3), dtype=torch.uint8, device=DEVICE)
    return 64 * rate(lambda: encoder(crops), 2 if REHEARSE else 50, 1 if REHEARSE else 10)


def joint() -> None:
    """Speed and memory of the joint training, compared with a plain loop."""
    clips, batch = (8, 2) if REHEARSE else (1600, 40)
    for name, more in (("", []), (", gradient_checkpointing", ["joint.gradient_checkpointing=true"])):
        tag = "joint" + ("-again" if more else "")
        count = clips if not more else max(4 * batch, clips // 4)
        chosen = [
            *base("data"),
            "preprocess.cut_margin=false",
            f"joint.sequence.batch={batch}",
            "joint.multitask.epochs=1",
            f"joint.clips_per_epoch={count}",
            *more,
        ]
        with Watch() as watch:
            pipeline(
                "train-joint",
                "--config",
                "mtrcnet",
                "--name",
                tag,
                *settings(*chosen),
                timed=WORK / f"{tag}.json",
                timeout=60,
            )
        found = timed_rate(WORK / f"{tag}.json", batch, 5)
        figure(
            f"train-joint{name}, clips of 10 per second",
            found["rate"],
            None if more else "0.9 of the plain loop",
            **found,
            **watch.means(),
        )
    figure("plain joint loop, clips of 10 per second", plain_joint(batch))


def plain_joint(batch: int) -> float:
    """Clips per second of the ResNet50 and LSTM of benchmarks/temporal_reference.py, in bf16, on images on the GPU."""
    import torch
    import torch.nn.functional as F
    from temporal_reference import EndToEnd

    net = EndToEnd().to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    images = torch.randn(batch, 10, 3, SIDE_PX, SIDE_PX, device=DEVICE)
    phase = torch.randint(7, (batch * 10,), device=DEVICE)
    tools = torch.rand(batch, 10, 7, device=DEVICE).round()

    def once() -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            phases, present = net(images)
        loss = F.cross_entropy(phases.flatten(0, 1).float(), phase)
        (loss + F.binary_cross_entropy_with_logits(present.float(), tools)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return batch * rate(once, 1 if REHEARSE else 12, 1 if REHEARSE else 3)


def hardware() -> None:
    """Check that `extract` can use NVDEC and that its frames equal those of software decoding; measure its speed."""
    import numpy as np

    clip = require_clip()
    data = WORK / "hw" / "videos"
    data.mkdir(parents=True, exist_ok=True)
    shutil.copy(clip, data / "video01.mp4")
    chosen = [
        *base("hw"),
        "data.split={rule: lists, test: [video01]}",
        "extract.encoder=initial",
        f"extract.store={WORK / 'hw-store'}",
        "extract.hardware_decoding=cuda",
    ]
    pipeline("index", *settings(*chosen), timeout=30)
    done = pipeline("extract", "--name", "hw", *settings(*chosen), timeout=120, check=False)
    last = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()][-1:] or [""]
    figure("extract.hardware_decoding=cuda: exit code", done.returncode, 2 if REHEARSE else 0, said=last[0][:300])
    if REHEARSE:
        return
    import av
    from av.codec.hwaccel import HWAccel

    def decoded(accelerated: bool, keep: int = 0) -> tuple[float, list[np.ndarray], list[np.ndarray]]:
        more = {"hwaccel": HWAccel("cuda", allow_software_fallback=False)} if accelerated else {}
        direct, planar, count, started = [], [], 0, time.perf_counter()
        with av.open(str(clip), **more) as container:
            for frame in container.decode(video=0):
                count += 1
                if len(direct) < keep:
                    direct.append(frame.to_ndarray(format="rgb24"))
                    planar.append(frame.reformat(format="yuv420p").to_ndarray(format="rgb24"))
        return count / (time.perf_counter() - started), direct, planar

    _, expected, _ = decoded(False, 3)
    _, direct, planar = decoded(True, 3)
    figure("NV12 to RGB directly, equal to software", all(map(np.array_equal, direct, expected)))
    figure("NV12 to planar first, as readers do, equal to software", all(map(np.array_equal, planar, expected)), True)
    hard, _, _ = decoded(True)
    soft, _, _ = decoded(False)
    figure("frames per second, one NVDEC reader", hard, software_one_thread=round(soft, 1))


def waits() -> None:
    """Count where training steps wait for the GPU, line by line (torch.cuda.set_sync_debug_mode)."""
    os.environ["GPU_CHECK_WAITS"] = "1"
    frames = 200 if REHEARSE else 4000
    batch = 10 if REHEARSE else 100
    chosen = [
        *base("data"),
        "cnn.backbone=resnet18",
        "cnn.epochs=1",
        f"cnn.batch_frames={batch}",
        f"cnn.frames_per_epoch={frames}",
    ]
    pipeline("train-cnn", "--name", "waits", *settings(*chosen), timed=WORK / "waits.json", timeout=30)
    found = json.loads((WORK / "waits.json").read_text())["waits"]
    figure("train-cnn: waits for the GPU in 20 steps", sum(found.values()), 0, where=found)
    chosen = [*base_of_features("data"), "temporal.epochs=1", "temporal.baseline=false"]
    pipeline(
        "train-temporal",
        "--name",
        "waits",
        "--features",
        str(WORK / "random_features"),
        *settings(*chosen),
        timed=WORK / "waits2.json",
        timeout=30,
    )
    found = json.loads((WORK / "waits2.json").read_text())["waits"]
    figure("train-temporal: waits for the GPU in 20 steps", sum(found.values()), 0, where=found)


def together() -> None:
    """Compare four trainings of stage two on one GPU at the same time, as `ablate` starts them, with a single one."""
    words = ["train-temporal", "--features", str(WORK / "random_features")]
    chosen = [*base_of_features("data"), "temporal.epochs=2", "temporal.baseline=false"]
    start = [sys.executable, str(ROOT / "pipeline.py"), *words, *settings(*chosen), "--name"]
    quiet: dict[str, Any] = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    seconds = {}
    for count in (1, 2) if REHEARSE else (1, 4):
        started = time.perf_counter()
        running = [subprocess.Popen([*start, f"with{count}-{n}"], **quiet) for n in range(count)]
        codes = [process.wait() for process in running]
        seconds[count] = time.perf_counter() - started
        figure(f"{count} training(s) of stage two at once, seconds", seconds[count], codes=codes)
    most = max(seconds)
    figure(f"{most} at once against {most} in a row", most * seconds[1] / seconds[most], "over 2 for 4")


def compiled() -> None:
    """Measure what torch.compile and a fused optimiser would gain in stage one.

    This is the last step, since compiling takes a long time.
    """
    batch = 4 if REHEARSE else 100
    figure("plain loop, compiled, fused, images per second", plain_resnet(batch, True, False, optimised=True))
