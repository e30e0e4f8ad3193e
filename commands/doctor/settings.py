"""The checks of `doctor` that concern settings, decoders and networks; `commands.doctor.machine` has the others."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from commands.doctor.machine import Check, Finding, Level, check_folder, examined, machine_checks
from configs.errors import UserError, listed, type_and_line

if TYPE_CHECKING:
    from configs.schema import Config, Size
    from features.dataset.index import Dataset

READER_LIMIT_S = 60.0
_VERDICTS: dict[str, tuple[Level, str]] = {
    "ok": ("ok", ""),
    "warn": ("warn", "only PyAV is used; see data.reader"),
    "FAIL": ("FAIL", "reinstall with `pip install -U av`"),
}
# Program that decodes in a separate process, since a decoder may crash or hang.
DECODE = """
import sys
from pathlib import Path
from commands.doctor.settings import compare_readers
print(compare_readers(Path(sys.argv[1])))
"""


def diagnose(load: Callable[[], Config]) -> Iterator[Finding]:
    """Run all checks in a fixed order and yield their findings. `load` reads the settings.

    No exception is raised. If the settings are wrong, that is a finding, and the checks that need no settings still
    run.
    """
    checks: list[tuple[str, Check]] = [("decoders", check_decoders)]
    try:
        config = load()
    except UserError as error:
        yield Finding("FAIL", "settings", str(error), "weights, data and folders are checked once this is fixed")
    except Exception as error:  # pydantic or PyYAML is broken, which the check of the packages will report
        yield Finding("FAIL", "settings", f"cannot be read ({type_and_line(error)})", "see the packages below")
    else:
        yield Finding("ok", "settings", "read")
        of_settings = {
            "device": check_device,
            "encoder": check_encoder,
            "weights": check_weights,
            "data": check_data,
            "folders": check_folders,
        }
        checks += [(what, partial(check, config)) for what, check in of_settings.items()]
    for what, check in (*machine_checks(), *checks):
        yield from examined(what, check)


# ---------------------------------------------------------------------------------------------- decoders


def check_decoders(program: str = DECODE, limit_s: float = READER_LIMIT_S) -> Iterable[Finding]:
    """Check both video readers: a separate process writes a small video and reads it, within `limit_s` seconds.

    The process runs `program`.
    """
    folder = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryDirectory(prefix="surgstage-doctor-") as place:
        try:
            done = subprocess.run(
                [sys.executable, "-c", program, place],
                env=environment,
                capture_output=True,
                text=True,
                timeout=limit_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            to_do = "set data.reader=pyav, or reinstall av and decord"
            yield Finding("FAIL", "decoders", f"no frame within {limit_s:g} s", to_do)
            return
    answer = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode == 0 and answer:
        verdict, _, found = answer.partition(" ")
        level, to_do = _VERDICTS.get(verdict, _VERDICTS["FAIL"])
        yield Finding(level, "decoders", found, to_do)
        return
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]
    yield Finding("FAIL", "decoders", last, "reinstall with `pip install --force-reinstall av`")


def compare_readers(folder: Path) -> str:
    """Check whether both readers decode a small H.264 video to the frames it was made from.

    Returns the level and the finding in one line.
    """
    import numpy as np

    from features.video.decord import why_not_decord
    from features.video.open import open_video
    from features.video.scan import scan_video
    from features.video.write import encode_mp4

    path = folder / "video.mp4"
    images = [np.full((64, 96, 3), 8 * number, dtype=np.uint8) for number in range(20)]
    encode_mp4(path, images, 25.0, {"crf": "18"}, lambda: None)
    wanted = [0, 7, 13, 19]
    with open_video(path, "pyav") as reader:
        frames = np.stack(list(reader.read(wanted)))
        name = f"PyAV {reader.version}"
    shades = frames.mean(axis=(1, 2, 3))
    if np.abs(shades - [8 * number for number in wanted]).max() > 4:
        return f"FAIL {name} decodes other frames than were written"
    reason = why_not_decord(scan_video(path))
    if reason is not None:
        return f"warn {name} reads a test video; decord does not ({reason})"
    with open_video(path, "decord") as reader:
        same = np.array_equal(np.stack(list(reader.read(wanted))), frames)
        version = reader.version
    return (
        f"ok {name} and decord {version} read the same frames" if same else f"warn decord {version} differs from {name}"
    )


# ---------------------------------------------------------------------------------------------- settings


def check_device(config: Config) -> Iterable[Finding]:
    """Check that `device` is available, computes the precisions, and has the memory for a training step."""
    import torch

    from engine.device import choose_device, choose_precision

    try:
        device = choose_device(config.device)
    except UserError as error:
        yield Finding("FAIL", "device", str(error))
        return
    yield Finding("ok", "device", f"device={config.device} is {device}")
    yield from _precisions(config)
    if device.type != "cuda" or config.cnn.backbone != "resnet50" or config.cnn.freeze_until is not None:
        return
    free = min(torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count())) / 2**30
    for stage, frames, precision, checkpointing, to_do in _training_steps(config):
        try:
            resolved = choose_precision("", precision, device, training=True)
        except UserError:  # the stage itself will refuse this precision
            continue
        needed = step_gib(frames, resolved, config.preprocess.crop_px, checkpointing)
        found = f"{stage} needs about {needed:.1f} GiB ({frames} frames per step, {resolved}, one GPU), {free:.1f} free"
        yield Finding("warn", "GPU memory", found, to_do) if needed > free else Finding("ok", "GPU memory", found)


def _precisions(config: Config) -> Iterator[Finding]:
    """Yield a finding for each refusal of `run` or `train-joint` because of a precision in the settings."""
    from commands.run import require_precisions
    from stage2_temporal.joint import train as joint

    for require in (require_precisions, joint.require_precisions):
        try:
            require(config)
        except UserError as error:
            yield Finding("FAIL", "precision", str(error))


def _training_steps(config: Config) -> Iterator[tuple[str, int, str, bool, str]]:
    """Yield, for each training on images: the stage, its frames per step, its precision, whether it recomputes
    activations, and how to make it need less memory.
    """
    lower = "lower {0} and raise {1}.accumulate_steps"
    cnn, joint = config.cnn, config.joint
    yield "train-cnn", cnn.batch_frames, cnn.precision, False, lower.format("cnn.batch_frames", "cnn")
    less = lower.format("joint.sequence.batch", "joint")
    if not joint.gradient_checkpointing:
        less = f"set joint.gradient_checkpointing=true, or {less}"
    frames = joint.sequence.batch * joint.sequence.frames
    yield "train-joint", frames, joint.multitask.precision, joint.gradient_checkpointing, less


def step_gib(frames: int, precision: str, crop_px: Size, checkpointing: bool) -> float:
    """Estimate the GPU memory, in GiB, that a training step of ResNet50 needs.

    The estimate extrapolates from the bytes in use that were counted at 224 pixels. Activations are proportional to
    frames and pixels. Weights, gradients and momentum take 0.2 GiB; the CUDA context and cuDNN's workspace take about
    1.5 GiB.
    """
    from configs.schema import height_width

    wide = precision == "fp32"
    per_frame = (0.031 if wide else 0.0165) if checkpointing else (0.082 if wide else 0.042)
    return 1.7 + frames * per_frame * math.prod(height_width(crop_px)) / 224**2


def check_encoder(config: Config) -> Iterable[Finding]:
    """Check that the backbone can be built and takes the frames of these settings; say what it is and its licence."""
    import torch

    from configs.encoder_spec import find_description
    from features.frames.settings_match import frames_note, preprocess_words
    from stage1_cnn.encoders.backbone import bare_backbone, require_image_size

    name, size = config.cnn.backbone, config.preprocess.crop_px
    try:
        with torch.device("meta"):  # shapes are computed, and nothing else
            backbone = bare_backbone(name)
            require_image_size(backbone, size)
    except UserError as error:
        if not isinstance(error.__cause__, NotImplementedError):
            yield Finding("FAIL", "encoder", str(error))
            return
        dimension = "embeddings of unknown dimension"
    except NotImplementedError:  # a network that cannot be built, or computed, without memory
        dimension = "embeddings of unknown dimension"
    else:
        dimension = f"embeddings of dimension {backbone.embedding_dim}"
    found = f"{name}, {dimension}; {frames_note(config) or f'frames {preprocess_words(config.preprocess)}'}"
    described = find_description(name)
    if described is not None and described.weights is not None:
        found += f"; licence of its weights: {described.weights.licence}"
    yield Finding("ok", "encoder", found)


def check_weights(config: Config) -> Iterable[Finding]:
    """Check whether the backbone's initial weights are on this machine. Nothing is downloaded."""
    from configs.encoder_spec import find_description
    from stage1_cnn.encoders.pretrained import (
        PUBLISHED,
        published_weights,
        release_note,
        settled_weights,
        weights_file,
    )

    cnn = config.cnn
    try:
        weights = settled_weights(cnn)
        path = None if weights == "random" else weights_file(cnn.backbone, weights, config.runs)
        about = published_weights(cnn.backbone).trained_on if weights == PUBLISHED else ""
        if path is not None and path.is_file() and find_description(cnn.backbone) is not None:
            about = release_note(cnn.backbone, path)
    except UserError as error:
        yield Finding("FAIL", "weights", str(error))
        return
    if path is None:
        yield Finding("ok", "weights", f"{cnn.backbone} starts from random weights (cnn.weights={cnn.weights})")
    elif path.is_file():
        size = f"{path.stat().st_size / 1e6:,.0f} MB"
        yield Finding("ok", "weights", f"{path} ({', '.join(filter(None, (size, about)))})")
    else:
        found = f"{path} does not exist; it is downloaded when it is first needed"
        to_do = "without internet access, copy the file there, or set cnn.weights=FILE or cnn.weights=random"
        yield Finding("warn", "weights", found, to_do)


