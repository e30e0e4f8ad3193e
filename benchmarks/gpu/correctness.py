"""Steps that check what is computed: the LSTM, features, the joint net, resuming, several processes, fp16."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from common import (
    BACKBONE,
    CORES,
    DEVICE,
    REHEARSE,
    ROOT,
    SIMULATED,
    SPEED_UP,
    VIDEOS,
    WORK,
    base,
    base_of_features,
    figure,
    pipeline,
    run,
    settings,
)


def about() -> None:
    """Report versions, the GPU, the precisions that `auto` selects, and what `doctor` finds."""
    import torch

    figure("torch", torch.__version__, cuda=torch.version.cuda, python=sys.version.split()[0], cores=CORES)
    if torch.cuda.is_available():
        from engine.device import choose_precision

        major, minor = torch.cuda.get_device_capability()
        figure("gpu", torch.cuda.get_device_name(), capability=f"{major}.{minor}", cudnn=torch.backends.cudnn.version())
        precision = {
            training: choose_precision("cnn.precision", "auto", torch.device("cuda"), training=training)
            for training in (True, False)
        }
        figure("precision of auto", precision[True], extraction=precision[False])
    shm = shutil.disk_usage("/dev/shm").total / 2**30 if Path("/dev/shm").is_dir() else 0
    figure("shared memory, GiB", round(shm, 1))
    importing = [sys.executable, "-c", "import torch"]
    for count in dict.fromkeys([1, CORES]):
        started = time.perf_counter()
        running = [subprocess.Popen(importing) for _ in range(count)]
        codes = {process.wait() for process in running}
        figure(
            f"seconds to import torch, {count} process(es) at once", time.perf_counter() - started, codes=list(codes)
        )
    done = pipeline("doctor", timeout=40, check=False)
    lines = done.stdout.splitlines()
    bad = [line for line in lines if line.startswith(("FAIL", "warn"))]
    figure("doctor: lines that are not ok", len(bad), lines=[line[:200] for line in bad])


def lstm() -> None:
    """Compare the outputs and gradients of cuDNN and of the project's own recurrence on the CPU.

    Both are called in the way in which `train-temporal` calls them.
    """
    import torch
    import torch.nn.functional as F

    from configs.head_settings import LstmHead
    from stage2_temporal.heads.base import build_head

    torch.manual_seed(0)
    width, lengths = 2048, [40, 33, 20] if REHEARSE else [2158, 1500, 900, 300]
    head = build_head(LstmHead(hidden=512), width, 7).train()
    x = torch.randn(len(lengths), max(lengths), width)
    rows = torch.tensor(lengths)
    with torch.no_grad():
        phase = head(x, None, rows).logits.argmax(-1)
    mask = torch.arange(max(lengths)) < rows[:, None]
    phase = phase.masked_fill(~mask, -1)

    def gradients(device: str, sharpness: float, lower: Any) -> tuple[Any, dict[str, Any], str]:
        net = head.to(device)
        net.zero_grad()
        seen: list[Any] = []
        hook = net.rnn.register_forward_hook(
            lambda module, given, out: seen.append((out[0].data if hasattr(out[0], "data") else out[0]).dtype)
        )
        with lower():
            logits = net(x.to(device), None, rows).logits
        # the labels are the head's own predictions, so that sharp logits give small gradients, as late in training
        loss = F.cross_entropy(sharpness * logits.float().flatten(0, 1), phase.to(device).flatten(), ignore_index=-1)
        loss.backward()
        hook.remove()
        found = {name: p.grad.detach().double().cpu() for name, p in net.named_parameters() if p.grad is not None}
        return logits.detach().double().cpu()[mask], found, str(seen[0]) if seen else "own recurrence"

    def compare(title: str, sharpness: float, lower: Any, wanted: float) -> None:
        expected, grads, _ = gradients("cpu", sharpness, contextlib.nullcontext)
        found, others, kind = gradients(DEVICE, sharpness, lower)
        error = float((found - expected).norm() / expected.norm())
        figure(f"LSTM outputs, {title}: relative error", error, f"under {wanted}", type_inside=kind)
        for name in ("rnn.weight_hh_l0", "rnn.weight_ih_l0"):
            cosine = float(F.cosine_similarity(grads[name].flatten(), others[name].flatten(), dim=0))
            gone = float(((others[name] == 0) & (grads[name] != 0)).double().mean())
            figure(f"LSTM gradient of {name}, {title}: cosine", cosine, "over 0.999", vanished=round(gone, 4))

    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    compare("fp32 without TF32", 1.0, contextlib.nullcontext, 1e-4)
    torch.backends.cudnn.allow_tf32 = tf32
    compare("fp32 as torch has it", 1.0, contextlib.nullcontext, 1e-3)
    if DEVICE == "cuda":
        autocast = partial(torch.autocast, "cuda", torch.bfloat16)  # what precision=auto means on recent GPUs
        compare("precision=auto, early in training", 1.0, autocast, 1e-2)
        compare("precision=auto, late in training (sharp logits)", 60.0, autocast, 1e-2)
    # the state is carried between chunks, and padding has no effect
    net = head.to(DEVICE).eval()
    with torch.no_grad():
        whole = net(x.to(DEVICE), None, rows).logits
        first = net(x[:, :17].to(DEVICE), None, rows.clamp(max=17))
        left = rows - 17
        second = net(x[:, 17:].to(DEVICE), first.state, left)
        joined = torch.cat([first.logits, second.logits], 1)
        alone = net(x[2:3, : lengths[2]].to(DEVICE)).logits
    inside = mask.to(DEVICE)
    figure(
        "LSTM in chunks against whole: largest difference", float((joined - whole)[inside].abs().max()), "under 1e-3"
    )
    figure(
        "LSTM alone against in a batch: largest difference",
        float((alone[0] - whole[2, : lengths[2]]).abs().max()),
        "under 1e-3",
    )


def material() -> None:
    """Write a SIMULATED data set at 1 fps for training, and random features of forty videos of realistic lengths."""
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    started = time.perf_counter()
    size = ["--width", "108", "--height", "60"] if REHEARSE else ["--width", "428", "--height", "240"]
    pipeline(
        "simulate",
        str(WORK / "data"),
        "--videos",
        str(SIMULATED),
        "--fps",
        "1",
        "--speed-up",
        str(SPEED_UP),
        "--workers",
        str(CORES),
        *size,
        timeout=60,
    )
    for number in range(SIMULATED, VIDEOS):
        for one in (
            "videos/video{:02d}.mp4",
            "phase_annotations/video{:02d}-phase.txt",
            "tool_annotations/video{:02d}-tool.txt",
        ):
            first = WORK / "data" / one.format(number % SIMULATED + 1)
            os.link(first, WORK / "data" / one.format(number + 1))
    figure("simulated videos", SIMULATED, files=VIDEOS, seconds=round(time.perf_counter() - started, 1))
    pipeline("index", *settings(*base("data")), timeout=30)
    from start_up import phases_of, write_feature_set

    from configs.load import load_config
    from features.frames.preprocess import preprocess_json
    from features.store import EncoderSpec

    started = time.perf_counter()
    phases = [phase[::20] for phase in phases_of(None)[:4]] if REHEARSE else phases_of(None)
    preprocess = preprocess_json(load_config("cholec80", base("data")).preprocess)
    encoder = EncoderSpec(BACKBONE, "0" * 64, preprocess, 1.0, "fp32", "float16", 2048)
    write_feature_set(WORK / "random_features", phases, train_share=1.0, encoder=encoder)
    figure("random features written", len(phases), seconds=round(time.perf_counter() - started, 1))


def features() -> None:
    """Compare the features of `extract` on the GPU, in each precision, with those in fp32 on the CPU.

    The figures are mean and lowest cosine similarity, of the features themselves and after subtracting their mean,
    since features of a network with random weights differ little from each other.
    """
    import h5py
    import numpy as np

    pair = WORK / "pair"
    shutil.rmtree(pair, ignore_errors=True)
    (pair / "videos").mkdir(parents=True)
    for video in sorted((WORK / "data" / "videos").glob("*.mp4"))[:2]:
        shutil.copy(video, pair / "videos")
    split = "data.split={rule: lists, test: [video01, video02]}"

    def extracted(device: str, precision: str, net: list[str], tag: str) -> np.ndarray:
        store = WORK / f"pair-{tag}"
        chosen = [
            *base("pair"),
            split,
            "extract.encoder=initial",
            f"extract.store={store}",
            f"device={device}",
            f"extract.precision={precision}",
            *net,
        ]
        pipeline("extract", "--name", f"pair-{tag}", *settings(*chosen), timeout=120)
        parts = []
        for path in sorted(store.rglob("video*.h5")):
            with h5py.File(path, "r") as file:
                parts.append(file["features"][...].astype(np.float64))
        return np.concatenate(parts)

    pipeline("index", *settings(*base("pair"), split), timeout=30)
    nets = {
        BACKBONE: [f"cnn.backbone={BACKBONE}"],
        "efficientnet_lite0 (ImageNet)": [
            "cnn.backbone=efficientnet_lite0",
            "cnn.weights=imagenet",
            "preprocess.mean=[0.485, 0.456, 0.406]",
            "preprocess.std=[0.229, 0.224, 0.225]",
        ],
    }
    for net, words in nets.items():
        tag = net.partition(" ")[0]
        expected = extracted("cpu", "fp32", words, f"{tag}-cpu")
        for precision in ("auto",) if REHEARSE or tag != BACKBONE else ("auto", "fp16", "fp32"):
            found = extracted(DEVICE, precision, words, f"{tag}-{precision}")
            middle = expected.mean(axis=0)
            for kind, a, b in (("raw", expected, found), ("without the mean", expected - middle, found - middle)):
                cosine = (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-30)
                wanted = "mean over 0.999, worst over 0.995" if kind == "raw" else None
                figure(
                    f"features, {net}, {precision} on {DEVICE} against fp32 on the CPU, cosine {kind}",
                    float(cosine.mean()),
                    wanted,
                    worst=round(float(cosine.min()), 6),
                    frames=len(cosine),
                )


def parity() -> None:
    """Compare the joint net, before its first step, with the two stages it was built from: in fp32 and in `auto`.

    Both stages are trained briefly, and the comparison is made on one video.
    """
    import numpy as np

    chosen = [
        *base("data"),
        "cnn.epochs=1",
        "cnn.workers=2",
        f"cnn.batch_frames={20 if REHEARSE else 100}",
        f"cnn.frames_per_epoch={60 if REHEARSE else 2000}",
    ]
    pipeline("train-cnn", "--name", "two", *settings(*chosen), timeout=120)
    pipeline(
        "extract", "--name", "two", *settings(*chosen, "extract.precision=fp32", "extract.storage=float32"), timeout=120
    )
    pipeline(
        "train-temporal",
        "--name",
        "two",
        *settings(*chosen, "temporal.epochs=2", "temporal.baseline=false"),
        timeout=120,
    )

    import torch

    from configs.load import load_config
    from engine.device import choose_device, choose_precision, lower_precision
    from features.dataset.index import Dataset, Index
    from features.store_folder import find_feature_folder, load_feature_set
    from stage2_temporal.joint.predict import predict_videos
    from stage2_temporal.joint.train import Start, initial_net
    from stage2_temporal.predict import load_temporal, predict_phases

    config = load_config("cholec80", chosen)
    run_of = WORK / "runs" / "two"
    index = Index.load(config.data.index)
    entries = index.by_split("test")[:1]
    folder = find_feature_folder(None, run_of, config.extract.store)
    stored = load_feature_set(folder, [entries[0].id])
    model, _ = load_temporal(run_of / "temporal")
    device = choose_device(config.device)
    for precision in ("fp32",) if REHEARSE else ("fp32", "auto"):
        resolved = choose_precision("extract.precision", precision, device, training=False)
        for tf32 in (False, True) if precision == "fp32" else (True,):
            torch.backends.cudnn.allow_tf32 = tf32
            expected = predict_phases(model, stored, "carried", 10, device.type)[entries[0].id]
            net = initial_net(config, index, Start(cnn=run_of, temporal=run_of)).to(device)
            found = predict_videos(
                net,
                config,
                Dataset(index, WORK / "data"),
                entries,
                inference="carried",
                frames=10,
                check_stop=lambda: None,
                autocast=partial(lower_precision, device, resolved),
            )[entries[0].id].phase
            apart = float(np.abs(found - expected).max())
            same = float((found.argmax(1) == expected.argmax(1)).mean())
            wanted = "under 1e-4" if precision == "fp32" and not tf32 else None
            name = f"joint net before its first step against the two stages, {resolved}, TF32 {'on' if tf32 else 'off'}"
            figure(f"{name}: largest difference of probabilities", apart, wanted, same_phase=round(same, 5))


def small() -> list[str]:
    """The settings of a short training of stage one."""
    batch, frames = (2, 60) if REHEARSE else (100, 4000)
    return [
        *base("data"),
        "cnn.backbone=resnet18",
        "cnn.epochs=2",
        f"cnn.batch_frames={batch}",
        f"cnn.frames_per_epoch={frames}",
        "cnn.workers=2",
    ]


def resume() -> None:
    """Train twice without a stop, and once with a stop by SIGTERM and a resume; compare the weights."""
    for name in ("whole-a", "whole-b"):
        pipeline("train-cnn", "--name", name, *settings(*small()), timeout=120)
    code = stopped("train-cnn", "stopped", small(), WORK / "runs" / "stopped" / "cnn" / "metrics.jsonl")
    figure("train-cnn: exit code after SIGTERM", code, 75)
    pipeline("train-cnn", "--name", "stopped", *settings(*small()), timeout=120)
    weights("train-cnn", "cnn", "whole-a", "whole-b", "stopped")


def resume_temporal() -> None:
    """The same as `resume`, for stage two, which is trained on chunks."""
    chosen = [
        *base_of_features("data"),
        "temporal.sequence.mode=chunked",
        "temporal.sequence.frames=64",
        "temporal.epochs=4",
        "temporal.baseline=false",
        "temporal.head.dropout=0.1",
        "temporal.head.layers=2",
    ]
    features_of = ["--features", str(WORK / "random_features")]
    for name in ("t-whole-a", "t-whole-b"):
        pipeline("train-temporal", "--name", name, *features_of, *settings(*chosen), timeout=120)
    log = WORK / "runs" / "t-stopped" / "temporal" / "metrics.jsonl"
    code = stopped("train-temporal", "t-stopped", chosen, log, *features_of)
    figure("train-temporal: exit code after SIGTERM", code, 75)
    pipeline("train-temporal", "--name", "t-stopped", *features_of, *settings(*chosen), timeout=120)
    weights("train-temporal", "temporal", "t-whole-a", "t-whole-b", "t-stopped")


def stopped(command: str, name: str, chosen: list[str], log: Path, *words: str) -> int:
    """Start a training, send SIGTERM after its first step, and return the exit code."""
    start = [sys.executable, str(ROOT / "pipeline.py"), command, "--name", name, *words, *settings(*chosen)]
    process = subprocess.Popen(start, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and '"step"' in log.read_text(errors="replace"):
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.02)
    return process.wait(timeout=120)


def weights(what: str, stage: str, first: str, second: str, third: str) -> None:
    """Report the largest difference of a weight in the last checkpoints of runs.

    The runs `first` and `second` were not stopped, and `third` was stopped and resumed. The other two are compared
    with `first`.
    """
    import torch

    def model(name: str) -> dict[str, Any]:
        content = torch.load(WORK / "runs" / name / stage / "last.pt", map_location="cpu", weights_only=True)
        return {key: value for key, value in content["model"].items() if isinstance(value, torch.Tensor)}

    def apart(one: dict[str, Any], other: dict[str, Any]) -> float:
        gaps = [float((one[key].double() - other[key].double()).abs().max()) for key in one if one[key].numel()]
        return max(gaps)

    a, b, c = model(first), model(second), model(third)
    figure(f"{what}: two runs of the same command, largest difference of a weight", apart(a, b), 0.0)
    figure(f"{what}: stopped and resumed, largest difference of a weight", apart(a, c), 0.0)


def nccl() -> None:
    """Compare a training by one process under torchrun (NCCL, DistributedDataParallel) with one without torchrun.

    Also check that two processes on one GPU are refused.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    one = [sys.executable, *launcher, str(ROOT / "pipeline.py")]
    done = run([*one, "train-cnn", "--name", "torchrun", *settings(*small())], 120, check=False)
    figure("torchrun with one process: exit code", done.returncode, 0)
    lines = done.stderr.splitlines()
    warned = [line[:200] for line in lines if "destroy_process_group" in line or "Warning" in line]
    figure("torchrun: warnings on stderr", len(warned), 0, lines=warned[:6])
    if done.returncode == 0:
        pipeline("train-cnn", "--name", "no-torchrun", *settings(*small()), timeout=120)
        weights("torchrun against one process", "cnn", "no-torchrun", "torchrun", "torchrun")
    if REHEARSE:  # two processes may share a CPU
        return
    done = pipeline(
        "train-cnn", "--name", "two-on-one", "--devices", "2", *settings(*small()), timeout=120, check=False
    )
    last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or [""]
    figure("--devices 2 on one GPU: exit code", done.returncode, 2, said=last[0][:300])


