"""kill -9 at random moments, start again, compare: `python -m tests.torture --kills 50 --seed 0` (`make torture`).

A place is a command and the folders it writes to. It first runs undisturbed, and the moments of its first and its last
write are noted. Then, for each attempt, it is started in an empty folder, killed with SIGKILL at a moment drawn evenly
between the two (counted from its first write; trainings write for moments only, so three in four of their kills then
wait for the next temporary file), perhaps stopped once or twice more (SIGKILL again, or SIGTERM, which must end it
within 10 s, or `--stops-within`, with exit code 75), and started a last time and left alone. The final state
must equal that of the undisturbed run: data sets, attributes, tensors, metrics and every other file except wall times,
and no additional file.

Half of the kills hit the process, half its group; if a place uses several processes, the orphans must exit by
themselves. Most starts are forks of this process, which has imported torch already; one in eight is a fresh
interpreter. The exit code is 1 unless everything recovered, and for long runs also if fewer than 3 in 5 kills left a
partial file, since kills that leave no partial file do not test recovery.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cli import Command, group_members, import_everything, start_forked, start_fresh

POLL_S = 0.002
LONGEST_S = 240.0  # for a command that runs undisturbed
STOPS_WITHIN_S = 10.0
ORPHANS_END_WITHIN_S = 60.0  # one that imports torch on a busy machine ends when it has done so
ENOUGH_KILLS = 20  # from this many on, the fraction that left a partial file counts
SHARE_PARTIAL = 0.6
SAY_EVERY = 10  # attempts, for a run that is broken off
FRESH, AGAIN, ONCE_MORE, GENTLE, WHOLE_GROUP = 1 / 8, 0.3, 0.3, 0.4, 0.5
AIMED, AIM_S = 0.75, 0.01  # of a training's kills, and how long after a temporary file was seen at most

SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "data": {"fps": 1.0, "split": {"rule": "3/1/1"}},
    "preprocess": {"resize_px": 72, "crop_px": 64},
    "cnn": {
        "backbone": "mobilenet_v3_small",
        "weights": "random",
        "precision": "fp32",
        "epochs": 2,
        "batch_frames": 8,
        "frames_per_epoch": 24,
        "workers": 0,
        "optim": {"name": "adamw", "lr": 0.002},
        "backbone_lr_factor": 1.0,
        "checkpoint_minutes": 0.001,  # in the middle of epochs too
    },
    "extract": {"encoder": "initial", "precision": "fp32", "workers": 1, "batch_frames": 4, "segment_frames": 8},
    "temporal": {
        "head": {"name": "lstm", "hidden": 320},
        "sequence": {"mode": "chunked", "frames": 16, "batch": 2},
        "epochs": 6,
        "optim": {"lr": 0.01},
        "checkpoint_minutes": 0.003,
    },
    "joint": {
        "net": {"tool_hidden": 8, "mapping": True},
        "sequence": {"mode": "clips", "frames": 4, "stride": 4, "batch": 2, "inference": "clip"},
        "clips_per_epoch": 4,
        "multitask": {"epochs": 1, "optim": {"name": "adamw", "lr": 0.002}, "precision": "fp32"},
        "mapping": {"epochs": 1, "optim": {"name": "adamw", "lr": 0.002}, "precision": "fp32"},
        "correlation": {"epochs": 1, "optim": {"name": "adamw", "lr": 0.002}, "precision": "fp32"},
        "workers": 0,
    },
}


@dataclass(frozen=True)
class Variant:
    """A command line of a place; `watched` are the folders whose writes open and close the time for kills."""

    name: str
    arguments: tuple[str, ...]
    watched: tuple[str, ...]
    result: str  # the file or pattern that exists at the end
    processes: int = 1
    aimed: bool = False  # most of its kills wait for the next temporary file
    parts: bool = False  # a video is split among its processes


@dataclass
class Undisturbed:
    """The output of an undisturbed run of a variant, and for how long it writes."""

    folder: Path
    writing_s: float


@dataclass
class Tally:
    """The outcome of the attempts on one place."""

    place: str
    attempts: int = 0
    kills: int = 0  # every SIGKILL that hit
    missed: int = 0  # drawn moments that came after the command's end
    terms: int = 0
    fresh: int = 0
    temporary: int = 0  # first kills that left a temporary file
    unfinished: int = 0  # those that left files and not all of the result
    failures: list[str] = field(default_factory=list)

    def line(self) -> str:
        """The outcome in one line."""
        good = self.attempts - len(self.failures)
        return (
            f"{self.place}: {good} of {self.attempts} recovered; {self.kills} kills -9, {self.terms} SIGTERM, "
            f"{self.missed} moments came too late and were drawn again, {self.fresh} fresh interpreters; first kills "
            f"left a temporary file {self.temporary} times, an unfinished result {self.unfinished} times"
        )


def variants(place: str, data: Path, shared: Path) -> list[Variant]:
    """The command lines of a place, taken in turn. `shared` holds the cache and the features of trainings."""

    def line(*arguments: str, cache: Path | str = shared / "cache") -> tuple[str, ...]:
        options = {"data.root": data, "cache.dir": cache, "data.index": "index.json", "extract.store": "features"}
        sets = [text for key, value in options.items() for text in ("--set", f"{key}={value}")]
        return (*arguments[:1], "--config", "torture.json", "--name", "t", *sets, *arguments[1:])

    def more(*settings: str) -> tuple[str, ...]:
        return tuple(text for setting in settings for text in ("--set", setting))

    temporal = Variant(
        "train-temporal",
        line("train-temporal", "--features", str(shared / "features")),
        ("runs",),
        "runs/t/temporal/result.json",
        aimed=True,
    )
    cnn = Variant("train-cnn", line("train-cnn"), ("runs",), "runs/t/cnn/result.json", aimed=True)
    joint = Variant("train-joint", line("train-joint"), ("runs",), "runs/t/joint/correlation/result.json", aimed=True)
    loaders = Variant(
        "train-cnn, a loader process", line("train-cnn", *more("cnn.workers=1")), ("runs",), cnn.result, 2, aimed=True
    )
    extract = Variant("extract", line("extract"), ("features",), "runs/t/extract/result.json")
    several = Variant(
        "extract, 2 processes and a video in parts",
        line("extract", *more("extract.workers=2")),
        ("features",),
        extract.result,
        2,
        parts=True,
    )
    short = more("cnn.epochs=1", "cnn.frames_per_epoch=8")
    cache = Variant("cache", line("train-cnn", *short, cache="cache"), ("cache",), cnn.result)
    larger = Variant(
        "cache, 2 processes", line("train-cnn", *short, *more("data.fps=5"), cache="cache"), ("cache",), cnn.result, 2
    )
    return {
        "extract": [extract, several, extract, extract, extract],
        "train": [temporal, cnn, temporal, cnn, joint, temporal, cnn, temporal, loaders, joint],
        "cache": [cache, larger, cache, cache, cache],
    }[place]


PLACES = ("extract", "train", "cache")


class Workshop:
    """A folder with simulated data, shared inputs of trainings, and one work folder per attempt."""

    def __init__(self, base: Path, videos: int, stops_within_s: float) -> None:
        self.base, self.data, self.shared = base, base / "data", base / "shared"
        self.stops_within_s = stops_within_s
        self._number = 0
        self._undisturbed: dict[Variant, Undisturbed] = {}
        options = ("--seed", "1", "--fps", "5", "--width", "96", "--height", "96", "--speed-up", "40")
        self._must("simulate", str(self.data), "--videos", str(videos), *options)
        settled = ("--config", "torture.json", "--set", f"data.root={self.data}", "--set", "data.index=index.json")
        cache = ("--set", f"cache.dir={self.shared / 'cache'}", "--set", "cnn.epochs=1", "--set", "cnn.workers=0")
        self._must("train-cnn", *settled, *cache)
        folder = self._must("extract", *settled, *cache, "--set", "extract.store=features")
        (made,) = (folder / "features").iterdir()
        shutil.copytree(made, self.shared / "features")

    def new_folder(self) -> Path:
        """An empty work folder with the settings in it."""
        self._number += 1
        folder = self.base / f"work-{self._number:04d}"
        folder.mkdir(parents=True)
        (folder / "torture.json").write_text(json.dumps(SETTINGS))
        return folder

    def log_of(self, folder: Path) -> Path:
        return folder.with_suffix(".log")

    def _must(self, *arguments: str) -> Path:
        folder = self.new_folder()
        command = start_forked(arguments, folder, self.log_of(folder))
        if command.wait(LONGEST_S) != 0:
            raise SystemExit(f"{arguments[0]} failed: {self.log_of(folder).read_text()[-2000:]}")
        return folder

    def undisturbed(self, variant: Variant) -> Undisturbed:
        """The undisturbed run of a variant, made once; its folder also gets the index that it writes."""
        if variant not in self._undisturbed:
            folder = self.new_folder()
            before = snapshot(folder, variant.watched)
            command = start_forked(variant.arguments, folder, self.log_of(folder))
            first = last = 0.0
            parts = False
            while command.poll() is None:
                now = snapshot(folder, variant.watched)
                if now != before:
                    last, before = time.monotonic(), now
                    first = first or last
                    parts = parts or _has_parts(now)
                time.sleep(POLL_S)
            if command.code != 0:
                raise SystemExit(f"{variant.name} failed undisturbed: {self.log_of(folder).read_text()[-2000:]}")
            if variant.parts and not parts:
                raise SystemExit(f"{variant.name}: no video was split")
            self._undisturbed[variant] = Undisturbed(folder, last - first)
        return self._undisturbed[variant]


def snapshot(folder: Path, watched: Sequence[str]) -> dict[str, tuple[int, int, int]]:
    """Every file below the watched folders with its inode, size and time, which change when it is written."""
    found: dict[str, tuple[int, int, int]] = {}
    waiting = [str(folder / name) for name in watched]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    else:
                        state = entry.stat()
                        found[entry.path] = (state.st_ino, state.st_size, state.st_mtime_ns)
        except OSError:  # removed in the meantime
            continue
    return found


def _has_parts(files: Iterable[str]) -> bool:
    """Whether several temporary files of one video are there, which is how its parts wait."""
    names = Counter(Path(path).name.rsplit(".", 2)[0] for path in files if path.endswith(".tmp"))
    return any(count > 1 for count in names.values())


class Failure(Exception):
    """What went wrong in an attempt, in one line."""


class Attempt:
    """One command, stopped at drawn moments and finished in the end."""

    def __init__(self, shop: Workshop, variant: Variant, rng: random.Random, tally: Tally) -> None:
        self.shop, self.variant, self.rng, self.tally = shop, variant, rng, tally
        self.reference = shop.undisturbed(variant)
        self.folder = shop.new_folder()
        self.story: list[str] = []

    def go_through(self) -> None:
        """Raises Failure if the final state differs from that of the undisturbed run."""
        from tests.sameness import differences

        while not self._stop_once(signal.SIGKILL, first=True):
            self.tally.missed += 1
            shutil.rmtree(self.folder)
            self.folder = self.shop.new_folder()
        for share in (AGAIN, ONCE_MORE):
            if self.rng.random() < share:
                self._stop_once(signal.SIGTERM if self.rng.random() < GENTLE else signal.SIGKILL, first=False)
        self._finish()
        found = differences(self.reference.folder, self.folder)
        if found:
            raise Failure("; ".join(found[:5]))

    def _start(self) -> Command:
        fresh = self.rng.random() < FRESH
        self.tally.fresh += fresh
        start: Callable[..., Command] = start_fresh if fresh else start_forked
        return start(self.variant.arguments, self.folder, self.shop.log_of(self.folder))

    def _stop_once(self, number: int, first: bool) -> bool:
        """Start, wait for the first write and then until the drawn moment, send the signal; whether it hit."""
        after_s = self.rng.random() * self.reference.writing_s
        group = self.rng.random() < WHOLE_GROUP
        before = snapshot(self.folder, self.variant.watched)
        command = self._start()
        limit = time.monotonic() + LONGEST_S
        while snapshot(self.folder, self.variant.watched) == before and command.poll() is None:
            if time.monotonic() > limit:
                command.end()
                raise Failure("nothing was written")
            time.sleep(POLL_S)
        command.wait(after_s)
        if self.variant.aimed and number == signal.SIGKILL and self.rng.random() < AIMED:
            self._await_temporary(command)
        self.story.append(f"{signal.Signals(number).name} to the {'group' if group else 'process'} at {after_s:.3f} s")
        if command.poll() is not None:
            self._require_end(command, (0,))
            return False
        command.send(number, group)
        self._await_end(command, number)
        if number == signal.SIGTERM:
            self.tally.terms += 1
            return True
        self.tally.kills += 1
        if first:
            self._look_at_what_is_left()
        if self.variant.processes > 1 and self.rng.random() < 0.5:  # otherwise they still run during the next start
            self._await_orphans(command)
        return True

    def _await_temporary(self, command: Command) -> None:
        """Return while a temporary file is there, a moment after it was seen; or once the command has ended.

        SIGSTOP holds the process where it is, so that the file is not gone by the time the signal comes.
        """
        delay_s = self.rng.random() * AIM_S
        while command.poll() is None:
            if self._temporary_is_there():
                time.sleep(delay_s)
                command.send(signal.SIGSTOP, group=False)
                if self._temporary_is_there():
                    return
                command.send(signal.SIGCONT, group=False)
            time.sleep(POLL_S / 4)

    def _temporary_is_there(self) -> bool:
        return any(path.endswith(".tmp") for path in snapshot(self.folder, self.variant.watched))

    def _await_end(self, command: Command, number: int) -> None:
        if command.wait(self.shop.stops_within_s) is None:
            command.end()
            raise Failure(f"still runs {self.shop.stops_within_s:g} s after {signal.Signals(number).name}")
        if number == signal.SIGTERM:
            self._require_end(command, (0, 75))

    def _require_end(self, command: Command, codes: tuple[int, ...]) -> None:
        if command.code not in codes:
            raise Failure(f"exit code {command.code}: {self._last_words()}")

    def _last_words(self) -> str:
        return self.shop.log_of(self.folder).read_text(errors="replace").strip()[-600:]

    def _await_orphans(self, command: Command) -> None:
        limit = time.monotonic() + ORPHANS_END_WITHIN_S
        while group_members(command.pid):
            if time.monotonic() > limit:
                command.end()
                raise Failure(f"processes without their parent still run after {ORPHANS_END_WITHIN_S:g} s")
            time.sleep(0.02)

    def _look_at_what_is_left(self) -> None:
        left = snapshot(self.folder, self.variant.watched)
        self.tally.temporary += any(path.endswith(".tmp") for path in left)
        self.tally.unfinished += bool(left) and not (self.folder / self.variant.result).exists()

    def _finish(self) -> None:
        command = self._start()
        if command.wait(LONGEST_S) is None:
            command.end()
            raise Failure(f"still runs after {LONGEST_S:g} s")
        self._require_end(command, (0,))
        self._await_orphans(command)


def torture(place: str, shop: Workshop, kills: int, seed: int, keep: bool) -> Tally:
    """`kills` attempts on one place, each with its own seed, which is printed if it fails."""
    tally = Tally(place)
    choices = variants(place, shop.data, shop.shared)
    for number in range(kills):
        name = f"{seed}/{place}/{number}"
        attempt = Attempt(shop, choices[number % len(choices)], random.Random(name), tally)
        tally.attempts += 1
        try:
            attempt.go_through()
        except Failure as failure:
            story = ", ".join(attempt.story)
            tally.failures.append(name)
            print(f"  NOT RECOVERED, seed {name}, {attempt.variant.name} ({story}): {failure}", flush=True)
            if keep:
                continue
        shutil.rmtree(attempt.folder, ignore_errors=True)
        shop.log_of(attempt.folder).unlink(missing_ok=True)
        if tally.attempts % SAY_EVERY == 0 and tally.attempts < kills:
            print(f"  so far {tally.line()}", flush=True)
    return tally


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="attempts a place")
    parser.add_argument("--seed", type=int, default=None, help="default: a new one, printed")
    parser.add_argument("--place", choices=PLACES, action="append", help="repeatable; default: all three")
    parser.add_argument("--videos", type=int, default=5, help="simulated videos to work on")
    parser.add_argument(
        "--stops-within",
        type=float,
        default=STOPS_WITHIN_S,
        metavar="S",
        help="how long SIGTERM may take (%(default)g s)",
    )
    parser.add_argument("--keep", type=Path, help="work here, and keep the folders of attempts that failed")
    chosen = parser.parse_args(arguments)
    seed = chosen.seed if chosen.seed is not None else random.SystemRandom().randrange(10**6)
    import_everything()
    print(f"seed {seed}, {chosen.kills} kills a place; an attempt's seed is {seed}/PLACE/NUMBER", flush=True)
    base = chosen.keep or Path(tempfile.mkdtemp(prefix="torture-"))
    try:
        shop = Workshop(base, chosen.videos, chosen.stops_within)
        tallies = [_one_place(place, shop, chosen, seed) for place in chosen.place or PLACES]
    finally:
        if not chosen.keep:
            shutil.rmtree(base, ignore_errors=True)
    attempts, failed = sum(tally.attempts for tally in tallies), sum(len(tally.failures) for tally in tallies)
    print(f"{attempts - failed} of {attempts} recovered")
    return int(failed > 0 or any(_proves_little(tally) for tally in tallies))


def _one_place(place: str, shop: Workshop, chosen: argparse.Namespace, seed: int) -> Tally:
    started = time.monotonic()
    tally = torture(place, shop, chosen.kills, seed, keep=chosen.keep is not None)
    print(f"{tally.line()}; {time.monotonic() - started:.0f} s", flush=True)
    if _proves_little(tally):
        print(f"  too few of {place}'s kills left a partial file: this run proves little", flush=True)
    return tally


def _proves_little(tally: Tally) -> bool:
    return tally.attempts >= ENOUGH_KILLS and tally.temporary < SHARE_PARTIAL * tally.attempts


if __name__ == "__main__":
    sys.exit(main())