def check_data(config: Config) -> Iterable[Finding]:
    """Check the data root, and that names, sizes and times of the files match the index. No video is opened."""
    from features.dataset.catalogue import data_root
    from features.dataset.index import Dataset, Index

    try:
        root = data_root(config)
    except UserError as error:
        yield Finding("warn", "data root", str(error), "without it only stage two works, on existing features")
        root = None
    if root is not None and not os.access(root, os.R_OK | os.X_OK):
        yield Finding("FAIL", "data root", f"{root} is not readable", "ask its owner for read permission")
        root = None
    path = config.data.index
    if not path.exists():
        if root is not None:
            yield from _found_videos(config, root)
        return
    try:
        index = Index.load(path)
    except UserError as error:
        yield Finding("FAIL", "index", str(error))
        return
    if root is None:
        yield Finding("ok", "index", f"{path}, {len(index.videos)} video(s)")
        return
    yield Finding("ok", "data root", str(root))
    yield _agreement(Dataset(index, root), path)


def _found_videos(config: Config, root: Path) -> Iterable[Finding]:
    from configs.load import load_dataset
    from features.dataset.discover import find_videos

    try:
        found = find_videos(root, load_dataset(config.data.dataset), config.data)
    except UserError as error:
        yield Finding("FAIL", "data root", str(error))
        return
    kinds = sorted({video.kind for video in found.videos})
    labelled = sum(
        video.kind == "tfrecord" or video.has_labels("phase") or bool(found.shared.get("phase"))
        for video in found.videos
    )
    text = f"{root}, {len(found.videos)} video(s) ({', '.join(kinds)}), {labelled} with phases, not indexed yet"
    yield Finding("ok", "data root", text, "run `index`")


