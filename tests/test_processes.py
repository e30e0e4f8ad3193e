"""Several processes through the launchers themselves: the steps of one process, one end for all, one voice.

Training here is held to one process with the same global batches; sizes are chosen so that batches and validation
videos do not divide evenly and one process goes without a part now and then.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from engine.checkpoints import load_checkpoint
from engine.logs import read_metrics
from tests.stage1_cnn.material import SPEC, World, make_world, write_dataset
from tests.stage2_temporal.toy import cue_video, small, write_folder

PROJECT = Path(__file__).resolve().parent.parent
PIPELINE = [sys.executable, str(PROJECT / "pipeline.py")]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(PROJECT / "pipeline.py")]
STEPS = 20

pytestmark = pytest.mark.slow


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "SURGSTAGE_DATA"}
    return kept | {"OMP_NUM_THREADS": "1", "COLUMNS": "80"}


def start(words: Sequence[str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def call(words: Sequence[str], folder: Path) -> tuple[int, str]:
    """Exit code and everything it said."""
    running = start(words, folder)
    out, err = running.communicate(timeout=200)
    return running.returncode, out + err


def succeed(words: Sequence[str], folder: Path) -> str:
    code, said = call(words, folder)
    assert code == 0, said
    return said


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl", "epoch")]


def assert_same_losses(one: Path, two: Path, steps: int = STEPS) -> None:
    expected, found = losses(one), losses(two)
    assert len(expected) == len(found)
    assert read_metrics(one / "metrics.jsonl", "epoch")[-1]["global_step"] >= steps
    assert found == pytest.approx(expected, rel=1e-4)
    assert expected[0] != pytest.approx(expected[-1], rel=1e-2)  # it learns: equal is not for want of steps


def scores(folder: Path, key: str) -> list[float]:
    return [row[key] for row in read_metrics(folder / "metrics.jsonl", "epoch")]


# ---------------------------------------------------------------------------------------------- stage two


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A feature folder: five training videos in groups of two, three to choose on; some frames have no label."""
    base = tmp_path_factory.mktemp("bench")
    rng = np.random.default_rng(0)
    lengths = {"train": (70, 41, 55, 90, 33), "val": (80, 45, 20)}
    videos = {
        f"video{number:02d}": cue_video(rng, split, frames)
        for number, (split, frames) in enumerate((split, n) for split, group in lengths.items() for n in group)
    }
    for number, (_, _, phase) in enumerate(videos.values()):
        phase[10 : 13 + 5 * number] = -1  # unequal counts: a mean of the processes' means would be wrong
    write_folder(base / "features", videos)
    return base


def temporal(bench: Path, name: str, sequence: dict[str, Any], epochs: int, **more: Any) -> list[str]:
    """Words of a `train-temporal` whose settings stand in a file."""
    settings = {
        "device": "cpu",
        "runs": str(bench / "runs"),
        "temporal": small(epochs=epochs, sequence=sequence, baseline=False, **more),
    }
    path = bench / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return ["train-temporal", "--config", str(path), "--name", name, "--features", str(bench / "features")]


CHUNKED = {"mode": "chunked", "frames": 16, "batch": 2}
DEVICES = ["--devices", "2"]


@pytest.mark.parametrize(
    ("launcher", "sequence", "epochs"),
    [
        ("devices", CHUNKED, 4),
        ("torchrun", {"mode": "full", "batch": 2}, 8),
        ("devices", {"mode": "clips", "frames": 20, "stride": 7, "batch": 5}, 4),
    ],
)
def test_two_processes_train_stage_two_as_one(
    bench: Path, launcher: str, sequence: dict[str, Any], epochs: int
) -> None:
    one, two = f"one-{sequence['mode']}", f"two-{sequence['mode']}"
    succeed([*PIPELINE, *temporal(bench, one, sequence, epochs)], bench)
    words = temporal(bench, two, sequence, epochs)
    succeed([*PIPELINE, *words, *DEVICES] if launcher == "devices" else [*TORCHRUN, *words], bench)
    folders = [bench / "runs" / name / "temporal" for name in (one, two)]
    assert_same_losses(*folders)
    accuracies = [scores(folder, "val_accuracy") for folder in folders]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.02)  # a frame on the edge may fall to either side
    models = [load_checkpoint(folder / "last.pt")["model"] for folder in folders]
    for name, tensor in models[0].items():
        if isinstance(tensor, torch.Tensor):
            assert torch.allclose(tensor, models[1][name], rtol=1e-3, atol=1e-4), name


