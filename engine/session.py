"""The parts that all training loops share: optimiser steps with accumulation, checkpoints, exact resume, early stopping
and stopping on signals.

Each stage contains its own loop, which has this form:

    for epoch in session.epochs():
        for batch in session.batches(loader(epoch, start=session.position.step), steps):
            with session.autocast():
                loss = ...
            session.update(loss)
        session.finish_epoch(scores, score=scores["map"])
"""

from __future__ import annotations

import itertools
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import LoopConfig
from engine.averaging import MovingAverage
from engine.checkpoints import RollingCheckpoint, load_checkpoint, random_states, restore_random_states
from engine.files import remove_stale_temporaries, sha256_json
from engine.launch import launcher_died
from engine.logs import MetricLog
from engine.optim import Schedule, build_optimizer
from engine.processes import Failed, Processes
from engine.progress import progress_bar, say
from engine.runs import BEST_FILE
from engine.stopping import Stopped

Batch = TypeVar("Batch")
LOG_EVERY_STEPS = 20


@dataclass
class Position:
    """The progress of a training, saved in `last.pt`. `step` is the number of finished batches in the current epoch."""

    epoch: int = 0
    step: int = 0
    global_step: int = 0
    loss_sum: float = 0.0
    best_score: float | None = None
    best_epoch: int = -1
    epochs_without_better: int = 0
    finished: bool = False


