"""The training session: resumed equals uninterrupted, accumulation equals a larger batch, errors name the batch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.overrides import TorchFunctionMode

import engine.session
from configs.errors import UserError
from configs.schema import LoopConfig, OptimConfig
from engine.checkpoints import RollingCheckpoint, load_checkpoint
from engine.device import make_accelerator, seed_everything
from engine.logs import read_metrics
from engine.processes import Processes
from engine.session import TrainingSession, epoch_generator
from engine.stopping import Stopped, StopRequest
from tests.onednn import cpu_with_bf16
from tests.sameness import scalars

PROJECT = Path(__file__).resolve().parents[2]

STEPS, BATCH = 5, 4
INPUTS = torch.randn(STEPS * BATCH, 6, generator=torch.Generator().manual_seed(1))
TARGETS = INPUTS.sum(dim=1, keepdim=True)


def train(
    folder: Path,
    config: LoopConfig,
    stop_after: int | None = None,
    accumulate: int = 1,
    batch: int = BATCH,
    poison: int | None = None,
    break_weights: tuple[int, float] | None = None,
    kill_after: int | None = None,
    reads_late: bool = False,
) -> nn.Module:
    """A small regression with dropout (so that random states matter), stopped by a signal after `stop_after` steps."""
    seed_everything(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, 1))
    accelerator, _ = make_accelerator("cpu", config.precision)
    stop = StopRequest()
    folder.mkdir(exist_ok=True)
    session = TrainingSession(
        folder,
        accelerator,
        model,
        [{"params": model.parameters()}],
        config,
        {"kind": "test"},
        Processes(stop=stop),
        accumulate,
        bar=False,
        reads_late=reads_late,
    )
    session.resume()
    steps = len(INPUTS) // batch
    for epoch in session.epochs():
        order = torch.randperm(len(INPUTS), generator=epoch_generator(0, epoch)).split(batch)
        for rows in session.batches(order[session.position.step :], steps):
            with session.autocast():
                loss = (session.model(INPUTS[rows]) - TARGETS[rows]).square().mean()
            if session.position.global_step == poison:
                loss = loss * float("nan")
            session.update(loss, lambda rows=rows: f"rows {rows.tolist()}")
            if break_weights is not None and session.position.global_step == break_weights[0]:
                with torch.no_grad():
                    model[2].weight[0, 3] = break_weights[1]
            if session.position.global_step == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
            if stop_after is not None and session.position.global_step >= stop_after:
                stop.number = signal.SIGTERM
        score = -(session.evaluated.eval()(INPUTS) - TARGETS).square().mean().item()
        session.finish_epoch({"val": score}, score)
    return session.raw_model


def log_without_times(folder: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if key != "seconds"} for row in read_metrics(folder / "metrics.jsonl")
    ]


def in_a_fork(work: Callable[[], object]) -> int:
    """The exit code of `body` in a fork, since the names of event files contain the second and the process.

    One thread only: OpenMP threads started by an earlier test do not exist in a fork, which would wait for them.
    """
    torch.set_num_threads(1)
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(sys.exc_info()[0] is not None)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


CONFIG = LoopConfig(epochs=3, precision="fp32")


@given(
    stops=st.lists(st.integers(1, 3 * STEPS), min_size=1, max_size=3),
    accumulate=st.sampled_from([1, 2, 3]),
    ema_decay=st.sampled_from([None, 0.6]),
)
@settings(deadline=None, max_examples=14, suppress_health_check=list(HealthCheck))
def test_resumed_equals_uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, stops: list[int], accumulate: int, ema_decay: float | None
) -> None:
    whole, parts = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("parts")
    config = CONFIG.model_copy(update={"ema_decay": ema_decay})
    expected = train(whole, config, accumulate=accumulate).state_dict()
    for stop_after in sorted(stops):
        try:
            train(parts, config, stop_after, accumulate)
        except Stopped as stopped:
            assert stopped.exit_code == 75  # noqa: PT017 - two stops at the same moment end the run instead
    found = train(parts, config, accumulate=accumulate).state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert log_without_times(whole) == log_without_times(parts)
    best = [load_checkpoint(folder / "best.pt")["model"] for folder in (whole, parts)]
    assert all(torch.equal(best[0][name], best[1][name]) for name in best[0])


def test_a_crash_without_warning_resumes_from_the_last_checkpoint(tmp_path: Path) -> None:
    whole, crashed = tmp_path / "whole", tmp_path / "crashed"
    expected = train(whole, CONFIG).state_dict()
    with pytest.raises(UserError):
        train(crashed, CONFIG, poison=STEPS + 2)  # the log already holds lines after last.pt
    found = train(crashed, CONFIG).state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert log_without_times(whole) == log_without_times(crashed)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_weights_that_are_not_finite_never_become_a_checkpoint(tmp_path: Path, value: float) -> None:
    """The last step of an epoch can make weights non-finite while its loss is still finite."""
    with pytest.raises(UserError, match=r"weights are no longer finite after epoch 2, step 5 \(rows \[.*is kept"):
        train(tmp_path, CONFIG, break_weights=(2 * STEPS, value))
    for name, epoch in (("last.pt", 1), ("best.pt", None)):
        content = load_checkpoint(tmp_path / name)
        assert all(torch.isfinite(tensor).all() for tensor in content["model"].values())
        assert epoch is None or content["position"]["epoch"] == epoch
    whole = tmp_path / "whole"
    expected = train(whole, CONFIG).state_dict()
    found = train(tmp_path, CONFIG).state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert log_without_times(whole) == log_without_times(tmp_path)


@pytest.mark.parametrize("poison", [2, STEPS + 3, 2 * STEPS + 1])
def test_after_a_kill_without_clean_up_log_and_events_equal_undisturbed_ones(
    tmp_path: Path, poison: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything logged before a checkpoint is on the disk before the checkpoint is; later lines are dropped."""
    monkeypatch.setattr(engine.session, "LOG_EVERY_STEPS", 1)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(whole, CONFIG)
    assert in_a_fork(lambda: train(killed, CONFIG, kill_after=poison)) == -signal.SIGKILL
    with (killed / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "ep')
    assert in_a_fork(lambda: train(killed, CONFIG)) == 0
    assert log_without_times(whole) == log_without_times(killed)
    assert scalars(whole / "events") == scalars(killed / "events")


def test_an_epoch_that_was_logged_and_not_saved_is_logged_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill between the two, training resumes at the epoch's last step and ends the epoch again."""
    monkeypatch.setattr(engine.session, "LOG_EVERY_STEPS", 1)
    whole, killed, config = tmp_path / "whole", tmp_path / "killed", CONFIG.model_copy(
        update={"checkpoint_minutes": 1e-9}
    )  # fmt: skip
    train(whole, config)

    save = RollingCheckpoint.save

    def killed_at_best(checkpoint: RollingCheckpoint, content: dict[str, Any]) -> None:
        if checkpoint.path.name == "best.pt" and content["scores"]["epoch"] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        save(checkpoint, content)

    with monkeypatch.context() as patched:
        patched.setattr(RollingCheckpoint, "save", killed_at_best)
        assert in_a_fork(lambda: train(killed, config)) == -signal.SIGKILL
    assert len(read_metrics(killed / "metrics.jsonl", "epoch")) == 2
    assert in_a_fork(lambda: train(killed, config)) == 0
    assert log_without_times(whole) == log_without_times(killed)
    assert scalars(whole / "events") == scalars(killed / "events")


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_training_resumes_from_the_checkpoint_before_a_damaged_one(tmp_path: Path, damage: str) -> None:
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    expected = train(whole, CONFIG).state_dict()
    with pytest.raises(UserError):
        train(damaged, CONFIG, poison=2 * STEPS + 2)
    path = damaged / "last.pt"
    content = bytearray(path.read_bytes())
    weights = load_checkpoint(path)["model"]["0.weight"].numpy().tobytes()
    content[content.index(weights) + 5] ^= 4
    path.write_bytes({"cut": content[:-300], "flip": content, "empty": b""}[damage])
    with pytest.warns(UserWarning, match=r"last\.pt: damaged.*; resuming from last\.pt\.previous"):
        found = train(damaged, CONFIG).state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert log_without_times(whole) == log_without_times(damaged)


def test_temporary_files_of_killed_starts_are_removed(tmp_path: Path) -> None:
    """Heads and steps train in subfolders of the stage's folder."""
    dead = subprocess.Popen([sys.executable, "-c", "import engine.files; print(engine.files.process_mark())"],
                            stdout=subprocess.PIPE, text=True, cwd=PROJECT)  # fmt: skip
    (tmp_path / f".best.pt.{dead.communicate()[0].strip()}-0.tmp").touch()
    train(tmp_path, CONFIG)
    assert not list(tmp_path.glob(".*"))


class Recorder(nn.Module):
    """A layer that records in which type it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 1)
        self.types: list[torch.dtype] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x)
        self.types.append(y.dtype)
        return y


@pytest.mark.parametrize("precisions", [("bf16", "fp32"), ("fp32", "bf16")])
def test_a_net_that_is_trained_again_computes_in_the_precision_of_each_training(
    tmp_path: Path, precisions: tuple[str, str]
) -> None:
    net = Recorder()
    found = []
    with cpu_with_bf16(True):
        for precision in precisions:
            accelerator, _ = make_accelerator("cpu", precision)
            groups = [{"params": net.parameters()}]
            session = TrainingSession(
                tmp_path, accelerator, net, groups, LoopConfig(epochs=1), {}, Processes(), bar=False
            )
            for _ in session.epochs():
                for _ in session.batches(range(1), 1):
                    with session.autocast():
                        session.update(session.model(INPUTS).mean())
                session.finish_epoch({}, None)
            found.append(net.types.pop())
    assert found == [{"bf16": torch.bfloat16, "fp32": torch.float32}[name] for name in precisions]
    assert net(INPUTS).dtype == torch.float32


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    train(tmp_path, CONFIG)
    before = (tmp_path / "metrics.jsonl").read_text()
    train(tmp_path, CONFIG)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_accumulated_batches_step_like_one_large_batch(tmp_path: Path) -> None:
    config = LoopConfig(epochs=1, precision="fp32", optim={"name": "sgd", "lr": 0.1})
    seed_everything(0)
    rows = torch.arange(8)
    weights = []
    for accumulate, batch in ((1, 8), (4, 2)):
        torch.manual_seed(0)
        model = nn.Linear(6, 1)
        accelerator, _ = make_accelerator("cpu", "fp32")
        session = TrainingSession(
            tmp_path / str(batch), accelerator, model, [{"params": model.parameters()}], config, {}, Processes(),
            accumulate, bar=False,
        )  # fmt: skip
        (tmp_path / str(batch)).mkdir()
        for _ in session.epochs():
            for part in session.batches(rows.split(batch), 8 // batch):
                session.update((session.model(INPUTS[part]) - TARGETS[part]).square().mean())
            session.finish_epoch({}, None)
        weights.append(session.raw_model.weight.detach())
    assert torch.allclose(weights[0], weights[1], atol=1e-6)


def test_the_best_checkpoint_holds_the_moving_average_of_weights_and_running_statistics(tmp_path: Path) -> None:
    """Against the formula written out, with a group of two batches for each step."""
    accelerator, _ = make_accelerator("cpu", "fp32")
    model = nn.Sequential(nn.Linear(6, 2), nn.BatchNorm1d(2))
    config = LoopConfig(epochs=2, precision="fp32", ema_decay=0.3)
    session = TrainingSession(
        tmp_path, accelerator, model, [{"params": model.parameters()}], config, {}, Processes(), 2, bar=False
    )
    expected: dict[str, torch.Tensor] = {}
    for _ in session.epochs():
        for rows in session.batches(torch.arange(16).split(2), 8):
            session.update(session.model(INPUTS[rows]).square().mean())
            if session.position.step % 2:
                continue
            n = session.position.global_step // 2 - 1
            kept = min(0.3, (1 + n) / (10 + n)) if n else 0.0
            weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
            expected = {name: kept * expected.get(name, value) + (1 - kept) * value for name, value in weights.items()}
        session.finish_epoch({}, None)
        assert any(not torch.equal(value, weights[name]) for name, value in expected.items())
        found = load_checkpoint(tmp_path / "best.pt")["model"]
        assert found.keys() == expected.keys()
        for name in ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
            assert torch.allclose(found[name], expected[name], atol=1e-6), name
        assert torch.equal(found["1.num_batches_tracked"], weights["1.num_batches_tracked"])
        assert torch.equal(load_checkpoint(tmp_path / "last.pt")["model"]["0.weight"], weights["0.weight"])


def test_a_loss_that_is_not_finite_names_the_batch_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"loss is nan in epoch 2, step 2 \(rows \[.*lower the learning rate"):
        train(tmp_path, CONFIG, poison=STEPS + 1)
    assert load_checkpoint(tmp_path / "last.pt")["position"]["epoch"] == 1


class Reads(TorchFunctionMode):
    """Counts how often numbers of a tensor are read, which on a GPU waits for everything before it."""

    count = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function in (torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__float__)
        return function(*args, **(kwargs or {}))


def reads(folder: Path, config: LoopConfig, late: bool) -> int:
    with Reads() as mode:
        train(folder, config, reads_late=late)
    return mode.count


def test_steps_do_not_wait_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code for GPUs, here on a CPU: the same log and weights, without a read at every step."""
    config = CONFIG.model_copy(update={"optim": OptimConfig(name="sgd", lr=1e-3)})
    monkeypatch.setattr(engine.session, "LOG_EVERY_STEPS", 3)
    fewer = reads(tmp_path / "exact", config, late=False) - reads(tmp_path / "late", config, late=True)
    assert fewer == 3 * STEPS - len({3, 6, 9, 12, 15} | {5, 10, 15})  # read where logged, and at the end of an epoch
    assert log_without_times(tmp_path / "exact") == log_without_times(tmp_path / "late")
    left, right = (load_checkpoint(tmp_path / name / "last.pt") for name in ("exact", "late"))
    assert left["position"] == right["position"]
    assert all(torch.equal(left["model"][name], right["model"][name]) for name in left["model"])


def test_read_late_a_stopped_run_resumes_the_same(tmp_path: Path) -> None:
    train(tmp_path / "exact", CONFIG)
    for stop_after in (2, STEPS + 1):
        with pytest.raises(Stopped):
            train(tmp_path / "late", CONFIG, stop_after=stop_after, reads_late=True)
    train(tmp_path / "late", CONFIG, reads_late=True)
    assert log_without_times(tmp_path / "exact") == log_without_times(tmp_path / "late")


@pytest.mark.parametrize("minutes", [20.0, 1e-9])
def test_a_non_finite_loss_read_late_names_its_batch(tmp_path: Path, minutes: float) -> None:
    """It is noticed some steps later, but before anything is saved."""
    config = CONFIG.model_copy(update={"checkpoint_minutes": minutes})
    expected = tmp_path / "exact", tmp_path / "late"
    for folder in expected:
        with pytest.raises(UserError, match=r"loss is nan in epoch 2, step 2 \(rows \[.*lower the learning rate"):
            train(folder, config, poison=STEPS + 1, reads_late=folder.name == "late")
    left, right = (load_checkpoint(folder / "last.pt") for folder in expected)
    assert left["position"] == right["position"]
    assert all(torch.equal(left["model"][name], right["model"][name]) for name in left["model"])


def test_a_kill_between_best_and_last_does_not_change_the_best_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If `best.pt` is of an epoch that `last.pt` does not contain, the previous one is used."""
    with pytest.raises(UserError):
        train(tmp_path, CONFIG, poison=STEPS + 2)
    known = load_checkpoint(tmp_path / "best.pt")
    assert known["scores"]["epoch"] == 0

    class Killed(BaseException):
        pass

    def killed(self: RollingCheckpoint, content: dict[str, Any]) -> None:
        if self.path.name == "last.pt" and content["position"]["epoch"] == 2:
            raise Killed
        save(self, content)

    save = RollingCheckpoint.save
    monkeypatch.setattr(RollingCheckpoint, "save", killed)
    with pytest.raises(Killed):
        train(tmp_path, CONFIG)
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "best.pt")["scores"]["epoch"] == 1
    with pytest.raises(UserError):
        train(tmp_path, CONFIG, poison=STEPS + 1)  # resumed, and no further
    again = load_checkpoint(tmp_path / "best.pt")
    assert again["scores"] == known["scores"]
    assert all(torch.equal(again["model"][name], known["model"][name]) for name in known["model"])
    train(tmp_path, CONFIG)
    assert sorted(path.name for path in tmp_path.glob("best.pt*")) == ["best.pt"]


def test_early_stopping_keeps_the_best_epoch(tmp_path: Path) -> None:
    config = LoopConfig(epochs=30, precision="fp32", early_stop_epochs=2, optim={"name": "sgd", "lr": 1e-12})
    train(tmp_path, config)
    rows = read_metrics(tmp_path / "metrics.jsonl", "epoch")
    assert len(rows) < 30
    last = load_checkpoint(tmp_path / "last.pt")["position"]
    assert last["epochs_without_better"] == 2
    assert load_checkpoint(tmp_path / "best.pt")["scores"]["epoch"] == last["best_epoch"]


def test_the_last_epoch_can_be_kept_whatever_its_score(tmp_path: Path) -> None:
    config = LoopConfig(epochs=4, precision="fp32", keep_epoch="last", optim={"name": "sgd", "lr": 1e-12})
    train(tmp_path, config)  # no epoch is better than the first one
    best, last = (load_checkpoint(tmp_path / name) for name in ("best.pt", "last.pt"))
    assert best["scores"]["epoch"] == last["position"]["best_epoch"] == 3
    assert all(torch.equal(best["model"][name], last["model"][name]) for name in last["model"])


def test_keeping_the_last_epoch_is_refused_with_early_stopping() -> None:
    with pytest.raises(ValueError, match="early_stop_epochs has no place with keep_epoch=last"):
        LoopConfig(keep_epoch="last", early_stop_epochs=2)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"name": "constant"}, [1.0, 1.0, 1.0, 1.0]),
        ({"name": "step", "step_epochs": 2, "gamma": 0.1}, [1.0, 1.0, 0.1, 0.1]),
        ({"name": "cosine"}, [1.0, 0.853553, 0.5, 0.146447]),
        ({"name": "plateau", "patience_epochs": 0, "gamma": 0.5}, [1.0, 1.0, 0.5, 0.25]),
    ],
)
def test_schedules(schedule: dict[str, Any], expected: list[float]) -> None:
    from configs.schema import OptimConfig, ScheduleConfig
    from engine.optim import Schedule, build_optimizer

    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr_factor": factor} for factor in (1.0, 0.1)]
    optimizer = build_optimizer(groups, OptimConfig(name="sgd", lr=1.0))
    plan = Schedule(optimizer, ScheduleConfig(**schedule), epochs=4)
    seen = []
    for epoch in range(4):
        seen.append(optimizer.param_groups[0]["lr"])
        assert optimizer.param_groups[1]["lr"] == pytest.approx(seen[-1] * 0.1)
        plan.end_epoch(epoch, score=0.0)
    assert seen == pytest.approx(expected, abs=1e-6)


def test_a_log_cut_short_by_a_crash_is_readable(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"kind": "epoch", "global_step": 1, "epoch": 0}) + '\n{"kind": "ep')
    assert len(read_metrics(path)) == 1
