"""One of two processes that join like srun's tasks, for `test_processes`: `pair.py CASE FOLDER`."""

from __future__ import annotations

import atexit
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import click
import torch
from accelerate import Accelerator, PartialState
from torch import nn

import engine.session
from configs.errors import UserError
from configs.schema import LoopConfig
from engine.device import make_accelerator, seed_everything
from engine.launch import is_main_process
from engine.processes import Processes, join
from engine.session import TrainingSession
from engine.stopping import StopRequest, watch_signals
from pipeline import Group
from tests.onednn import cpu_with_bf16


@click.group(cls=Group)
def cli() -> None:
    """With the code that turns errors into one line and an exit code."""


def session_in(folder: Path, processes: Processes, **options: Any) -> TrainingSession:
    seed_everything(1)
    model = nn.Linear(3, 1)
    accelerator, _ = make_accelerator("cpu", "fp32")
    groups = [{"params": model.parameters()}]
    config = LoopConfig(epochs=1, checkpoint_minutes=options.pop("checkpoint_minutes", 20.0))
    return TrainingSession(folder, accelerator, model, groups, config, {}, processes, bar=False, **options)


def take_minutes(look: Callable[[], None]) -> None:
    """Work that polls between its steps whether to stop."""
    for _ in range(4000):
        look()
        time.sleep(0.05)


@cli.command()
@click.argument("folder", type=Path)
def nan(folder: Path, late: bool = False) -> None:
    """The third batch of the second process has a loss that is not a number."""
    stop = StopRequest()
    processes = join("cpu", stop)
    session = session_in(folder, processes, reads_late=late)
    for _ in session.epochs():
        for batch in session.batches(range(5), 5):
            loss = session.model(torch.ones(2, 3)).mean()
            bad = batch == 2 and not processes.first
            name = f"batch {batch} of {processes.rank}"
            session.update(loss * float("nan") if bad else loss, lambda name=name: name)  # type: ignore[misc]


@cli.command()
@click.argument("folder", type=Path)
@click.pass_context
def nan_late(context: click.Context, folder: Path) -> None:
    """The same, with losses read in groups as on GPUs."""
    context.invoke(nan, folder=folder, late=True)


@cli.command()
@click.argument("folder", type=Path)
def steps(folder: Path) -> None:
    """Three trainings, whose losses are read at every step, in groups, and in groups with a checkpoint at every step;
    prints how often the processes exchanged something during each step.
    """
    engine.session.LOG_EVERY_STEPS = 3
    stop = StopRequest()
    processes = join("cpu", stop)
    exchanges = []
    sums, gather = processes.sums, processes.gather
    processes.sums = lambda *values: exchanges.append("sums") or sums(*values)  # type: ignore[func-returns-value, method-assign]
    processes.gather = lambda value: exchanges.append("gather") or gather(value)  # type: ignore[func-returns-value, method-assign]
    for name, options in (
        ("exact", {}),
        ("late", {"reads_late": True}),
        ("saved", {"reads_late": True, "checkpoint_minutes": 1e-9}),
    ):
        (folder / name).mkdir(exist_ok=True)
        session = session_in(folder / name, processes, **options)
        counts = []
        for _ in session.epochs():
            for batch in session.batches(range(5), 5):
                session.update(session.model(torch.full((2, 3), batch + 0.1 * processes.rank)).square().mean() / 2)
                counts.append(len(exchanges))
                exchanges.clear()
            session.finish_epoch({}, None)
            exchanges.clear()
        if processes.first:
            print(name, counts)


@cli.command()
@click.argument("folder", type=Path)
def twice(folder: Path) -> None:
    """One net trained in bf16 and then in fp32; prints the types that it computes in."""
    stop = StopRequest()
    processes = join("cpu", stop)
    net, types = nn.Sequential(nn.Linear(3, 1)), []
    net[0].register_forward_hook(lambda module, given, output: types.append(output.dtype))
    for precision in ("bf16", "fp32"):
        with cpu_with_bf16(True):
            accelerator, _ = make_accelerator("cpu", precision)
        (folder / precision).mkdir(exist_ok=True)
        session = TrainingSession(
            folder / precision, accelerator, net, [{"params": net.parameters()}], LoopConfig(epochs=1), {},
            processes, bar=False,
        )  # fmt: skip
        assert session.model.module is net
        for _ in session.epochs():
            for _ in session.batches(range(2), 2):
                with session.autocast():
                    session.update(session.model(torch.ones(2, 3)).mean())
            session.finish_epoch({}, None)
    if processes.first:
        print(*types)


