"""Open what `view` is asked to open, and serve the page until a signal arrives."""

from __future__ import annotations

import secrets
import socket
import threading
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from configs.errors import UserError, one_line
from configs.load import load_dataset
from configs.schema import MAIN_TRACK, TEMPORAL_FOLDER
from engine.files import read_json
from engine.progress import say
from engine.stopping import StoppedAtOnce, StopRequest
from evaluation.reports.gather import RunResults, find_run, gather, recordings
from features.annotation_files.intervals import DEFAULT_TRACK, clean_text
from features.dataset.index import Dataset
from features.ids import id_key
from live.view.access import Guard
from live.view.app import Durations, Material, build_app
from live.view.labels import LabelFolder
from live.view.rows import OfVideos, RunSource, Source, read_shown
from live.view.videos import Opened, Pictures, Video, named_videos, require_distinct
from stage2_temporal.decoding.fitted import DECODING_FILE, FittedDecoding

HOST = "127.0.0.1"
_ANY_DATASET = "cholec80"  # says how images in folders of frames are named; its classes are not used


def open_material(
    paths: Sequence[Path],
    runs: Sequence[Path],
    *,
    split: str,
    shown: Sequence[Path],
    labels: Path | None,
    annotator: str | None,
    dataset: str | None,
    live: Path | None,
) -> Material:
    """Read what the command line names. Without videos, those of the runs are opened.

    Raises UserError if there is nothing to open, a path does not exist, a run has not been evaluated, or a file of
    `shown` cannot be read.
    """
    spec = load_dataset(dataset) if dataset else None
    folders = [find_run(run) for run in runs]
    results = [gather([folder], split).runs[0] for folder in folders]
    videos = named_videos(paths) if paths else _videos_of_runs(folders, results)
    if not videos and live is None:
        raise UserError("nothing to open; name videos, a folder of videos, or with --run a run whose videos are there")
    spec = spec or (results[0].truth.spec if results else None)
    pictures, base = Pictures(), spec or load_dataset(_ANY_DATASET)
    opened = [Video(one, base, pictures) for one in videos]
    sources: list[Source] = [
        RunSource(folder.resolve().name, found) for folder, found in zip(folders, results, strict=True)
    ]
    specs = [one for one in (spec, *(found.truth.spec for found in results)) if one is not None]
    for path in shown:
        sources += read_shown(path, specs, OfVideos("csv", spec=spec, videos=tuple(opened)))
    if annotator is not None:
        annotator = clean_text(annotator, "--annotator") or None
    return Material(
        opened,
        sources,
        LabelFolder(labels) if labels is not None else None,
        annotator,
        spec,
        [one for folder in folders for one in _durations(folder)],
        live,
    )


def _videos_of_runs(folders: Sequence[Path], results: Sequence[RunResults]) -> list[Opened]:
    """Return the evaluated videos that are where the runs' settings say; a note says which are not."""
    found: dict[str, Opened] = {}
    for folder, result in zip(folders, results, strict=True):
        try:
            config, dataset = recordings(folder)
        except UserError as error:
            say(f"note: {folder}: its videos are not opened: {error}")
            continue
        for name in result.truth.videos:
            path = _path_of(dataset, name)
            if path is None:
                say(f"note: {name}: its video is not there, so it is not opened")
            else:
                found.setdefault(id_key(name), Opened(name, path, (config, dataset, dataset.index.entry(name))))
    return require_distinct(list(found.values()))


def _path_of(dataset: Dataset, video: str) -> Path | None:
    try:
        path = dataset.root / dataset.index.entry(video).source
    except UserError:
        return None
    return path if path.exists() else None


def _durations(folder: Path) -> list[Durations]:
    """Return the mean durations that a run's training videos had; none if the run has no fitted decoding."""
    path = folder / TEMPORAL_FOLDER / DECODING_FILE
    if not path.is_file():
        return []
    try:
        tracks = FittedDecoding.from_json(read_json(path)).tracks
        for track in tracks.values():
            track.check(track.classes)
    except (UserError, TypeError, ValueError) as error:
        say(f"note: {path}: no durations are shown ({one_line(error)})")
        return []
    means = {name: dict(zip(one.classes, one.graph.mean_s, strict=True)) for name, one in tracks.items()}
    name_of = {MAIN_TRACK: DEFAULT_TRACK}  # as the files of labels name it
    return [Durations(folder.resolve().name, name_of.get(name, name), mean_s) for name, mean_s in means.items()]


class PageServer:
    """Serves the page in a thread of its own while the context is open; signals stay with the main thread.

    `address` contains the secret of this start. Raises UserError if the port cannot be used.
    """

    def __init__(self, material: Material, port: int = 0) -> None:
        import uvicorn

        secret = secrets.token_urlsafe(24)
        self._material, self._listening = material, _bound(port)
        app, self._answers = build_app(material)
        number = self._listening.getsockname()[1]
        guarded = Guard(app, secret, f"surgstage-view-{number}")
        quiet: Any = {"log_config": None, "access_log": False, "server_header": False}
        more: Any = {"lifespan": "off", "ws": "none", "timeout_graceful_shutdown": 2}
        self._server = uvicorn.Server(uvicorn.Config(guarded, **quiet, **more))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listening]}, daemon=True)
        self.address = f"http://{HOST}:{number}/?key={secret}"

    def wait(self, seconds: float) -> bool:
        """Wait; return whether the server still runs."""
        self._thread.join(seconds)
        return self._thread.is_alive()

    def __enter__(self) -> PageServer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._answers.stopping = self._server.should_exit = True
        self._thread.join(5)
        self._listening.close()
        for video in self._material.videos:
            video.close()


def serve(material: Material, stop: StopRequest, *, port: int = 0, browser: bool = True) -> None:
    """Serve the page on 127.0.0.1 until `stop` is set; prints the address, and opens the browser.

    Raises UserError if the port cannot be used, and StoppedAtOnce when a signal arrives.
    """
    with PageServer(material, port) as server:
        click.echo(server.address)
        say(f"{len(material.videos)} video(s); Ctrl-C ends the viewer")
        if browser and not webbrowser.open(server.address):
            say("note: no browser was found; open the address above")
        while stop.poll() is None and server.wait(0.2):
            pass
    if stop.number is not None:
        raise StoppedAtOnce(stop.number)


def _bound(port: int) -> socket.socket:
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((HOST, port))
        listening.listen(128)
    except OSError as error:
        listening.close()
        raise UserError(f"--port {port}: cannot be used ({error.strerror}); choose another, or leave it out") from error
    return listening
