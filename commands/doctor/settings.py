"""`doctor`: is this machine able to do what the settings ask for? One line a finding, with what to do.

The machine's part is `commands.doctor.machine`; here is what needs settings, readers and nets.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from commands.doctor.machine import Check, Finding, Level, check_folder, examined, kind_and_text, machine_checks
from configs.errors import UserError, listed

if TYPE_CHECKING:
    from configs.schema import Config
    from features.dataset.index import Index

READER_LIMIT_S = 60.0
_VERDICTS: dict[str, tuple[Level, str]] = {
    "ok": ("ok", ""),
    "warn": ("warn", "only PyAV is used; see data.reader"),
    "FAIL": ("FAIL", "reinstall with `pip install -U av`"),
}
# A process of its own decodes: a decoder that crashes or hangs must not take the doctor with it.
_DECODE = """
import sys
from pathlib import Path
from commands.doctor.settings import compare_readers
print(compare_readers(Path(sys.argv[1])))
"""


def diagnose(load: Callable[[], Config]) -> Iterator[Finding]:
    """Every finding, as it is found, in a fixed order. `load` reads the settings.

    Raises nothing. Without settings in order, what needs none is looked at nevertheless.
    """
    checks: tuple[tuple[str, Check], ...] = (("decoders", check_decoders),)
    try:
        config = load()
    except UserError as error:
        yield Finding("FAIL", "settings", str(error), "weights, data and folders are looked at once this is mended")
    except Exception as error:  # a broken pydantic or PyYAML: the packages' line says which
        yield Finding("FAIL", "settings", f"cannot be read ({kind_and_text(error)})", "see the packages below")
    else:
        yield Finding("ok", "settings", "read")
        checks = _checks(config)
    for what, check in (*machine_checks(), *checks):
        yield from examined(what, check)


def _checks(config: Config) -> tuple[tuple[str, Check], ...]:
    def of(check: Callable[[Config], Iterable[Finding]]) -> Check:
        return lambda: check(config)

    return (
        ("decoders", check_decoders),
        ("weights", of(check_weights)),
        ("data", of(check_data)),
        ("folders", of(check_folders)),
    )


# ---------------------------------------------------------------------------------------------- decoders


def check_decoders() -> Iterable[Finding]:
    """Write a small video and read it with both readers, in a process that is given a minute."""
    folder = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryDirectory(prefix="surgstage-doctor-") as place:
        try:
            done = subprocess.run(
                [sys.executable, "-c", _DECODE, place],
                env=environment,
                capture_output=True,
                text=True,
                timeout=READER_LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            to_do = "set data.reader=pyav, or reinstall av and decord"
            yield Finding("FAIL", "decoders", f"no picture within {READER_LIMIT_S:g} s", to_do)
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
    """`ok`, `warn` or `FAIL`, and what became of a small H.264 video under both readers."""
    import numpy as np

    from features.video.decord import why_not_decord
    from features.video.open import open_video
    from features.video.scan import scan_video
    from features.video.write import encode_mp4

    path = folder / "video.mp4"
    pictures = [np.full((64, 96, 3), 8 * number, dtype=np.uint8) for number in range(20)]
    encode_mp4(path, pictures, 25.0, {"crf": "18"}, lambda: None)
    wanted = [0, 7, 13, 19]
    with open_video(path, "pyav") as reader:
        frames = np.stack(list(reader.read(wanted)))
        name = f"PyAV {reader.version}"
    shades = frames.mean(axis=(1, 2, 3))
    if np.abs(shades - [8 * number for number in wanted]).max() > 4:
        return f"FAIL {name} gives other pictures than were written"
    reason = why_not_decord(scan_video(path))
    if reason is not None:
        return f"warn {name} reads a test video; decord does not ({reason})"
    with open_video(path, "decord") as reader:
        same = np.array_equal(np.stack(list(reader.read(wanted))), frames)
        version = reader.version
    return (
        f"ok {name} and decord {version} read the same pictures"
        if same
        else f"warn decord {version} differs from {name}"
    )


# ---------------------------------------------------------------------------------------------- settings


def check_weights(config: Config) -> Iterable[Finding]:
    """Whether the backbone's initial weights are on this machine; nothing is downloaded."""
    from stage1_cnn.model import settled_weights, weights_file

    cnn = config.cnn
    try:
        weights = settled_weights(cnn)
        path = None if weights == "random" else weights_file(cnn.backbone, weights, config.runs)
    except UserError as error:
        yield Finding("FAIL", "weights", str(error))
        return
    if path is None:
        yield Finding("ok", "weights", f"{cnn.backbone} starts at random (cnn.weights={cnn.weights})")
    elif path.is_file():
        yield Finding("ok", "weights", f"{path} ({path.stat().st_size / 1e6:,.0f} MB)")
    else:
        found = f"{path} is not there; it is downloaded when it is first needed"
        yield Finding("warn", "weights", found, "without internet put the file there, or set cnn.weights=FILE, or "
                      "cnn.weights=random")  # fmt: skip