def children(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def copies(parent: int) -> list[int]:
    """The copies that `--devices` has started: children that run the command line, by number."""
    found = {}
    for pid in children(parent):
        try:
            words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        rank = next((int(word[5:]) for word in words if word.startswith(b"RANK=")), None)
        if rank is not None:
            found[rank] = pid
    return [found[rank] for rank in sorted(found)]


def wait_for_epochs(folder: Path, count: int, running: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and running.poll() is None:
        path = folder / "metrics.jsonl"
        if path.exists() and len(read_metrics(path, "epoch")) >= count:
            return
        time.sleep(0.02)
    running.kill()
    pytest.fail("".join(running.communicate()))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_one_process_stops_both_and_resuming_gives_the_same_bits(
    bench: Path, number: signal.Signals
) -> None:
    head = {"name": "lstm", "hidden": 12, "layers": 2, "dropout": 0.3}  # each process draws its own
    whole, parts = bench / "runs" / "whole" / "temporal", bench / "runs" / f"parts-{number}" / "temporal"
    if not (whole / "result.json").exists():
        succeed([*PIPELINE, *temporal(bench, "whole", CHUNKED, 12, head=head), *DEVICES], bench)
    words = [*PIPELINE, *temporal(bench, f"parts-{number}", CHUNKED, 12, head=head), *DEVICES]
    running = start(words, bench)
    wait_for_epochs(parts, 2, running)
    os.kill(running.pid if number == signal.SIGUSR1 else copies(running.pid)[1], number)
    said = "".join(running.communicate(timeout=60))
    assert running.returncode == (130 if number == signal.SIGINT else 75), said
    assert said.count("what was done is saved") == 1
    stopped = load_checkpoint(parts / "last.pt")
    assert not (parts / "result.json").exists()
    assert len(stopped["others"]) == 1
    succeed(words, bench)
    ends = [load_checkpoint(folder / "last.pt") for folder in (whole, parts)]
    for name, tensor in ends[0]["model"].items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(tensor, ends[1]["model"][name]), name
    assert losses(whole) == losses(parts)


def test_a_process_that_dies_ends_the_others(bench: Path) -> None:
    words = temporal(bench, "killed", CHUNKED, 4000)
    running = start([*PIPELINE, *words, *DEVICES], bench)
    folder = bench / "runs" / "killed" / "temporal"
    wait_for_epochs(folder, 2, running)
    os.kill(copies(running.pid)[1], signal.SIGKILL)
    said = "".join(running.communicate(timeout=60))
    assert running.returncode == 128 + signal.SIGKILL, said
    assert "another process of this training has ended" in said
    assert "Traceback" not in said
    assert load_checkpoint(folder / "last.pt")["position"]["epoch"] >= 2


def test_another_number_of_processes_goes_on_between_videos(bench: Path) -> None:
    """`full` carries nothing from step to step, so one process can take over from two; it says so."""
    sequence = {"mode": "full", "batch": 2}
    running = start([*PIPELINE, *temporal(bench, "fewer", sequence, 60), *DEVICES], bench)
    wait_for_epochs(bench / "runs" / "fewer" / "temporal", 2, running)
    running.send_signal(signal.SIGTERM)
    said = "".join(running.communicate(timeout=60))
    assert running.returncode == 75, said
    running = start([*PIPELINE, *temporal(bench, "fewer", sequence, 60)], bench)
    wait_for_epochs(bench / "runs" / "fewer" / "temporal", 60, running)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 0, err
    assert "note: going on with 1 process(es) after 2" in err


def test_a_mistake_is_said_once(bench: Path) -> None:
    words = temporal(bench, "wrong", CHUNKED, 1)[:-1]
    code, said = call([*PIPELINE, *words, str(bench / "nothing"), *DEVICES], bench)
    assert code == 2
    assert said.count("error:") == 1
    assert "Traceback" not in said


def test_other_commands_refuse_a_launcher(bench: Path) -> None:
    _, said = call([*TORCHRUN, "config", "show"], bench)
    assert said.count("error: config is one process's work, and a launcher has started 2") == 1


# ---------------------------------------------------------------------------------------------- frames

FRAME_STEP = {"epochs": 5, "optim": {"name": "sgd", "lr": 0.02}, "backbone_lr_factor": 1.0, "precision": "fp32"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Five tiny videos, three to train and two to choose, with settings that two processes can follow exactly."""
    base = tmp_path_factory.mktemp("pictures")
    world = make_world(base, write_dataset(base / "data", 5))
    tree = world.config.model_dump(mode="json")
    tree["data"] |= {"split": {"rule": "3/2/0"}, "dataset": str(base / "tiny.yaml")}
    tree["cnn"] |= {"epochs": 3, "batch_frames": 5, "freeze_batch_norm": True, "phase_head": True}
    tree["temporal"]["head"] = {"name": "lstm", "hidden": 8}
    tree["joint"] = {
        "net": {"tool_hidden": 8, "mapping": True},
        "sequence": {"mode": "clips", "frames": 4, "stride": 3, "batch": 3, "inference": "clip"},
        "multitask": FRAME_STEP,
        "mapping": FRAME_STEP | {"epochs": 1},
        "correlation": FRAME_STEP | {"epochs": 2},
        "freeze_batch_norm": True,
        "accumulate_steps": 2,
        "workers": 0,
    }
    return World(base, world.root, type(world.config).model_validate(tree))


def words_of(world: World, command: str, name: str) -> list[str]:
    from configs.load import to_yaml

    world.index().save(world.base / "index.json")
    (world.base / "tiny.yaml").write_text(yaml.safe_dump(SPEC.model_dump(mode="json")))
    (world.base / "settings.yaml").write_text(to_yaml(world.config))
    return [command, "--config", str(world.base / "settings.yaml"), "--name", name]


def test_two_processes_train_stage_one_as_one_and_extract_the_same_bytes(pictures: World) -> None:
    succeed([*PIPELINE, *words_of(pictures, "train-cnn", "one")], pictures.base)
    succeed([*PIPELINE, *words_of(pictures, "train-cnn", "two"), *DEVICES], pictures.base)
    runs = pictures.config.runs
    assert_same_losses(runs / "one" / "cnn", runs / "two" / "cnn")
    assert scores(runs / "one" / "cnn", "val_map") == pytest.approx(scores(runs / "two" / "cnn", "val_map"), abs=0.01)

    store = pictures.config.extract.store
    contents = []
    for launcher in ([*PIPELINE], [*TORCHRUN]):
        succeed([*launcher, *words_of(pictures, "extract", "one")], pictures.base)
        files = sorted(path for path in store.rglob("*") if path.is_file())
        contents.append({path.relative_to(store): path.read_bytes() for path in files})
        for path in files:
            path.unlink()
    assert len(contents[0]) == 5 + 2
    assert contents[0] == contents[1]
    result = yaml.safe_load((runs / "one" / "extract" / "result.json").read_text())
    assert result["done"] == [f"video{number:02d}" for number in range(1, 6)]
    assert result["shard"] == "all 2"


def test_two_processes_train_the_joint_net_as_one(pictures: World) -> None:
    succeed([*PIPELINE, *words_of(pictures, "train-joint", "joint-one")], pictures.base)
    succeed([*TORCHRUN, *words_of(pictures, "train-joint", "joint-two")], pictures.base)
    folders = [pictures.config.runs / name / "joint" for name in ("joint-one", "joint-two")]
    assert_same_losses(*(folder / "multitask" for folder in folders))
    for step in ("mapping", "correlation"):
        assert losses(folders[1] / step) == pytest.approx(losses(folders[0] / step), rel=1e-4)