def _agreement(dataset: Dataset, path: Path) -> Finding:
    """Check that the sources exist, with the sizes and times recorded in the index."""
    from engine.files import inside

    missing, changed = [], []
    for entry in dataset.index.videos:
        try:
            states = [(file, inside(dataset.root, file.source).stat()) for file in entry.sources]
        except (UserError, OSError):
            missing.append(entry.id)
            continue
        same = all((now.st_size, now.st_mtime_ns) == (file.size_bytes, file.modified_ns) for file, now in states)
        if entry.kind != "frames" and not same:
            changed.append(entry.id)
    for problem, ids in (("are missing", missing), ("have changed", changed)):
        if ids:
            to_do = "run `index --check` for details, `index --force` to index again"
            found = f"{path}: {len(ids)} of {len(dataset.index.videos)} sources {problem} ({listed(ids)})"
            return Finding("warn", "index", found, to_do)
    return Finding("ok", "index", f"{path}, {len(dataset.index.videos)} video(s), sizes and times as indexed")


def check_folders(config: Config) -> Iterable[Finding]:
    """Check that the output folders are writable and have enough space for what the indexed videos will need."""
    yield from check_folder("runs", config.runs)
    yield from examined("features", lambda: _check_store(config))
    yield from examined("frame cache", lambda: _check_cache(config))
    yield from check_folder("temporary files", Path(tempfile.gettempdir()))


def _check_store(config: Config) -> Iterable[Finding]:
    """Check the space for the features of all videos.

    Which features exist already is not known here, since that needs the encoder's digest.
    """
    from features.store import EncoderSpec, feature_path
    from features.store_folder import estimate_bytes
    from stage1_cnn.encoders.backbone import build_backbone

    store, frames = config.extract.store, _sampled_frames(config)
    name, storage = config.cnn.backbone, config.extract.storage
    try:
        dim = build_backbone(name, "random", 0).embedding_dim if frames else 0
    except UserError:  # the check of the weights reports this error
        dim = 0
    needed = estimate_bytes(frames.values(), EncoderSpec(name, "", {}, config.data.fps, "fp32", storage, dim))
    some_exist = any(os.path.exists(feature_path(folder, one)) for folder in store.glob(f"{name}-*") for one in frames)
    yield from check_folder("features", store, needed, certain=not some_exist)


def _check_cache(config: Config) -> Iterable[Finding]:
    """Check the space for the frames that training will decode; frames with an existing file need none."""
    from features.frames.source import frame_cache

    cache = frame_cache(config)
    frames = _sampled_frames(config, ("train", "val"))
    needed = sum(cache.estimate_bytes(count) for one, count in frames.items() if not os.path.exists(cache.path(one)))
    yield from check_folder("frame cache", config.cache.dir, needed)


def _sampled_frames(config: Config, splits: tuple[str, ...] = ()) -> dict[str, int]:
    """Return the number of sampled frames of each video (by id), for some splits or all.

    The result is empty if there is no usable index.
    """
    from features.dataset.index import Index
    from features.dataset.sampling import sampled_frames

    if not config.data.index.exists():
        return {}
    try:
        videos = Index.load(config.data.index).videos
        wanted = [entry for entry in videos if not splits or entry.split in splits]
        return {entry.id: len(sampled_frames(entry, config.data.fps)) for entry in wanted}
    except UserError:
        return {}