class TrainingSession:
    """The training of one model in one folder, which gets `last.pt`, `best.pt`, `metrics.jsonl` and TensorBoard events.

    `describe` contains, as plain values, what is needed to build the model again; it is written into both checkpoints.
    `last.pt` contains everything that a step depends on except its batch, and batches depend on (seed, epoch, step)
    alone. A run that is stopped anywhere and resumed therefore computes the same as an uninterrupted one (on a CPU, bit
    for bit).

    With several ranks (`processes`), each rank passes to `update` its part of the batch's mean loss: the sum over the
    rank's own entries, divided by the number of entries on all ranks (`Processes.total`). The optimiser steps are then
    the same as those of a single process with the whole batch. `last.pt` also contains each rank's own random states
    and carried state.

    With `ema_decay`, `evaluated` holds the moving average of the weights, which is what a loop validates and what
    `best.pt` contains; otherwise it is the model itself.

    With `reads_late` (the default on GPUs), losses are read from the device, and exchanged between ranks, for a group
    of steps at once, so that a step need not wait for the device.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        model: nn.Module,
        groups: Iterable[dict[str, Any]],
        config: LoopConfig,
        describe: dict[str, Any],
        processes: Processes,
        accumulate_steps: int = 1,
        bar: bool = True,
        reads_late: bool | None = None,
    ) -> None:
        self.folder, self.accelerator, self.config, self.describe = folder, accelerator, config, describe
        optimizer = build_optimizer(groups, config.optim)
        self.raw_model = model  # without DDP; Accelerate's `unwrap_model` would import torch's compiler
        self._average = None if config.ema_decay is None else MovingAverage(model, config.ema_decay)
        own = set(vars(model))
        # explicit device_placement saves Accelerate the import of torch.distributed.tensor (0.5 s)
        self.model, self.optimizer = accelerator.prepare(model, optimizer, device_placement=[True, True])
        self._accelerates = set(vars(model)) - own  # attributes that Accelerate has added, such as `forward`
        if self._average is not None:
            self._average.module.to(accelerator.device)
        self.evaluated: Any = model if self._average is None else self._average.module
        self.schedule = Schedule(self.optimizer, config.schedule, config.epochs)
        self.log = MetricLog(folder, enabled=accelerator.is_main_process)
        self.position = Position()
        self._last, self._best = RollingCheckpoint(folder / "last.pt"), RollingCheckpoint(folder / BEST_FILE)
        self.processes, self._stop, self._accumulate = processes, processes.stop, accumulate_steps
        self._bar_wanted = bar and processes.first
        self._sharing = False
        if not self.processes.first:
            # each rank draws its own dropout masks
            torch.manual_seed((torch.initial_seed() * 1_000_003 + self.processes.rank) % 2**63)
        self._identity = sha256_json(describe)
        self._steps_in_epoch = 0
        self._name_batch: Callable[[], str] = lambda: ""
        self._reads_late = accelerator.device.type != "cpu" if reads_late is None else reads_late
        # per step whose loss is still to be read: its number, this rank's loss, the function that names its batch
        self._unread: list[tuple[int, Tensor, Callable[[], str]]] = []
        self._save_agreed = False
        self._saved_at = self._epoch_started_at = time.monotonic()

    # ------------------------------------------------------------------------------------------ resume

    def resume(self) -> bool:
        """Resume from `last.pt` or `last.pt.previous`; returns False if neither exists.

        Raises UserError if both are damaged or the checkpoint belongs to another configuration.
        """
        content = self.processes.from_first(self._latest)
        if content is None:
            self.log.rewind(0, 0)  # an earlier start may have been killed before its first checkpoint
            return False
        if content["identity"] != self._identity:
            raise UserError(f"{self._last.path}: belongs to another configuration; delete the folder")
        own = self._own_part(content)
        self.raw_model.load_state_dict(content["model"] | own["extra"])
        if self._average is not None:
            self._average.load_state_dict(content["average"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.schedule.load_state_dict(content["schedule"])
        if self.accelerator.scaler is not None and content["scaler"]:
            self.accelerator.scaler.load_state_dict(content["scaler"])
        self.position = Position(**content["position"])
        if own["random"] is not None:
            restore_random_states(own["random"], self.accelerator.device)
        self.log.rewind(self.position.global_step, self.position.epoch)
        self.processes.from_first(self._keep_best_of_position)
        return True

    def _latest(self) -> dict[str, Any] | None:
        remove_stale_temporaries(self.folder)
        return self._last.load()

    def _own_part(self, content: dict[str, Any]) -> dict[str, Any]:
        """Return the part of `last.pt` that belongs to this rank: random states and the model's extra (carried) state.

        If `last.pt` was written with another number of ranks, training continues with the same steps, but with other
        dropout masks. Raises UserError if it contains state carried from chunk to chunk, which cannot be divided among
        another number of ranks.
        """
        parts: list[dict[str, Any]] = [{"random": content["random"], "extra": {}}, *content.get("others", [])]
        count = self.processes.count
        if len(parts) == count:
            return parts[self.processes.rank]
        if any(state for part in (content["model"], *(other["extra"] for other in parts)) for state in _carried(part)):
            raise UserError(
                f"{self._last.path}: the run was stopped inside a video on {len(parts)} process(es), and its carried "
                f"state cannot be divided among {count}; resume with {len(parts)}"
            )
        say(f"note: resuming with {count} process(es) instead of {len(parts)}: same steps, but other dropout masks")
        return parts[self.processes.rank] if self.processes.rank < len(parts) else {"random": None, "extra": {}}

    def _keep_best_of_position(self) -> None:
        """Make `best.pt` match the position that was read from `last.pt`.

        If the process was killed between writing `best.pt` and `last.pt`, restore the earlier `best.pt`.
        """
        best, previous = self._best.path, self._best.previous
        if not previous.exists():
            return
        if self.position.best_epoch == _epoch_of(previous) != _epoch_of(best):
            os.replace(previous, best)
        else:
            previous.unlink()

    # ------------------------------------------------------------------------------------------ the loop

    def epochs(self) -> Iterator[int]:
        """Yield the numbers of the remaining epochs (from 0), until early stopping or the last epoch."""
        try:
            while self.position.epoch < self.config.epochs and not self.position.finished:
                yield self.position.epoch
            self.position.finished = True
        finally:  # all checkpoints are on the disk; an error here must not hide the one that ended the loop
            self._give_back_model()
            with suppress(UserError, OSError):
                self.log.close()

    def batches(self, source: Iterable[Batch], steps_in_epoch: int) -> Iterator[Batch]:
        """Yield the epoch's remaining batches, with a progress bar. `source` must begin at batch `position.step`."""
        self.model.train()
        self._steps_in_epoch = steps_in_epoch
        self._epoch_started_at = time.monotonic()
        title = f"epoch {self.position.epoch + 1}/{self.config.epochs}"
        with progress_bar(
            steps_in_epoch, title, "step", initial=self.position.step, disable=not self._bar_wanted
        ) as bar:
            for batch in self._in_step(source):
                self.stop_if_asked()
                yield batch
                bar.update(1)
                bar.set_postfix(loss=f"{self.mean_loss:.4f}", refresh=False)

    @property
    def mean_loss(self) -> float:
        """The mean loss of this epoch's steps, as far as their losses have been read from the device."""
        return self.position.loss_sum / max(1, self.position.step - len(self._unread))

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context in which the forward pass is computed in the run's precision."""
        return self.accelerator.autocast()

    def gradient_sync(self) -> AbstractContextManager[Any]:
        """Return a context in which ranks exchange gradients only for the last batch of an accumulation group."""
        return nullcontext() if self._group_ends() else self.accelerator.no_sync(self.model)

    def update(self, loss: Tensor, name_batch: Callable[[], str] = lambda: "") -> None:
        """Run the backward pass and, at the end of an accumulation group, an optimiser step.

        `loss` is the batch's mean loss (with several ranks, this rank's part of it). Raises UserError naming the batch
        if the loss is not finite; `last.pt` then still contains the last good state. If losses are read in groups
        (`reads_late`), this error may come up to `LOG_EVERY_STEPS` steps later, but before anything is saved.
        """
        self._name_batch = name_batch
        save = self._save_agreed if self.processes.count > 1 else self._save_is_due()
        logs = (self.position.global_step + 1) % LOG_EVERY_STEPS == 0
        self._unread.append((self.position.step + 1, loss.detach(), name_batch))
        value = 0.0 if self._reads_late else self._read_losses()
        parts = self.processes.count  # DDP averages gradients over ranks, but the ranks' losses add up to the loss
        self.accelerator.backward((loss * parts if parts > 1 else loss) / self._group_size())
        ends = self._group_ends()
        if ends:
            if self.config.grad_clip_norm is not None:
                self.accelerator.unscale_gradients(self.optimizer)
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.schedule.step()
            if self._average is not None:
                self._average.update_parameters(self.raw_model)
        self.position.step += 1
        self.position.global_step += 1
        if self._reads_late and (logs or self.position.step == self._steps_in_epoch):
            value = self._read_losses()
        if logs:
            self.log.log("step", self.position.global_step, {"epoch": self.position.epoch, "loss": value, **self._lr()})
        if ends and save:
            self._save_last()

    def finish_epoch(self, scores: dict[str, float | None], score: float | None) -> bool:
        """Log the epoch, update `best.pt` and write `last.pt`; returns whether this epoch is the best so far.

        A higher score is better. Without validation videos, `score` is None and the last epoch counts as the best, as
        it does with `keep_epoch=last`.
        """
        self._read_losses()
        self._require_finite_weights()
        position = self.position
        values: dict[str, Any] = {"epoch": position.epoch, "loss": self.mean_loss, **self._lr(), **scores}
        values["seconds"] = round(time.monotonic() - self._epoch_started_at, 3)
        self.schedule.end_epoch(position.epoch, score)
        last = self.config.keep_epoch == "last"
        better = last or score is None or position.best_score is None or score > position.best_score
        if better:
            position.best_score, position.best_epoch, position.epochs_without_better = score, position.epoch, 0
        else:
            position.epochs_without_better += 1
        patience = self.config.early_stop_epochs
        position.finished = patience is not None and position.epochs_without_better >= patience
        self.log.log("epoch", position.global_step, values)
        position.epoch, position.step, position.loss_sum = position.epoch + 1, 0, 0.0
        if better and self.accelerator.is_main_process:
            self._best.save(self._content(self.evaluated, values))
        self._save_last()
        if self.processes.first:
            self._best.previous.unlink(missing_ok=True)
        self._stop_together()
        return better

    def validate(self, work: Callable[[], Any]) -> list[Any]:
        """Run `work` on every rank, for its share of the validation data; returns all results in rank order.

        If the training is stopped meanwhile, the state after the epoch's last step is saved: it resumes with the
        validation.
        """
        self.processes.send_buffers(self.evaluated)
        self._sharing = self.processes.count > 1
        try:
            return self.processes.together(work)
        except Stopped:
            if self._sharing:
                self._save_last()
            raise
        finally:
            self._sharing = False

    def stop_if_asked(self) -> None:
        """Save the state and raise Stopped if a signal has arrived.

        Within an accumulation group this does nothing, since `last.pt` cannot contain half a group. With several ranks
        nothing is saved here: they stop together, between steps or at the end of validation.
        """
        if self.processes.count > 1:
            if self._sharing:
                self._stop.raise_if_set()
            return
        if self._stop.poll() is not None and self.position.step % self._accumulate == 0:
            self._save_last()
            self._stop.raise_if_set()

    def _stop_together(self, problem: str | None = None) -> None:
        """Stop all ranks if one of them has received a signal, or has a `problem` (its error message)."""
        if self.processes.count == 1:
            self.stop_if_asked()
            return
        if launcher_died() and self._stop.number is None:
            self._stop.number = signal.SIGTERM
        asked, due = float(self._stop.number or 0), self.processes.first and self._save_is_due()
        numbers, problems, save = self.processes.sums(asked, float(problem is not None), float(due))
        self._save_agreed = save > 0
        if problems:
            raise Failed(next(text for text in self.processes.gather(problem) if text is not None))
        if numbers and self.position.step % self._accumulate == 0:
            self._save_last()
            raise Stopped(max(number or 0 for number in self.processes.gather(self._stop.number)))

    def _in_step(self, source: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches of `source`; each time, first wait until every rank has one, and stop if one must stop."""
        if self.processes.count == 1:
            yield from source
            return
        remaining, end = iter(source), object()
        while True:
            problem, batch = None, end
            try:
                batch = next(remaining, end)
            except UserError as error:
                problem = str(error)
            if batch is end and problem is None:
                return  # every rank has the same number of batches
            self._stop_together(problem)
            yield batch  # type: ignore[misc]

    # ------------------------------------------------------------------------------------------ inside

    def _give_back_model(self) -> None:
        """Remove what Accelerate has added to the model, so that it can be trained again in another precision."""
        while self._accelerates:
            delattr(self.raw_model, self._accelerates.pop())

    def _save_is_due(self) -> bool:
        return time.monotonic() - self._saved_at > 60 * self.config.checkpoint_minutes

    def _read_losses(self) -> float:
        """Read the losses that have not been read yet, summed over ranks, and add them to the epoch's sum.

        Returns the loss of the last step. Every rank must call this at the same steps.
        """
        unread, self._unread = self._unread, []
        if not unread:
            return 0.0
        own: list[float] = torch.stack([loss for _, loss, _ in unread]).tolist()
        values = self.processes.sums(*own)
        for (step, _, name_batch), mine, value in zip(unread, own, values, strict=True):
            if not math.isfinite(value):
                names = self.processes.gather("" if math.isfinite(mine) else name_batch())
                self._refuse(f"the loss is {value} in", step, next((name for name in names if name), ""))
            self.position.loss_sum += value
        return values[-1]

    def _require_finite_weights(self) -> None:
        """Raise UserError before non-finite weights are written to a checkpoint."""
        tensors = itertools.chain(self.raw_model.parameters(), self.raw_model.buffers())
        bad = not all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
        if self.processes.sums(float(bad))[0]:  # running statistics may differ between ranks
            self._refuse("the weights are no longer finite after", self.position.step, self._name_batch())

    def _refuse(self, what: str, step: int, batch: str) -> NoReturn:
        where = f"epoch {self.position.epoch + 1}, step {step}{f' ({batch})' if batch else ''}"
        raise Failed(
            f"{self.folder}: {what} {where}; lower the learning rate or check that input; "
            "the last good checkpoint is kept"
        )

    def _group_size(self) -> int:
        """Return the number of batches in the current accumulation group; the epoch's last group may be smaller."""
        first = self.position.step - self.position.step % self._accumulate
        return min(self._accumulate, max(1, self._steps_in_epoch - first))

    def _group_ends(self) -> bool:
        done = self.position.step + 1
        return done % self._accumulate == 0 or done == self._steps_in_epoch

    def _lr(self) -> dict[str, float]:
        return {
            f"lr_{group.get('name') or index}": float(group["lr"])
            for index, group in enumerate(self.optimizer.param_groups)
        }

    def _content(self, model: nn.Module, values: dict[str, Any]) -> dict[str, Any]:
        return {"identity": self._identity, "model": model.state_dict(), "scores": values, **self.describe}

    def _save_last(self) -> None:
        self._read_losses()
        self._saved_at = time.monotonic()
        self._require_finite_weights()
        own = {"random": random_states(self.accelerator.device), "extra": _extra_state(self.raw_model)}
        others = self.processes.gather(own)[1:]
        if not self.accelerator.is_main_process:
            return
        self.log.sync()
        scaler = self.accelerator.scaler
        average = {} if self._average is None else {"average": self._average.state_dict()}
        content = self._content(self.raw_model, {}) | {
            **average,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else {},
            "position": asdict(self.position),
            "random": own["random"],
            "others": others,
        }
        self._last.save(content)


def _extra_state(model: nn.Module) -> dict[str, Any]:
    """Return the entries of the state dict that modules add by `get_extra_state`, which are not tensors."""
    return {name: value for name, value in model.state_dict().items() if not isinstance(value, Tensor)}


def _carried(state: dict[str, Any]) -> list[Any]:
    return [value["carried"] for value in state.values() if not isinstance(value, Tensor) and value.get("carried")]


def _epoch_of(best: Path) -> int | None:
    try:
        epoch: int = load_checkpoint(best)["scores"]["epoch"]
    except UserError:
        return None  # missing or damaged
    return epoch


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Return the random generator that shuffles an epoch.

    It depends on seed and epoch alone, so that a resumed training needs no generator state.
    """
    generator = torch.Generator()
    generator.manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return generator