def half() -> None:
    """Run all three trainings in fp16 with a gradient scaler, which GPUs before Ampere need."""
    precision = "fp32" if REHEARSE else "fp16"  # CPUs do not train in fp16
    batch, frames, clips = (2, 60, 4) if REHEARSE else (100, 6000, 100)
    stage_one = [f"cnn.precision={precision}", "cnn.epochs=1", "cnn.workers=2"]
    stage_one += [f"cnn.batch_frames={batch}", f"cnn.frames_per_epoch={frames}"]
    stage_two = [f"temporal.precision={precision}", "temporal.epochs=3", "temporal.baseline=false"]
    both = [f"joint.multitask.precision={precision}", "joint.multitask.epochs=1", f"joint.clips_per_epoch={clips}"]
    both += ["preprocess.cut_margin=false", "joint.sequence.batch=2", "joint.workers=2"]
    small_base = [*base("data"), "cnn.backbone=resnet18"]
    pipeline("train-cnn", "--name", "half", *settings(*small_base, *stage_one), timeout=120)
    features_of = ["--features", str(WORK / "random_features")]
    chosen = settings(*base_of_features("data"), *stage_two, "temporal.sequence.batch=8")
    pipeline("train-temporal", "--name", "half", *features_of, *chosen, timeout=120)
    pipeline("train-joint", "--config", "mtrcnet", "--name", "half", *settings(*small_base, *both), timeout=120)
    for stage in ("cnn", "temporal", "joint/multitask"):
        rows = [
            json.loads(line) for line in (WORK / "runs" / "half" / stage / "metrics.jsonl").read_text().splitlines()
        ]
        losses = [row["loss"] for row in rows]
        figure(f"{precision} training, {stage}: last loss", losses[-1], "finite", first=losses[0])


