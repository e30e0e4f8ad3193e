"""One flipped byte in the features of eighty videos: found, named, and only that video redone, by the command line."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml

from features.store import read_features
from tests.cli import run
from tests.stage1_cnn.material import SPEC, make_world, write_dataset

VIDEOS = 80


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighty videos of 13 sampled frames, extracted by the command: 2048-d float16, as of Cholec80's but short."""
    folder = tmp_path_factory.mktemp("eighty")
    root = write_dataset(folder / "data", 1)
    for number in range(2, VIDEOS + 1):
        for ending in (".mp4", "-phase.txt", "-tool.txt"):
            shutil.copyfile(root / f"video01{ending}", root / f"video{number:02d}{ending}")
    (folder / "tiny-set.yaml").write_text(yaml.safe_dump(SPEC.model_dump(mode="json")))
    tree = make_world(folder, root).config.model_dump(mode="json")
    tree["data"] |= {"dataset": str(folder / "tiny-set.yaml"), "split": {"rule": "32/8/40"}, "fps": 1.0}
    tree["cnn"]["backbone"] = "resnet50"
    tree["extract"] |= {"encoder": "initial", "storage": "float16"}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    done = run(["extract", "--config", "tiny.yaml"], folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_one_flipped_byte_among_eighty_files_is_found_and_only_that_file_redone(extracted: Path) -> None:
    (store,) = (extracted / "features").iterdir()
    files = sorted(store.glob("*.h5"))
    assert len(files) == VIDEOS
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in files}
    victim = files[40]
    whole = read_features(victim)
    assert whole.features.shape[1] == 2048
    assert whole.features.dtype == np.float16
    with h5py.File(victim) as file:
        chunk = file["features"].id.get_chunk_info(0)
    content = bytearray(victim.read_bytes())
    content[chunk.byte_offset + chunk.size // 2] ^= 1
    victim.write_bytes(content)
    os.utime(victim, ns=(before[victim][0],) * 2)  # like disk damage: neither time nor size changes

    done = run(["features", "verify", str(store)], extracted)
    assert done.returncode == 1
    named = [line for line in (done.stdout + done.stderr).splitlines() if "damaged or cut short" in line]
    assert len(named) == 1
    assert victim.name in named[0]

    done = run(["extract", "--config", "tiny.yaml"], extracted)
    assert done.returncode == 0, done.stderr
    assert "1 video(s) extracted" in done.stdout
    assert f"{VIDEOS - 1} unchanged" in done.stdout
    after = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in files}
    assert [path for path in files if after[path] != before[path]] == [victim]
    again = read_features(victim)
    for name in ("features", "tool_logits", "frame_index", "time_s", "phase", "tools"):
        assert np.array_equal(getattr(again, name), getattr(whole, name), equal_nan=name == "tool_logits"), name
    assert run(["features", "verify", str(store)], extracted).returncode == 0