@cli.command()
@click.argument("folder", type=Path)
def apart(folder: Path) -> None:
    """Validation that takes minutes, of which the first process has no part."""
    with watch_signals() as stop:
        processes = join("cpu", stop)
        session = session_in(folder, processes)

        def work() -> None:
            if not processes.first:
                take_minutes(session.stop_if_asked)

        (folder / f"ready{processes.rank}").touch()
        session.validate(work)


@cli.command()
@click.argument("folder", type=Path)
def cache(folder: Path) -> None:
    """Work before training that takes both processes minutes; only the first gets the signal."""
    with watch_signals() as stop:
        processes = join("cpu", stop)

        (folder / f"ready{processes.rank}").touch()
        processes.together(lambda: take_minutes(stop.raise_if_set))


@cli.command()
@click.argument("folder", type=Path)
def mistake(folder: Path) -> None:
    """Work before training: the first process still needs minutes when the second finds an unreadable video."""
    with watch_signals() as stop:
        processes = join("cpu", stop)

        def work() -> None:
            if not processes.first:
                raise UserError("video07.mp4: damaged, frame 3")
            take_minutes(stop.raise_if_set)
            (folder / "all done").touch()

        processes.together(work)


@cli.command()
@click.argument("folder", type=Path)
def late(folder: Path) -> None:
    """The second process finds an error before the two have joined."""
    if not is_main_process():
        raise UserError("weights.pth: not on this machine; copy it there")
    join("cpu")


@cli.command()
@click.argument("folder", type=Path)
def outside(folder: Path) -> None:
    """The second process finds an error while the first waits for it in an exchange."""
    processes = join("cpu")
    if not processes.first:
        raise UserError("weights.pth: not on this machine; copy it there")
    processes.gather(1)


@cli.command()
@click.argument("folder", type=Path)
def sound(folder: Path) -> None:
    """Nothing is wrong."""
    assert join("cpu").gather(1) == [1, 1]


def on_gpus(same: bool) -> list[dict[str, Any]]:
    """Join as ranks that see a GPU each, with number 0; returns how torch is asked to train one of them."""
    asked: list[dict[str, Any]] = []

    def wrapped(net: nn.Module, **options: Any) -> nn.Module:
        asked.append(options)
        return net

    gpu = SimpleNamespace(uuid="a" if same or is_main_process() else "b", name="a GPU")
    with ExitStack() as stack:
        for what, answer in {
            "engine.device.choose_device": lambda name: torch.device("cuda"),
            "torch.cuda.current_device": lambda: 0,
            "torch.cuda.get_device_properties": lambda number: gpu,
            "accelerate.PartialState": lambda cpu: PartialState(cpu=True),
            "torch.nn.parallel.DistributedDataParallel": wrapped,
        }.items():
            stack.enter_context(patch(what, answer))
        join("auto")
        stack.enter_context(patch.object(Accelerator, "multi_device", True))
        Accelerator(cpu=True).prepare_model(nn.Linear(1, 1))
    return asked


@cli.command("own-gpu")
@click.argument("folder", type=Path)
def own_gpu(folder: Path) -> None:
    """Each process sees one GPU, its own."""
    assert [options["device_ids"] for options in on_gpus(same=False)] == [None]


@cli.command("same-gpu")
@click.argument("folder", type=Path)
def same_gpu(folder: Path) -> None:
    """Both processes see the same GPU."""
    on_gpus(same=True)


if __name__ == "__main__":
    # threads of an exchange that are alive at the interpreter's exit can abort it
    atexit.register(lambda: torch.distributed.is_initialized() and print("STILL JOINED"))
    cli(sys.argv[1:])