def ahead() -> None:
    """Compare `predict` and `evaluate` of the joint net on the GPU, with decoding processes, with those on the CPU."""
    import numpy as np

    clips = ["joint.clips_per_epoch=8", "joint.sequence.batch=2", "joint.multitask.epochs=1", "joint.workers=2"]
    chosen = settings(*base("data"), "preprocess.cut_margin=false", *clips)
    pipeline("train-joint", "--config", "mtrcnet", "--name", "ahead", *chosen, timeout=90)
    videos = [str(path) for path in sorted((WORK / "data" / "videos").glob("*.mp4"))[:1]]
    words = ["--config", "mtrcnet", "--name", "ahead", "--model", "joint"]
    found, seconds = {}, {}
    for device, choice in dict.fromkeys([("cpu", "off"), (DEVICE, "off"), (DEVICE, "on")]):
        chosen = [*base("data"), f"device={device}", "extract.precision=fp32", f"extract.decode_ahead={choice}"]
        out, started = WORK / f"ahead-{device}-{choice}", time.perf_counter()
        pipeline("predict", *words, "--out", str(out), *settings(*chosen), *videos, timeout=120)
        seconds[device, choice] = round(time.perf_counter() - started, 1)
        rows = [np.genfromtxt(path, delimiter=",", names=True, dtype=None) for path in sorted(out.glob("*.csv"))]
        names = [name for name in rows[0].dtype.names if name.startswith("p_")]
        found[device, choice] = np.concatenate([np.stack([table[name] for name in names], 1) for table in rows])
    expected = found["cpu", "off"]
    for key, values in found.items():
        figure(
            f"predict of the joint net on {key[0]}, decode_ahead={key[1]}: largest difference of a probability",
            float(np.abs(values - expected).max()),
            "under 1e-3",
            frames=len(values),
            seconds=seconds[key],
        )
    scores = {}
    for choice in ("off", "on"):
        chosen = [*base("data"), f"extract.decode_ahead={choice}"]
        pipeline("evaluate", *words, *settings(*chosen), timeout=120)
        scores[choice] = (WORK / "runs" / "ahead" / "evaluate" / "test" / "metrics.json").read_text()
    figure(
        "evaluate of the joint net: the same results with and without decode_ahead", scores["off"] == scores["on"], True
    )
