"""Several processes with the real launchers: the steps of one process, a common end, one message.

Trainings are compared with one process with the same global batches; sizes are chosen so that batches and validation
videos do not divide evenly and one process sometimes has no part.
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
from click.testing import CliRunner

from engine.checkpoints import load_checkpoint
from engine.logs import read_metrics
from pipeline import cli
from tests.stage1_cnn.material import SPEC, World, make_world, write_dataset
from tests.stage2_temporal.toy import cue_video, small, write_folder

PROJECT = Path(__file__).resolve().parent.parent
PIPELINE = [sys.executable, str(PROJECT / "pipeline.py")]
TORCHRUN = [
    *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
    *("--log-dir", "torchrun"),  # in the folder of the test, for it stays when a process fails
    str(PROJECT / "pipeline.py"),
]
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
    """Exit code and output."""
    running = start(words, folder)
    return ended(running)


def ended(running: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and output, once it has ended; that it ends at all is part of the test."""
    try:
        out, err = running.communicate(timeout=280)
    except subprocess.TimeoutExpired:
        running.kill()
        raise
    return running.returncode, out + err


def succeed(words: Sequence[str], folder: Path) -> str:
    code, said = call(words, folder)
    assert code == 0, said
    return said


def alone(words: Sequence[str], code: int = 0) -> str:
    """The same command as one process: this one."""
    result = CliRunner().invoke(cli, list(words), catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl", "epoch")]


def assert_same_losses(one: Path, two: Path, steps: int = STEPS) -> None:
    expected, found = losses(one), losses(two)
    assert len(expected) == len(found)
    assert read_metrics(one / "metrics.jsonl", "epoch")[-1]["global_step"] >= steps
    assert found == pytest.approx(expected, rel=1e-4)
    assert expected[0] != pytest.approx(expected[-1], rel=1e-2)  # it learns, so equality is not due to missing steps


def scores(folder: Path, key: str) -> list[float]:
    return [row[key] for row in read_metrics(folder / "metrics.jsonl", "epoch")]


# ---------------------------------------------------------------------------------------------- stage two


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A feature folder: five training videos in groups of two, three for validation; some frames have no label."""
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
    """The command line of a `train-temporal` with settings in a file."""
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
        ("devices", CHUNKED, 3),
        ("torchrun", {"mode": "clips", "frames": 20, "stride": 7, "batch": 5}, 4),  # 31 clips: the last batch has one
    ],
)
def test_two_processes_train_stage_two_as_one(
    bench: Path, launcher: str, sequence: dict[str, Any], epochs: int
) -> None:
    one, two = f"one-{sequence['mode']}", f"two-{sequence['mode']}"
    alone(temporal(bench, one, sequence, epochs))
    words = temporal(bench, two, sequence, epochs)
    succeed([*PIPELINE, *words, *DEVICES] if launcher == "devices" else [*TORCHRUN, *words], bench)
    folders = [bench / "runs" / name / "temporal" for name in (one, two)]
    assert_same_losses(*folders)
    accuracies = [scores(folder, "val_accuracy") for folder in folders]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.02)  # a frame on the boundary may get either class
    models = [load_checkpoint(folder / "last.pt")["model"] for folder in folders]
    for name, tensor in models[0].items():
        if isinstance(tensor, torch.Tensor):
            assert torch.allclose(tensor, models[1][name], rtol=1e-3, atol=1e-4), name


def test_one_process_imports_nothing_for_several(bench: Path) -> None:
    """Modules for several processes (and torch's compiler, which Accelerate may import) are not imported for one."""
    words = temporal(bench, "plain", CHUNKED, 1)
    program = (
        "import sys, torch; before = set(sys.modules)\n"
        "from pipeline import cli; cli(sys.argv[1:], standalone_mode=False)\n"
        "found = {n for n in set(sys.modules) - before if n.startswith(('torch.distributed', 'torch._dynamo'))}\n"
        "print('found', sorted(found), torch.distributed.is_initialized())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=PROJECT,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "found [] False"


def children(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def copies(parent: int) -> list[int]:
    """The processes that `--devices` has started: children that run the command line, by rank."""
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
    deadline = time.monotonic() + 280
    while time.monotonic() < deadline and running.poll() is None:
        path = folder / "metrics.jsonl"
        if path.exists() and len(read_metrics(path, "epoch")) >= count:
            return
        time.sleep(0.02)
    running.kill()
    pytest.fail("".join(running.communicate()))


def wait_until_gone(pids: Sequence[int]) -> None:
    deadline = time.monotonic() + 280
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "still there"
        time.sleep(0.05)


@pytest.mark.timeout(600)  # five trainings, on a machine that may be busy
def test_a_signal_to_any_process_stops_all_and_resuming_gives_the_same_bits(bench: Path) -> None:
    """SIGTERM to one, SIGINT to the launcher, SIGUSR1 to the other; each time the same command resumes."""
    head = {"name": "lstm", "hidden": 12, "layers": 2, "dropout": 0.3}  # each process draws its own
    whole, parts = (bench / "runs" / name / "temporal" for name in ("whole", "parts"))
    succeed([*PIPELINE, *temporal(bench, "whole", CHUNKED, 40, head=head), *DEVICES], bench)
    words = [*PIPELINE, *temporal(bench, "parts", CHUNKED, 40, head=head), *DEVICES]
    stops = [(signal.SIGTERM, 1, 75), (signal.SIGINT, None, 130), (signal.SIGUSR1, 0, 75)]
    done = 0
    for number, rank, expected in stops:
        running = start(words, bench)
        wait_for_epochs(parts, done + 1, running)
        os.kill(running.pid if rank is None else copies(running.pid)[rank], number)
        code, said = ended(running)
        assert code == expected, said
        assert said.count("progress is saved") == 1, said
        assert "Traceback" not in said
        stopped = load_checkpoint(parts / "last.pt")
        done = stopped["position"]["epoch"]
        assert 0 < done < 40
        assert len(stopped["others"]) == 1
        assert not (parts / "result.json").exists()
    succeed(words, bench)
    ends = [load_checkpoint(folder / "last.pt") for folder in (whole, parts)]
    for name, tensor in ends[0]["model"].items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(tensor, ends[1]["model"][name]), name
    assert losses(whole) == losses(parts)


def test_a_process_that_dies_ends_the_others(bench: Path) -> None:
    words = temporal(bench, "killed", CHUNKED, 4000)
    folder = bench / "runs" / "killed" / "temporal"
    running = start([*PIPELINE, *words, *DEVICES], bench)
    wait_for_epochs(folder, 2, running)
    os.kill(copies(running.pid)[1], signal.SIGKILL)
    code, said = ended(running)
    assert code == 128 + signal.SIGKILL, said
    assert said.count("error:") == 1, said
    assert "another process of this training has ended" in said
    assert "Traceback" not in said
    reached = load_checkpoint(folder / "last.pt")["position"]["epoch"]
    assert reached >= 1  # an epoch's line is written before the checkpoint that includes it
    lines = len(losses(folder))  # perhaps one more: not evidence of the next start

    running = start([*PIPELINE, *words, *DEVICES], bench)  # now the one that started them
    wait_for_epochs(folder, lines + 1, running)
    left = copies(running.pid)
    running.kill()
    wait_until_gone(left)
    assert ended(running)[1].count("stopped by SIGTERM; progress is saved") == 1
    assert load_checkpoint(folder / "last.pt")["position"]["epoch"] > reached


def test_another_number_of_processes_can_resume_between_videos(bench: Path) -> None:
    """`full` carries no state from step to step, so one process can resume after two; a note says so."""
    sequence = {"mode": "full", "batch": 2}
    running = start([*PIPELINE, *temporal(bench, "fewer", sequence, 40), *DEVICES], bench)
    wait_for_epochs(bench / "runs" / "fewer" / "temporal", 1, running)
    running.send_signal(signal.SIGTERM)
    code, said = ended(running)
    assert code == 75, said
    assert "note: resuming with 1 process(es) instead of 2" in alone(temporal(bench, "fewer", sequence, 40))
    alone(temporal(bench, "never-two", sequence, 40))
    assert_same_losses(*(bench / "runs" / name / "temporal" for name in ("never-two", "fewer")))


def test_an_error_is_printed_once(bench: Path) -> None:
    words = temporal(bench, "wrong", CHUNKED, 1)[:-1]
    code, said = call([*PIPELINE, *words, str(bench / "nothing"), *DEVICES], bench)
    assert code == 2
    assert said.count("error:") == 1
    assert "Traceback" not in said


def test_other_commands_refuse_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("engine.ending.is_reporting_rank", lambda problem: True)  # no store to ask
    said = alone(["config", "show"], code=2)
    assert "error: config runs as one process, but a launcher has started 2" in said


# ---------------------------------------------------------------------------------------------- frames

FRAME_STEP = {
    "epochs": 5,
    "optim": {"name": "sgd", "lr": 0.02, "weight_decay": 0.05},  # also of what has no gradient, if it had one
    "backbone_lr_factor": 1.0,
    "precision": "fp32",
}


@pytest.fixture(scope="module")
def frame_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return new_frame_world(tmp_path_factory.mktemp("frames"))


def new_frame_world(base: Path) -> World:
    """Five tiny videos, three for training and two for validation, with settings that two processes can reproduce."""
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


def test_two_processes_train_stage_one_as_one(frame_world: World) -> None:
    average = ["--set", "cnn.ema_decay=0.9"]
    alone([*words_of(frame_world, "train-cnn", "one"), *average])
    succeed([*PIPELINE, *words_of(frame_world, "train-cnn", "two"), *average, *DEVICES], frame_world.base)
    runs = frame_world.config.runs
    assert_same_losses(runs / "one" / "cnn", runs / "two" / "cnn")
    assert scores(runs / "one" / "cnn", "val_map") == pytest.approx(scores(runs / "two" / "cnn", "val_map"), abs=0.01)


def test_two_processes_train_the_joint_net_as_one(frame_world: World) -> None:
    """Groups of batches, clips that do not divide evenly, and three steps that freeze different parts."""
    partly = ["--set", "cnn.freeze_until=conv1", "--set", "cnn.layer_lr_decay=0.9"]
    alone([*words_of(frame_world, "train-joint", "joint-one"), *partly])
    succeed([*PIPELINE, *words_of(frame_world, "train-joint", "joint-two"), *partly, *DEVICES], frame_world.base)
    folders = [frame_world.config.runs / name / "joint" for name in ("joint-one", "joint-two")]
    assert_same_losses(*(folder / "multitask" for folder in folders))
    for step in ("mapping", "correlation"):
        assert losses(folders[1] / step) == pytest.approx(losses(folders[0] / step), rel=1e-4)
    mappings = [load_checkpoint(folder / "multitask" / "last.pt")["model"]["mapping.weight"] for folder in folders]
    assert torch.equal(*mappings)  # has no part in the first step's loss


def test_two_processes_extract_the_same_bytes(tmp_path: Path) -> None:
    """Both videos of the second process are damaged: it waits for the first, since launchers end all when one fails."""
    world = new_frame_world(tmp_path)
    words = [*words_of(world, "extract", "features"), "--set", "extract.encoder=initial"]
    for number in (2, 4):
        os.truncate(world.root / f"video{number:02d}.mp4", 900)
    store, contents, results = world.config.extract.store, [], []
    for launch in (lambda: alone(words, code=1), lambda: call([*TORCHRUN, *words], tmp_path)):
        launch()
        files = sorted(path for path in store.rglob("*") if path.is_file())
        contents.append({path.relative_to(store): path.read_bytes() for path in files})
        results.append(yaml.safe_load((world.config.runs / "features" / "extract" / "result.json").read_text()))
        for path in files:
            path.unlink()
    assert len(contents[0]) == 3 + 2 + 2  # index and encoder, and why two videos have no features
    assert contents[0] == contents[1]
    for result in results:
        assert result["done"] == ["video01", "video03", "video05"]
        assert [name for name, _ in result["failed"]] == ["video02", "video04"]
    assert [result["shard"] for result in results] == ["0/1", "all 2"]
