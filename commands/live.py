"""Recognition while a video runs."""

from __future__ import annotations

import sys
from typing import Any

import click

from commands import options
from commands.nets import NetChoice, net_options
from commands.options import FILE, POSITIVE


@click.command()
@net_options
@click.argument("video", metavar="SOURCE")
@click.option(
    "--speed",
    type=click.Choice(["real", "max"]),
    default="real",
    help="real: as a camera gives frames, of which the newest wins if the nets are too slow. max: every frame of a "
    "file or of standard input, as fast as possible.",
)
@click.option("--raw", metavar="WIDTHxHEIGHT@FPS", help="Layout of raw RGB frames on standard input (SOURCE is -).")
@click.option("--jsonl", type=FILE, metavar="FILE", help="Also append the lines of JSON to this file.")
@click.option("--csv", type=FILE, metavar="FILE", help="Also append phases and tools to this prediction file.")
@click.option("--record", type=FILE, metavar="FILE", help="Write the sampled frames with what was known as an MP4.")
@click.option(
    "--dump-input", type=FILE, metavar="FILE", help="Write the encoder's input, (N, 3, S, S) float32, as a .npy file."
)
@click.option(
    "--state", type=FILE, metavar="FILE", help="Save the state here every 10 s and at the end, and continue from it."
)
@click.option("--report", type=FILE, metavar="FILE", help="Write counts and latencies to this JSON file.")
@click.option(
    "--give-up",
    "give_up_s",
    type=POSITIVE,
    default=60.0,
    metavar="SECONDS",
    help="How long a device or an address may give no frame before the stream ends.",
)
def stream(net: NetChoice, video: str, speed: str, raw: str | None, give_up_s: float, **files: Any) -> None:
    """Recognise phases and tools while a video runs: one line of JSON per frame.

    SOURCE is a video file or a folder of frames, a camera (/dev/video0), an address (rtsp://, udp://, tcp://), or - for
    raw frames on standard input. Each sampled frame gives a line with frame, time_s, phase, phase_name, since_s,
    probabilities, tools and delay_s. A lost camera or address is connected again; if it stays away, the exit code is 1.
    Counts and latencies are printed at the end. SIGTERM and Ctrl-C end the stream; with --state the same command then
    continues. For research only, not a medical device.
    """
    from live.sources.open import open_source_named
    from live.stream import StreamFiles, run_stream

    with options.watch_signals() as stop:
        nets = net.load()
        opened = open_source_named(video, nets, real=speed == "real", raw=raw, give_up_s=give_up_s)
        done = run_stream(nets, opened, StreamFiles(**files), stop)
    if done.lost is not None:
        click.echo(done.lost, err=True)
        sys.exit(options.EXIT_PARTLY)
