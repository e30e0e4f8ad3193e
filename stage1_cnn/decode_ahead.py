"""Frames of videos that other processes decode, ahead of this one, which computes: it keeps a GPU busy.

The decoding processes are those of `stage1_cnn.decoding`. Cropping, normalisation and the net run on the device.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Container, Generator, Iterator, Sequence
from contextlib import closing

import torch

from configs.schema import Config, Size, height_width
from engine.device import choose_device
from engine.launch import ranks_here
from engine.memory import free_shared_memory
from engine.pool import WORTH_A_PROCESS_FRAMES, failure_reason, processes_for, work_through
from engine.progress import progress_bar, say
from engine.stopping import StopRequest
from stage1_cnn.decoding import QUEUE_BATCHES, Message, OpenVideo, decoding_processes, messages_of
from stage1_cnn.encoders.encoder import encoded_at_once
from stage1_cnn.shared_decode import ExtractTask, SharedJob, Writing

HARDWARE_PROCESSES = 4
# The arguments and the result are those of `decoding_processes`.
Decode = Callable[[Sequence[OpenVideo], int, int, bool], Generator[tuple[int, Message], None, None]]


def decodes_ahead(config: Config, device: torch.device) -> bool:
    """Whether other processes decode for this one, as `extract.decode_ahead` says; `auto` means on a GPU only."""
    chosen = config.extract.decode_ahead
    return device.type != "cpu" if chosen == "auto" else chosen == "on"


def decoders_for(config: Config, frames: int) -> int:
    """The number of processes that decode `frames` frames, from `extract.workers`.

    With hardware decoding the default is `HARDWARE_PROCESSES` at most, since each process has a context of its own in
    the device's memory (about 300 to 500 MB on CUDA).
    """
    wanted = processes_for(config.extract.workers, frames)
    by_default_on_hardware = config.extract.hardware_decoding is not None and config.extract.workers < 0
    return min(wanted, HARDWARE_PROCESSES) if by_default_on_hardware else wanted


def fitting_decoders(wanted: int, config: Config, sizes_px: Sequence[Size] = ()) -> int:
    """`wanted`, or fewer if /dev/shm has no room for the frames of so many processes; at least one.

    `sizes_px` are the sizes to which each frame is resized, by default `preprocess.resize_px` only. Prints a note if
    the number is smaller than `wanted`.
    """
    free_bytes = free_shared_memory()
    pixels = sum(math.prod(height_width(size)) for size in sizes_px or [config.preprocess.resize_px])
    batch_bytes = encoded_at_once(config) * 3 * pixels
    each = (QUEUE_BATCHES + 1) * batch_bytes  # one more batch is being decoded
    fitting = wanted if free_bytes is None else max(1, min(wanted, free_bytes // ranks_here() // each))
    if fitting < wanted:
        say(
            f"note: /dev/shm has room for {fitting} of {wanted} decoding processes, {each / 1e6:.0f} MB each; in a "
            "container enlarge it (docker run --shm-size), or set a smaller extract.batch_frames",
            every_rank=True,
        )
    return fitting


def work_ahead(
    task: ExtractTask,
    jobs: Sequence[SharedJob],
    decoders: int,
    title: str,
    stop: StopRequest,
    *,
    decode: Decode = decoding_processes,
) -> Generator[tuple[SharedJob, str | None], None, None]:
    """Do the jobs in this process, with frames that up to `decoders` other processes decode (`frames_of_videos`).

    Yields each job that has ended, with the reason if it failed, as `work_through` does. If a decoding process dies,
    the unfinished videos begin again. Raises Stopped when asked to stop, and NoRoomError when the disk is full.
    """
    with_frames = [job for job in jobs if not job.video.labels_only]
    videos, total = [task.source(job) for job in with_frames], sum(job.frames for job in with_frames)
    ended: set[int] = set()
    encoded = dict.fromkeys(range(len(videos)), 0)  # frames of each video
    writing = [Writing(task, job) for job in with_frames]
    sizes, _ = task.sizes(range(len(task.encoders)))
    messages = frames_of_videos(
        videos, task.config, total, ended, decoders=decoders, decode=decode, sizes_px=[size.resize_px for size in sizes]
    )
    with progress_bar(total, title, "frame") as bar, closing(messages):
        try:
            begun: float | None = None  # the processes start before the first message, which is no decoding
            for number, message in messages:
                stop.raise_if_set()
                if begun is not None:
                    task.seconds.decoded(with_frames[number], time.perf_counter() - begun)
                if number not in ended:  # encoding it may have failed, while its frames still arrive
                    writing[number].take(message)
                    encoded[number] = 0 if isinstance(message, dict) else encoded[number] + _frames_in(message)
                    bar.update(sum(encoded.values()) - bar.n)
                    if writing[number].ended:
                        writing[number].close()
                        ended.add(number)
                        yield with_frames[number], writing[number].reason
                del message  # otherwise a batch would stay in shared memory
                begun = time.perf_counter()
        finally:
            for one in writing:
                one.close()
    yield from work_through(task, [job for job in jobs if job.video.labels_only], 1, title, stop)


def _frames_in(message: Message) -> int:
    return len(message) if isinstance(message, torch.Tensor) else 0


def _fewer(decoders: int, error: _DecoderDied) -> int:
    """After a decoding process has died, the number of them to continue with: half, since memory may have run out.

    Prints a note that says so.
    """
    fewer = decoders // 2
    rest = f"with {fewer} instead of {decoders} decoding processes" if fewer else "without decoding processes, slowly"
    say(f"{error}; continuing {rest}", every_rank=True)
    return fewer


def frames_of_videos(
    videos: Sequence[OpenVideo],
    config: Config,
    frames: int,
    unwanted: Container[int] = (),
    *,
    decoders: int | None = None,
    decode: Decode = decoding_processes,
    sizes_px: Sequence[Size] = (),
) -> Generator[tuple[int, Message], None, None]:
    """The messages about all videos, each with its video's number; the videos have `frames` samples in total.

    Up to `decoders` other processes decode. By default their number follows from the settings: there are some if
    `decodes_ahead` says so and there are many frames (with `extract.decode_ahead=on`, for any number of frames).
    Messages of several videos then alternate. Otherwise this process decodes one video after the other. A video's
    messages come in order. If a decoding process dies, half as many continue, and in the end this process alone. If a
    video's first message, the dict, comes a second time, a process has died and the video starts again. Videos that the
    caller has added to `unwanted` may be skipped. `sizes_px` are those of `fitting_decoders`. Close the generator to
    end the processes.
    """
    device, at_once = choose_device(config.device), encoded_at_once(config)
    left = list(range(len(videos)))
    if decoders is None:
        worth_it = frames > WORTH_A_PROCESS_FRAMES or config.extract.decode_ahead == "on"
        ahead = worth_it and decodes_ahead(config, device)
        decoders = min(decoders_for(config, frames), len(videos)) if ahead else 0
    if decoders:
        decoders = fitting_decoders(decoders, config, sizes_px)
    while decoders and (given := [number for number in left if number not in unwanted]):
        left = list(given)
        opened = [videos[number] for number in given]
        messages = decode(opened, at_once, decoders, device.type == "cuda")
        try:
            for _ in opened:
                message: Message = {}
                while not _ends(message):
                    at, message = _next(messages)
                    yield given[at], message
                left.remove(given[at])
        except _DecoderDied as error:
            decoders = _fewer(decoders, error)
        finally:
            messages.close()
    for number in left:
        for message in messages_of(videos[number], at_once):
            if number in unwanted:
                break
            yield number, message


def _ends(message: Message) -> bool:
    return message is None or isinstance(message, str)


class _DecoderDied(Exception):
    """A decoding process has died (out of memory, or killed)."""


def _next(messages: Iterator[tuple[int, Message]]) -> tuple[int, Message]:
    try:
        return next(messages)
    except StopIteration as error:
        raise _DecoderDied("a decoding process ended early") from error
    except (RuntimeError, EOFError, ConnectionError) as error:  # the last two if it died while sending
        raise _DecoderDied(f"a decoding process died ({failure_reason(error)})") from error