def check_data(config: Config) -> Iterable[Finding]:
    """The data root, and whether index and files agree as far as names, sizes and times tell; nothing is opened."""
    from features.dataset.catalogue import data_root
    from features.dataset.index import Index

    try:
        root = data_root(config)
    except UserError as error:
        yield Finding("warn", "data root", str(error), "only stage two, on features that are there, works without")
        root = None
    if root is not None and not os.access(root, os.R_OK | os.X_OK):
        yield Finding("FAIL", "data root", f"{root} may not be read", "ask its owner for read permission")
        root = None
    path = config.data.index
    if not path.exists():
        if root is not None:
            yield from _what_is_there(config, root)
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
    yield _agreement(index, root, path)


def _what_is_there(config: Config, root: Path) -> Iterable[Finding]:
    from configs.load import load_dataset
    from features.dataset.discover import find_videos

    try:
        found = find_videos(root, load_dataset(config.data.dataset), config.data)
    except UserError as error:
        yield Finding("FAIL", "data root", str(error))
        return
    kinds = sorted({video.kind for video in found.videos})
    labelled = sum(video.kind == "tfrecord" or video.phase is not None for video in found.videos)
    text = f"{root}, {len(found.videos)} video(s) ({', '.join(kinds)}), {labelled} with phases, not indexed yet"
    yield Finding("ok", "data root", text, "run `index`")


def _agreement(index: Index, root: Path, path: Path) -> Finding:
    """Whether sources are where the index says, with the sizes and times that it says."""
    from engine.files import inside

    missing, changed = [], []
    for entry in index.videos:
        try:
            state = inside(root, entry.source).stat()
        except (UserError, OSError):
            missing.append(entry.id)
            continue
        same = (state.st_size, state.st_mtime_ns) == (entry.size_bytes, entry.modified_ns)
        if entry.kind != "frames" and not same:
            changed.append(entry.id)
    for problem, ids in (("are not there", missing), ("have changed", changed)):
        if ids:
            to_do = "run `index --check` for details, `index --force` to index again"
            return Finding(
                "warn", "index", f"{path}: {len(ids)} of {len(index.videos)} sources {problem} ({listed(ids)})", to_do
            )
    return Finding("ok", "index", f"{path}, {len(index.videos)} video(s), sizes and times as indexed")


def check_folders(config: Config) -> Iterable[Finding]:
    """Where results go: writable, with room for what the index comes to at these settings and is not there yet."""
    yield from check_folder("runs", config.runs)
    yield from examined("features", lambda: _check_store(config))
    yield from examined("frame cache", lambda: _check_cache(config))
    yield from check_folder("temporary files", Path(tempfile.gettempdir()))


def _check_store(config: Config) -> Iterable[Finding]:
    """Room for the features of all videos. Which are there already only the encoder's weights would tell."""
    from features.store import EncoderSpec, estimate_bytes, feature_path
    from stage1_cnn.model import build_backbone

    store, frames = config.extract.store, _sampled_frames(config)
    name, storage = config.cnn.backbone, config.extract.storage
    try:
        dim = build_backbone(name, "random", 0).embedding_dim if frames else 0
    except UserError:  # the line about weights says so
        dim = 0
    needed = estimate_bytes(frames.values(), EncoderSpec(name, "", {}, config.data.fps, "fp32", storage, dim))
    some_are_there = any(
        os.path.exists(feature_path(folder, one)) for folder in store.glob(f"{name}-*") for one in frames
    )
    yield from check_folder("features", store, needed, certain=not some_are_there)


def _check_cache(config: Config) -> Iterable[Finding]:
    """Room for the frames that training would decode; files that are there count as whole."""
    from features.frames.source import frame_cache

    cache = frame_cache(config)
    frames = _sampled_frames(config, ("train", "val"))
    needed = sum(cache.estimate_bytes(count) for one, count in frames.items() if not os.path.exists(cache.path(one)))
    yield from check_folder("frame cache", config.cache.dir, needed)


def _sampled_frames(config: Config, splits: tuple[str, ...] = ()) -> dict[str, int]:
    """Sampled frames of each video, of some splits or all, as far as there is an index to tell."""
    from features.dataset.index import Index, sampled_frames

    if not config.data.index.exists():
        return {}
    try:
        videos = Index.load(config.data.index).videos
        wanted = [entry for entry in videos if not splits or entry.split in splits]
        return {entry.id: len(sampled_frames(entry, config.data.fps)) for entry in wanted}
    except UserError:
        return {}
